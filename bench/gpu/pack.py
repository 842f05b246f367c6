"""The packages for DALI's parts of make gpu, for a machine without network that has torch, Triton and NumPy.

    python -m bench.gpu.pack --python 3.12      # here, with network: bench/out/pack/gpu-pack.tar.xz.00, .01, ...

Send the pieces one after another, join and unpack them by the line that is printed, and put that folder on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import hashlib
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import TracebackType

from bench.gpu.__main__ import OUT
from bench.gpu.runner import REPOSITORY
from fasttricks.config.errors import ConfigError
from fasttricks.system.command import run_main

NAME = "gpu-pack.tar.xz"
PACKAGES = (
    # DALI, and those of its dependencies that JPEGs need; its wheel alone is 405 MiB
    *("nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12", "nvidia-nvjpeg-cu12", "optree", "nvtx", "makefun", "libcst"),
    *("astunparse", "gast", "six", "packaging", "pyyaml", "simplejpeg", "pillow", "nvidia-ml-py"),
    # the commands
    *("tyro", "docstring-parser", "typeguard", "typing-extensions", "rich", "pygments", "markdown-it-py", "mdurl"),
    # the log of a run
    *("tensorboard", "absl-py", "protobuf", "matplotlib", "contourpy", "cycler", "fonttools", "kiwisolver"),
    *("pyparsing", "python-dateutil"),
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
LEFT_OUT = re.compile(r"(^|/)(__pycache__|nvidia/dali/include|nvidia/dali/test|bin)(/|$)")
"""Folders that nobody imports."""
UNPACK = (
    "mkdir -p {folder} && cat {name}.* | python3 -c 'import sys, tarfile; "
    'tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1])\' {folder}'
)
"""The line that unpacks, in the folder of the pieces. No xz program is needed."""


class Pieces:
    """A file to write to, kept in pieces FIRST.00, FIRST.01, ... of at most so many bytes."""

    def __init__(self, first: Path, most_bytes: int) -> None:
        self._first, self._most, self._room = first, most_bytes, 0
        self.paths: list[Path] = []

    def write(self, data: bytes) -> int:
        """All of `data`, in as many pieces as that takes."""
        rest = memoryview(data)
        while len(rest):
            if not self._room:
                self.paths.append(self._first.with_name(f"{self._first.name}.{len(self.paths):02d}"))
                self.paths[-1].write_bytes(b"")
                self._room = self._most
            part, rest = rest[: self._room], rest[self._room :]
            with open(self.paths[-1], "ab") as file:
                file.write(part)
            self._room -= len(part)
        return len(data)

    def __enter__(self) -> Pieces:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for path in self.paths:
                path.unlink()


def install(target: Path, python: str) -> None:
    """Have pip put PACKAGES, of the releases in constraints.txt, as Python `python` takes them, into `target`."""
    words = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-compile",
    ]
    words += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--target", str(target)]
    words += [word for name in PLATFORMS for word in ("--platform", name)]
    done = subprocess.run([*words, "--constraint", str(REPOSITORY / "constraints.txt"), *PACKAGES])
    if done.returncode:
        raise ConfigError(f"python = {python!r}: pip ended with exit code {done.returncode}; its message is above")


def needed(folder: Path, python: str) -> list[Path]:
    """The files below `folder` that Python `python` can import: no other release's extension modules, no headers, no tests."""
    tag = f"cpython-{python.replace('.', '')}-"
    files = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    files = [path for path in files if not LEFT_OUT.search(str(path.relative_to(folder)))]
    return [path for path in files if ".cpython-" not in path.name or f".{tag}" in path.name]


def pack(folder: Path, files: list[Path], first: Path, most_bytes: int, *, preset: int = 6) -> list[Path]:
    """Write the tar.xz of `files`, named as below `folder`, in pieces, which are returned. Costs minutes for DALI."""
    with Pieces(first, most_bytes) as pieces:
        compressor = lzma.LZMACompressor(preset=preset)

        class Compressed:
            def write(self, data: bytes) -> int:
                pieces.write(compressor.compress(data))
                return len(data)

        with tarfile.open(fileobj=Compressed(), mode="w|") as tar:  # type: ignore[call-overload]
            for path in files:
                tar.add(path, str(path.relative_to(folder)), recursive=False)
        pieces.write(compressor.flush())
    return pieces.paths


def main(words: list[str]) -> None:
    """Install, pack, and print the pieces and the line that unpacks them."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.pack", description=__doc__)
    parser.add_argument(
        "--python", default=f"{sys.version_info[0]}.{sys.version_info[1]}", help="release of the other machine"
    )
    parser.add_argument("--piece-mib", type=int, default=60, help="most MiB of a piece (60)")
    parser.add_argument("--output", type=Path, default=OUT / "pack", help="folder of the pieces (bench/out/pack)")
    options = parser.parse_args(words)
    if options.piece_mib < 1:
        raise ConfigError(f"piece_mib = {options.piece_mib}: must be 1 or more")
    if not re.fullmatch(r"3\.\d+", options.python):
        raise ConfigError(f"python = {options.python!r}: must be a release such as 3.12")
    options.output.mkdir(parents=True, exist_ok=True)
    for old in options.output.glob(f"{NAME}.*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder:
        install(Path(folder), options.python)
        files = needed(Path(folder), options.python)
        pieces = pack(Path(folder), files, options.output / NAME, options.piece_mib << 20)
    for piece in pieces:
        print(f"{hashlib.sha256(piece.read_bytes()).hexdigest()}  {piece}  {piece.stat().st_size >> 20} MiB")
    print("In the folder of the pieces, on the other machine:")
    print(UNPACK.format(folder="site", name=NAME))
    print("export PYTHONPATH=$PWD/site")


if __name__ == "__main__":
    run_main(main)
