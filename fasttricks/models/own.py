"""A user's own network: PACKAGE.MODULE:FACTORY, imported from sys.path and the working directory.

It runs the user's code, so only a name that the user gave may come here: runs.saved.Saved sees to it for names in files.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from typing import Any

import torch
from torch import nn

from fasttricks.config import ConfigError, nearest, require


def own_model(name: str, *, num_classes: int) -> nn.Module:
    """The network that FACTORY(num_classes=...) returns, in training mode.

    name: PACKAGE.MODULE:FACTORY; FACTORY may be a class. Raises ConfigError where there is no such module or FACTORY, where it
    cannot be imported or called so, and where it returns no module of FP32 weights. Errors within FACTORY are raised as they are.
    """
    path, _, factory_name = name.partition(":")
    factory = _find(name, _import(name, path), factory_name)
    rule = f"must be a function or class that takes num_classes, but is of the kind {type(factory).__name__}"
    require(callable(factory), "model.name", name, rule)
    try:
        inspect.signature(factory).bind(num_classes=num_classes)
    except (TypeError, ValueError) as error:  # ValueError: a builtin without a signature
        rule = f"must take num_classes alone, as {factory_name}(num_classes={num_classes}); {error}"
        raise ConfigError(f"model.name = {name!r}: {rule}; write a function that does") from error
    model = factory(num_classes=num_classes)
    rule = f"must return a torch.nn.Module, but returned an object of the kind {type(model).__name__}"
    require(isinstance(model, nn.Module), "model.name", name, rule)
    other = next((f"{n} is {p.dtype}" for n, p in model.named_parameters() if p.dtype != torch.float32), "")
    require(
        not other, "model.name", name, f"must return FP32 weights, but {other}; --precision chooses that of the run"
    )
    require(
        bool(list(model.parameters())), "model.name", name, "must return a network with weights, but this one has none"
    )
    network: nn.Module = model.train()
    return network


def _import(name: str, path: str) -> Any:
    """The module `path`. The working directory comes last on sys.path, so that no file there hides a package."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
        importlib.invalidate_caches()
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and (path == error.name or path.startswith(f"{error.name}.")):
            rule = f"there is no module {error.name} on sys.path or in {here}; give --model.name PACKAGE.MODULE:FACTORY"
            raise ConfigError(f"model.name = {name!r}: {rule}") from error
        raise _failed(name, path, error) from error
    except Exception as error:  # whatever the user's module raises
        raise _failed(name, path, error) from error


def _failed(name: str, path: str, error: Exception) -> ConfigError:
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__}: {error} at {last.filename}:{last.lineno}"
    return ConfigError(f"model.name = {name!r}: the import of {path} failed ({where}); mend that")


def _find(name: str, module: Any, factory: str) -> Any:
    if hasattr(module, factory):
        return getattr(module, factory)
    known = [one for one in vars(module) if not one.startswith("_") and callable(getattr(module, one))]
    near = nearest(factory, known, likeness=0.4)
    rule = f"{module.__name__} has no {factory}" + (f"; did you mean {near}?" if near else "")
    raise ConfigError(f"model.name = {name!r}: {rule}; it is {module.__file__}")
