"""Fuzz what reads a config: python tests/fuzz_config.py SECONDS. Not collected by pytest; make fuzz runs it.

Any JSON in the place of config.json, and any words on the command line, give a config that keeps its rules, or a ConfigError,
or exit status 2; never another exception.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fasttricks.config import ConfigError, TrainConfig, from_dict
from fasttricks.config.cli import parse_recipe
from fasttricks.config.recipes import RECIPES
from fasttricks.runs.begin import check_run_dir
from fasttricks.runs.folder import made_by_this_launch, read_config
from lib.fuzzing import settings_for, take_turns

SETTINGS = settings_for(50)
FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
GOOD = json.loads(json.dumps(dataclasses.asdict(RECIPES["resnet50d-tricks"]())))


def paths(values: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Where every field and section of a config is."""
    return [
        p for n, v in values.items() for p in [(*prefix, n), *(paths(v, (*prefix, n)) if isinstance(v, dict) else [])]
    ]


PATHS = paths(GOOD)


def read(text: str) -> None:
    """A run folder whose config.json is `text`."""
    (FOLDER / "config.json").write_text(text, errors="surrogatepass")
    made_by_this_launch(str(FOLDER))
    resumed = from_dict(TrainConfig, GOOD | {"run_dir": str(FOLDER), "resume": True})
    for ask in (lambda: read_config(FOLDER), lambda: check_run_dir(resumed)):
        with contextlib.suppress(ConfigError):
            ask()


@SETTINGS
@given(st.text(max_size=60))
def any_text(text: str) -> None:
    """No JSON."""
    read(text)


@SETTINGS
@given(JSON)
def any_json(value: Any) -> None:
    """JSON of any shape, whole and as the config."""
    read(json.dumps(value))
    read(json.dumps({"config": value}))


@SETTINGS
@given(st.lists(st.tuples(st.sampled_from(PATHS), JSON), min_size=1, max_size=3))
def any_field(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    """A good config with values of any kind in a few fields."""
    values = json.loads(json.dumps(GOOD))
    for path, value in changes:
        place = values
        for name in path[:-1]:
            place = place[name] if isinstance(place.get(name), dict) else {}
        place[path[-1]] = value
    read(json.dumps({"config": values}))


FLAGS = ["--" + ".".join(path).replace("_", "-") for path in PATHS]
WORDS = (
    st.sampled_from(FLAGS)
    | st.text(max_size=12)
    | st.sampled_from(["0", "-1", "1e999", "nan", "True", "None", "fp16", ""])
)


@SETTINGS
@given(st.sampled_from([*RECIPES, "x"]), st.lists(WORDS, max_size=6))
def any_words(recipe: str, words: list[str]) -> None:
    """Fields, values and noise on the command line."""
    code: object = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            parse_recipe([recipe, *words], prog="fuzz")
        except ConfigError:
            code = 2
        except SystemExit as end:
            code = end.code
    assert code in (0, 2)


def main(seconds: float) -> int:
    """As fuzzing.take_turns."""
    os.environ["COLUMNS"] = "100"
    return take_turns((any_text, any_json, any_field, any_words), seconds)


if __name__ == "__main__":
    print(
        f"config and command line: {main(float(sys.argv[1]))} turns of 4 x {SETTINGS.max_examples} inputs, nothing found"
    )
