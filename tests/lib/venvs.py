"""Virtual environments of a test's own."""

from __future__ import annotations

import os
import subprocess
import venv
from pathlib import Path

from lib.tiny import REPOSITORY


class Venv:
    """A virtual environment that sees nothing but what is installed in it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=True)
        self.python, self.home = folder / "venv" / "bin" / "python", folder / "home"
        self.home.mkdir()

    def run(self, *args: str, cwd: Path | None = None, **more: str) -> subprocess.CompletedProcess[str]:
        """Run its Python outside of the checkout, with a home of its own. more: variables of the environment."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "XDG_", "VIRTUAL_ENV"))
        }
        env = {**kept, "HOME": str(self.home), "XDG_CACHE_HOME": str(self.home / "cache"), **more}
        return subprocess.run([str(self.python), *args], capture_output=True, text=True, env=env, cwd=cwd or self.home)

    def install(self, *what: str, pinned: bool = True) -> None:
        """Install with pip; pinned: the releases of constraints.txt."""
        constraint = ("--constraint", str(REPOSITORY / "constraints.txt")) if pinned else ()
        done = self.run("-m", "pip", "install", "--quiet", "--no-cache-dir", *constraint, *what)
        assert done.returncode == 0, done.stderr
