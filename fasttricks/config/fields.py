"""The fields of a config by their dotted paths, and configs from plain data."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from fasttricks.config.errors import ConfigError, require

T = TypeVar("T")


def replace_fields(config: T, values: Mapping[str, Any]) -> T:
    """A copy of `config` with the fields at the dotted paths of `values` replaced, all at once.

    So a rule that relates two of them is judged on their new values.
    """
    own = {path: value for path, value in values.items() if "." not in path}
    nested: dict[str, dict[str, Any]] = {}
    for path in values.keys() - own.keys():
        section, _, rest = path.partition(".")
        nested.setdefault(section, {})[rest] = values[path]
    sections = {name: replace_fields(getattr(config, name), inner) for name, inner in nested.items()}
    return dataclasses.replace(config, **own, **sections)  # type: ignore[type-var]


def replace_at(config: T, path: str, value: Any) -> T:
    """A copy of `config` with the field at the dotted `path` replaced: replace_at(c, "loss.smoothing", 0.1)."""
    return replace_fields(config, {path: value})


@cache
def own_kinds(cls: type) -> Mapping[str, Any]:
    """Field -> type, of the dataclass `cls`; a section's is its dataclass."""
    return get_type_hints(cls)


@cache
def field_kinds(cls: type, prefix: str = "") -> Mapping[str, Any]:
    """Dotted path -> type, of every field of the dataclass `cls` and its sections that is not itself a section."""
    found: dict[str, Any] = {}
    for name, kind in own_kinds(cls).items():
        section = isinstance(kind, type) and dataclasses.is_dataclass(kind)
        found |= field_kinds(kind, f"{prefix}{name}.") if section else {prefix + name: kind}
    return found


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the string under it in the source, on one line, of the dataclass `cls` and of those it extends."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found |= _docs_of_module(base.__module__).get(base.__name__, {})
    return found


@cache
def _docs_of_module(name: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the string under it."""
    classes = [c for c in ast.parse(inspect.getsource(sys.modules[name])).body if isinstance(c, ast.ClassDef)]
    return {c.name: dict(_docs_of_class(c)) for c in classes}


def _docs_of_class(found: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for line, below in pairwise(found.body):
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr):
            yield ast.unparse(line.target), " ".join(str(ast.literal_eval(below.value)).split())


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of nested tables: flatten({"loss": {"smoothing": 0.1}}) is {"loss.smoothing": 0.1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def get_at(config: Any, path: str) -> Any:
    """The field at the dotted `path`: get_at(c, "loss.smoothing")."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def from_dict(cls: type[T], values: dict[str, Any], path: str = "") -> T:
    """The dataclass `cls` from nested plain dicts, as json.load gives them; errors put `path` before a field's name.

    Raises ConfigError for an unknown or missing field, and for a value that is not of its field's kind.
    """
    require(isinstance(values, dict), cls.__name__, values, "must be a table of fields and values")
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(known))
    require(not unknown, cls.__name__, unknown, f"is not a field; the fields are {', '.join(known)}")
    kinds = own_kinds(cast(type, cls))
    made = {name: from_plain(kinds[name], value, path + name) for name, value in values.items()}
    try:
        return cls(**made)
    except TypeError as error:  # a field is missing
        raise ConfigError(f"{cls.__name__}: {error}") from error


def from_plain(kind: Any, value: Any, name: str) -> Any:
    """`value`, of JSON, as the field `name` of `kind` holds it; Literals are left to the dataclass, which names the choices."""
    if dataclasses.is_dataclass(kind):
        return from_dict(cast(type, kind), value, name + ".")
    if get_origin(kind) is Literal:
        return value
    if get_origin(kind) is tuple:
        require(isinstance(value, (list, tuple)), name, value, "must be a list")
        return tuple(from_plain(get_args(kind)[0], item, name) for item in value)
    accepted = (int, float) if kind is float else kind
    ok = isinstance(value, accepted) and (kind is bool or not isinstance(value, bool))
    require(ok, name, value, f"must be of the kind {kind.__name__}")
    return value
