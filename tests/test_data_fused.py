"""The compiled operator: its pixels against PIL's, its bits on every kind of machine, its build, and what is done without."""

from __future__ import annotations

import ctypes
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.config import ConfigError, DataConfig
from fasttricks.data.pipeline import fused, reference
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources import find_dataset
from fasttricks_kernels import native
from fasttricks_kernels.native import NativeError
from lib.tiny import arguments, on_terminal

IDENTITY = np.eye(3, 4, dtype=np.float32)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    return native.load(fused.SOURCE, fused.FLAGS)


def call(
    library: ctypes.CDLL,
    image: np.ndarray,
    size: int,
    *,
    matrix: np.ndarray = IDENTITY,
    flip: bool = False,
    kind: str = "linear_antialias",
) -> np.ndarray:
    """The C function on one image as DALI calls it, with guard values around the output."""
    guarded = np.full(size * size * 3 + 16, 777, np.float32)
    outputs = (ctypes.c_void_p * 1)(guarded[8:].ctypes.data)
    inputs_kept = [np.ascontiguousarray(image), np.ascontiguousarray(matrix, np.float32), np.array(flip, np.float32)]
    inputs = (ctypes.c_void_p * 4)(*(array.ctypes.data for array in inputs_kept), None)
    shapes = [(ctypes.c_int64 * 3)(*shape) for shape in ((size, size, 3), image.shape)]
    out_shape, in_shape = ((ctypes.c_void_p * 1)(ctypes.addressof(shape)) for shape in shapes)
    getattr(library, f"fasttricks_{kind}")(outputs, out_shape, None, 1, inputs, in_shape, None, 4)
    assert (guarded[:8] == 777).all() and (guarded[-8:] == 777).all()  # nothing is written beside the output
    return guarded[8:-8].reshape(size, size, 3)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng((height, width)).integers(0, 256, (height, width, 3), np.uint8)


def outer_cubic(x: Any) -> Any:
    return np.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0)


WEIGHTS: dict[str, tuple[int, Callable[[Any], Any]]] = {
    "linear": (1, lambda x: np.maximum(0, 1 - abs(x))),
    "cubic": (2, lambda x: np.where(abs(x) < 1, (1.5 * abs(x) - 2.5) * x**2 + 1, outer_cubic(abs(x)))),
    "lanczos3": (3, lambda x: np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)),
}


def resized(image: np.ndarray, size: int, interpolation: str, *, antialias: bool) -> np.ndarray:
    """In float64, by two matrices, not rounded."""
    radius, weight = WEIGHTS[interpolation]
    axes = []
    for inputs in image.shape[:2]:
        scale = inputs / size
        widen = max(scale, 1) if antialias else 1
        taps = np.zeros((size, inputs))
        for i in range(size):
            center, reach = (i + 0.5) * scale - 0.5, math.ceil(radius * widen) + 1
            for k in range(math.floor(center) - reach, math.floor(center) + reach + 1):
                taps[i, min(max(k, 0), inputs - 1)] += weight(np.float64((k - center) / widen))
        axes.append(taps / taps.sum(1, keepdims=True))
    return np.einsum("yh,xw,hwc->yxc", *axes, image.astype(np.float64), optimize=True)


SIZES = ((150, 200, 112), (50, 40, 112), (64, 64, 64), (1, 1, 8), (1, 50, 9), (2, 2, 33), (900, 2, 15), (37, 500, 28))


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["linear", "cubic", "lanczos3"])
def test_pixels_are_the_filter_s_rounded(library: ctypes.CDLL, interpolation: str, antialias: bool) -> None:
    """On noise, which forgives nothing: the float64 value rounded, either way where it lies within 0.001 of a half."""
    kind = interpolation + ("_antialias" if antialias else "")
    for height, width, size in SIZES:
        image = noise(height, width)
        got = call(library, image, size, kind=kind)
        want = resized(image, size, interpolation, antialias=antialias).clip(0, 255)
        assert (got == np.round(got)).all()
        assert np.abs(got - want).max() < 0.501, (height, width, size)


@pytest.mark.parametrize("interpolation", ["linear", "cubic", "lanczos3"])
def test_pixels_are_those_of_pil(library: ctypes.CDLL, interpolation: str) -> None:
    for height, width, size in ((300, 400, 224), (100, 83, 224), (331, 221, 224)):
        image = noise(height, width)
        want = reference.training_pixels(
            Image.fromarray(image), (0, 0), (1, 1), flip=False, image_size=size, interpolation=interpolation
        )
        difference = np.abs(call(library, image, size, kind=f"{interpolation}_antialias") - want)
        assert difference.max() <= 1, (height, width, size)
        assert (difference > 0).mean() < 0.001, (height, width, size)


def test_flip_is_the_mirror_image_bit_for_bit(library: ctypes.CDLL) -> None:
    for height, width, size in SIZES:
        image = noise(height, width)
        assert (call(library, image, size, flip=True) == call(library, image, size)[:, ::-1]).all()


def test_matrix_is_applied_to_the_rounded_pixel(library: ctypes.CDLL) -> None:
    matrix = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    for height, width, size in SIZES:
        image = noise(height, width)
        want = call(library, image, size) @ matrix[:, :3].T.astype(np.float64) + matrix[:, 3]
        got = call(library, image, size, matrix=matrix)
        np.testing.assert_allclose(got, want, rtol=0, atol=255 * 4 * 2**-23 * np.abs(matrix).max())


@pytest.mark.slow
def test_same_bits_with_any_instruction_set(library: ctypes.CDLL, tmp_path: Path) -> None:
    """Without vectors, and with those of every CPU since 2003: what -march=native compiles must not differ in a bit."""
    kinds = [name + end for name in ("linear", "cubic", "lanczos3") for end in ("", "_antialias")]
    matrix = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    for number, options in enumerate((["-O0"], ["-O3"])):
        made = tmp_path / f"{number}.so"
        flags = [flag for flag in (*native.FLAGS, *fused.FLAGS) if flag != "-O3"]
        subprocess.run([*native.find_compiler(), *flags, *options, "-o", made, fused.SOURCE, "-lm"], check=True)
        other = ctypes.CDLL(str(made))
        for height, width, size in ((300, 400, 224), (100, 80, 65), (1, 2, 9)):
            image = noise(height, width)
            for kind in kinds:
                want = call(library, image, size, matrix=matrix, kind=kind)
                assert (call(other, image, size, matrix=matrix, kind=kind) == want).all(), (options, kind)


def test_a_dali_without_the_operator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fused.find_callback("linear", antialias=True)
    monkeypatch.setattr(fused, "_OPERATOR", "Resize")
    with pytest.raises(NativeError, match=r"DALI [\d.]+ takes no compiled callbacks"):
        fused.find_callback("linear", antialias=True)
    monkeypatch.setattr(fused, "_OPERATOR", "NoSuchOperator")
    with pytest.raises(NativeError, match="takes no compiled callbacks"):
        fused.find_callback("linear", antialias=True)


def test_without_a_compiler_dali_does_it(tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """auto falls back with the reason, fused is an error with the way out; the values agree, a level at a tie aside."""
    folder, _ = find_dataset(DataConfig(root=str(tiny_data)))
    train: Any = {"training": True, "batch_size": 16, "device": torch.device("cpu")}
    config = DataConfig(image_size=32, val_resize=32, color="none")
    fast = Loader(folder, config, **train)
    assert fast.note == ""
    monkeypatch.setenv("CC", "no-such-compiler")
    slow = Loader(folder, config, **train)
    assert slow.note == (
        "resized and coloured by DALI's operators, slower than the compiled one: "
        "no C compiler (CC=no-such-compiler); install gcc or clang, or name one in CC"
    )
    with pytest.raises(
        ConfigError, match=r"data\.operators = 'fused': the compiled .*install gcc or clang.*leave it at auto"
    ):
        Loader(folder, replace(config, operators="fused"), **train)
    difference = np.concatenate([(a.images - b.images).abs().numpy() * 58.4 for a, b in zip(fast, slow, strict=True)])
    assert difference.max() < 1.03
    assert (difference > 0.1).mean() < 0.01


@pytest.mark.slow
def test_the_header_says_that_there_is_no_compiler(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    args = arguments(tiny_data, tmp_path / "run", "--epochs", "1")
    code, shown = on_terminal(sys.executable, "-m", "fasttricks.train", *args)
    assert code == 0, shown
    assert "input    resized and coloured by DALI's operators" in shown


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_threads_and_batch_size_change_no_bit(tiny_data: Path, dtype: torch.dtype) -> None:
    folder, _ = find_dataset(DataConfig(root=str(tiny_data)))
    epochs = []
    for threads, batch_size in ((1, 45), (2, 7), (3, 45)):
        config = DataConfig(image_size=40, val_resize=40, threads=threads, operators="fused")
        cpu = torch.device("cpu")
        loader = Loader(folder, config, training=True, batch_size=batch_size, device=cpu, dtype=dtype)
        epochs.append(torch.cat([batch.images.clone() for batch in loader]))
    assert epochs[0].dtype == dtype
    assert all(torch.equal(epoch, epochs[0]) for epoch in epochs)
