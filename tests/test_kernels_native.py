"""C compiled at first use: built once whatever starts at once, anew for another source or compiler, and what is said without."""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tomllib

from fasttricks_kernels import native
from fasttricks_kernels.native import NativeError
from lib.forked import on_ranks
from lib.tiny import REPOSITORY


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "number.c"
    path.write_text("int number(void) { return 1; }\n")
    return path


def test_processes_that_start_at_once_leave_one_file(source: Path, tmp_path: Path) -> None:
    """Two on an empty cache: each loads it, and nothing half-made is left."""
    (tmp_path / "said").mkdir()
    on_ranks(2, load, source, tmp_path)
    (file,) = (tmp_path / "fasttricks").iterdir()
    assert [said.read_text() for said in (tmp_path / "said").iterdir()] == [f"1 {file}"] * 2


def load(source: Path, cache: Path) -> None:
    """What a rank does."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    library = native.load(source)
    (cache / "said" / os.environ["RANK"]).write_text(f"{library.number()} {library._name}")


def test_built_anew_for_another_source_compiler_or_flag(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    made = [native.build(source, cache=cache), native.build(source, cache=cache)]
    made.append(native.build(source, ["-ffp-contract=off"], cache=cache))
    source.write_text("int number(void) { return 2; }\n")
    made.append(native.build(source, cache=cache))
    monkeypatch.setenv("CC", f"{native.find_compiler()[0]} -O1")
    made.append(native.build(source, cache=cache))
    assert made[0] == made[1] and len(set(made)) == 4
    assert [native.load(source, cache=cache).number(), len(list(cache.iterdir()))] == [2, 4]
    (source.parent / "beside.h").write_text("/* a header */\n")
    assert native.build(source, cache=cache) not in made


SANITIZED = """
import torch
import fasttricks_kernels as fk
from fasttricks_kernels.losses import cross_entropy
from fasttricks_kernels import native
build = native.build
FLAGS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
native.build = lambda source, flags=(), **k: build(source, FLAGS, **k)
cross_entropy.OWN_FROM = 0
for shape in ((1, 1), (5, 7), (3, 1001), (2, 5, 3), (2, 3, 129), (1, 40, 128)):
    logits, num_classes = torch.randn(shape), shape[1]
    labels = torch.randint(num_classes, (shape[0], *shape[2:]))
    labels.view(-1)[0] = -100
    for target in (labels, labels.int(), torch.rand(shape)):
        for weight in (None, torch.rand(num_classes)):
            for smoothing in (0.0, 0.1):
                for leaf in (logits, logits.clone().requires_grad_()):
                    loss = fk.cross_entropy(leaf, target, weight, label_smoothing=smoothing)
                    if loss.requires_grad:
                        loss.backward()
print("ran", fk.losses_compiled())
"""


@pytest.mark.slow
def test_losses_c_under_the_sanitizers(tmp_path: Path) -> None:
    """No access beside an array, no overflow of a number: every form, with a gradient and without."""
    compiler = native.find_compiler()[0]
    runtime = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    preload = {"LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED], capture_output=True, text=True, check=False, env={**os.environ, **preload}
    )
    assert (done.returncode, done.stdout) == (0, "ran True\n"), done.stderr[-3000:]


def test_what_stands_in_the_way_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler -O2")
    with pytest.raises(NativeError, match=r"no C compiler \(CC=no-such-compiler\); install gcc or clang"):
        native.load(source, cache=tmp_path)
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\n[ $1 = --version ] && echo 1.0 && exit\necho number.c: it is broken >&2\nexit 3\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CC", str(failing))
    with pytest.raises(NativeError, match=r"failed with status 3: number\.c: it is broken"):
        native.load(source, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.delenv("CC")
    with pytest.raises(NativeError, match=r"cannot be used \(File exists\); set XDG_CACHE_HOME"):
        native.load(source, cache=failing)  # a file where the folder should be
    library = native.build(source, cache=tmp_path / "cache")
    library.write_bytes(b"damaged")
    with pytest.raises(NativeError, match=r"number-\w+\.so cannot be loaded .*; remove it"):
        native.load(source, cache=tmp_path / "cache")


def test_every_c_file_and_page_is_package_data() -> None:
    """A file that the wheel lacks is missed only after an install, which a slow test makes."""
    listed = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    found = [
        (path.parent.relative_to(root), path.name)
        for root in (REPOSITORY, REPOSITORY / "kernels")
        for package in ("fasttricks", "fasttricks_kernels")
        for path in sorted((root / package).rglob("*"))
        if path.suffix in (".c", ".h", ".html", ".typed")
    ]
    assert len(found) > 6
    for folder, name in found:
        package = ".".join(folder.parts)
        assert any(fnmatch(name, pattern) for pattern in listed.get(package, [])), f"{package}: {name}"
