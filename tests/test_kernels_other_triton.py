"""The kernels' numerics and machine code on the oldest Triton release they promise, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = "3.5.1"
ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_oldest_release(tmp_path: Path) -> None:
    """Ahead of the environment's own Triton on the path; torch stays the same."""
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path)]
    done = subprocess.run([*install, f"triton=={OLDEST}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"triton {OLDEST} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "kernels"), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    asked = [sys.executable, "-c", "import triton; print(triton.__version__)"]
    assert subprocess.run(asked, capture_output=True, text=True, env=environment).stdout.strip() == OLDEST
    tests = [f"tests/test_kernels_{name}.py" for name in ("interpreted", "bytes", "compile")]
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-x", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
