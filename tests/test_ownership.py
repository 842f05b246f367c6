"""A claim has one owner: under locks of the kernel, which /proc/locks shows, and on a file system that has none."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fasttricks.system import ownership
from fasttricks.system.ownership import Claim, InUseError, Owner, require_free
from lib.forked import forked

KINDS = ("locks", "no locks")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no locks":
        refuse_locks(monkeypatch.setattr)
    return str(request.param)


def refuse_locks(patch: Callable[..., object]) -> None:
    """As on NFS without its lock daemon."""

    def refuse(descriptor: int, command: int, argument: object = 0) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    patch(ownership.fcntl, "fcntl", refuse)


def kernels_locks(file: Path) -> list[str]:
    """The kernel's words on the locks of `file`."""
    inode = file.stat().st_ino
    return [line for line in Path("/proc/locks").read_text().splitlines() if f":{inode} " in line]


def hold(file: str, kind: str, then: str) -> None:
    """In another process: claim, and end as `then` says."""
    if kind == "no locks":
        refuse_locks(setattr)
    claim = Claim(Path(file))
    if then == "fork":
        if not os.fork():
            claim.release()
            claim.__del__()
            os._exit(0)
        os.wait()
    Path(f"{file}.claimed").touch()
    if then in ("stay", "fork"):
        time.sleep(600)
    if then == "release":
        claim.release()
    os._exit(0)


def test_a_second_claim_is_refused_by_who_holds_it(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "lock"
    require_free(file)
    with Claim(file):
        who = rf"^is in use by pid {os.getpid()} on {socket.gethostname()} since 20\d\d-\d\d-\d\dT.*; wait for it or end it$"
        for second in (Claim, require_free):
            with pytest.raises(InUseError, match=who):
                second(file, patience_s=0)
    assert list(tmp_path.iterdir()) == []
    require_free(file, patience_s=0)
    Claim(file, patience_s=0).release()


def test_the_kernel_holds_the_lock_and_a_closed_descriptor_or_a_reader_does_not_lose_it(tmp_path: Path) -> None:
    """lockf's would be gone after the first read."""
    file = tmp_path / "lock"
    with Claim(file):
        json.loads(file.read_text())
        (lock,) = kernels_locks(file)
        assert "OFDLCK ADVISORY  WRITE" in lock and lock.endswith(f"{1 << 30} {1 << 30}")
    with Claim(file), open(file, "r+b") as other:
        conflict = fcntl.fcntl(other, fcntl.F_OFD_GETLK, struct.pack("hhqqi", fcntl.F_WRLCK, 0, 0, 0, 0))
        assert struct.unpack("hhqqi", conflict)[0] == fcntl.F_WRLCK


@pytest.mark.parametrize("then", ["killed", "leaves it", "release"])
def test_a_process_that_ends_lets_go_however_it_ends(tmp_path: Path, kind: str, then: str) -> None:
    file = tmp_path / "lock"
    process = forked(hold, str(file), kind, "stay" if then == "killed" else then)
    while not Path(f"{file}.claimed").exists():
        assert process.exitcode in (None, 0)
    if then == "killed":
        with pytest.raises(InUseError, match=f"pid {process.pid} on "):
            Claim(file, patience_s=0)
        process.kill()
    Claim(file, patience_s=30).release()
    process.join()
    assert sorted(os.listdir(tmp_path)) == ["lock.claimed"]


def test_a_process_that_is_forked_from_the_owner_does_not_let_go_for_it(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "lock"
    process = forked(hold, str(file), kind, "fork")
    while not Path(f"{file}.claimed").exists():
        assert process.exitcode is None
    with pytest.raises(InUseError, match=f"pid {process.pid} on "):
        Claim(file, patience_s=0)
    process.kill()
    process.join()


def test_one_that_lets_go_in_time_is_waited_for_and_named(tmp_path: Path, kind: str) -> None:
    first, seen = Claim(tmp_path / "lock"), []

    def waiting(owner: Owner) -> None:
        seen.append(owner.pid)
        first.release()

    Claim(tmp_path / "lock", waiting=waiting).release()
    assert seen == [os.getpid()]


def others(file: Path, **changes: Any) -> Path:
    """What an owner left where there are no locks."""
    stand_in = file.with_name(file.name + ".owner")
    with Claim(file):
        owner = Owner(**json.loads(stand_in.read_text()))
    stand_in.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(owner, **changes))))
    return stand_in


@pytest.mark.parametrize("changes", [{"pid": 2**22 + 1}, {"started": 1}], ids=["gone", "pid given again"])
def test_without_locks_an_owner_that_is_gone_is_taken_over_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]
) -> None:
    refuse_locks(monkeypatch.setattr)
    stand_in = others(tmp_path / "lock", **changes)
    require_free(tmp_path / "lock", patience_s=0)
    with Claim(tmp_path / "lock", patience_s=0):
        assert json.loads(stand_in.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_the_owner_on_another_machine_names_the_file_to_remove(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(monkeypatch.setattr)
    stand_in = others(tmp_path / "lock", host="node7", machine="another boot", pid=1234)
    for ask in (Claim, require_free):
        with pytest.raises(
            InUseError, match=rf"pid 1234 on node7 since .* \(where it is gone, remove {stand_in}\); wait"
        ):
            ask(tmp_path / "lock", patience_s=0)
    stand_in.unlink()
    Claim(tmp_path / "lock", patience_s=0).release()


def test_without_locks_one_of_those_who_take_over_at_once_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second removed the first's file for that of the one that is gone."""
    refuse_locks(monkeypatch.setattr)
    stand_in = others(tmp_path / "lock", pid=2**22 + 1)

    def overtake(seconds: float) -> None:
        if seconds == ownership._SETTLE_S:
            stand_in.unlink()
            stand_in.write_text(json.dumps(dataclasses.asdict(Owner("node7", 1234, "now", "another boot"))))

    monkeypatch.setattr(ownership.time, "sleep", overtake)
    with pytest.raises(InUseError, match="pid 1234 on node7"):
        Claim(tmp_path / "lock", patience_s=0)
    assert json.loads(stand_in.read_text())["pid"] == 1234


def test_a_claim_whose_file_was_removed_leaves_the_next_ones_alone(tmp_path: Path) -> None:
    first = Claim(tmp_path / "lock")
    (tmp_path / "lock").unlink()
    second = Claim(tmp_path / "lock", patience_s=0)
    first.release()
    with pytest.raises(InUseError):
        Claim(tmp_path / "lock", patience_s=0)
    second.release()


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Claim(tmp_path / "gone" / "lock")


def test_a_full_disk_leaves_no_claim(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ownership.os, "write", full)
        with pytest.raises(OSError, match="No space left on device"):
            Claim(tmp_path / "lock")
    assert list(tmp_path.iterdir()) == []
    Claim(tmp_path / "lock", patience_s=0).release()


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / "lock").symlink_to("thesis.tex")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        Claim(tmp_path / "lock")
    assert (tmp_path / "thesis.tex").read_text() == "x"
