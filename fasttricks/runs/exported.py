"""The description of a network beside its weights: an export's metadata, or timm's config.json. No torch, no code of the file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fasttricks.config import (
    NETWORKS,
    TIMM,
    ConfigError,
    DataConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
    from_dict,
    model_info,
    replace_fields,
    same_statistics,
    show_name,
)
from fasttricks.runs.calibration import TEMPERATURE
from fasttricks.runs.stored import EXPORTED, CheckpointError, is_export, is_own
from fasttricks.system.extras import missing_extra
from fasttricks.system.reading import Reader, is_there, parse_json, regular_file
from fasttricks.system.schema import anything, fields, listed, number, table, text, whole

if TYPE_CHECKING:
    from fasttricks.runs.saved import Saved

DESCRIPTION = "fasttricks"
"""The key of an export's metadata that holds its run as JSON."""
INTERPOLATIONS = {"linear": "bilinear", "cubic": "bicubic", "lanczos3": "lanczos"}
"""data.interpolation -> timm's name of it."""
NOT_SAID = ModelConfig(name="")
"""The network of a file that does not say which."""
UNREAD = ("num_classes", "zero_gamma", "norm", "freeze")
"""Fields of ModelConfig that trained weights leave without effect."""
_RUN = fields(
    {"config": table(anything), "task": text(), "step": whole(), "epoch": whole(), "ranks": whole(1, 1_000_000)},
    {"temperature": TEMPERATURE},
)
_PLACES = {"run_dir": "", "init": "", "distill.teacher": "", "distill.cache": ""}
"""Fields that name a place of the machine that trained; evaluation reads none of them."""
_LONGEST = 1 << 24
_HUB = fields(
    {
        "architecture": text(),
        "pretrained_cfg": fields(
            {"input_size": listed(whole(1, 8192)), "mean": listed(number()), "std": listed(number())},
            {"interpolation": text(), "crop_pct": number(), "crop_mode": text()},
        ),
    },
    {"label_names": listed(text())},
)
_HUBS = Reader(
    CheckpointError,
    "must be as `fasttricks export` or timm writes it",
    "export it again, or give the .safetensors file under another name, with --model.name",
    max_bytes=_LONGEST,
)


class Description(NamedTuple):
    """The facts about a file of weights that are known before they are read."""

    config: TrainConfig
    """That of the run; for a file of another program a stand-in, whose model and data the user may say."""
    settled: bool
    """Whether `config` is that of the run."""
    classes: tuple[str, ...] | None = None
    """Names of the outputs, in order; None: not known."""
    task: str = "classification"
    step: int = 0
    epoch: int = 0
    ranks: int = 1
    temperature: float | None = None
    """The temperature that is folded into the classifier; None: none."""


def stand_in(name: str = "", **data: Any) -> TrainConfig:
    """The config of a network that was not trained here: `data` and, where they do not say, the sizes of the network `name`."""
    info, model = model_info(name), dataclasses.replace(NOT_SAID, name=name)
    sizes = {"image_size": info.image_size, "val_resize": info.val_resize}
    return TrainConfig(
        recipe="",
        epochs=1,
        global_batch_size=64,
        model=model,
        data=DataConfig(**{**sizes, **data}),
        schedule=ScheduleConfig(warmup_epochs=0),
    )


def described(saved: Saved) -> str:
    """The metadata DESCRIPTION of an export of `saved`: its run as JSON, without the places of this machine."""
    data = saved.config.data
    root = data.root if data.root == "demo" else ""
    config = replace_fields(
        saved.config, {**_PLACES, "data.root": root, "data.labels": "", "data.class_order": DataConfig.class_order}
    )
    values: dict[str, Any] = {"task": saved.task, "step": saved.step, "epoch": saved.epoch, "ranks": saved.ranks}
    values |= {"temperature": saved.temperature} if saved.temperature is not None else {}
    return json.dumps({"config": dataclasses.asdict(config), **values})


@contextmanager
def opened(path: Path, framework: str) -> Iterator[Any]:
    """The safetensors file `path`, open; framework: pt or np. Raises CheckpointError, also for the errors of the block.

    Raises ConfigError where safetensors is absent.
    """
    if missing := missing_extra("export", ["safetensors"], f"checkpoint = {str(path)!r}"):
        raise ConfigError(missing)
    from safetensors import SafetensorError, safe_open

    try:
        with regular_file(path), safe_open(path, framework) as file:
            yield file
    except (OSError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        rule = f"must be a whole safetensors file ({first}); use another one"
        raise CheckpointError(f"weights = {str(path)!r}: {rule}") from error


def classes_of(path: Path, metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """The classes that the metadata of an export name, in order; None where they name none. Raises CheckpointError."""
    if "classes" not in metadata:
        return None
    return tuple(_parsed(path, metadata, "classes", listed(text())))


def describe(path: Path) -> Description | None:
    """The description of an export's folder, or of a file of another program; None for a run and its checkpoints.

    A file of another program that says nothing has a stand-in for a config, with no network. Raises CheckpointError for a
    description that is damaged, of another version, or names a network that is not known here.
    """
    file = path / EXPORTED if is_export(path) else path
    if file.suffix != ".safetensors":
        return None if not file.is_file() or _ends_as_ours(file) else Description(stand_in(), settled=False)
    with opened(file, "np") as content:
        metadata = content.metadata() or {}
    classes = classes_of(file, metadata)
    if DESCRIPTION in metadata:
        return _of_run(file, metadata, classes)
    hub = file.parent / "config.json"
    if file.name == EXPORTED and is_there(hub):
        return _of_hub(hub, metadata.get("model", ""), classes)
    return Description(stand_in(_known(file, metadata.get("model", ""))), settled=False, classes=classes)


def _ends_as_ours(file: Path) -> bool:
    try:
        return is_own(file)
    except OSError:
        return True  # read_checkpoint names the fault


def _of_run(file: Path, metadata: Mapping[str, str], classes: Sequence[str] | None) -> Description:
    run = _parsed(file, metadata, DESCRIPTION, _RUN)
    try:
        config = from_dict(TrainConfig, run.pop("config"))
    except ValueError as error:
        raise _damaged(file, DESCRIPTION, error) from error
    if model_info(config.model.name).family != "own":  # Saved.trusting() asks the user before code is imported
        _known(file, config.model.name)
    if not classes or len(set(classes)) < len(classes):
        raise _damaged(file, "classes", "it must name each class once")
    return Description(config, settled=True, classes=tuple(classes), **run)


def _of_hub(file: Path, name: str, classes: tuple[str, ...] | None) -> Description:
    """A folder that timm or an earlier export wrote; name: the network in the metadata of the weights, or empty."""
    hub = _HUBS.json(file, _HUB)
    trained = hub["pretrained_cfg"]
    theirs, mode = trained.get("interpolation", "bilinear"), trained.get("crop_mode", "center")
    ours = next((our for our, their in INTERPOLATIONS.items() if their == theirs), "")
    side, share = trained["input_size"][-1] if trained["input_size"] else 0, trained.get("crop_pct", 0.875)
    try:
        if not ours or mode != "center":
            raise ValueError(
                f"interpolation {theirs!r} with crop_mode {mode!r}; known are {INTERPOLATIONS} and 'center'"
            )
        if not 0.1 <= share <= 1 or not len(trained["mean"]) == len(trained["std"]) == 3:
            raise ValueError("crop_pct must be 0.1 to 1, and mean and std must have three numbers")
        # as timm rounds, and for our own quotients exactly
        resize = math.floor(side / share + 1e-6)
        data: dict[str, Any] = {"image_size": side, "val_resize": resize, "interpolation": ours}
        statistics = [[255 * x for x in trained[name]] for name in ("mean", "std")]
        if not same_statistics((statistics[0], statistics[1]), (DataConfig.mean, DataConfig.std)):
            data |= {"mean": tuple(statistics[0]), "std": tuple(statistics[1])}
        config = stand_in(name or TIMM + hub["architecture"], **data)
    except ValueError as error:
        raise _HUBS.refusal(file, error) from error
    _known(file, config.model.name)
    named = classes or tuple(hub.get("label_names", ())) or None
    return Description(config, settled=False, classes=named)


def _known(file: Path, name: str) -> str:
    """`name`, of a network that is known here, and is no code."""
    if name and name not in NETWORKS and not name.startswith(TIMM):
        rule = f"is of the network {show_name(name)}, which is none of `fasttricks list models`; use another one"
        raise CheckpointError(f"weights = {str(file)!r}: {rule}")
    return name


def _parsed(file: Path, metadata: Mapping[str, str], key: str, kind: Any) -> Any:
    try:
        if len(metadata[key]) > _LONGEST:
            raise ValueError(f"{len(metadata[key]):,} characters, more than {_LONGEST:,}")
        return parse_json(os.fsencode(metadata[key]), kind)
    except ValueError as error:
        raise _damaged(file, key, error) from error


def _damaged(file: Path, key: str, wrong: object) -> CheckpointError:
    rule = f"has metadata {key!r} that `fasttricks export` of this version does not write ({wrong}); export it again"
    return CheckpointError(f"weights = {str(file)!r}: {rule}")
