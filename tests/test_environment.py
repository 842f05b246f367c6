"""The surroundings of a command: ranks without a launcher, no home, another user, ASCII, a compiler that is none, signals."""

from __future__ import annotations

import io
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fasttricks.commands import data as data_command
from fasttricks.config import ConfigError, Launch, read_launch
from fasttricks.data.pipeline import fused
from fasttricks_kernels import native
from lib.forked import UNSET, python_m
from lib.refusing import as_ordinary_user
from lib.tiny import arguments, call, environment, write_images

MEETING = {"MASTER_ADDR": "a", "MASTER_PORT": "29500"}
LAUNCHES: list[tuple[dict[str, str], Launch | str]] = [
    ({}, Launch(0, 1, 0, 1)),
    ({"RANK": "", "WORLD_SIZE": ""}, Launch(0, 1, 0, 1)),
    ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING}, Launch(3, 4, 1, 2)),
    ({"RANK": "one"}, "RANK = 'one': must be a whole number; start the processes with torchrun, or unset it"),
    ({"RANK": "-1"}, "RANK = '-1': must be a whole number"),
    ({"RANK": "²"}, "RANK = '²': must be a whole number"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE = 0: must be 1 or more"),
    ({"RANK": "1"}, "RANK = 1: must be below WORLD_SIZE (1)"),
    ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK = 2: must be below LOCAL_WORLD_SIZE (2)"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE = 2: several processes need MASTER_ADDR, MASTER_PORT too"),
    ({"WORLD_SIZE": "2", **MEETING}, "WORLD_SIZE = 2: several processes need RANK too"),
    ({"WORLD_SIZE": "2", "RANK": "0", **MEETING, "MASTER_PORT": "70000"}, "MASTER_PORT = 70000: must be 1 to 65535"),
]


@pytest.mark.parametrize(("variables", "wanted"), LAUNCHES, ids=[str(row[0]) for row in LAUNCHES])
def test_the_launch_that_the_environment_describes(variables: dict[str, str], wanted: Launch | str) -> None:
    if isinstance(wanted, Launch):
        assert read_launch(variables) == wanted
        return
    with pytest.raises(ConfigError) as caught:
        read_launch(variables)
    assert str(caught.value).startswith(wanted)


def no_home(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """A uid that has no entry in the list of users, as a container may be given."""
    patch.delenv("HOME")
    patch.setattr(pwd, "getpwuid", lambda uid: {}[uid])


def home(mode: int) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """One of that mode."""

    def make(folder: Path, patch: pytest.MonkeyPatch) -> None:
        (folder / "home").mkdir(mode=mode)
        patch.setenv("HOME", str(folder / "home"))

    return make


def file_for_cache(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "cache").write_text("")
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def compiler(words: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    """The words as CC, and a cache that can be used."""

    def make(folder: Path, patch: pytest.MonkeyPatch) -> None:
        patch.setenv("CC", words)
        patch.setenv("XDG_CACHE_HOME", str(folder))

    return make


SURROUNDINGS: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], None], str]] = {
    "no home": (no_home, "no home folder; set XDG_CACHE_HOME"),
    "a home that cannot be entered": (
        home(0o000),
        "home/.cache/fasttricks cannot be used (Permission denied); set XDG",
    ),
    "a home that is read-only": (
        home(0o555),
        "home/.cache/fasttricks cannot be used (Permission denied); set XDG_CACHE",
    ),
    "a file as the cache": (file_for_cache, "cache/fasttricks cannot be used (Not a directory); set XDG_CACHE_HOME"),
    "an unbalanced quote in CC": (
        compiler("gcc '"),
        "CC=gcc ' is no command (No closing quotation); correct it, or unset it",
    ),
    "a folder as CC": (compiler("/"), "no C compiler (CC=/)"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_compiled_code_that_cannot_be_had_says_why(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, to the loader and the losses, which take their other code then."""
    make, wanted = SURROUNDINGS[name]
    for variable in ("XDG_CACHE_HOME", "CC"):
        monkeypatch.delenv(variable, raising=False)
    make(tmp_path, monkeypatch)
    with as_ordinary_user(), pytest.raises(native.NativeError) as caught:
        fused.find_callback("linear", antialias=True)
    assert wanted in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_another_user_without_a_home_and_with_ascii_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Who owns nothing but the run folder: checkout, data and image are read-only to him. Names have no place in ASCII."""
    if os.getuid():
        pytest.skip("needs root, to become another user")
    base = tmp_path_factory.mktemp("other")
    classes = ("é", "犬", os.fsdecode(b"cat\xff"))
    data, out = write_images(base / "data", train=45, val=6, classes=classes), base / "out"
    out.mkdir()
    os.chown(out, 12345, 12345)
    bare = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"), UNSET)
    bare |= {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "CC": "gcc '"}
    run, image = str(out / "run"), str(data / "val" / "é" / "000.jpg")

    def said(module: str, *args: str, code: int = 0) -> tuple[str, str]:
        done = python_m(f"fasttricks.{module}", *args, user=12345, **bare)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        assert (done.stdout + done.stderr).isascii()
        return done.stdout, done.stderr

    output, notes = said("train", *arguments(data, out / "run", "--epochs", "1"))
    assert output.count("this user has no home folder") == 1, "the loader"
    ours = [line for line in notes.splitlines() if "Matplotlib" not in line]  # which says its own of a missing home
    slower = [line.partition(" on the CPU ")[0] for line in ours]
    assert sorted(slower) == ["note: 3x3 convolutions", "note: batch norm", "note: losses"], "each says so once"
    output, notes = said("predict", run, image, os.fsdecode(b"im\xe4ge.jpg"), code=1)
    assert r"val/\xe9/000.jpg" in output and r"%  \u72ac" in output and r"%  cat\udcff" in output
    assert notes == "error: im\\udce4ge.jpg: unreadable: No such file or directory\n"
    said("export", run, "--no-onnx")
    assert "犬" in (out / "run" / "export" / "README.md").read_text("utf-8")
    assert said("data.prepare", "pack", str(data), str(out / "pack"))[0].count("\n") == 2
    refused = said("data.prepare", "pack", str(data), str(base / "pack"), code=2)[1]
    assert refused == f"error: {base}/pack/train: cannot be made (Permission denied); give another OUT\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_closed_terminal_ends_scan_and_pack_as_ctrl_c_does(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(data_command.COMMANDS, "scan", lambda args: os.kill(os.getpid(), number))
    assert call(data_command.main, "scan") == 130
    assert capsys.readouterr().err == "stopped\n"
    monkeypatch.setitem(data_command.COMMANDS, "scan", lambda args: None)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setitem(data_command.COMMANDS, "scan", lambda args: os.kill(os.getpid(), signal.SIGHUP))
        assert call(data_command.main, "scan") == 0, "under nohup"
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_to_all_of_a_scan_ends_it_without_a_verdict(number: signal.Signals, tmp_path: Path) -> None:
    """As a terminal gives it to the workers too: none dies of it, which would count as a damaged image."""
    large = io.BytesIO()
    Image.new("RGB", (4000, 4000), "red").save(large, "JPEG")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    first = tmp_path / "train" / "ant" / "000.jpg"
    first.write_bytes(large.getvalue())
    for index in range(1, 1000):
        os.link(first, first.with_name(f"{index:03d}.jpg"))
    command = [sys.executable, "-m", "fasttricks.data.prepare", "scan", str(tmp_path), "--workers", "1"]
    scan = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )  # fmt: skip
    until_s = time.monotonic() + 60
    while not Path(f"/proc/{scan.pid}/task/{scan.pid}/children").read_text() and time.monotonic() < until_s:
        time.sleep(0.05)
    time.sleep(1)  # the worker imports, or decodes by then
    os.killpg(scan.pid, number)
    output, notes = scan.communicate(timeout=60)
    assert (scan.returncode, output) == (130, ""), notes
    assert notes == "stopped; nothing was written, the same command begins again\n"
    assert not (tmp_path / "quarantine.jsonl").exists()
