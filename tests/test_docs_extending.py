"""docs/architecture.md and docs/extending.md say nothing that is not so: their snippets run, their files and tests are there."""

from __future__ import annotations

import contextlib
import re
import runpy
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import tomllib

from fasttricks.config import NETWORKS
from fasttricks.config.recipes import RECIPES
from fasttricks.config.tricks import TRICKS
from fasttricks.data import sources
from fasttricks.models import MODELS
from fasttricks.tasks import TASKS
from lib.tiny import REPOSITORY

PAGES = {name: (REPOSITORY / "docs" / name).read_text() for name in ("architecture.md", "extending.md")}
SNIPPETS = [
    (title, textwrap.dedent("\n".join(lines)))
    for title, body in re.findall(r"## (.*?)\n(.*?)(?=\n## |\Z)", PAGES["extending.md"], re.DOTALL)
    if (lines := re.findall(r"^(?:    .*|)$", body, re.MULTILINE)) and any(line.strip() for line in lines)
]


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is added to a registry is taken away again."""
    with contextlib.ExitStack() as stack:
        for registry in (TRICKS, MODELS, NETWORKS, RECIPES, TASKS):
            stack.enter_context(mock.patch.dict(registry))
        monkeypatch.setattr(sources, "OPENERS", [*sources.OPENERS])
        yield


def test_every_addition_has_a_snippet() -> None:
    additions = ["A trick", "A model", "A recipe", "A kernel", "A source of images", "A metric", "A Task"]
    assert [title for title, _ in SNIPPETS] == additions


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("title", [title for title, _ in SNIPPETS])
def test_the_snippet_runs(
    title: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of its own, where it leaves nothing."""
    monkeypatch.chdir(tmp_path)
    code = dict(SNIPPETS)[title]
    assert "\nassert " in code, "a snippet that shows nothing"
    file = tmp_path_factory.mktemp("snippet") / "snippet.py"  # a file, for Triton reads a kernel's source
    file.write_text(code)
    runpy.run_path(str(file))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page", PAGES)
def test_the_files_and_folders_that_it_names_are_there(page: str) -> None:
    text = PAGES[page]
    named = set(re.findall(r"\b((?:[\w.]+/)*\w+\.(?:py|md))\b", text)) - {"NAME.py"}
    named = {name for name in named if "NAME" not in name and not name.startswith("test_")}
    assert len(named) > 5
    for name in named:
        places = ("", "fasttricks/", "docs/", "kernels/fasttricks_kernels/")
        assert any((REPOSITORY / place / name).is_file() for place in places), name
    tests = set(re.findall(r"\btest_\w+\.py\b", text))
    assert all((REPOSITORY / "tests" / name).is_file() for name in tests), tests


def test_the_rooms_are_those_of_the_contract() -> None:
    """The table's rows, from the top down, are import-linter's layers."""
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == ["fasttricks"])
    table = PAGES["architecture.md"].partition("| room | contents |\n|---|---|\n")[2].partition("\n\n")[0]
    rows = [row.split("|")[1].strip().removesuffix(".py").replace("\\_", "_") for row in table.splitlines()]
    assert [set(row.split(", ")) - {"data.prepare"} for row in rows] == [set(layer.split(" | ")) for layer in layers]
