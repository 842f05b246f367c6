"""C compiled at first use: built once whatever starts at once, anew for another source or compiler, and what is said without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fasttricks_kernels import native
from fasttricks_kernels.native import NativeError
from lib.forked import on_ranks


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
