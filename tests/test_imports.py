"""Test files stand alone: what several of them use is in lib/ or conftest.py."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).parent.rglob("*.py"))


def imported(code: str) -> set[str]:
    """The first name of every module that `code` imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("code", ["import test_a", "from test_a import b", "def f():\n    import os, test_a as c"])
def test_an_import_of_a_test_file_is_seen(code: str) -> None:
    assert "test_a" in imported(code)


def test_no_file_imports_a_test_file() -> None:
    tests = {path.stem for path in FILES if path.stem.startswith(("test_", "fuzz_"))}
    assert len(tests) > 50
    assert {
        str(path): sorted(imported(path.read_text()) & tests) for path in FILES if imported(path.read_text()) & tests
    } == {}
