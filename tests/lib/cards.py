"""The Python of an export's model card, as it is printed, and its run in the exported folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lib.images import smooth


def blocks(folder: Path) -> list[str]:
    """The Python blocks of the card in the exported folder, in order."""
    return re.findall(r"^```python\n(.*?)^```$", (folder / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def run_blocks(code: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the blocks leave, run in order in the folder, which gets an image of another shape than the crop's."""
    smooth("RGB", (91, 70)).save(folder / "image.jpg", quality=95)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for block in code:
        exec(compile(block, "card", "exec"), names)
    return names
