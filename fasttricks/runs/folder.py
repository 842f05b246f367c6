"""A run's folder: config.json, metrics.jsonl, metrics.csv, TensorBoard events, curves.png, checkpoints/, summary.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import fasttricks
from fasttricks.config import ConfigError, TrainConfig, flatten, from_dict
from fasttricks.system.files import remove_leftovers, temporary_of, write_whole
from fasttricks.system.process import LONGEST_COMMAND, launch_token, this_start
from fasttricks.system.reading import Reader, is_there
from fasttricks.system.schema import anything, fields, listed, table, text

CONFIGS = Reader(ConfigError, "must be as fasttricks.train wrote it", "give another --run-dir")

_MAY_DIFFER = (
    *(
        "resume",
        "run_dir",
        "log_steps",
        "loggers",
        "profile",
        "checkpoint_epochs",
        "checkpoint_steps",
        "device",
        "recipe",
    ),
    *("tricks.on", "tricks.off"),
    *("allow_other_ranks", "allow_other_versions", "on_bad_loss", "max_loss", "timeout_s"),
    *(
        "data.root",
        "data.labels",
        "data.threads",
        "data.readers",
        "data.prefetch",
        "data.max_bad",
        "model.norm",
        "eval.batch_size",
        "eval.patience",
        "distill.teacher",
        "distill.cache",
        "distill.trust_code",
    ),
)
"""Fields whose change leaves a resumed run the same. Tricks are already in the other fields; that data.root, which may
have moved, still holds the same files is for the loader to see; that distill.teacher has the same weights, for distill.digest;
that model.norm computes by the same operators, for the fact `batch norm` of resume.py."""


_NEWEST_STARTS = 48
"""A run keeps its first start and so many of the newest, however often it is resumed, so that config.json has a bound."""


def versions() -> dict[str, str]:
    """The versions of the run: python, the packages that matter, and the source's commit where it is a checkout."""
    return releases() | {"commit": _commit()}


def releases(*more: str) -> dict[str, str]:
    """The versions of python, the packages that matter and those named, without the commit, which takes a process of git."""
    found = {"python": platform.python_version(), "fasttricks": fasttricks.__version__}
    for package in ("torch", "triton", "numpy", "nvidia-dali-cuda120", *more):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _commit() -> str:
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return "unknown"  # installed: git would answer for whatever repository lies around site-packages
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def made_by_this_launch(run_dir: str) -> bool:
    """Whether the torchrun that started this process has made this run, in an earlier start of its ranks."""
    try:
        saved = CONFIGS.json(Path(run_dir) / "config.json", fields({"launch": text()}))
    except ConfigError:
        return False
    return bool(launch_token()) and saved["launch"] == launch_token()


def no_place(config: TrainConfig, error: OSError) -> ConfigError:
    """The error for a run folder that cannot be written."""
    return ConfigError(f"run_dir = {config.run_dir!r}: must be a place to write to; give another --run-dir ({error})")


def open_run(config: TrainConfig, extended: Sequence[Mapping[str, Any]] = ()) -> Path:
    """Make the run's folder and write config.json into it. For the main rank, which has claimed it, after check_run_dir.

    extended: how the run got more epochs than it began with. A resumed run keeps the starts that were written there before.
    Raises ConfigError where it cannot be made, or where those cannot be read.
    """
    folder = Path(config.run_dir)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, r"config\.json")
        made: dict[str, Any] = {"config": dataclasses.asdict(config), "versions": versions(), "launch": launch_token()}
        earlier = earlier_starts(folder) if config.resume else []
        made["starts"] = [*earlier[:1], *earlier[1:][-_NEWEST_STARTS:], this_start()]
        made |= {"extended": list(extended)} if extended else {}
        write_json(folder / "config.json", made)
    except OSError as error:
        raise no_place(config, error) from error
    return folder


def earlier_starts(folder: Path) -> list[dict[str, str]]:
    """The command, date and host of each start of the run in `folder`, oldest first; none where no run is there."""
    if not is_there(folder / "config.json"):
        return []
    kind = listed(table(text(longest=LONGEST_COMMAND)))
    starts: list[dict[str, str]] = CONFIGS.json(folder / "config.json", fields({}, {"starts": kind})).get("starts", [])
    return starts


def read_config(folder: Path) -> TrainConfig:
    """The resolved config of the run in `folder`. Raises ConfigError where config.json is none that a run wrote."""
    file = folder / "config.json"
    saved = CONFIGS.json(file, fields({"config": table(anything)}))
    try:
        return from_dict(TrainConfig, saved["config"])
    except ConfigError as error:
        raise CONFIGS.refusal(file, error) from error


def deciding_fields(config: TrainConfig) -> dict[str, Any]:
    """The fields of `config` that decide a run's weights, by dotted name."""
    fields = flatten(json.loads(json.dumps(dataclasses.asdict(config))))  # tuples as the lists that JSON has
    return {name: value for name, value in fields.items() if name not in _MAY_DIFFER}


def differences(before: TrainConfig, now: TrainConfig, lenient: Collection[str] = ()) -> list[str]:
    """Fields, as `a.b: before -> now`, that differ and would change a resumed run's weights; all but the lenient."""
    old, new = (flatten(dataclasses.asdict(config)) for config in (before, now))
    if now.distill.teacher and not now.distill.digest:  # its weights are not read yet
        del new["distill.digest"]
    names = [name for name in new if name not in _MAY_DIFFER and name not in lenient]
    return [f"{name}: {old[name]!r} -> {new[name]!r}" for name in names if old[name] != new[name]]


def config_digest(config: TrainConfig, **more: object) -> str:
    """12 hex digits of the fields that decide the run, and of `more`: equal for configs that train the same.

    Fields at their default are left out, so a field that is added later changes nothing if its default means the old
    behaviour.
    """
    fields = {f.name: f.default for f in dataclasses.fields(TrainConfig) if f.default is not dataclasses.MISSING}
    sections = {f.name: f.default_factory() for f in dataclasses.fields(TrainConfig) if callable(f.default_factory)}
    defaults = flatten(fields | {name: dataclasses.asdict(section) for name, section in sections.items()})
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    flat = flatten({n: dataclasses.asdict(v) if n in sections else v for n, v in values.items()})
    kept = {n: v for n, v in flat.items() if n not in _MAY_DIFFER and (n not in defaults or defaults[n] != v)}
    text = json.dumps({"config": kept, **more}, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def config_table(config: TrainConfig) -> str:
    """Every field of `config` as a row of a Markdown table."""
    values = flatten(dataclasses.asdict(config))
    rows = [f"| {name} | {_cell(json.dumps(value))} |" for name, value in values.items()]
    return "\n".join(["| field | value |", "|---|---|", *rows])


def _cell(text: str) -> str:
    """`text` in a cell of a Markdown table, as it is: no column ends in it, and nothing of it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>()#+.!|-])", r"\\\1", text)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` to `path` as JSON, whole or not at all, after a power cut too."""
    write_whole(path, (json.dumps(values, indent=2) + "\n").encode(), temporary_of(path))
