"""Run a test's body in a process of its own in which Triton interprets kernels, on CPU tensors.

TRITON_INTERPRET must be set before a kernel's module is imported, and no other test may see it: so a second process,
started once a session by the first test that needs it.
"""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the test's body runs under the interpreter. Its arguments must pickle."""

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        _worker().submit(_call, test.__module__, test.__name__, arguments).result()

    return run


@functools.lru_cache(maxsize=1)
def _worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_interpret)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NumPy on inf - inf, in lanes that are masked out
    _patch_once_a_launch()
    _sum_as_a_tree()


def _sum_as_a_tree() -> None:
    """NumPy adds the rows of a tile one after another, whose error grows with their number. A GPU adds halves to halves.

    Along a row NumPy adds by pairs itself.
    """
    from triton.runtime.interpreter import ReduceOps

    plain = ReduceOps.sum

    def summed(self: Any, value: Any) -> Any:
        data, axis = value.handle.data, self.axis
        if axis == data.ndim - 1:
            return plain(self, value)
        while data.shape[axis] > 1:  # a power of two
            half = data.shape[axis] // 2
            data = data.take(range(half), axis) + data.take(range(half, 2 * half), axis)
        return self.to_tensor(data if self.keep_dims else data.squeeze(axis), value.dtype)

    ReduceOps.sum = summed


def _patch_once_a_launch() -> None:
    """Triton looks through its language for what to patch at a launch, and again at each call of a function within it.

    That is half of the time, and there is nothing left to patch.
    """
    from triton import language
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def languages(function: Callable[..., object]) -> list[Any]:
        used = list(map(id, function.__globals__.values()))
        return [module for module in (language, language.core) if id(module) in used]

    def patch_what_is_not(function: Callable[..., object]) -> Any:
        return patch(function) if any(language.core.is_builtin(module.load) for module in languages(function)) else None

    interpreter._patch_lang = patch_what_is_not


def _call(module: str, name: str, arguments: dict[str, Any]) -> None:
    from lib.seeds import seed_all

    seed_all()
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)
