"""Names are data: folders, classes and files with terminal escapes and line breaks, through the commands of a user.

No command prints, and no page holds, a character that is not printable, nor a line that a name has begun.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fasttricks.config import UserError, show_classes, show_name
from lib.forked import said_by
from lib.tiny import arguments, write_images

FORGED = "\nerror: forged"
EVIL = "\x1b[31m\x1b]0;owned\x07" + FORGED
"""A class, a file or a folder may be called so."""
CLASSES = (f"ant{EVIL}", "bee\r\u202e", os.fsdecode(b"cat\xff"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(data, run folder, output) of a run on such a data set, one image of which is no image."""
    root = tmp_path_factory.mktemp("names") / f"root{EVIL}"
    data = write_images(root / f"data{EVIL}", train=48, val=9, classes=CLASSES)
    (data / "train" / CLASSES[0] / f"bad{EVIL}.jpg").write_bytes(b"text")
    run = root / f"run{EVIL}"
    return data, run, said_by("fasttricks.train", *arguments(data, run, "--epochs", "1"))


def check(text: str) -> None:
    """Nothing of a name gets through, and something of one is there."""
    odd = {c for c in text if not c.isprintable() and c != "\n"}
    assert not odd, text
    assert FORGED not in text
    assert r"\x1b[31m\x1b]0;owned\x07\nerror: forged" in text


def test_training_says_them_escaped(trained: tuple[Path, Path, str]) -> None:
    check(trained[2])
    assert r"bad image ant\x1b" in trained[2]
    assert r"3 classes in " in trained[2]


@pytest.mark.parametrize("command", ["predict", "evaluate", "export", "scan", "pack", "check", "plan"])
def test_commands_say_them_escaped(command: str, trained: tuple[Path, Path, str], tmp_path: Path) -> None:
    data, run, _ = trained
    image = next(iter((data / "val" / CLASSES[0]).iterdir()))
    out = tmp_path / f"out{EVIL}"
    if command == "check":
        said_by("fasttricks.data.prepare", "pack", str(data), str(out))
    calls = {
        "predict": ("fasttricks.predict", [str(run), str(image), str(data / f"nowhere{EVIL}")], 1),
        "evaluate": ("fasttricks.evaluate", [str(run)], 0),
        "export": ("fasttricks.export", [str(run), "--output", str(out), "--no-onnx"], 0),
        "scan": ("fasttricks.data.prepare", ["scan", str(data / "train")], 0),
        "pack": ("fasttricks.data.prepare", ["pack", str(data), str(out)], 0),
        "check": ("fasttricks.data.prepare", ["check", str(out)], 0),
        "plan": ("fasttricks.plan", [*arguments(data / f"nowhere{EVIL}", run)], 2),
    }
    module, args, code = calls[command]
    check(said_by(module, *args, codes=(code,)))
    if command == "export":
        check((out / "README.md").read_text())
        labels = json.loads((out / "config.json").read_text())["label_names"]
        assert labels == sorted(CLASSES), "as they are: programs read it"
    if command == "scan":
        (data / "train" / "quarantine.jsonl").unlink()


@pytest.mark.parametrize("wrong", ["empty class", "unknown class", "loose file", "folder in a class"])
def test_errors_say_them_escaped(wrong: str, tmp_path: Path) -> None:
    data = write_images(tmp_path / f"data{EVIL}", train=12, val=6)
    place = {
        "empty class": data / "train" / f"none{EVIL}",
        "unknown class": data / "val" / f"more{EVIL}",
        "loose file": data / "train",
        "folder in a class": data / "train" / "ant" / f"inner{EVIL}",
    }[wrong]
    place.mkdir(exist_ok=True)
    kind = "jpg" if wrong == "loose file" else "txt"  # one that is not named as an image is skipped there
    (place / f"x{EVIL}.{kind}").write_text("no image") if wrong != "empty class" else None
    shown = said_by("fasttricks.train", *arguments(data, tmp_path / "run"), codes=(2,))
    check(shown)
    assert shown.startswith("error: ") and shown.count("\n") == 1, shown


def test_what_is_shown() -> None:
    assert show_name("plain é 犬") == "plain é 犬"
    assert show_name("a\n\x1b\u202e'\"\\") == r"a\n\x1b\u202e'" + '"\\'
    assert str(UserError("a\nb\n  listed\x1b")) == "a\\nb\n  listed\\x1b"


def test_a_number_of_classes_reads_as_english() -> None:
    assert [show_classes(count) for count in (0, 1, 2, 21843)] == [
        "0 classes",
        "1 class",
        "2 classes",
        "21,843 classes",
    ]
