"""DALI's memory stays DALI's user's until torch's stream has read it: a pipeline and a card that are not there."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fasttricks.config import DataConfig
from fasttricks.data.pipeline import decoder as module
from fasttricks.data.pipeline.decoder import Decoder
from fasttricks.data.pipeline.draws import Draws
from fasttricks.data.pipeline.feed import Job
from fasttricks.data.pipeline.pixels import GpuPixels, Pixels
from lib.card import CARD, OnCard, card

JOB = Job(0, 0, np.arange(2), np.arange(2), np.arange(2), [b"a", b"b"])
happened: list[str] = []


class Event:
    """An event of torch's stream that passes when the test says so."""

    passed = 0
    """How many of those made have passed."""
    made = 0

    def __init__(self) -> None:
        self.number = Event.made
        Event.made += 1

    def record(self, stream: object) -> None:
        assert stream == "torch's stream"
        happened.append("recorded")

    def query(self) -> bool:
        return self.number < Event.passed

    def synchronize(self) -> None:
        happened.append(f"waited for {self.number}")


class Pipeline:
    """Of DALI: its outputs, in its memory."""

    device: torch.device = CARD
    lent: list[weakref.ref[Tensor]]

    def __init__(self) -> None:
        self.lent = []

    def build(self) -> None: ...

    def feed_input(self, name: str, values: object) -> None: ...

    def schedule_run(self) -> None: ...

    def release_outputs(self) -> None:
        happened.append("released")

    def share_outputs(self) -> tuple[Any]:
        return (self,)

    def as_tensor(self) -> Tensor:
        host = torch.full((2, 4, 4, 3), 7, dtype=torch.uint8)
        made = OnCard(host) if self.device.type == "cuda" else host
        self.lent.append(weakref.ref(made))
        return made


class Launched(GpuPixels):
    """Notes when the kernel is launched."""

    def finish(self, images: Tensor, config: DataConfig, draws: Draws, *, half: bool) -> Tensor:
        happened.append("launched")
        return images.permute(0, 3, 1, 2).float()


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipeline]:
    made = Pipeline()
    happened.clear()
    Event.made = Event.passed = 0
    monkeypatch.setattr(module, "pipeline_def", lambda graph: lambda *args, **options: made)
    monkeypatch.setattr(module, "TensorCPU", lambda file: file)
    monkeypatch.setattr(module, "TensorListCPU", lambda files, contiguous: files)
    monkeypatch.setattr(torch, "from_dlpack", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "torch's stream" if device == CARD else "another")
    with card():
        yield made


def make(pixels: Pixels | None, device: torch.device = CARD) -> Decoder:
    return Decoder(DataConfig(), pixels, device=device, half=False, seed=0, batch_size=2, ahead=1, hw_decoder_load=0.0)


def take(decoder: Decoder) -> Tensor:
    decoder.hand_over(JOB)
    return decoder.take()


def alive(pipeline: Pipeline) -> list[bool]:
    return [reference() is not None for reference in pipeline.lent]


@pytest.mark.parametrize("pixels", [Launched(), None], ids=["training", "validation"])
def test_memory_is_dalis_again_once_torchs_stream_has_read_it(pixels: Pixels | None, pipeline: Pipeline) -> None:
    decoder = make(pixels)
    batches = [take(decoder), take(decoder)]
    assert happened == [*(["launched"] if pixels else []), "recorded", "released"] * 2, "nothing is waited for"
    del batches
    assert alive(pipeline) == [True, True], "the kernels have not run yet, though nobody has the batches any more"
    Event.passed = 1
    take(decoder)
    assert alive(pipeline) == [False, True, True]
    happened.clear()
    del decoder
    assert happened == ["waited for 1", "waited for 2"], "a new pipeline takes memory from the same pool"
    assert alive(pipeline) == [False] * 3


def test_a_batch_of_validation_is_in_torchs_memory(pipeline: Pipeline) -> None:
    """Its kernels are the caller's, so that nobody can tell when they end."""
    decoder = make(None)
    batch = take(decoder)
    raw = pipeline.lent[0]()
    assert isinstance(batch, OnCard) and isinstance(raw, OnCard)
    assert batch.host.data_ptr() != raw.host.data_ptr()
    assert batch.host.is_contiguous(memory_format=torch.channels_last) and batch.host.unique().tolist() == [7]


def test_on_the_cpu_nothing_is_copied_or_held(pipeline: Pipeline) -> None:
    pipeline.device = torch.device("cpu")
    decoder = make(None, pipeline.device)
    batch = take(decoder)
    raw = pipeline.lent[0]()
    assert raw is not None and batch.data_ptr() == raw.data_ptr()
    del raw, batch
    assert alive(pipeline) == [False] and Event.made == 0
