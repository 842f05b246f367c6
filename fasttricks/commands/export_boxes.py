"""A detection as ONNX: from the pixels of an image to its boxes, held against the network in ONNX Runtime."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttricks.config import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from fasttricks.config import TrainConfig

TOLERANCE = 1e-3
"""Tolerance of ONNX Runtime's scores, and of its boxes relative to the longer side: it sums float32 in another order."""
_SUREST = 20
"""Boxes that are compared of an image: of the least sure ones the order of equal scores decides which are kept."""
_NAMES = ["boxes", "labels", "scores"]


def from_pixels(model: nn.Module, config: TrainConfig) -> nn.Module:
    """`model`, a Detector, behind its normalisation, in evaluation mode: (1, 3, H, W) float32 RGB pixels, 0 to 255, to boxes
    (M, 4) in them, labels (M,) int64 from 0, scores (M,), the surest first.
    """
    from torch import nn

    from fasttricks.commands import export

    class OfOne(nn.Module):
        """The detections on one image, as three tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            (found,) = self.model([images[0]])
            return found["boxes"], found["labels"] - 1, found["scores"]

    return export.from_pixels(OfOne(), config.data)


def write_boxes_onnx(model: nn.Module, path: Path, config: TrainConfig, metadata: dict[str, str], opset: int) -> None:
    """`model` as ONNX: input pixels, outputs boxes, labels and scores, as from_pixels(); any H and W.

    By torch's exporter that traces: the newer one was cut off after 280 seconds without a graph. The file is compared with
    the network on smooth images of two sizes. Raises ConfigError where they disagree.
    """
    import onnx
    import onnxruntime
    import torch

    from fasttricks.commands.export import smooth

    network, short, long = from_pixels(model, config), config.detect.base_size, config.detect.max_size
    inputs = [smooth(1, short, min(long, short * 5 // 4 + 1)), smooth(1, long, short)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it traces, and is the older of two
        torch.onnx.export(
            network,
            (inputs[0],),
            path,
            dynamo=False,
            opset_version=opset,
            input_names=["pixels"],
            output_names=_NAMES,
            dynamic_axes={"pixels": {2: "H", 3: "W"}, **{name: {0: "M"} for name in _NAMES}},
        )
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, metadata)
    onnx.save(graph, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for pixels in inputs:
        with torch.no_grad():
            wanted = [part.numpy() for part in network(pixels)]
        found = session.run(None, {"pixels": pixels.numpy()})
        longer = max(pixels.shape[2:])
        lost = [_lost(ours, theirs, longer=longer) for ours, theirs in ((wanted, found), (found, wanted))]
        if any(lost):
            rule = (
                f"of the {_SUREST} surest boxes {max(lost)} differ between ONNX Runtime and the network; take --no-onnx"
            )
            raise ConfigError(f"onnx = {str(path)!r}: {rule}")


def _lost(ours: list[NDArray[Any]], theirs: list[NDArray[Any]], longer: int) -> int:
    """How many of the _SUREST boxes of `ours` are none of `theirs`: (boxes, labels, scores) each."""
    return sum(
        not (
            (abs(theirs[0] - box).max(1, initial=0) <= TOLERANCE * longer)
            & (theirs[1] == label)
            & (abs(theirs[2] - score) <= TOLERANCE)
        ).any()
        for box, label, score in zip(*(part[:_SUREST] for part in ours), strict=True)
    )
