"""What a rank does about the process that started it: no orphan, the same torchrun known again, the command to go on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fasttricks.runs.folder import made_by_this_launch
from fasttricks.system import process
from fasttricks.system.process import activation, command_to_resume, launch_token
from lib.tiny import environment

# A launcher that starts a rank, says its number and waits.
LAUNCHER = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(rank.pid, rank.stdout.readline().strip(), flush=True)
time.sleep(60)
"""
RANK = """
import time
from fasttricks.system.process import die_with_launcher, launch_token
die_with_launcher()
print(launch_token(), flush=True)
time.sleep(60)
"""


def started(**env: str) -> tuple[subprocess.Popen[str], int, str]:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK], stdout=subprocess.PIPE, text=True, env=environment(**env)
    )
    assert launcher.stdout is not None
    pid, _, token = launcher.stdout.readline().strip().partition(" ")
    return launcher, int(pid), token


def gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_a_rank_ends_with_its_torchrun() -> None:
    launcher, rank, _ = started(TORCHELASTIC_RUN_ID="x")
    launcher.kill()
    launcher.wait()
    assert gone(rank, 1.0)
    launcher.stdout.close()  # type: ignore[union-attr]


def test_a_process_of_another_launcher_does_not() -> None:
    launcher, rank, _ = started()
    launcher.kill()
    launcher.wait()
    try:
        assert not gone(rank, 0.5)
    finally:
        os.kill(rank, signal.SIGKILL)
        launcher.stdout.close()  # type: ignore[union-attr]


def test_a_launch_is_known_again_and_no_other_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launchers with the same id, as torchrun's default is."""
    tokens = []
    for _ in range(2):
        launcher, _, token = started(TORCHELASTIC_RUN_ID="none")
        tokens.append(token)
        launcher.kill()
        launcher.wait()
        launcher.stdout.close()  # type: ignore[union-attr]
    assert tokens[0] != tokens[1]
    assert all(token.startswith("none/") for token in tokens)
    assert launch_token() == "", "there is no torchrun here"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert launch_token() == launch_token()
    assert not made_by_this_launch(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"launch": launch_token()}))
    assert made_by_this_launch(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"launch": tokens[0]}))
    assert not made_by_this_launch(str(tmp_path))


def test_the_command_to_go_on_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "fasttricks.train", "demo", "--run-dir", "a b"])
    assert shlex.split(command_to_resume()) == [*sys.orig_argv, "--resume"]
    monkeypatch.setattr(sys, "orig_argv", [*sys.orig_argv, "--resume"])
    assert shlex.split(command_to_resume()) == sys.orig_argv
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    parent = process._command_of(os.getppid())
    assert shlex.split(command_to_resume())[: len(parent)] == parent


def test_a_virtual_environment_is_to_be_activated_where_the_shell_has_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("my env", "other"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "my env"))
    for path in ("other/bin", "nowhere"):
        monkeypatch.setenv("PATH", str(tmp_path / path))
        assert activation() == f"source '{tmp_path}/my env/bin/activate'"
    monkeypatch.setenv("PATH", f"{tmp_path}/my env/bin{os.pathsep}{tmp_path}/other/bin")
    assert activation() == ""
    monkeypatch.setenv("PATH", "nowhere")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert activation() == ""
