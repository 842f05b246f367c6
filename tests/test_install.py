"""A fresh install: the kernels alone, what is said without the extra, and training with it. Slow: it downloads gigabytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.tiny import REPOSITORY
from lib.venvs import Venv

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

KERNELS_ALONE = """
import importlib.util, torch
from fasttricks_kernels import cross_entropy
for absent in ("tyro", "rich", "matplotlib", "tensorboard", "torchvision", "timm"):
    assert importlib.util.find_spec(absent) is None, absent
logits = torch.randn(4, 7, dtype=torch.float64).float().requires_grad_()
labels = torch.tensor([0, 3, 6, 2])
loss = cross_entropy(logits, labels, reduction="sum")
loss.backward()
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
print("kernels run")
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git tracks or would, in a folder of their own: a build leaves things behind."""
    folder = tmp_path_factory.mktemp("checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout, to know which files are the project's")
    for name in filter(None, listed.stdout.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((REPOSITORY / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def fresh(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Venv]:
    """An empty environment, with the project installed as `pip install .` does it; removed afterwards, as it takes 6 GB."""
    folder = tmp_path_factory.mktemp("fresh")
    fresh = Venv(folder)
    fresh.install(str(checkout))
    yield fresh
    shutil.rmtree(folder)


def test_the_wheel_holds_both_packages_and_the_license_alone(checkout: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(checkout),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("fasttricks-")
    names = zipfile.ZipFile(wheel).namelist()
    info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
    assert {name.partition("/")[0] for name in names} == {"fasttricks", "fasttricks_kernels", info}
    assert f"{info}/licenses/LICENSE" in names
    for package, source in (("fasttricks", checkout), ("fasttricks_kernels", checkout / "kernels")):
        wanted = {
            str(path.relative_to(source))
            for path in (source / package).rglob("*")
            if path.suffix in (".c", ".h", ".html", ".py", ".typed")
        }
        assert wanted == {name for name in names if name.startswith(f"{package}/")}


# These three go in order: one environment, of which the last changes what is installed.
def test_the_kernels_run_on_their_own(fresh: Venv) -> None:
    done = fresh.run("-c", KERNELS_ALONE)
    assert (done.returncode, done.stdout) == (0, "kernels run\n"), done.stderr


@pytest.mark.parametrize(
    "module, needs",
    [("train", "nvidia.dali, tyro, rich"), ("evaluate", "nvidia.dali, tyro"), ("plan", "tyro, rich, PIL")],
)
def test_without_the_extra_the_command_says_how_to_install_it(module: str, needs: str, fresh: Venv) -> None:
    done = fresh.run("-m", f"fasttricks.{module}", "demo")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {module} needs {needs}")
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith("pip install 'fasttricks[train]' (in a checkout: pip install '.[train]')\n")


def test_with_the_extra_the_demo_trains(fresh: Venv, checkout: Path) -> None:
    fresh.install(f"{checkout}[train]")
    done = fresh.run(
        "-m", "fasttricks.train", "demo", "--epochs", "1", "--schedule.warmup-epochs", "0", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("top-1 ") for line in done.stdout.splitlines()), done.stdout
    assert (fresh.home / "runs" / "demo" / "summary.json").is_file()
