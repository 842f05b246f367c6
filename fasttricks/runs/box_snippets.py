"""The Python in the model card of a detection: an image made ready, and its boxes by this project and ONNX Runtime.

tests/test_detection_export.py runs every block as it is printed, in the exported folder.
"""

from __future__ import annotations

import dataclasses

from fasttricks.config import DataConfig, DetectConfig, TrainConfig
from fasttricks.runs.card_snippets import FILTERS, ONNX, own_config

_SHOW = """\
for box, label, score in zip(boxes / scale, labels, scores):
    if score >= 0.5:
        print(names[label], round(float(score), 2), box.round().tolist())"""
_ONNX = f"""\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
boxes, labels, scores = session.run(["boxes", "labels", "scores"], {{"pixels": pixels}})
{_SHOW}"""


def box_snippets(config: TrainConfig, num_classes: int) -> dict[str, str]:
    """Heading -> lines of Python, to be run in this order in the exported folder, which has an image.jpg. ONNX comes last."""
    plain = DetectConfig()
    given = {one.name: getattr(config.detect, one.name) for one in dataclasses.fields(DetectConfig)}
    fields = ", ".join(f"{name}={value!r}" for name, value in given.items() if value != getattr(plain, name))
    made = f"build_detector({own_config(config.model)}, DetectConfig({fields}), {num_classes})"
    mean, std = (f"torch.tensor({list(values)}).view(3, 1, 1)" for values in (config.data.mean, config.data.std))
    asked = f"""\
import torch
from fasttricks.config import DetectConfig, ModelConfig
from fasttricks.models.detector import build_detector
from safetensors.torch import load_file

model = {made}
model.load_state_dict(load_file("model.safetensors"))
model.eval()
mean, std = {mean}, {std}
with torch.no_grad():
    (found,) = model([(torch.from_numpy(pixels[0]) - mean) / std])
boxes, scores = found["boxes"].numpy(), found["scores"].numpy()
labels = found["labels"].numpy() - 1  # 0 is the background
{_SHOW}"""
    return {"An image": _prepare(config.data, config.detect), "fasttricks": asked, ONNX: _ONNX}


def _prepare(data: DataConfig, detect: DetectConfig) -> str:
    return f"""\
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

names = json.loads(Path("config.json").read_text())["label_names"]
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
scale = min({detect.base_size} / min(image.size), {detect.max_size} / max(image.size))
sides = [max(1, int(scale * side)) for side in image.size]
image = image.resize(sides, Image.Resampling.{FILTERS[data.interpolation]})
pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None].copy()"""
