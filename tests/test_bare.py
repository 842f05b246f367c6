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
    "bench.gpu.data": "nvidia.dali",
    "bench.gpu.ranks": "PIL",
    "bench.gpu.runs": "PIL",
    "bench.host": "PIL",
    "bench.loader": "nvidia.dali",
    "bench.pack": "rich",
    "bench.published": "rich",
    "bench.report": "rich",
    "fasttricks.data.annotated.loader": "torchvision",
    "fasttricks.data.annotated.pixels": "torchvision",
    "fasttricks.data.boxes.loader": "torchvision",
    "fasttricks.data.boxes.samples": "torchvision",
    "fasttricks.data.boxes.views": "torchvision",
    "fasttricks.data.masks.loader": "torchvision",
    "fasttricks.models.faster_rcnn": "torchvision",
    "fasttricks.data.masks.samples": "torchvision",
    "fasttricks.data.masks.views": "torchvision",
    "fasttricks.data.packing.imagenet": "PIL",
    "fasttricks.data.packing.pack": "PIL",
    "fasttricks.data.packing.place": "PIL",
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
    "fasttricks.reporting.box_page": "PIL",
    "fasttricks.reporting.charts": "PIL",
    "fasttricks.reporting.page": "PIL",
    "fasttricks.reporting.pixel_page": "PIL",
}
"""The modules that cannot be imported on such a machine, and the package that each asks for first. All others can."""


KERNELS = [f"kernels_{name}" for name in ("on_gpu", "cpu", "interpreted", "bytes", "compile")]
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
@pytest.mark.parametrize(
    "arguments, code, says",
    [
        ("plan cifar10 --gpus 2 --images 50000 --model.num-classes 10", 0, "torchrun"),
        ("cost --networks resnet8d mobilenet_v1 --rounds 0", 0, "mobilenet_v1"),
        (
            "cost --networks resnet8d --output out",
            2,
            "error: fasttricks cost --output needs matplotlib, not installed here;",
        ),
        ("train demo", 2, "error: train needs nvidia.dali, tensorboard, matplotlib, not installed here; "),
        ("data scan .", 2, "error: data needs simplejpeg, not installed here; "),
    ],
)
def test_a_command_needs_what_it_uses_and_no_more(arguments: str, code: int, says: str, tmp_path: Path) -> None:
    """With tyro, rich and Pillow, but without DALI."""
    command = [sys.executable, "-m", "lib.bare", *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(PYTHONPATH=PATH))
    assert done.returncode == code, done.stderr
    assert says in (done.stderr if code else done.stdout)
    assert not code or (done.stderr.count("\n") == 1 and "pip install 'fasttricks[train]'" in done.stderr)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("torch, triton", [("2.9.0", "3.5"), ("2.11.0", "3.6")])
def test_other_releases_of_torch(torch: str, triton: str, tmp_path: Path) -> None:
    """The oldest that pyproject.toml allows, and one between; each with its own Triton, NumPy and pytest, and nothing else.

    The kernels' numbers, bytes and machine code are tested there too; the GPU tests are collected, and run where a card is.
    """
    fresh = Venv(tmp_path)
    fresh.install(f"torch=={torch}", "numpy", "pytest", pinned=False)
    try:
        versions = check(fresh.run("-W", "error", "-m", "lib.bare", PYTHONPATH=PATH, OMP_NUM_THREADS="1"))
        assert [version[: len(asked)] for version, asked in zip(versions, (torch, triton), strict=True)] == [
            torch,
            triton,
        ]
        tests = [f"tests/test_{name}.py" for name in ("on_gpu", *KERNELS, "losses")]
        done = fresh.run("-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", *tests, cwd=REPOSITORY)
        assert done.returncode == 0, done.stdout[-4000:]
    finally:
        shutil.rmtree(tmp_path / "venv")
