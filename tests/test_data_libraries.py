"""DALI's libraries of CUDA 12 that no operator of ours calls: it is silent on their absence, and on nothing else."""

from __future__ import annotations

import mmap
import re
import warnings
from pathlib import Path
from typing import Any

import nvidia.dali
import pytest
import torch
from nvidia.dali import backend

from fasttricks.config import DataConfig
from fasttricks.data.pipeline import decoder
from fasttricks.data.pipeline.decoder import Decoder


class Pipeline:
    """Looks for the libraries as DALI does where it builds a graph for a GPU."""

    def build(self) -> None:
        backend.check_cuda_runtime()


def build(monkeypatch: pytest.MonkeyPatch, *, cuda: int, cufft: int, npp: int) -> list[str]:
    """What DALI warns of where a Decoder is made and it finds these versions of the driver and the libraries; -1: none."""
    found = {"GetCudaVersion": cuda, "GetCufftVersion": cufft, "GetNppVersion": npp}
    for name, version in found.items():
        monkeypatch.setattr(backend, name, lambda version=version: version)
    monkeypatch.setattr(backend, "cuda_checked", False)

    def define(graph: Any) -> Any:
        return lambda *args, **options: Pipeline()

    monkeypatch.setattr(decoder, "pipeline_def", define)
    device = torch.device("cuda", 0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Decoder(DataConfig(), None, device=device, half=True, seed=0, batch_size=1, ahead=1, hw_decoder_load=0.0)
    return [str(warning.message) for warning in said]


@pytest.mark.parametrize("cufft, npp", [(-1, -1), (-1, 12000), (11000, -1), (11000, 12000)])
def test_their_absence_is_not_said(cufft: int, npp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build(monkeypatch, cuda=13000, cufft=cufft, npp=npp) == []


def test_the_absence_of_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    (said,) = build(monkeypatch, cuda=-1, cufft=-1, npp=-1)
    assert said.startswith("GPU is not available")


def test_dali_would_say_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else there is nothing left to be silent on."""
    monkeypatch.setattr(decoder, "_no_word_on_unused_libraries", warnings.catch_warnings)
    said = build(monkeypatch, cuda=13000, cufft=-1, npp=-1)
    assert ["cuFFT" in said[0], "NPP" in said[1], len(said)] == [True, True, 2]


@pytest.mark.slow
def test_the_functions_that_dali_looks_up_in_them() -> None:
    """NPP's for Bayer patterns, remap and the old colour twist, and cuFFT's for spectrograms; no more."""
    found: set[str] = set()
    for library in Path(nvidia.dali.__file__).parent.glob("libdali*.so"):
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            names = re.findall(rb"\0((?:nppi|cufftExec)[A-Za-z0-9]*)(?=[_\0])", content)
            found |= {name.decode() for name in names}
    assert found == {"nppiCFAToRGB", "nppiColorTwist32f", "nppiRemap", "cufftExecR2C"}
