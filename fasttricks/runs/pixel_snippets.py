"""The Python in the model card of a segmentation: an image made ready, and its mask by torchvision, this project or ONNX Runtime.

tests/test_segmentation_export.py runs every block as it is printed, in the exported folder.
"""

from __future__ import annotations

from fasttricks.config import DataConfig, ModelConfig, TrainConfig
from fasttricks.runs.card_snippets import FILTERS, ONNX, own_config

_FCN = {"resnet50b": "fcn_resnet50", "resnet101b": "fcn_resnet101"}
"""Base network -> torchvision's FCN on it, which has an output stride of 8."""
_MASK = """\
logits = torch.nn.functional.interpolate(logits, size=(height, width), mode="bilinear")
mask = logits.argmax(1)[0].numpy()
print({names[k]: float((mask == k).mean()) for k in np.unique(mask)})"""
_ONNX = """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {"pixels": pixels})
small = Image.fromarray(logits[0].argmax(0).astype(np.uint8))
mask = np.asarray(small.resize((width, height), Image.Resampling.NEAREST))"""


def torchvision_fcn(config: TrainConfig) -> str:
    """torchvision's name of the same network; empty where it has none."""
    model = config.model
    same = (model.width, model.stem_stride) == (ModelConfig.width, ModelConfig.stem_stride)
    return _FCN.get(model.name, "") if same and config.segment.output_stride == 8 else ""


def pixel_snippets(config: TrainConfig, num_classes: int) -> dict[str, str]:
    """Heading -> lines of Python, to be run in this order in the exported folder, which has an image.jpg. ONNX comes last."""
    if theirs := torchvision_fcn(config):
        options = f"weights=None, weights_backbone=None, num_classes={num_classes}"
        made = f"torchvision.models.segmentation.{theirs}({options}, aux_loss={config.segment.aux_weight > 0})"
        heading, imports, out = "torchvision", "import torchvision", '["out"]'
    else:
        parts = f"output_stride={config.segment.output_stride}, aux_weight={config.segment.aux_weight}"
        made = f"build_fcn({own_config(config.model)}, SegmentConfig({parts}), {num_classes})"
        heading, out = "fasttricks", ""
        imports = (
            "from fasttricks.config import ModelConfig, SegmentConfig\nfrom fasttricks.models.fcn import build_fcn"
        )
    mean, std = (f"torch.tensor({list(values)}).view(3, 1, 1)" for values in (config.data.mean, config.data.std))
    asked = f"""\
import torch
{imports}
from safetensors.torch import load_file

model = {made}
model.load_state_dict(load_file("model.safetensors"))
model.eval()
mean, std = {mean}, {std}
with torch.no_grad():
    logits = model((torch.from_numpy(pixels) - mean) / std){out}
{_MASK}"""
    return {"An image": _prepare(config.data), heading: asked, ONNX: _ONNX}


def _prepare(data: DataConfig) -> str:
    return f"""\
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

names = json.loads(Path("config.json").read_text())["label_names"]
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
width, height = image.size
sides = [int({data.val_resize} * side / min(image.size)) for side in image.size]
image = image.resize(sides, Image.Resampling.{FILTERS[data.interpolation]})
pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None].copy()"""
