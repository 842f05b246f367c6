"""Weights & Biases and MLflow: they get the records of metrics.jsonl, the config and the summary; docs/tracking.md. No torch.

Each works in a thread of its own, fed through a queue where the log is flushed, so no server is waited for in training. One that
fails says so once, and the run continues without it: metrics.jsonl has everything.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from fasttricks.config import ConfigError, show_name
from fasttricks.config.schema import LOGGERS
from fasttricks.runs.folder import write_json
from fasttricks.system.extras import missing_extra
from fasttricks.system.output import say
from fasttricks.system.reading import Reader, is_there
from fasttricks.system.schema import table, text

IDS = "loggers.json"
PROJECT = "fasttricks"
_MOST_WAITING = 100_000
"""Records that may wait for a logger: 50 MB."""
_END_S = {True: 60.0, False: 5.0}
"""Seconds that a logger may take to end, by whether the run has finished."""
_FILES = Reader(ConfigError, "must name the run of each logger", "each begins a new one")
_lock = threading.Lock()


@dataclass(frozen=True)
class Setup:
    """The facts of the run that a logger begins with."""

    folder: Path
    """The run's."""
    project: str
    config: Mapping[str, Any]
    """By dotted path."""
    known: str
    """The id that the logger gave to this run before; empty: none."""


class Logger(Protocol):
    """A service. Its methods are called from one thread, and may raise anything."""

    def start(self, setup: Setup) -> str:
        """Begin, or continue, its run. Returns the id."""

    def log(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """Take a record after `step` updates; time_s: seconds since 1970."""

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        """End its run. summary: the content of summary.json; None where the run was stopped, and may be resumed."""


class Wandb:
    """Weights & Biases. Its own variables apply: WANDB_MODE, WANDB_ENTITY, WANDB_API_KEY. Files: run folder/wandb/."""

    def start(self, setup: Setup) -> str:
        import wandb

        offline = os.environ.get("WANDB_MODE", "") in ("offline", "disabled", "dryrun")
        if not offline and not wandb.login(prompt=False):  # it would wait for someone to type a key
            raise ConfigError("nobody is logged in; run `wandb login`, or set WANDB_MODE=offline")
        self._run = wandb.init(
            project=setup.project,
            name=setup.folder.name,
            id=setup.known or None,
            resume="allow",
            dir=str(setup.folder),
            config=dict(setup.config),
            settings=wandb.Settings(console="off", silent=True),
        )
        return str(self._run.id)

    def log(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        self._run.summary.update(dict(summary or {}))
        self._run.finish(exit_code=0 if summary is not None else 1)


class Mlflow:
    """MLflow. The store is that of MLFLOW_TRACKING_URI, else its own default; where that needs a database that is not installed,
    as in mlflow-skinny, the folder mlruns/.
    """

    def start(self, setup: Setup) -> str:
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        default = None if find_spec("sqlalchemy") else Path("mlruns").absolute().as_uri()
        self._client = client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or default)
        self._last: dict[str, int] | None = {} if setup.known else None
        if setup.known:
            self._id = setup.known
            client.update_run(self._id, status="RUNNING")
            return self._id
        experiment = client.get_experiment_by_name(setup.project)
        number = experiment.experiment_id if experiment else client.create_experiment(setup.project)
        self._id = str(client.create_run(number, run_name=setup.folder.name).info.run_id)
        params = [Param(name, str(value)) for name, value in setup.config.items()]
        for first in range(0, len(params), 100):  # the most that it takes at once
            client.log_batch(self._id, params=params[first : first + 100])
        return self._id

    def log(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        at = round(1000 * time_s)
        new = [Metric(name, float(value), at, step) for name, value in values.items() if step > self._last_step(name)]
        self._client.log_batch(self._id, metrics=new)

    def _last_step(self, name: str) -> int:
        """The last step of that metric that an earlier process logged: a resumed run repeats those after its checkpoint."""
        if self._last is None:
            return -1
        if name not in self._last:
            steps = [metric.step for metric in self._client.get_metric_history(self._id, name)]
            self._last[name] = max(steps, default=-1)
        return self._last[name]

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None:
            self._client.log_dict(self._id, dict(summary), "summary.json")
        self._client.set_terminated(self._id, status="KILLED" if summary is None else "FINISHED")


KINDS: dict[str, Callable[[], Logger]] = {"wandb": Wandb, "mlflow": Mlflow}
assert tuple(KINDS) == LOGGERS


class _Worker:
    """A logger, in its thread."""

    def __init__(self, name: str, setup: Setup) -> None:
        self._name, self._setup, self._failed = name, setup, False
        self._jobs: queue.Queue[Callable[[Logger], object] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[Logger], object] | None) -> None:
        """Have the logger do `job`; None: nothing more. Never waits."""
        if self._failed:
            return
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            self._fail(f"is {_MOST_WAITING:,} records behind")

    def end(self, wait_s: float) -> None:
        """Wait until all is done, at most so long."""
        self.put(None)
        if not self._failed:
            self._thread.join(wait_s)
            if self._thread.is_alive():
                self._fail(f"has not ended within {wait_s:g} s")

    def _work(self) -> None:
        try:
            if missing := missing_extra("loggers", [self._name], f"--loggers {self._name}"):
                raise ConfigError(missing)
            logger = KINDS[self._name]()
            _remember(self._setup.folder, self._name, logger.start(self._setup))
            while not self._failed and (job := self._jobs.get()):
                job(logger)
        except BaseException as error:  # whatever a service raises, SystemExit too, is no reason to end a run
            first = next(iter(str(error).splitlines()), "") or type(error).__name__
            self._fail(f"failed ({first})")

    def _fail(self, words: str) -> None:
        self._failed = True
        say(
            show_name(
                f"note: logger {self._name} {words}; the run continues without it, and metrics.jsonl has all records"
            )
        )


class Loggers:
    """The loggers of a run, none before start(). As a context: its end finishes them, with the summary where there is one."""

    def __init__(self, wanted: Sequence[str], folder: Path, config: Mapping[str, Any], *, resumed: bool) -> None:
        """wanted: as TrainConfig.loggers. config: by dotted path. resumed: their runs in `folder` continue."""
        self._wanted, self._folder, self._config, self._resumed = wanted, folder, config, resumed
        self._workers: list[_Worker] = []
        self.summary: Mapping[str, Any] | None = None

    def start(self) -> None:
        """Start them. For the main rank, once the folder is there. Waits for none."""
        known = _known(self._folder) if self._resumed and self._wanted else {}
        for wanted in self._wanted:
            name, _, project = wanted.partition(":")
            setup = Setup(self._folder, project or PROJECT, self._config, known.get(name, ""))
            self._workers.append(_Worker(name, setup))

    def log(self, record: Mapping[str, Any]) -> None:
        """Give them a record of metrics.jsonl. Waits for none."""
        values = {name: value for name, value in record.items() if name not in ("step", "unix_time")}
        for worker in self._workers:
            worker.put(lambda logger: logger.log(record["step"], record["unix_time"], values))

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *_: object) -> None:
        summary = self.summary
        for worker in self._workers:
            worker.put(lambda logger: logger.finish(summary))
        for worker in self._workers:
            worker.end(_END_S[summary is not None])


def _known(folder: Path, *, quiet: bool = False) -> dict[str, str]:
    """The id of the run of each logger. A file that is damaged counts as none, with a note unless quiet."""
    try:
        found: dict[str, str] = _FILES.json(folder / IDS, table(text())) if is_there(folder / IDS) else {}
    except ConfigError as error:
        if not quiet:
            say(f"note: {error}")
        return {}
    return found


def _remember(folder: Path, name: str, run: str) -> None:
    with _lock:
        write_json(folder / IDS, {**_known(folder, quiet=True), name: run})
