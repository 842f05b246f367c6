"""The Python in a model card: an image made ready, and the exported weights loaded and asked, by each library that can.

tests/test_model_card.py runs every block as it is printed, in the exported folder.
"""

from __future__ import annotations

from collections.abc import Mapping

from fasttricks.config import DataConfig, ModelConfig, model_info

ONNX = "ONNX Runtime"
"""Heading of the block for a folder that has model.onnx."""
FILTERS = {"linear": "BILINEAR", "cubic": "BICUBIC", "lanczos3": "LANCZOS"}
_APPLY = """\
with torch.no_grad():
    logits = model((torch.from_numpy(pixels) - mean) / std)"""
_ONE = """\
shares = logits.softmax(1)[0]
print(names[shares.argmax()], float(shares.max()))"""
_SEVERAL = """\
shares = logits.sigmoid()[0]
print({name: float(share) for name, share in zip(names, shares) if share > 0.5})"""
_ONNX = """\
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(["logits"], {"pixels": pixels})"""
_ONNX_ONE = "print(names[logits[0].argmax()])"
_ONNX_SEVERAL = "print([name for name, logit in zip(names, logits[0]) if logit > 0])"


def snippets(
    config: ModelConfig,
    data: DataConfig,
    counterparts: Mapping[str, str],
    num_classes: int,
    *,
    several: bool = False,
) -> dict[str, str]:
    """Heading -> lines of Python, to be run in this order in the exported folder, which has an image.jpg.

    counterparts: the network's names in timm and torchvision. several: an image may have several classes. ONNX comes last.
    """
    found: dict[str, str] = {}
    if "timm" in counterparts:
        found["timm"] = _asked(data, "import timm", 'model = timm.create_model("local-dir:.", pretrained=True)')
    if "torchvision" in counterparts:
        is_inception = model_info(config.name).family == "inception"
        more = f", aux_logits={config.aux_head}, init_weights=False" if is_inception else ""
        made = f"model = torchvision.models.{counterparts['torchvision']}(num_classes={num_classes}{more})"
        found["torchvision"] = _asked(data, "import torchvision", made, loads=True)
    if not counterparts:
        imports = "from fasttricks.config import ModelConfig\nfrom fasttricks.models import build_model"
        found["fasttricks"] = _asked(
            data, imports, f"model = build_model({own_config(config)}, {num_classes})", loads=True
        )
    asked = {heading: f"{code}\n{_SEVERAL if several else _ONE}" for heading, code in found.items()}
    return {"An image": _prepare(data), **asked, ONNX: f"{_ONNX}\n{_ONNX_SEVERAL if several else _ONNX_ONE}"}


def _prepare(data: DataConfig) -> str:
    size, kind = data.image_size, f"Image.Resampling.{FILTERS[data.interpolation]}"
    resize = f"image = image.resize(sides, {kind})"
    if not data.antialias and data.interpolation == "linear":
        resize = f"image = image.transform(sides, Image.Transform.EXTENT, (0, 0, *image.size), {kind})"
    elif not data.antialias:
        resize += "  # PIL antialiases, the run did not: its pixels differ where an image shrinks"
    return f"""\
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

names = json.loads(Path("config.json").read_text())["label_names"]
image = ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")
sides = [int(side * {data.val_resize} / min(image.size) + 0.5) for side in image.size]
{resize}
left, top = ((side - {size}) // 2 for side in image.size)
image = image.crop((left, top, left + {size}, top + {size}))
pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None].copy()"""


def _asked(data: DataConfig, imports: str, made: str, *, loads: bool = False) -> str:
    """A block that makes a model and asks it for logits. loads: it comes without the weights."""
    mean, std = (f"torch.tensor({list(values)}).view(3, 1, 1)" for values in (data.mean, data.std))
    loader = ["from safetensors.torch import load_file"] if loads else []
    heads = sorted([*imports.splitlines(), "import torch", *loader], key=lambda line: line.startswith("from"))
    weights = ['model.load_state_dict(load_file("model.safetensors"))'] if loads else []
    normal = [f"mean, std = {mean}, {std}"]
    return "\n".join([*heads, "", made, *weights, "model.eval()", *normal, _APPLY])


def own_config(config: ModelConfig) -> str:
    """The config as Python, without the fields at their defaults and those that say nothing of the network's shape."""
    shape = {"name": config.name, **{field: getattr(config, field) for field in model_info(config.name).options}}
    plain = {"num_classes", "zero_gamma", "norm"}
    given = [f"{n}={v!r}" for n, v in shape.items() if n not in plain and (n == "name" or v != getattr(ModelConfig, n))]
    return f"ModelConfig({', '.join(given)})"
