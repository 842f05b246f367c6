"""Plain English in docs, docstrings, comments, help and messages: subject, verb, object; no habit that readers stumble over."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from fasttricks.commands import COMMANDS
from fasttricks.config.recipes import RECIPES
from lib.tiny import REPOSITORY

BANNED = {
    r"(?i)\bwhat\b": "name the thing: `the loss that ...`, `the contents of ...`",
    r"(?i)\b(?:go|goes|going|went|gone) on\b": "continue, resume",
    r"(?i)\bby turns\b|\btak(?:e|es|ing) turns\b": "alternate, in alternation",
    r"(?i)\banew\b": "again",
    r"(?i)\bfor ever\b": "at any time, always",
    r"(?i)\baloud\b": "with a warning, counted",
    r"(?i)\bmeanwhile\b": "during ..., by then",
    r"(?:^|[.!?] )Of ": "begin with the subject: `Seed of the order`, not `Of the order`",
}
"""Pattern -> plainer words."""
FOLDERS = ("fasttricks", "kernels/fasttricks_kernels", "bench")
PAGES = (
    *sorted(str(page.relative_to(REPOSITORY)) for page in (REPOSITORY / "docs").glob("*.md")),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md", "Makefile"),
)


def found(text: str) -> list[str]:
    """The banned words of `text`, each with its surroundings and the way out."""
    text = " ".join(text.split())
    return [
        f"...{text[max(0, match.start() - 30) : match.end() + 30]}...: {way_out}"
        for pattern, way_out in BANNED.items()
        for match in re.finditer(pattern, text)
    ]


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of each string and of each block of comments of a Python file."""
    source = file.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
    last, block = -1, [""]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1:
                yield last, " ".join(block)
                block = []
            last = token.start[0]
            block.append(token.string.lstrip("# "))
    yield last, " ".join(block)


@pytest.mark.parametrize("folder", FOLDERS)
def test_docstrings_comments_and_messages(folder: str) -> None:
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    assert len(files) > 20
    assert [f"{file}:{line}: {hit}" for file in files for line, text in texts(file) for hit in found(text)] == []


@pytest.mark.parametrize("page", PAGES)
def test_pages(page: str) -> None:
    assert found((REPOSITORY / page).read_text()) == []


HELP = [[name, "--help"] for name in COMMANDS]
HELP += [["train", recipe, "--help"] for recipe in RECIPES]
HELP += [["data", name, "--help"] for name in ("scan", "stats", "pack", "imagenet")]
HELP += [["ablate", "table4", "cifar10-ablate", "--help"], ["plan", "demo", "--help"]]


@pytest.mark.parametrize("arguments", HELP, ids=" ".join)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """No banned words, and none of a docstring's marks for programmers."""
    with pytest.raises(SystemExit) as left:
        import_module(COMMANDS[arguments[0]].module).main(arguments[1:])
    assert left.value.code in (0, None)
    said = re.sub(r"[\u2500-\u257f]", " ", capsys.readouterr().out)
    assert len(said) > 100
    assert found(said) == []
    assert re.findall(r"Raises|ConfigError|\bHERE\b|\bPAPER\b|A collective|arXiv", said) == []


def test_each_habit_is_found() -> None:
    """So that the tests above cannot pass on nothing, across a line's end too."""
    habits = ("tells\nwhat", "It goes\n on.", "by turns", "anew", "for ever", "aloud", "Meanwhile", "Yes. Of it")
    assert [len(found(habit)) for habit in habits] == [1] * len(BANNED)
    assert found("plain English: of it") == []
