"""--loggers: Weights & Biases offline and MLflow in a local store, read back; and loggers that fail in every way."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fasttricks.config import ConfigError
from fasttricks.config.recipes import RECIPES
from fasttricks.config.resolve import resolve
from fasttricks.runs import loggers as module
from fasttricks.runs.loggers import IDS, Loggers, Mlflow, Setup
from lib.forked import python_m
from lib.tiny import arguments

CONFIG = {"seed": 3, "loss.smoothing": 0.1}
RECORDS = [{"step": step, "epoch": step / 2, "unix_time": 1e9 + step, "train_loss": 1 / step} for step in (1, 2, 3)]
SUMMARY = {"top1": 50.0, "bad_images": {"a": "b"}}


class Told:
    """A logger that keeps all it is told, and fails where it is told to."""

    all: dict[str, Told] = {}  # noqa: RUF012 (a test's own)
    fails: dict[str, BaseException] = {}  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.name, self.said = name, list[Any]()
        Told.all[name] = self

    def _tell(self, what: str, *words: Any) -> None:
        if error := Told.fails.get(f"{self.name} {what}"):
            raise error
        self.said.append((what, *words))

    def start(self, setup: Setup) -> str:
        self._tell("start", setup.project, setup.known, dict(setup.config))
        return setup.known or f"id of {self.name}"

    def log(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        self._tell("log", step, time_s, dict(values))

    def finish(self, summary: Mapping[str, Any] | None) -> None:
        self._tell("finish", summary)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> type[Told]:
    monkeypatch.setattr(module, "KINDS", {name: (lambda name=name: Told(name)) for name in module.KINDS})
    monkeypatch.setattr(module, "missing_extra", lambda *_: "")
    Told.all, Told.fails = {}, {}
    return Told


def run(folder: Path, *, resumed: bool = False, finished: bool = True) -> None:
    with Loggers(("wandb:mine", "mlflow"), folder, CONFIG, resumed=resumed) as loggers:
        loggers.start()
        for record in RECORDS:
            loggers.log(record)
        loggers.summary = SUMMARY if finished else None


def test_each_gets_config_records_and_summary_and_continues_its_run(
    tmp_path: Path, told: type[Told], capfd: Any
) -> None:
    run(tmp_path, finished=False)
    records = [
        ("log", r["step"], r["unix_time"], {"epoch": r["epoch"], "train_loss": r["train_loss"]}) for r in RECORDS
    ]
    for name, project in (("wandb", "mine"), ("mlflow", "fasttricks")):
        assert told.all[name].said == [("start", project, "", CONFIG), *records, ("finish", None)]
    assert json.loads((tmp_path / IDS).read_text()) == {"wandb": "id of wandb", "mlflow": "id of mlflow"}
    run(tmp_path, resumed=True)
    for name, project in (("wandb", "mine"), ("mlflow", "fasttricks")):
        said = told.all[name].said
        assert said[0] == ("start", project, f"id of {name}", CONFIG) and said[-1] == ("finish", SUMMARY)
    (tmp_path / IDS).write_text("{")
    run(tmp_path, resumed=True)
    assert told.all["wandb"].said[0][2] == ""
    assert capfd.readouterr().err.count("note: ") == 1, "the file is named"
    assert json.loads((tmp_path / IDS).read_text()) == {"wandb": "id of wandb", "mlflow": "id of mlflow"}


@pytest.mark.parametrize("what", ["start", "log", "finish"])
@pytest.mark.parametrize("error", [RuntimeError("no \x1b route\nto host"), SystemExit(1), KeyboardInterrupt()])
def test_one_that_fails_is_named_once_and_the_other_has_everything(
    what: str, error: BaseException, tmp_path: Path, told: type[Told], capfd: Any
) -> None:
    told.fails[f"wandb {what}"] = error
    run(tmp_path)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("note: logger wandb failed (") and line.isprintable()
    assert line.endswith("; the run continues without it, and metrics.jsonl has all records")
    assert len(told.all["mlflow"].said) == 5


def test_one_that_hangs_holds_up_nothing(tmp_path: Path, told: type[Told], capfd: Any, monkeypatch: Any) -> None:
    hang = threading.Event()
    monkeypatch.setattr(Told, "finish", lambda self, summary: self.name == "wandb" and hang.wait(60))
    monkeypatch.setattr(module, "_END_S", {True: 0.2})
    run(tmp_path)
    hang.set()
    assert capfd.readouterr().err.startswith("note: logger wandb has not ended within 0.2 s; the run continues")


def test_one_that_is_far_behind_is_left(tmp_path: Path, told: type[Told], capfd: Any, monkeypatch: Any) -> None:
    hang = threading.Event()
    monkeypatch.setattr(Told, "start", lambda self, setup: str(hang.wait(60)))
    monkeypatch.setattr(module, "_MOST_WAITING", 4)
    with Loggers(("wandb",), tmp_path, CONFIG, resumed=False) as loggers:
        loggers.start()
        for record in RECORDS * 3:
            loggers.log(record)
    hang.set()
    assert capfd.readouterr().err.count("note: logger wandb is 4 records behind") == 1


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (("wanb",), "loggers = 'wanb': unknown; did you mean 'wandb'?; the loggers are wandb and mlflow"),
        (("mlflow:",), "loggers = 'mlflow:': "),
        (("wandb:a", "wandb:b"), "loggers = 'wandb:a wandb:b': must name each logger once"),
    ],
)
def test_wrong_names_are_errors(wanted: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(RECIPES["demo"](), {"loggers": wanted})
    assert message in str(error.value)


def wandb_that(tmp_path: Path, body: str, monkeypatch: Any) -> None:
    (tmp_path / "wandb.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise ImportError('broken wheel')", "failed (broken wheel)"),
        ("def login(**_): return False", "failed (nobody is logged in; run `wandb login`, or set WANDB_MODE=offline)"),
        (
            "def login(**_): return True\ndef init(**_): raise OSError('no network')\nSettings = dict",
            "failed (no network)",
        ),
    ],
)
def test_a_wandb_that_does_not_start(body: str, words: str, tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    wandb_that(tmp_path, body, monkeypatch)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with Loggers(("wandb",), tmp_path, CONFIG, resumed=False) as loggers:
        loggers.start()
    assert capfd.readouterr().err.startswith(f"note: logger wandb {words}; the run continues")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)


def test_one_that_is_not_installed_is_asked_for_by_its_extra(tmp_path: Path, capfd: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("fasttricks.system.extras._present", lambda name: False)
    with Loggers(("mlflow",), tmp_path, CONFIG, resumed=False) as loggers:
        loggers.start()
    said = capfd.readouterr().err
    assert said.startswith("note: logger mlflow failed (--loggers mlflow needs mlflow, not installed here; ")
    assert "fasttricks[loggers]" in said or "make setup" in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_real_ones_hold_what_metrics_jsonl_says(tiny_data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """An epoch, then another by --resume, which continues both runs; a record that comes again is not doubled in MLflow."""
    env = {"MLFLOW_TRACKING_URI": (tmp_path / "store").as_uri(), "WANDB_MODE": "offline"}
    env |= {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false"}
    folder, options = tmp_path / "run", ("--loggers", "wandb:mine", "mlflow:experiment")
    for epochs in ("1", "2"):
        more = ("--epochs", epochs, *options, *(("--resume",) if epochs == "2" else ()))
        done = python_m("fasttricks.train", *arguments(tiny_data, folder, *more), **env)
        assert done.returncode == 0 and "note: logger" not in done.stderr, done.stderr
    ids = json.loads((folder / IDS).read_text())
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())

    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    assert (found.info.run_id, found.info.status, found.info.run_name) == (ids["mlflow"], "FINISHED", "run")
    assert found.data.params["data.root"] == str(tiny_data) and found.data.params["loss.smoothing"] == "0.1"
    again = Mlflow()
    again.start(Setup(folder, "experiment", {}, ids["mlflow"]))
    again.log(records[0]["step"], 0.0, {"train_loss": -1.0})
    names = {name for record in records for name in record} - {"step", "unix_time"}
    assert {"train_loss", "top1", "val_loss", "epoch", "lr"} <= names
    for name in names:
        kept = [(m.step, m.timestamp, m.value) for m in client.get_metric_history(ids["mlflow"], name)]
        at = [(r["step"], round(1000 * r["unix_time"]), r[name]) for r in records if name in r]
        assert sorted(kept) == sorted(at), name
    artifact = json.loads(Path(client.download_artifacts(ids["mlflow"], "summary.json", str(tmp_path))).read_text())
    assert artifact == summary

    files = sorted(folder.glob(f"wandb/offline-run-*-{ids['wandb']}/run-{ids['wandb']}.wandb"))
    assert len(files) == 2, "a file for each process, of one run"
    content = b"".join(file.read_bytes() for file in files)
    for record in records:
        for name in set(record) & {"train_loss", "val_loss"}:
            assert json.dumps(record[name]).encode() in content, (name, record)
    assert b"loss.smoothing" in content and json.dumps(summary["train_seconds"]).encode() in content
