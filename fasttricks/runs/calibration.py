"""RUN/calibration.json: the temperature of one checkpoint's weights, and its effect where it was measured. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from fasttricks.config import DataConfig, UserError
from fasttricks.runs.folder import write_json
from fasttricks.system.reading import Reader, is_there
from fasttricks.system.schema import Kind, WrongError, fields, number, text, whole

NAME = "calibration.json"
COLDEST, HOTTEST = 0.01, 100.0
"""Range of a temperature; the minimum of the NLL lies outside only where it means nothing."""


class CalibrationError(UserError):
    """A temperature that cannot be fitted, read or applied."""


_FILES = Reader(
    CalibrationError,
    "must be as `fasttricks evaluate RUN --calibrate` wrote it",
    "make it again by that command",
)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A temperature, the weights that it belongs to, and the figures of the held-out images that it was not fitted on."""

    temperature: float
    """T of softmax(logits / T), COLDEST to HOTTEST."""
    step: int
    """Updates of the checkpoint."""
    weights: str
    """averaged or raw."""
    digest: str
    """That of the weights: learning.teacher.weights_digest()."""
    images: str
    """The way in which the images were shown: shown_as()."""
    fitted_images: int
    measured_images: int
    ece_before: float
    """Expected calibration error, 0 to 1, on the measured images."""
    ece_after: float
    nll_before: float
    """Mean negative log-likelihood, in nats."""
    nll_after: float


def within(low: float, high: float) -> Kind:
    """A number from `low` to `high`, both allowed."""
    is_number = number()

    def check(value: object, where: str) -> None:
        is_number(value, where)
        if not low <= value <= high:  # type: ignore[operator]
            raise WrongError(where, value, f"{low:g} to {high:g}")

    return check


def _unknown(value: object, where: str) -> None:
    raise WrongError(where, value, "left out: no such field is known")


TEMPERATURE = within(COLDEST, HOTTEST)
_NLL = within(0, 1e300)
_KIND = fields(
    {
        "temperature": TEMPERATURE,
        "step": whole(),
        "weights": text(8, "averaged|raw", "averaged or raw"),
        "digest": text(16, "[0-9a-f]{16}", "16 hex digits"),
        "images": text(200),
        "fitted_images": whole(1),
        "measured_images": whole(1),
        **dict.fromkeys(("ece_before", "ece_after"), within(0, 1)),
        **dict.fromkeys(("nll_before", "nll_after"), _NLL),
    },
    others=_unknown,
)


def shown_as(data: DataConfig, *, flip: bool) -> str:
    """The way in which images are shown to the network, in words: logits of another way have another temperature."""
    filter_ = f"{data.interpolation}{' with antialias' if data.antialias else ''}"
    return f"{data.image_size} pixels of {data.val_resize}, {filter_}{', and mirrored' if flip else ''}"


def run_of(checkpoint: Path) -> Path | None:
    """The run folder of a checkpoint RUN/checkpoints/FILE; None for any other file."""
    folder = checkpoint.parent if checkpoint.parent.name else checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def write_calibration(run: Path, calibration: Calibration) -> None:
    """Write it into the run folder, in place of an earlier one. Raises CalibrationError."""
    try:
        write_json(run / NAME, dataclasses.asdict(calibration))
    except OSError as error:
        raise CalibrationError(f"calibrate: {run / NAME} cannot be written ({error}); free it and repeat") from error


def read_calibration(checkpoint: Path, *, step: int, weights: str, digest: str) -> Calibration:
    """The calibration of a run's checkpoint, of exactly these weights.

    weights: averaged or raw. Raises CalibrationError where there is none, for one of other weights, and for a damaged file.
    """
    run = run_of(checkpoint)
    if run is None:
        rule = "is in no run folder, and holds no temperature itself; give RUN, or an export made with --calibrated"
        raise CalibrationError(f"calibrated: {checkpoint} {rule}")
    file = run / NAME
    if not is_there(file):
        raise CalibrationError(f"calibrated: {file} is not there; make it: fasttricks evaluate {run} --calibrate")
    found = Calibration(**_FILES.json(file, _KIND))
    if found.digest != digest:
        theirs = f"step {found.step}, {found.weights} weights {found.digest}"
        rule = f"is of other weights ({theirs}) than these (step {step}, {weights} weights {digest})"
        raise CalibrationError(f"calibrated: {file} {rule}; fit them: fasttricks evaluate {run} --calibrate")
    return found
