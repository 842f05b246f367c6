"""Export a checkpoint: fasttricks export CHECKPOINT [--output DIR ...]: safetensors, ONNX and a model card."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttricks.commands import prog
from fasttricks.commands.by_task import commands_of
from fasttricks.commands.calibrated import calibration_to_apply, fold
from fasttricks.commands.network_config import WeightsConfig
from fasttricks.commands.saved_run import SavedRunCommand
from fasttricks.config import ConfigError, require, show_name
from fasttricks.runs.calibration import shown_as
from fasttricks.runs.stored import is_export, run_of_best
from fasttricks.system.extras import require_extra

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fasttricks.config import DataConfig
    from fasttricks.runs.saved import Saved

PROG = prog("export")
ABOUT = """Write model.safetensors (in timm's and torchvision's key names), model.onnx (from pixels to logits), config.json and a
model card, README.md. CHECKPOINT is a file, a run folder, of which the newest checkpoint is taken, or another export.

A segmentation's model.onnx takes images of any size, and has logits for each pixel; a detection's takes one image of any size,
and has boxes, labels and scores."""
OPSET = 18
ONNX_MODULES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
"""Tolerance of ONNX Runtime's logits, relative to the largest: it sums float32 in another order."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(WeightsConfig):
    """The parts of an export, and its place."""

    output: str = ""
    """Folder to make; empty: export/ in the run folder, or beside the checkpoint file. It must not exist."""
    onnx: bool = True
    """Write model.onnx too, and compare its outputs in ONNX Runtime with the network's."""
    calibrated: bool = False
    """Divide the logits by the temperature that `fasttricks evaluate RUN --calibrate` fitted: the classifier has it then."""


def write_safetensors(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """The state_dict of `model` under its own names, which are torchvision's and timm's. FP32, contiguous."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    path.write_bytes(save(tensors, metadata))


def from_pixels(model: nn.Module, data: DataConfig) -> nn.Module:
    """`model` behind the normalisation of `data`, evaluating: (N, 3, H, W) float32 RGB pixels, 0 to 255, to its outputs."""
    import torch
    from torch import nn

    class FromPixels(nn.Module):
        mean: Tensor
        std: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.model = model
            for name, values in (("mean", data.mean), ("std", data.std)):
                self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1))

        def forward(self, pixels: Tensor) -> Any:
            return self.model((pixels - self.mean) / self.std)

    return FromPixels().eval()


def write_onnx(
    model: nn.Module, path: Path, data: DataConfig, metadata: dict[str, str], *, any_size: bool = False
) -> None:
    """`model` behind its normalisation as ONNX, opset 18, of any batch size; held against ONNX Runtime afterwards.

    Input pixels: (N, 3, S, S) float32 RGB, 0 to 255; any_size: (N, 3, H, W). Output logits: (N, K), of a network of whole images
    (N, K, H, W). The two are compared on smooth images for any_size, of two sizes and batches, else on noise of two batches.
    Raises ConfigError where they disagree.
    """
    import onnx
    import onnxruntime
    import torch

    network = from_pixels(model, data)
    side, dynamic = data.image_size, {0: torch.export.Dim("N", min=1)}
    inputs = [_noise(2, side, side), _noise(1, side, side)]
    if any_size:  # no multiples of a stride
        dynamic |= {2: torch.export.Dim("H", min=1), 3: torch.export.Dim("W", min=1)}
        inputs = [smooth(2, side, side * 5 // 4 + 1), smooth(1, side * 3 // 4 + 1, side)]
    torch.onnx.export(
        network,
        (inputs[0],),
        path,
        dynamo=True,
        opset_version=OPSET,
        input_names=["pixels"],
        output_names=["logits"],
        dynamic_shapes={"pixels": dynamic},
        external_data=False,
        verbose=False,
    )
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, metadata)
    onnx.save(graph, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for pixels in inputs:
        with torch.no_grad():
            wanted = network(pixels).numpy()
        (found,) = session.run(None, {"pixels": pixels.numpy()})
        off = float(abs(found - wanted).max() / max(abs(wanted).max(), 1e-6))
        if not off <= TOLERANCE:
            rule = f"ONNX Runtime's logits are off by {off:.2g} of the largest, more than {TOLERANCE:g}; take --no-onnx"
            raise ConfigError(f"onnx = {str(path)!r}: {rule}")


def _noise(count: int, height: int, width: int) -> Tensor:
    import torch

    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 255


def smooth(count: int, height: int, width: int) -> Tensor:
    """Areas of colour, as a photograph has them: of noise the features of all pixels are alike."""
    from torch.nn.functional import interpolate

    return interpolate(_noise(count, 6, 8), size=(height, width), mode="bilinear")


def export(saved: Saved, config: ExportConfig, run_folder: Path | None) -> Path:
    """Write the folder; all of it or nothing. Returns the folder.

    Raises ConfigError where it exists or cannot be made, and as write_onnx, calibration_to_apply and fold.
    """
    from fasttricks.runs.exported import DESCRIPTION, described
    from fasttricks.runs.model_card import counterparts, hub_config, model_card, transform_text
    from fasttricks.runs.stored import EXPORTED
    from fasttricks.system.files import temporary_of
    from fasttricks.tasks import find_task

    row = commands_of(saved.task)
    target = Path(config.output or (run_folder or saved.path.parent) / "export")
    if target.exists():
        raise ConfigError(f"output = {str(target)!r}: already exists and is never overwritten; give another --output")
    run, classes = saved.config, saved.classes
    model = saved.trusting(config.trust_code).network(average=config.average)
    calibration = None
    rule = f"is for one label an image, and the checkpoint's task is {saved.task}; leave it out"
    require(not config.calibrated or row.calibrated, "calibrated", True, rule)
    if config.calibrated:
        shown = shown_as(run.data, flip=run.eval.flip)
        calibration = calibration_to_apply(saved, model, average=config.average, shown=shown)
    if calibration is not None:
        fold(model, calibration.temperature, run.data)
        saved = dataclasses.replace(saved, temperature=calibration.temperature)
    hub, task = hub_config(run, classes, saved.task), find_task(saved.task)
    metadata = {
        "format": "pt",
        "architecture": hub["architecture"],
        "model": run.model.name,
        "transform": transform_text(run, saved.task),
        "classes": json.dumps(list(classes)),
        DESCRIPTION: described(saved),
    }
    if saved.temperature is not None:
        metadata["temperature"] = repr(saved.temperature)
    temporary = temporary_of(target)
    try:
        temporary.mkdir(parents=True)
        write_safetensors(model, temporary / EXPORTED, metadata)
        if config.onnx:
            file = temporary / "model.onnx"
            if row.onnx is not None:
                row.onnx(model, file, run, metadata, OPSET)
            else:
                write_onnx(model, file, run.data, metadata, any_size=bool(task.facts.whole_images))
        (temporary / "config.json").write_text(json.dumps(hub, indent=2) + "\n", "utf-8")
        metrics, others = task.metrics_of(len(classes)), counterparts(run.model)
        card = model_card(saved, metrics, others, run_folder, config.onnx, calibration)
        (temporary / "README.md").write_text(card, "utf-8")
        os.rename(temporary, target)
    except OSError as error:
        raise ConfigError(f"output = {str(target)!r}: must be a place to write to; give another ({error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def main(args: Sequence[str]) -> None:
    """Export the checkpoint that `args` name."""
    command = SavedRunCommand(PROG, "CHECKPOINT", ABOUT, ExportConfig(), lambda run: ExportConfig())
    asked = command.read(args)
    path, config = asked.path, command.config(None, asked.options)
    if config.onnx:
        require_extra("export", ["safetensors", *ONNX_MODULES], "export (--no-onnx aside)")
    require_extra("export", ["safetensors"], "export")
    from fasttricks.runs.opened import open_saved

    folder = run_of_best(path) or (path if path.is_dir() and not is_export(path) else None)
    target = export(open_saved(path), config, folder)
    print(f"wrote {', '.join(sorted(file.name for file in target.iterdir()))} to {show_name(target)}/")
