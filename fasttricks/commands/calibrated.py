"""The temperature of a checkpoint in a command: fitted by evaluate, applied by predict and export."""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING

from fasttricks.config import UserError
from fasttricks.runs.calibration import Calibration, CalibrationError, read_calibration, run_of

if TYPE_CHECKING:
    from torch import nn

    from fasttricks.config import DataConfig
    from fasttricks.data.sources import Source
    from fasttricks.runs.saved import Saved
    from fasttricks.system.distributed import World
    from fasttricks.tasks.answers import Answers

_TOLERANCE = 1e-4
"""Largest difference of float32 logits / T from those of the network with T in its classifier, relative to the largest."""


def weights_name(saved: Saved, *, average: bool) -> str:
    """averaged or raw: the weights of saved.network(average=average)."""
    return "averaged" if average and saved.average is not None else "raw"


def check_place(saved: Saved) -> None:
    """Raise CalibrationError where `saved` has no run folder that a temperature can be written into."""
    run = run_of(saved.path)
    if run is None or saved.foreign:
        rule = f"is stored in a run folder, and {saved.path} is in none; give the run"
        raise CalibrationError(f"calibrate = True: {rule}")
    if not os.access(run, os.W_OK | os.X_OK):
        raise CalibrationError(f"calibrate = True: {run} may not be written to; give a run of your own")


def calibrate_checkpoint(
    saved: Saved, answers: Answers, images: Source, world: World, *, average: bool, shown: str
) -> Calibration | UserError:
    """The temperature of these weights, from the logits that `answers` kept, on every rank; it writes nothing.

    shown: shown_as() of the images.

    An error of tasks.calibration.calibrate() is returned, so that the answers of the same pass are not lost. A collective.
    """
    from fasttricks.learning.teacher import weights_digest
    from fasttricks.tasks.calibration import calibrate

    outputs, found = answers.outputs(world), b""
    if outputs is not None:
        try:
            fitted = calibrate(outputs, [images.name(image) for image in outputs.images.tolist()])
            digest = weights_digest(saved.network(average=average))
            weights = weights_name(saved, average=average)
            found = pickle.dumps(
                Calibration(step=saved.step, weights=weights, digest=digest, images=shown, **fitted._asdict()),
            )
        except UserError as error:
            found = pickle.dumps(error)
    result: Calibration | UserError = pickle.loads(world.gather(found)[0])
    return result


def calibration_text(calibration: Calibration) -> str:
    """The figures in a line."""
    c = calibration
    ece = f"ECE {100 * c.ece_before:.2f} % -> {100 * c.ece_after:.2f} %"
    where = f"fitted on {c.fitted_images:,} images; on the {c.measured_images:,} others"
    return f"temperature {c.temperature:.4f}, {where}: {ece}, NLL {c.nll_before:.4f} -> {c.nll_after:.4f}"


def stored_calibration(saved: Saved, model: nn.Module, *, average: bool) -> Calibration:
    """That of the run of `saved`, whose network is `model`, FP32 on the CPU. Raises as read_calibration."""
    from fasttricks.learning.teacher import weights_digest

    weights, digest = weights_name(saved, average=average), weights_digest(model)
    return read_calibration(saved.path, step=saved.step, weights=weights, digest=digest)


def calibration_to_apply(saved: Saved, model: nn.Module, *, average: bool, shown: str) -> Calibration | None:
    """That whose temperature divides the logits of `model`; None for an export whose classifier has it.

    shown: shown_as() of the images that it is for. Raises as read_calibration, and CalibrationError where it was fitted on
    images that were shown in another way.
    """
    if saved.temperature is not None:
        return None
    found = stored_calibration(saved, model, average=average)
    if found.images != shown:
        rule = f"was fitted on images of {found.images}, and these are {shown}"
        raise CalibrationError(
            f"calibrated: {rule}; fit it again with the same options of data and flip, or leave it out"
        )
    return found


def fold(model: nn.Module, temperature: float, data: DataConfig) -> None:
    """Divide the logits of `model` by `temperature`, in place: its classifier's weights and biases.

    Raises CalibrationError for a network without a known classifier, and for one whose logits are not divided by that.
    """
    import torch

    from fasttricks.models import AUXILIARY, head_names

    names = [name for name in head_names(model) if not name.startswith(AUXILIARY)]
    pixels = torch.randn(2, 3, data.image_size, data.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(pixels) / temperature
        for name in names:
            model.get_parameter(name).div_(temperature)
        off = float((model(pixels) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    if not names or not off <= _TOLERANCE:
        rule = "the temperature cannot be folded into this network, whose last layer does not give the logits"
        raise CalibrationError(f"calibrated = True: {rule}; leave it out, and divide the logits by {temperature!r}")
