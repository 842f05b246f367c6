"""Networks, losses, planning and the step bench with torch, triton and numpy alone, at the oldest release of torch too."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.bare import PARTS
from lib.tiny import REPOSITORY, environment
from lib.venvs import Venv

NEEDS = {
    "bench.compare": "rich",
    "bench.cost": "rich",
    "bench.loader": "nvidia.dali",
    "bench.pack": "rich",
    "bench.published": "rich",
    "bench.report": "rich",
    "fasttricks.data.packing.imagenet": "PIL",
    "fasttricks.data.packing.pack": "PIL",
    "fasttricks.data.packing.reencode": "PIL",
    "fasttricks.data.pipeline.decoder": "nvidia.dali",
    "fasttricks.data.pipeline.fused": "nvidia.dali",
    "fasttricks.data.pipeline.graph": "nvidia.dali",
    "fasttricks.data.pipeline.loader": "nvidia.dali",
    "fasttricks.data.pipeline.pixels": "nvidia.dali",
    "fasttricks.data.pipeline.reference": "PIL",
    "fasttricks.data.sources.demo": "PIL",
    "fasttricks.data.sources.demo_images": "PIL",
    "fasttricks.system.bars": "rich",
}
"""The modules that cannot be imported on such a machine, and the package that each asks for first. All others can."""


PATH = os.pathsep.join(str(REPOSITORY / folder) for folder in (".", "kernels", "tests"))


def check(done: subprocess.CompletedProcess[str]) -> list[str]:
    """lib.bare has ended well; returns the releases of torch and triton."""
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["needs"] == NEEDS
    assert set(found["ran"]) == {part.__name__ for part in PARTS}
    versions: list[str] = found["versions"]
    return versions


def test_all_but_the_input_runs_without_the_extras() -> None:
    command = [sys.executable, "-W", "error", "-m", "lib.bare"]
    check(subprocess.run(command, capture_output=True, text=True, env=environment(PYTHONPATH=PATH)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("torch, triton", [("2.9.0", "3.5"), ("2.11.0", "3.6")])
def test_other_releases_of_torch(torch: str, triton: str, tmp_path: Path) -> None:
    """The oldest that pyproject.toml allows, and one between; each with its own Triton, NumPy and pytest, and nothing else.

    The GPU tests of the losses, the images and the step are collected there, and run where a card is.
    """
    fresh = Venv(tmp_path)
    fresh.install(f"torch=={torch}", "numpy", "pytest", pinned=False)
    try:
        versions = check(fresh.run("-W", "error", "-m", "lib.bare", PYTHONPATH=PATH, OMP_NUM_THREADS="1"))
        assert [version[: len(asked)] for version, asked in zip(versions, (torch, triton), strict=True)] == [
            torch,
            triton,
        ]
        tests = [f"tests/test_{name}.py" for name in ("on_gpu", "kernels_on_gpu", "kernels_cpu", "losses")]
        done = fresh.run("-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *tests, cwd=REPOSITORY)
        assert done.returncode == 0, done.stdout[-4000:]
    finally:
        shutil.rmtree(tmp_path / "venv")
