"""The description of an export: config.json, and a model card from the checkpoint and its run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttricks.config import (
    TIMM,
    TORCHVISION,
    ConfigError,
    DataConfig,
    ModelConfig,
    TrainConfig,
    model_info,
    show_classes,
    show_name,
)
from fasttricks.config.tricks import TRICKS, is_on
from fasttricks.runs.box_snippets import box_snippets
from fasttricks.runs.calibration import Calibration
from fasttricks.runs.card_snippets import ONNX, snippets
from fasttricks.runs.exported import INTERPOLATIONS
from fasttricks.runs.metric import Metric
from fasttricks.runs.pixel_snippets import pixel_snippets, torchvision_fcn
from fasttricks.runs.saved import Saved
from fasttricks.system.reading import Reader, is_there
from fasttricks.system.schema import Kind as JsonKind
from fasttricks.system.schema import fields, number, table, text, whole


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The words for the export of a task; the defaults are those of a class for each image."""

    pipeline: str = "image-classification"
    """The hub's name of the task."""
    problem: str = ""
    """problem_type in config.json; empty: none."""
    several: bool = False
    """Whether an image may have several classes."""
    pixels: bool = False
    """Whether each pixel has a class, by an FCN on the base network."""
    boxes: bool = False
    """Whether it gives boxes, by a Faster R-CNN on the base network."""
    title: str = ""
    """The words before the base network."""
    note: str = ""
    """The meaning of the logits."""


_KINDS = {
    "multilabel": Kind(
        problem="multi_label_classification",
        several=True,
        note="An image may have several classes: the sigmoid of a logit is the probability of its class. Above 0.5 it is there.",
    ),
    "segmentation": Kind(
        pipeline="image-segmentation",
        problem="semantic_segmentation",
        pixels=True,
        title="FCN on ",
        note="The logits have the height and width of the input. Resized to the image, their largest is the class of the pixel.",
    ),
    "detection": Kind(
        pipeline="object-detection",
        problem="object_detection",
        boxes=True,
        title="Faster R-CNN on ",
        note="Boxes are left, top, right and bottom edge in pixels of the input. A class counts from 0. The surest come first.",
    ),
}
_FILES = Reader(ConfigError, "must be as fasttricks.train wrote it", "move it away, and the card is made without it")


def summary_kind(metrics: Sequence[Metric]) -> JsonKind:
    """The kind of summary.json of a run whose task has these metrics; one of 0.1.0 may have the headline alone of them."""
    headline, *others = (metric.name for metric in metrics)
    numbers = dict.fromkeys(("train_seconds", headline), number())
    return fields(
        {"steps": whole(), "val_images": whole(), "ranks": whole(1), "precision": text(), "device": text(), **numbers},
        dict.fromkeys(("val_loss", *others), number()),
    )


def counterparts(config: ModelConfig) -> dict[str, str]:
    """Package -> its name of the same network, for timm and torchvision. Neither has our other widths or stems.

    timm's Inception with an auxiliary head also gives two outputs in evaluation, so it is another network.
    """
    if (config.width, config.stem_stride) != (ModelConfig.width, ModelConfig.stem_stride):
        return {}
    info = model_info(config.name)
    timm = "" if config.aux_head else info.timm
    return {package: name for package, name in (("timm", timm), ("torchvision", info.torchvision)) if name}


def hub_config(config: TrainConfig, classes: Sequence[str], task: str = "classification") -> dict[str, Any]:
    """config.json as timm reads it from a folder (`local-dir:`) or the hub; of a network it does not know, the same fields."""
    data, kind = config.data, _KINDS.get(task, Kind())
    problem = {"problem_type": kind.problem} if kind.problem else {}
    if kind.pixels:
        return {
            "architecture": torchvision_fcn(config) or "fcn",
            "backbone": config.model.name,
            "output_stride": config.segment.output_stride,
            "num_classes": len(classes),
            "label_names": list(classes),
            **problem,
            "short_side": data.val_resize,
            **_normalisation(data),
        }
    if kind.boxes:
        return {
            "architecture": "faster_rcnn",
            "backbone": config.model.name,
            "num_classes": len(classes),
            "label_names": list(classes),
            **problem,
            "short_side": config.detect.base_size,
            "long_side": config.detect.max_size,
            **_normalisation(data),
        }
    return {
        "architecture": counterparts(config.model).get("timm", config.model.name),
        "num_classes": len(classes),
        "label_names": list(classes),
        **problem,
        "pretrained_cfg": {
            "input_size": [3, data.image_size, data.image_size],
            **_normalisation(data),
            "crop_pct": data.image_size / data.val_resize,
            "crop_mode": "center",
            "num_classes": len(classes),
        },
    }


def _normalisation(data: DataConfig) -> dict[str, Any]:
    mean, std = ([value / 255 for value in values] for values in (data.mean, data.std))
    return {"mean": mean, "std": std, "interpolation": INTERPOLATIONS[data.interpolation]}


def transform_text(config: TrainConfig, task: str = "classification") -> str:
    """The validation transform in words."""
    data, kind = config.data, _KINDS.get(task, Kind())
    filters = {"linear": "bilinear", "cubic": "bicubic", "lanczos3": "Lanczos"}
    antialias = "with antialiasing, as PIL does" if data.antialias else "without antialiasing"
    resize = f"{filters[data.interpolation]}, {antialias}; sizes rounded to the nearest pixel"
    if kind.pixels or kind.boxes:
        resize = resize.replace("to the nearest pixel", "down")
        side = f"short side to {data.val_resize} pixels"
        if kind.boxes:
            side = f"short side to {config.detect.base_size} pixels, the long one to {config.detect.max_size} at most"
        return f"decode to RGB, upright; resize the {side}, keeping the aspect ratio ({resize})"
    return (
        f"decode to RGB, upright; resize the short side to {data.val_resize} pixels, keeping the aspect ratio ({resize}); "
        f"crop the centre {data.image_size} x {data.image_size} (offsets rounded down)"
    )


def model_card(
    saved: Saved,
    metrics: Sequence[Metric],
    counterparts: Mapping[str, str],
    run_folder: Path | None,
    with_onnx: bool,
    calibration: Calibration | None = None,
) -> str:
    """Markdown, with the front matter that the Hugging Face hub reads.

    metrics: those of its task. counterparts: the network's names in timm and torchvision. run_folder: the folder of config.json
    and summary.json; None or without them: the card names the unknown facts. calibration: of the temperature that is folded into
    the classifier; None of another export's, whose figures are not known.
    """
    config, classes, kind = saved.config, saved.classes, _KINDS.get(saved.task, Kind())
    summary = _read(run_folder, "summary.json", summary_kind(metrics))
    versions = _read(run_folder, "config.json", fields({}, {"versions": table(text())})).get("versions", {})
    parts = [
        _front_matter(counterparts, kind),
        f"# {kind.title}{config.model.name}, {show_classes(len(classes))}",
        f"Trained by the recipe `{config.recipe}` of fasttricks, after [Bag of Tricks](https://arxiv.org/abs/1812.01187).",
        "## Result",
        _result(summary, saved, metrics),
        *_calibration(saved.temperature, calibration),
        "## Use",
        _use(saved, kind, counterparts, with_onnx),
        "## How it was trained",
        _training(config, kind, summary, versions),
        "## Classes",
        ", ".join(map(show_name, classes)),
    ]
    return "\n\n".join(parts) + "\n"


def _read(folder: Path | None, name: str, kind: JsonKind) -> dict[str, Any]:
    if folder is None or not is_there(folder / name):
        return {}
    values: dict[str, Any] = _FILES.json(folder / name, kind)
    return values


def _front_matter(counterparts: Mapping[str, str], kind: Kind) -> str:
    library = "library_name: timm\n" if "timm" in counterparts and not kind.title else ""
    return f"---\ntags:\n- {kind.pipeline}\n{library}pipeline_tag: {kind.pipeline}\n---"


def _result(summary: Mapping[str, Any], saved: Saved, metrics: Sequence[Metric]) -> str:
    if not summary or summary["steps"] != saved.step:
        return f"Not known: the checkpoint is of step {saved.step}, epoch {saved.epoch} of {saved.config.epochs}."
    scores = ", ".join(metric.show(summary[metric.name]) for metric in metrics if metric.name in summary)
    averaged = "probabilities" if _KINDS.get(saved.task, Kind()).pixels else "logits"
    flip = f", {averaged} averaged with the mirror image's" if saved.config.eval.flip else ""
    how = f"(precision {summary['precision']}{flip})"
    loss = f", loss {summary['val_loss']:.4f}" if "val_loss" in summary else ""
    return f"On {summary['val_images']:,} validation images: {scores}{loss} {how}."


def _calibration(temperature: float | None, found: Calibration | None) -> list[str]:
    if temperature is None:
        return []
    text = f"The classifier holds a temperature: its logits are those of the training divided by {temperature!r}."
    if found is not None:
        figures = (
            f"expected calibration error {100 * found.ece_before:.2f} % before and {100 * found.ece_after:.2f} % after"
        )
        where = f"On {found.measured_images:,} validation images that it was not fitted on: {figures}"
        text += f" {where}, loss {found.nll_before:.4f} and {found.nll_after:.4f}. The loss above is without it."
    return ["## Calibration", text]


def _use(saved: Saved, kind: Kind, counterparts: Mapping[str, str], with_onnx: bool) -> str:
    config = saved.config
    theirs = kind.pixels and torchvision_fcn(config)
    mean, std = (" ".join(f"{x:g}" for x in values) for values in (config.data.mean, config.data.std))
    parts = [
        f"Images: {transform_text(config, saved.task)}; then subtract {mean} and divide by {std} (RGB, 0 to 255).",
        "`model.safetensors` holds the weights, FP32. `config.json` has the names of the classes in the order of the outputs.",
    ]
    parts += [kind.note] if kind.note else []
    if theirs:
        parts.append(f"It is torchvision's `{theirs}`.")
    elif kind.title or not counterparts:
        parts.append("timm and torchvision have no such network, though it uses their names.")
    if with_onnx:
        shapes = ("(N, 3, H, W)", ", (N, K, H, W)") if kind.pixels else ("(N, 3, S, S)", "")
        gives = f"logits{shapes[1]}"
        if kind.boxes:
            shapes, gives = ("(1, 3, H, W)", ""), "boxes (M, 4), labels (M,) and scores (M,)"
        onnx = f"takes RGB pixels, {shapes[0]} float32, 0 to 255, normalises them itself and gives {gives}."
        parts.append(f"`model.onnx` {onnx}")
    parts.append("In this folder, with an `image.jpg`:")
    if kind.pixels:
        found = pixel_snippets(config, len(saved.classes))
    elif kind.boxes:
        found = box_snippets(config, len(saved.classes))
    else:
        found = snippets(config.model, config.data, counterparts, len(saved.classes), several=kind.several)
    for heading, code in found.items():
        if with_onnx or heading != ONNX:
            parts.append(f"{heading}:\n\n```python\n{code}\n```")
    return "\n\n".join(parts)


def tricks_used(config: TrainConfig, precision: str) -> list[str]:
    """The tricks that the run had on; half precision only where it ran in it. precision: fp32, bf16 or fp16; auto: not known."""
    half = precision in ("fp16", "bf16")
    return [name for name in TRICKS if is_on(config, name) and (half or name != "low_precision")]


def _images(config: TrainConfig, kind: Kind) -> str:
    data, segment = config.data, config.segment
    if kind.pixels:
        factors = f"{segment.scale[0]:g} to {segment.scale[1]:g}"
        scaled = f"of images whose {segment.base_side} side is {segment.base_size} pixels times {factors}"
        return f"squares of {data.image_size} pixels {scaled}"
    if kind.boxes:
        return f"whole, the short side {config.detect.base_size} pixels, the long one {config.detect.max_size} at most"
    return f"{data.image_size} pixels, colour {data.color}, crops of {data.area[0]:g} to {data.area[1]:g} of the area"


def _name_of(weights: str) -> str:
    """`weights` without the folders of this machine, which a published card must not tell."""
    return weights if weights.startswith((TIMM, TORCHVISION)) else Path(weights).name


def _training(config: TrainConfig, kind: Kind, summary: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    schedule = config.schedule
    precision = summary.get("precision", config.precision)
    rows = {
        "tricks": ", ".join(tricks_used(config, precision)) or "none",
        "precision": "not known: auto is fp16 on CUDA and fp32 on the CPU" if precision == "auto" else precision,
        "epochs": f"{config.epochs}",
        "global batch": f"{config.global_batch_size} images",
        "learning rate": f"peak {config.peak_lr:g}, warm-up {schedule.warmup_epochs:g} epochs, then {schedule.decay}",
        "images": _images(config, kind),
        "average of weights": f"decay {config.ema_decay:g}" if config.ema_decay else "none",
        "seed": f"{config.seed}",
    }
    if config.distill.teacher:
        rows["teacher"] = f"{_name_of(config.distill.teacher)}, weights {config.distill.digest}"
    if summary:
        rows["hardware"] = f"{summary['ranks']} x {summary['device']}, {summary['train_seconds']:,.0f} s of training"
    if versions:
        rows["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {show_name(value)} |" for name, value in rows.items())])
