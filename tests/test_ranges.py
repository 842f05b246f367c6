"""Ranges of fields: what they say, what they let pass, and that every config of the project holds its fields to them."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fasttricks.ablation.cells import AblateConfig
from fasttricks.config import (
    ConfigError,
    DataConfig,
    DetectConfig,
    Range,
    Rising,
    ScheduleConfig,
    Span,
    TrainConfig,
    field_docs,
    field_rules,
)
from fasttricks.config.cli import parse
from fasttricks.config.ranges import OneOf, Rule
from fasttricks.planning.planner import PlanConfig
from lib.configs import edges, plain, words_of
from lib.tiny import REPOSITORY

WORDS: list[tuple[Rule, str, list[Any], list[Any]]] = [
    (Range(1), "1 or more", [1, 2, 10**400], [0, -1, math.inf, math.nan]),
    (Range(8, unit="pixels"), "8 or more pixels", [8], [7.9]),
    (Range(0, zero="off"), "0 (off) or more", [0, 0.1], [-0.1]),
    (Range(0, 1), "0 to 1", [0, 0.5, 1], [-0.1, 1.1, math.nan]),
    (Range(0, 1, below=True), "0 or more and below 1", [0, 0.99], [1, -0.1]),
    (Range(0, 1, below=True, zero="none"), "0 (none) or more and below 1", [0], [1]),
    (Range(0, 1, above=True), "above 0 and at most 1", [0.1, 1], [0, 1.1]),
    (Range(0, 1, above=True, below=True), "above 0 and below 1", [0.5], [0, 1]),
    (Range(0, above=True), "above 0", [0.1], [0, math.inf]),
    (Range(0, above=True, zero="dynamic"), "above 0, or 0 (dynamic)", [0, 0.1], [-0.1]),
    (Range(1, 100, zero="choose"), "1 to 100, or 0 (choose)", [0, 1, 100], [-1, 0.5, 101]),
    (Range(32, zero="keep", unit="pixels"), "32 or more pixels, or 0 (keep)", [0, 32], [1, 31]),
    (Span(0, 1), "two numbers with 0 < first <= second <= 1", [(0.1, 1.0), (1.0, 1.0)], [(0.0, 1.0), (0.1,)]),
    (Rising(), "rising and above 0", [(), (1, 2)], [(0, 1), (2, 1), (1, 1)]),
    (Rising(empty=False), "one number or more, rising and above 0", [(1,), (1, 2)], [(), (2, 1)]),
    (OneOf(("a", 2)), "one of a, 2", ["a", 2], ["b", ""]),
]
"""A rule, its words, what is inside and what outside."""


@pytest.mark.parametrize(("rule", "words", "inside", "outside"), WORDS, ids=lambda value: getattr(value, "words", None))
def test_a_rule_lets_pass_what_its_words_say(rule: Rule, words: str, inside: list[Any], outside: list[Any]) -> None:
    assert rule.words == words
    assert all(rule.holds(value) for value in inside)
    assert not any(rule.holds(value) for value in outside)
    assert rule.message.startswith(f"must be {words}")


def test_the_error_says_the_note_too() -> None:
    assert Range(5, note="a median of fewer says little").message == "must be 5 or more; a median of fewer says little"


# -------------------------------------------------------------------------------------------------- every config
RUN = {"recipe": "test", "epochs": 120, "global_batch_size": 256, "schedule": ScheduleConfig(warmup_epochs=0)}
REQUIRED: dict[type, dict[str, Any]] = {
    **dict.fromkeys((TrainConfig, AblateConfig, PlanConfig), RUN),
    DataConfig: {"val_resize": 8192},
    DetectConfig: {"max_size": 8192},
}
"""What a config cannot be made without, and what leaves its other fields their whole range."""


def every_config() -> list[type]:
    """Each dataclass of the project that is called a config, in the file that the command line reads it in."""
    found = []
    for file in sorted([*REPOSITORY.glob("fasttricks/**/*.py"), *REPOSITORY.glob("bench/**/*.py")]):
        names = re.findall(r"^class (\w*Config|BenchData)\b", file.read_text(), re.MULTILINE)
        module = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
        found += [getattr(importlib.import_module(module), name) for name in names]
    return found


def make(cls: type, **values: Any) -> Any:
    """A `cls` with these values, whatever else it needs besides."""
    needed = {f.name: "" for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    return cls(**{**needed, **REQUIRED.get(cls, {}), **values})


CONFIGS = every_config()
each_config = pytest.mark.parametrize("cls", CONFIGS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
RELATED = {"val_resize", "max_size", "more_seeds"}
"""Numbers whose range another field gives."""


def test_the_configs_are_found() -> None:
    assert {"TrainConfig", "DataConfig", "PlanConfig", "AblateConfig", "CostConfig", "PackConfig", "ScanConfig"} <= {
        cls.__name__ for cls in CONFIGS
    }
    assert {"PredictConfig", "EvaluateConfig", "ExportConfig", "ImagenetConfig", "BenchConfig", "SoakConfig"} <= {
        cls.__name__ for cls in CONFIGS
    }


@each_config
def test_every_number_has_a_range(cls: type) -> None:
    numbers = {name for name, kind in get_type_hints(cls).items() if kind in (int, float)}
    assert numbers - field_rules(cls).keys() <= RELATED


@each_config
def test_values_just_inside_pass_and_just_outside_are_refused(cls: type) -> None:
    for name, rule in field_rules(cls).items():
        inside, outside = edges(cls, name)
        assert inside and outside
        if name == "task":  # the others need fields of their own
            inside = ["classification"]
        for value in inside:
            assert getattr(make(cls, **{name: value}), name) == value
        for value in outside:
            with pytest.raises(ConfigError, match=rf"^[a-z]*\.?{name} = {re.escape(f'{value!r}: {rule.message}')}$"):
                make(cls, **{name: value})


@each_config
def test_the_help_has_the_string_under_each_field_and_its_range(
    cls: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")  # tyro sets wider ones in two columns
    with pytest.raises(SystemExit, match="0"):
        parse(make(cls), ["--help"], prog="test", description="")
    shown, docs, rules, kinds = plain(capsys.readouterr().out), field_docs(cls), field_rules(cls), get_type_hints(cls)
    for name in (field.name for field in dataclasses.fields(cls) if not dataclasses.is_dataclass(kinds[field.name])):
        text = f"{docs[name]} {words_of(rules[name]) if name in rules else ''}".strip()
        flag, before_default = f"--{name.replace('_', '-')}", r"(?:(?!\(default: ).)*"
        assert re.search(rf" {flag}[ ,]{before_default}{re.escape(plain(text))} \(default: ", shown), (name, text)


def test_the_strings_under_fields_are_found_in_the_classes_that_a_config_extends() -> None:
    assert field_docs(PlanConfig)["seed"] == field_docs(TrainConfig)["seed"]
    assert (
        Path(importlib.import_module(PlanConfig.__module__).__file__ or "")
        .read_text()
        .count(field_docs(PlanConfig)["network_gbit"])
    )
