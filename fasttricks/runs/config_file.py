"""--config FILE: fields of a run from YAML, JSON or another run; and a config as YAML that it takes back. No torch.

YAML is read as YAML 1.2 has its scalars: on, off, yes and no are words, 1e-4 is a number. Nothing else than lists, tables
and scalars is made of it: no tags, no anchors.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fasttricks.config import ConfigError, TrainConfig, UserError, flatten, get_at
from fasttricks.config.fields import field_kinds
from fasttricks.system.extras import missing_extra
from fasttricks.system.reading import Reader, parse_json
from fasttricks.system.schema import anything, table

_OF_THE_RUN = ("run_dir", "resume")
"""Fields that a run's config.json has for itself alone."""
_WAY_OUT = "fasttricks show RECIPE prints one that is right"
_FILES = Reader(ConfigError, "must be a table of fields, as epochs: 20 or loss: {smoothing: 0.1}", _WAY_OUT)
_YAML = (".yaml", ".yml")
_DEEPEST = 32
_TAG = "tag:yaml.org,2002:"
_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,19})", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]{1,4})?|[-+]?[0-9]+[eE][-+]?[0-9]{1,4}",
     "-+.0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
)  # fmt: skip
"""YAML 1.2's kinds of plain scalars: name, pattern, first characters."""
_PLAIN = re.compile(r"[A-Za-z][\w./-]*")
_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
"""YAML 1.1 reads them as others than words."""


def load_config(file: str) -> dict[str, Any]:
    """The fields that `file` gives, by dotted path, and `recipe` where it names one.

    file: a .yaml, .yml or .json whose fields have nested or dotted names, with - or _; or a run's config.json or folder, whose
    fields are taken but run_dir and resume. Raises ConfigError for a file that is none, and for a key that comes twice; whether
    the fields are fields, and their values right, is for resolve().
    """
    path = Path(file)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix.lower() not in (".json", *_YAML):
        raise ConfigError(f"config = {file!r}: must end in .yaml, .yml or .json, or be a run folder; give another")
    content = _FILES.read(path)
    try:
        values = _from_json(content) if path.suffix.lower() == ".json" else _from_yaml(content)
        fields = dict(_flat(values["config"] if _is_run(values) else values))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise _FILES.refusal(path, error) from error
    return {name: value for name, value in fields.items() if not (_is_run(values) and name in _OF_THE_RUN)}


def _is_run(values: Mapping[str, Any]) -> bool:
    return isinstance(values.get("config"), dict) and "versions" in values


def _flat(values: Any) -> dict[str, Any]:
    """Dotted path -> value. Raises ValueError where it is no table, and for a path that comes twice."""
    found: dict[str, Any] = {}
    for path, value in _pairs(values, ""):
        if path in found:
            raise ValueError(f"{path!r} comes twice")
        found[path] = value
    return found


def _pairs(values: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(values, dict) or (not values and prefix):
        if not prefix:
            raise ValueError(f"it is a {type(values).__name__}")
        yield prefix.removesuffix("."), values
        return
    for name, value in values.items():
        if not isinstance(name, str):
            raise ValueError(f"the name {name!r} is no text")
        path = prefix + name.replace("-", "_")
        if isinstance(value, dict):
            yield from _pairs(value, f"{path}.")
        else:
            yield path, value


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} comes twice")
        found[name] = value
    return found


def _from_json(content: bytes) -> Any:
    parse_json(content, table(anything))
    return json.loads(content, object_pairs_hook=_once)


def _from_yaml(content: bytes) -> Any:
    if missing := missing_extra("train", ["yaml"], "a .yaml file"):
        raise UserError(missing)
    import yaml

    try:
        values = yaml.load(content.decode(), _loader())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    if not isinstance(values, dict):
        raise ValueError("it has no fields" if values is None else f"it is a {type(values).__name__}")
    return values


@cache
def _loader() -> Any:
    """yaml's SafeLoader without aliases and keys that come twice, and with YAML 1.2's scalars."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers: Any = {}  # noqa: RUF012 (filled below)
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                mark = self.peek_event().start_mark
                raise yaml.composer.ComposerError(None, None, "aliases (*name) are not read", mark)
            self.depth += 1
            if self.depth > _DEEPEST:
                raise yaml.composer.ComposerError(None, None, f"nested deeper than {_DEEPEST}")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            return _once(
                [(self.construct_object(key), self.construct_object(value, True)) for key, value in node.value]
            )

    Loader.add_constructor(f"{_TAG}map", Loader.construct_mapping)
    for name, pattern, first in _SCALARS:
        starts = ["" if character == "\0" else character for character in first]
        Loader.add_implicit_resolver(f"{_TAG}{name}", re.compile(f"^(?:{pattern})$"), starts)
    return Loader


# ------------------------------------------------------------------------------------------------------- as YAML


def config_yaml(config: TrainConfig) -> str:
    """`config` as YAML that load_config() takes back; a field that is not at its default has that behind it."""
    cls: type = type(config)
    defaults, lines, section = _defaults(cls), [], ""
    for path in field_kinds(cls):
        value, (before, _, name) = get_at(config, path), path.rpartition(".")
        if before != section:
            lines += [f"{before}:"]
            section = before
        default = defaults.get(path, value)
        note = f"  # default: {_scalar(default)}" if value != default else ""
        lines.append(f"{'  ' if section else ''}{_scalar(name)}: {_scalar(value)}{note}")
    return "\n".join(lines)


def _defaults(cls: type) -> dict[str, Any]:
    own = {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
    made = {f.name: f.default_factory() for f in dataclasses.fields(cls) if callable(f.default_factory)}
    return flatten(own | {name: dataclasses.asdict(section) for name, section in made.items()})


def _scalar(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, float):
        if not math.isfinite(value):
            return f".{value}" if value != -math.inf else "-.inf"
        mantissa, exponent, power = repr(value).partition("e")
        return f"{mantissa}{'.0' * ('.' not in mantissa)}{exponent}{power}"  # YAML 1.1 reads 1e-05 as a word
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
        return value if plain else json.dumps(value, ensure_ascii=not value.isprintable())
    return json.dumps(value)
