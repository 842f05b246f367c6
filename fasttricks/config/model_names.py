"""Model names as strings. No torch import, so that tricks and the command line's help stay instant."""

from __future__ import annotations

import re

from fasttricks.config import require


def variant_of(name: str, letter: str) -> str:
    """The same network in another variant: variant_of("resnet50a", "d") is "resnet50d".

    `letter` is a, b, c or d (section 4 of the paper). Raises ConfigError for another letter or for a network that
    has no variants.
    """
    match = re.fullmatch(r"(resnet\d+)[abcd]", name)
    rule = "has no variants a to d, so the trick resnet_d does not apply; only names like resnet50a have"
    require(match is not None, "model.name", name, rule)
    require(letter in tuple("abcd"), "variant", letter, "must be a, b, c or d")
    assert match is not None
    return match[1] + letter
