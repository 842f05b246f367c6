"""README.md says nothing that is not so: its links, commands, options, recipes and tricks are those of the project."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from importlib.util import find_spec
from typing import Any

import pytest

from bench.pairs import show_ratio
from fasttricks import config
from fasttricks.ablation.cells import extend
from fasttricks.commands import evaluate, predict
from fasttricks.config.cli import parse_recipe
from fasttricks.config.expected import EXPECTED, SOURCES
from fasttricks.config.recipes import RECIPES
from fasttricks.config.tricks import TRICKS
from fasttricks.data.packing.imagenet import ImagenetConfig
from lib.tiny import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
INDENTED = [line.strip() for line in re.sub(r" \\\n +", " ", README).splitlines() if line.startswith("    ")]
"""The lines of its code blocks, continued ones joined."""


def in_code(pattern: str) -> set[str]:
    """What `pattern` finds in code blocks and between backquotes."""
    code = "\n".join([*INDENTED, *re.findall(r"`([^`\n]+)`", README)])
    return set(re.findall(pattern, code))


def test_nothing_is_left_to_fill_in() -> None:
    assert "@@" not in README
    assert "TODO" not in README


def test_links_lead_to_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (REPOSITORY / link).exists()] == []


def test_make_targets_are_there() -> None:
    targets = in_code(r"make ((?:[a-z-]+ ?)+)")
    named = {target for group in targets for target in group.split()}
    assert {"train", "test", "help"} <= named
    defined = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert named - defined == set()


def test_modules_that_are_run_are_there() -> None:
    modules = in_code(r"-m ([a-z_.]+)")
    assert "fasttricks.train" in modules
    assert [name for name in modules if find_spec(name) is None] == []


def test_imports_work() -> None:
    imports = in_code(r"from ([a-z_.]+) import ([a-z_, ]+)")
    assert imports
    for module, names in imports:
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module}.{name}"


TRAINING = [
    re.split(r"\bfasttricks[ .]train ", line)[1].partition("#")[0]
    for line in INDENTED
    if re.search(r"\bfasttricks[ .]train ", line) and "..." not in line
]


@pytest.mark.parametrize("arguments", [line for line in TRAINING if "RECIPE" not in line])
def test_training_commands_are_understood(arguments: str) -> None:
    assert isinstance(parse_recipe(shlex.split(arguments), prog="README"), config.TrainConfig)


def test_options_are_fields() -> None:
    launcher = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts", "--help"}
    for option in in_code(r"--[a-z][a-z0-9._-]*") - launcher:
        path = option.removeprefix("--").replace("-", "_")
        roots = (extend(RECIPES["demo"]()), evaluate.EvaluateConfig(), predict.PredictConfig(), ImagenetConfig())
        assert any(has_field(root, path) for root in roots), option


def has_field(root: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(root, name):
            return False
        root = getattr(root, name)
    return True


def rows(first_header: str) -> list[str]:
    """The first cells of the table whose first column is called `first_header`, without backquotes."""
    table = README.partition(f"| {first_header} |")[2].partition("\n\n")[0].splitlines()[2:]
    return [line.split("|")[1].strip().strip("`") for line in table if line.startswith("|")]


def test_the_table_of_recipes_has_their_expected_accuracy() -> None:
    table = README.partition("| You have | recipe | expected top-1 |\n")[2].partition("\n\n")[0].splitlines()[1:]
    assert len(table) > 5
    for line in table:
        _, _, name, figure, _ = line.split("|")
        expected = EXPECTED[name.strip(" `")]
        said = re.fullmatch(r" ([\d.]+) % \((\w+(?: \w+)?)\) ", figure)
        assert said, line
        assert expected.top1 == pytest.approx(float(said[1]), abs=0.5 * 10 ** -len(said[1].partition(".")[2]) + 1e-9)
        assert SOURCES[expected.source].startswith(said[2])


def test_the_first_lines_have_the_figures_of_the_tables() -> None:
    said = re.findall(r"\*\*([\d.]+) (times|%)\*\*", README.partition("![")[0])
    bench = {row["name"]: row["ratio"] for part in ("loader", "step") for row in rows_of("x86_64-cpu", part)}
    ratios = [bench["torchvision, same colour"], bench["timm, channels-last"]]
    scores = [EXPECTED["demo"].top1, EXPECTED["cifar10-fast"].top1]
    assert said == [*((f"{ratio:.1f}", "times") for ratio in ratios), *((f"{score:.4g}", "%") for score in scores)]
    assert f"after {EXPECTED['cifar10-fast'].time.replace('min', 'minutes')} with AVX2" in README


def rows_of(result: str, part: str) -> list[dict[str, Any]]:
    """The rows of the tables of `part` in the committed result of make bench of that name."""
    tables = json.loads((REPOSITORY / "bench" / "results" / f"{result}.json").read_text())["tables"]
    return [row for table in tables[part] for row in table["rows"]]


SHOWN = {
    "x86_64-cpu": ("loader", "step", "kernels"),
    "x86_64-cpu-loader": ("loader",),
    "x86_64-cpu-step32": ("step",),
    "x86_64-cpu-step32-avx2": ("step",),
    "x86_64-cpu-transfer": ("transfer",),
}
"""Results of make bench -> the parts whose every ratio docs/performance.md shows."""


@pytest.mark.parametrize("result", SHOWN)
def test_the_ratios_are_those_of_the_committed_bench(result: str) -> None:
    spans = {
        f"{show_ratio(row['ratio'])} ({show_ratio(row['ratio_low'])} to {show_ratio(row['ratio_high'])})"
        for part in SHOWN[result]
        for row in rows_of(result, part)
        if row["ratio_low"] != row["ratio_high"]
    }
    text = (REPOSITORY / "docs" / "performance.md").read_text()
    assert spans and [span for span in spans if span not in text] == []
    if result == "x86_64-cpu":
        of_readme = re.findall(r"[\d.]+ \([\d.]+ to [\d.]+\)", README)
        assert of_readme and set(of_readme) <= spans


def test_it_is_short() -> None:
    assert len(README.split()) <= 1100


def test_the_table_of_tricks_is_whole() -> None:
    assert rows("trick") == list(TRICKS)
