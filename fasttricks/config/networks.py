"""The networks by name, without torch: a row each. fasttricks/models has their constructors."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fasttricks.config.errors import DoesNotApplyError, require

TIMM = "timm:"
"""Prefix of a name of timm's."""
TORCHVISION = "torchvision:"
"""Prefix of a name of torchvision's, whose trained weights a run can start from."""
_OWN = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
VARIANTS = "abcd"
"""The variants of a ResNet, section 4 of the paper."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One network."""

    name: str
    """As of ModelConfig.name."""
    family: str
    """resnet, inception, mobilenet or cifarnet; timm for a name of timm's; own for PACKAGE.MODULE:FACTORY; empty: none."""
    options: tuple[str, ...]
    """The fields of ModelConfig that it has a use for; any other must be at its default."""
    variant: str = ""
    """Variant of a ResNet: a, b, c or d; empty for another network."""
    image_size: int = 224
    """Side of the images that it was made for, pixels."""
    val_resize: int = 256
    """Their short side before the centre crop, in validation."""
    timm: str = ""
    """timm's name of the very same network: equal weights give equal outputs. Empty: it has none."""
    torchvision: str = ""
    """torchvision's, likewise."""


def _resnet(layers: int, letter: str) -> ModelInfo:
    """A row. 8, 10 and 11 layers are ours; of the others B is torchvision's and timm's ResNet, and timm has D and most C.

    No other library has variant A; its weights would load into their resnet50, whose outputs differ. A basic block (18 and 34
    layers) has no first 1x1 to stride in, so its A is B.
    """
    name, published, basic = f"resnet{layers}{letter}", layers >= 18, layers in (18, 34)
    theirs = f"resnet{layers}" if published and (letter == "b" or (letter == "a" and basic)) else ""
    in_timm = published and (letter == "d" or (letter == "c" and not basic))
    return ModelInfo(
        name=name,
        family="resnet",
        options=("width", "stem_stride", "zero_gamma", "norm"),
        variant=letter,
        timm=name if in_timm else theirs,
        torchvision=theirs,
    )


NETWORKS: dict[str, ModelInfo] = {
    info.name: info
    for info in (
        *(_resnet(layers, letter) for layers in (8, 10, 11, 18, 34, 50, 101, 152) for letter in VARIANTS),
        # 342 pixels keep the 0.875 of 224 / 256: the paper leaves them open
        ModelInfo(
            name="inception_v3",
            family="inception",
            options=("width", "aux_head", "norm"),
            image_size=299,
            val_resize=342,
            timm="inception_v3",
            torchvision="inception_v3",
        ),
        ModelInfo(name="mobilenet_v1", family="mobilenet", options=("width", "norm"), timm="mobilenetv1_100"),
        ModelInfo(
            name="cifarnet",
            family="cifarnet",
            options=("width", "whitening", "identity_init", "norm"),
            image_size=32,
            val_resize=32,
        ),
    )
}
"""The networks by name."""
OPTIONS = {
    "width": "only the project's own networks have a width",
    "stem_stride": "only the ResNets have such a stem",
    "zero_gamma": "only the project's ResNets have residual blocks to start as the identity: zero gamma does not apply",
    "aux_head": "only inception_v3 has an auxiliary head",
    "whitening": "only cifarnet has a first layer for it: whitening does not apply",
    "identity_init": "only cifarnet's convolutions can start so: identity init does not apply",
    "norm": "only the project's own networks have its batch norm",
}
"""Fields of ModelConfig that not every network has a use for -> why another has none."""
OPTION_TRICKS = ("zero_gamma", "whitening", "identity_init")
"""Those of OPTIONS that the trick of the same name switches."""


def model_info(name: str) -> ModelInfo:
    """The facts about the network `name`: a row of NETWORKS; for timm:NAME, or a user's own, a row that says so.

    Any other name, whose options nobody can judge, has all of them: build_model refuses it.
    """
    if name.startswith(TIMM):
        return ModelInfo(name=name, family="timm", options=(), timm=name.removeprefix(TIMM))
    if not name.startswith(TORCHVISION) and _OWN.fullmatch(name):
        return ModelInfo(name=name, family="own", options=())
    return NETWORKS.get(name) or ModelInfo(name=name, family="", options=tuple(OPTIONS))


def find_network(name: str) -> str:
    """The network that `name` is, in the spelling of timm and torchvision too (resnet18, inceptionv3, mobilenet); empty: none."""
    if name in NETWORKS or name.startswith(TIMM):
        return name
    plain = name.lower().replace("_", "").replace("-", "")
    alike = {"inceptionv3": "inception_v3", "mobilenet": "mobilenet_v1", "mobilenetv1": "mobilenet_v1"}
    return alike.get(plain) or next((known for known in (plain, f"{plain}d") if known in NETWORKS), "")


def variant_of(name: str, letter: str) -> str:
    """The same network in another variant: variant_of("resnet50a", "d") is "resnet50d".

    `letter` is a, b, c or d (section 4 of the paper). Raises ConfigError for another letter, and DoesNotApplyError for
    a network that has no variants.
    """
    rule = "has no variants a to d, so the trick resnet_d does not apply; only names like resnet50a have"
    require(bool(model_info(name).variant), "model.name", name, rule, DoesNotApplyError)
    require(letter in tuple(VARIANTS), "variant", letter, "must be a, b, c or d")
    return name[:-1] + letter
