"""What the machine refuses is said in one line that names the path: no traceback, exit code 2, and nothing is lost."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from fasttricks.commands import data as data_command
from fasttricks.commands import evaluate, export, plan, predict, train
from lib.refusing import REASONS, as_ordinary_user
from lib.tiny import FinishedRun, arguments, call

TRAIN = ("train", "--data.root", "{data}", "--run-dir", "{new}")
RESUME = ("train", "--data.root", "{data}", "--run-dir", "{run}", "--epochs", "3", "--resume")
NEWEST = "run/checkpoints/step-0000000009.pt"
PLACES: dict[str, list[tuple[str, ...]]] = {
    "parent": [TRAIN],
    "parent/data": [TRAIN, ("plan", "--data.root", "{data}"), ("evaluate", "{run}", "--data.root", "{data}"),
                    ("scan", "{data}"), ("pack", "{data}", "{new}")],
    "parent/data/train": [TRAIN],
    "parent/data/val": [TRAIN],
    "parent/data/train/ant": [TRAIN, ("scan", "{data}")],
    "parent/data/quarantine.jsonl": [TRAIN],
    "parent/data/train/quarantine.jsonl": [TRAIN],
    "run": [RESUME, ("evaluate", "{run}", "--data.root", "{data}"), ("predict", "{run}", "{image}"),
            ("export", "{run}", "--no-onnx", "--output", "{new}")],
    "run/config.json": [RESUME],
    "run/metrics.jsonl": [RESUME],
    "run/checkpoints": [RESUME, ("evaluate", "{run}", "--data.root", "{data}"), ("predict", "{run}", "{image}")],
    NEWEST: [("evaluate", "{run}", "--data.root", "{data}")],
    "pack": [("check", "{pack}"), ("train", "--data.root", "{pack}", "--run-dir", "{new}")],
    "pack/train/pack.json": [("check", "{pack}"), ("train", "--data.root", "{pack}", "--run-dir", "{new}")],
    "pack/train/shard-00000.bin": [("check", "{pack}")],
    "closed": [("train", "--data.root", "{data}", "--run-dir", "{closed}/run"), ("pack", "{data}", "{closed}/pack"),
               ("export", "{run}", "--no-onnx", "--output", "{closed}/export")],
}  # fmt: skip
"""What is refused -> the commands that meet it."""
ROWS = [(place, words) for place, commands in PLACES.items() for words in commands]
OTHERS = [name for name in REASONS if name != "EACCES"]
CASES = [
    *((place, words, "EACCES") for place, words in ROWS),
    *((place, words, OTHERS[number % len(OTHERS)]) for number, (place, words) in enumerate(ROWS)),
]
CASES = [case for case in CASES if case[0] + case[2] not in ("parent/data/train/antELOOP", f"{NEWEST}ELOOP")]
"""Every row as an ordinary user without the right to it, and by one of the other reasons. A link to itself is a file: among the
class folders one without an image's name, which is no error to scan, and among the checkpoints one that is passed over."""


def names(words: Sequence[str]) -> str:
    return "-".join(word.strip("-{}").replace("/", "-") for word in words[:2])


@pytest.fixture(scope="module")
def packed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "pack"
    assert call(data_command.main, "pack", str(tiny_data), str(out)) == 0
    return out


@pytest.fixture
def base(tiny_data: Path, finished_run: FinishedRun, packed: Path, tmp_path: Path) -> Iterator[Path]:
    """Data, a run that can be extended, a pack and a folder: to be refused."""
    shutil.copytree(tiny_data, tmp_path / "parent" / "data")
    for place in ("", "train"):
        (tmp_path / "parent" / "data" / place / "quarantine.jsonl").write_text("")
    shutil.copytree(finished_run.folder, tmp_path / "run")
    shutil.copytree(packed, tmp_path / "pack")
    (tmp_path / "closed").mkdir()
    yield tmp_path
    for path in sorted(tmp_path.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755)  # for pytest to remove it


def content(folder: Path) -> dict[str, str]:
    """Every file's name, mode aside, and digest; as root, whom no mode stops."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".lock" not in path.name)
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(words: Sequence[str], base: Path) -> int:
    """The exit code of the command."""
    places = {name: str(base / name) for name in ("run", "new", "pack", "closed")}
    places |= {"data": str(base / "parent/data"), "image": str(base / "parent/data/val/ant/000.jpg")}
    command, *args = (word.format(**places) for word in words)
    if command == "train":
        return call(train.main, *arguments(Path(), Path(), *args))
    if command == "plan":
        return call(plan.main, "cifar10", *args)
    if command in ("scan", "pack", "check"):
        return call(data_command.main, command, *args)
    mains = {"evaluate": evaluate.main, "predict": predict.main, "export": export.main}
    return call(mains[command], *args)


@pytest.mark.parametrize(("place", "words", "reason"), CASES, ids=[f"{p}-{names(w)}-{r}" for p, w, r in CASES])
def test_a_refusal_is_one_line(
    place: str, words: tuple[str, ...], reason: str, base: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    before = content(base)
    capsys.readouterr()
    with monkeypatch.context() as patch, as_ordinary_user():
        REASONS[reason](base / place, patch)
        code = run(words, base)
    said = capsys.readouterr().err
    error = said[said.rfind("error: ") :]
    assert code == 2, said
    assert error.startswith("error: ") and "Traceback" not in said
    assert str(base / place) in error, error
    if not (base / place).is_symlink():
        assert content(base) == before, "what is the user's is as it was"


def fails(number: int, *names: str) -> Callable[[], object]:
    def call() -> None:
        raise OSError(number, os.strerror(number), *names)

    return call


OF_THE_MACHINE: dict[str, tuple[Callable[[], object], str]] = {
    "a server": (fails(errno.ESTALE, "/data/x"), "/data/x: Stale file handle; its disk or server does not answer"),
    "a full disk": (fails(errno.ENOSPC, "/run/x"), "/run/x: No space left on device; free some room"),
    "a read-only disk": (fails(errno.EROFS, "/run/x"), "/run/x: Read-only file system; the disk is read-only"),
    "no name": (fails(errno.EIO), "a file or a connection: Input/output error; its disk or server"),
    "odd name": (fails(errno.EACCES, "a\nb"), r"a\nb: Permission denied; give this user the right to it"),
    "memory": (lambda: bytearray(1 << 62), "not enough memory; lower --eval.batch-size"),
    "torch's memory": (lambda: torch.empty(1 << 60, dtype=torch.uint8), "not enough memory; lower --eval.batch-size"),
}


@pytest.mark.parametrize("name", OF_THE_MACHINE)
def test_any_error_of_the_machine_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever it comes from: torch's and Python's own errors for want of memory."""
    cause, wanted = OF_THE_MACHINE[name]
    assert call(lambda args: cause()) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {wanted}") and said.count("\n") == 1, said


@pytest.mark.parametrize("error", [ValueError("x"), OSError("x"), RuntimeError("x"), KeyError("x")], ids=repr)
def test_a_fault_of_the_program_keeps_its_traceback(error: Exception) -> None:
    def main(args: Sequence[str]) -> None:
        raise error

    with pytest.raises(type(error), match="x"):
        call(main)
