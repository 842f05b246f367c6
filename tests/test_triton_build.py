"""Triton's launcher, built for real without a GPU: against a libcuda of empty functions, with and without what it needs."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton.backends.nvidia import driver as nvidia
from triton.runtime import build as triton_builds
from triton.runtime.driver import DriverConfig

from fasttricks.config import ConfigError
from fasttricks.system.distributed import World
from fasttricks.system.triton_build import check_triton
from fasttricks.training import build as building
from lib.tiny import configure

CUDA = torch.device("cuda", 0)
pytestmark = pytest.mark.skipif(
    not Path(sysconfig.get_paths()["include"], "Python.h").is_file(), reason="needs the Python.h that it takes away"
)


@pytest.fixture(scope="session")
def libcuda(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A folder with a libcuda.so.1 that has every function of the driver's that Triton's launcher calls by name."""

    def make(folder: Path) -> None:
        names = set(re.findall(r"\bcu[A-Z]\w+(?=\()", Path(nvidia.dirname, "driver.c").read_text()))
        (folder / "cuda.c").write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names)))
        flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
        subprocess.run(["gcc", *flags, str(folder / "cuda.c")], check=True)

    return once("libcuda", make)


@pytest.fixture
def card(libcuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton finds a card, and has built nothing for it yet."""
    ctypes.CDLL(str(libcuda / "libcuda.so.1"), ctypes.RTLD_GLOBAL)  # the loader takes it for that of the launcher
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(libcuda))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(nvidia.CudaDriver, "is_active", staticmethod(lambda: True))
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process."""
    monkeypatch.setattr("triton.runtime.driver", DriverConfig())
    for found in (triton_builds._find_compiler, nvidia.libcuda_dirs, nvidia.library_dirs):
        found.cache_clear()


def no_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))


def no_such_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CC", "gcc-of-nowhere")


def broken_compiler(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("CC", "false")


def no_headers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda **_: {"include": str(folder)})


def no_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "file"))


def no_driver(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.delenv("TRITON_LIBCUDA_PATH")
    monkeypatch.setattr("subprocess.check_output", lambda *_: b"")


def no_card(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(nvidia.CudaDriver, "is_active", staticmethod(lambda: False))


def no_ptxas(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(vars(type(nvidia.knobs.nvidia))["ptxas"], "default_path", "/nowhere")


GOT_AND_SAID = {
    no_compiler: "the PATH has neither gcc nor clang; apt install gcc python3-dev, or take an image that has them (-devel), or",
    no_such_compiler: "CC = 'gcc-of-nowhere' is no program that can be started; correct it, or unset it",
    broken_compiler: "false ended with exit status 1, and its message is above; set CC to another compiler, or unset it",
    no_headers: "Python.h is missing; apt install gcc python3-dev, or take an image that has them (-devel)",
    no_cache: "name a folder that can be written to, and whose files can be run, in TRITON_CACHE_DIR",
    no_driver: "the driver's libcuda.so.1 is not found",
    no_card: "There should only be one; see that nvidia-smi works",
    no_ptxas: "Cannot find ptxas; the triton wheel brings it, or name yours in TRITON_PTXAS_PATH",
}


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("harm", GOT_AND_SAID)
def test_what_the_launcher_lacks_is_named_with_the_way_out(
    harm: Callable[[pytest.MonkeyPatch, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    harm(monkeypatch, tmp_path / "empty")
    with pytest.raises(ConfigError) as error:
        check_triton(CUDA)
    said = str(error.value)
    assert said.startswith("device = 'cuda': Triton cannot build or load the launcher of its kernels: ")
    assert GOT_AND_SAID[harm] in said
    assert "\n" not in said


@pytest.mark.usefixtures("card")
def test_a_launcher_that_is_built_needs_no_compiler_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_triton(CUDA)
    (built,) = (tmp_path / "cache").rglob("cuda_utils*.so")
    for harm in (no_compiler, no_such_compiler, no_headers):
        with monkeypatch.context() as harmed:
            forget(harmed)
            harm(harmed, tmp_path)
            check_triton(CUDA)
    assert [*(tmp_path / "cache").rglob("cuda_utils*.so")] == [built]


@pytest.mark.usefixtures("card")
def test_a_run_is_refused_before_its_folder_is_made_and_a_cpu_needs_no_launcher(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_compiler(monkeypatch, tmp_path)
    config = configure(tiny_data, tmp_path / "run", precision="fp32")
    with pytest.raises(ConfigError, match="the PATH has neither gcc nor clang"):
        building.build(config, World.alone(CUDA))
    assert not (tmp_path / "run").exists()
    check_triton(torch.device("cpu"))
