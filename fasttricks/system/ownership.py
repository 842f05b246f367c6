"""One owner at a time: a lock that the kernel lets go when its process ends, however it ends, and who holds it. No torch.

The lock is on a byte of an open file description (fcntl's F_OFD_SETLK). flock's is kept from other hosts by fewer file systems.
lockf's would be gone once this process closes any other descriptor of the file, and would not keep the process from itself.
NFS 4, and 3 with lockd, carry the lock to every host. The byte lies far behind the text that names the owner, so that the text
can be read where a lock forbids reading (SMB).

Where the file system has no locks, a file that only one process can create replaces it: an owner that is gone is found by
its pid on its own machine, and from elsewhere the message names the file to remove.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from fasttricks.config import UserError
from fasttricks.system.reading import Reader
from fasttricks.system.schema import fields, text, whole

PATIENCE_S = 3.0
"""How long a process that was killed may take to let go; longer where it gives memory back to a GPU's driver first."""
_POLL_S = 0.1
_SETTLE_S = 0.3
_BYTE = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 1 << 30, 1, 0)  # struct flock of Linux, 64 bits
_HELD = (errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_OWNERS = Reader(UserError, "must name an owner", "remove it")
_OWNER = fields({"host": text(), "pid": whole(), "since": text(), "machine": text(), "started": whole()})


class InUseError(UserError):
    """Another process holds the place that this one would write to; the message says which, and since when."""


@dataclass(frozen=True)
class Owner:
    """The process that holds a claim."""

    host: str = "another host"
    pid: int = 0
    since: str = ""
    """Local time with its offset from UTC, ISO 8601."""
    machine: str = ""
    """The kernel's boot and the namespace of pids: where a pid means the same process."""
    started: int = 0
    """When the process began, in ticks since the boot: a pid is given again."""

    def __str__(self) -> str:
        if not self.pid:
            return "another process"  # between its lock and its name
        return f"pid {self.pid} on {self.host} since {self.since}"

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended, which is seen on its own machine alone."""
        return self.machine == _machine() and _started(self.pid) != self.started


def _this_process() -> bytes:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    owner = Owner(socket.gethostname(), os.getpid(), now, _machine(), _started(os.getpid()))
    return json.dumps(asdict(owner)).encode()


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> int:
    """0 where there is no such process, or one that has ended and was not waited for."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if state in "ZX" else int(fields[18])


class Claim:
    """The only claim on `file`, in a folder that is there, from now to release() or to the end of this process.

    file: of no other use. It names the owner, and is removed by release().
    patience_s: how long another's claim is waited for; waiting(owner) is called where that has taken a second.
    A process forked from this one shares the claim for as long as it lives; one that is started does not.
    Raises InUseError where another holds it, and OSError where the folder cannot be written to.
    """

    def __init__(
        self, file: Path, *, patience_s: float = PATIENCE_S, waiting: Callable[[Owner], object] = lambda owner: None
    ) -> None:
        self._given = self._file = file
        self._descriptor, self._pid = -1, os.getpid()
        _wait_for(self._take, file, patience_s, waiting)

    def _take(self) -> Owner | None:
        """None where it is this process's now, else whose it is."""
        self._file = self._given
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _BYTE)
            if not _is_at(self._file, descriptor):
                os.close(descriptor)  # its owner has just removed it
                return Owner()
        except OSError as error:
            os.close(descriptor)
            if error.errno in _HELD:
                return _named_in(self._file)
            if error.errno in _NO_LOCKS:
                return self._create()
            raise
        self._descriptor = descriptor
        self._sign()
        return None

    def _create(self) -> Owner | None:
        """The same where there are no locks: only one process can create the file. One that is gone is taken over from."""
        self._file.unlink(missing_ok=True)  # of no use here
        stand_in = _stand_in(self._file)
        taken_over = stand_in.exists()
        if taken_over:
            owner = _named_in(stand_in)
            if not owner.is_gone:
                return owner
            stand_in.unlink(missing_ok=True)
        try:
            self._descriptor = os.open(stand_in, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return _named_in(stand_in)
        self._file = stand_in
        self._sign()
        if taken_over:
            time.sleep(_SETTLE_S)  # another may have removed this one for that of the one that is gone
            if not _is_at(stand_in, self._descriptor):
                self.release()
                return _named_in(stand_in)
        return None

    def _sign(self) -> None:
        try:
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, _this_process())
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Give it up; no effect where that is done, or in a forked process, which never owned it."""
        descriptor, self._descriptor = self._descriptor, -1  # at once: Ctrl-C may come at any line
        if descriptor == -1 or self._pid != os.getpid():
            return
        if _is_at(self._file, descriptor):  # else the user has removed it, and another may have made a new one
            self._file.unlink(missing_ok=True)
        os.close(descriptor)

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def require_free(file: Path, *, patience_s: float = PATIENCE_S) -> None:
    """Raise InUseError where another process has a Claim on `file`, for patience_s or longer. Claims and writes nothing."""
    _wait_for(lambda: _owner_of(file), file, patience_s, lambda owner: None)


def _owner_of(file: Path) -> Owner | None:
    stand_in = _stand_in(file)
    if stand_in.exists():
        owner = _named_in(stand_in)
        return None if owner.is_gone else owner
    try:
        with open(file, "r+b") as opened:
            found = fcntl.fcntl(opened, fcntl.F_OFD_GETLK, _BYTE)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, *_HELD, *_NO_LOCKS):
            return None
        raise
    return None if struct.unpack("hhqqi", found)[0] == fcntl.F_UNLCK else _named_in(file)


def _wait_for(
    owner_of: Callable[[], Owner | None], file: Path, patience_s: float, waiting: Callable[[Owner], object]
) -> None:
    began, told = time.monotonic(), False
    while (owner := owner_of()) is not None:
        waited = time.monotonic() - began
        if waited >= patience_s:
            held = _stand_in(file) if _stand_in(file).exists() else file
            elsewhere = f" (where it is gone, remove {held})" if owner.machine != _machine() else ""
            raise InUseError(f"is in use by {owner}{elsewhere}; wait for it or end it")
        if waited > 1 and not told:
            waiting(owner)
            told = True
        time.sleep(_POLL_S)


def _stand_in(file: Path) -> Path:
    """The file that is created where there are no locks."""
    return file.with_name(f"{file.name}.owner")


def _is_at(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _named_in(file: Path) -> Owner:
    """The owner that is named there; an unknown one where none is, or not yet."""
    try:
        return Owner(**_OWNERS.json(file, _OWNER))
    except (UserError, TypeError):
        return Owner()
