"""Bag-of-tricks training of image classifiers (He et al., 2018): the fastest correct way on one CPU, one GPU or many.

    import fasttricks as ft
    result = ft.train("demo", epochs=4)
    ft.predict(result.run_dir, "image.jpg")

docs/api.md describes the functions. torch is imported at the first use of one that needs it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttricks.api import (
        Result,
        create_model,
        evaluate,
        list_models,
        list_recipes,
        load,
        predict,
        train,
    )
    from fasttricks.data.pipeline.loader import Loader

__version__ = "0.1.0"
__all__ = [
    "Loader",
    "Result",
    "create_model",
    "evaluate",
    "list_models",
    "list_recipes",
    "load",
    "predict",
    "train",
]
_ELSEWHERE = {"Loader": "fasttricks.data.pipeline.loader"}
_READ_IMAGES = ("Loader", "evaluate", "predict", "train")


def __getattr__(name: str) -> Any:
    """The function or class `name` of the API, imported at its first use.

    Raises ImportError without the extra `train` for those that read images; networks and lists need torch alone.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fasttricks.system.extras import TRAIN_MODULES, missing_extra

    if name in _READ_IMAGES and (missing := missing_extra("train", TRAIN_MODULES, f"fasttricks.{name}")):
        raise ImportError(missing)
    value = getattr(import_module(_ELSEWHERE.get(name, "fasttricks.api")), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps the API's functions from being hidden by the modules of the same names, which `python -m` needs.

    The import of a module binds it in its package: after `import fasttricks.train`, fasttricks.train would be no function.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
