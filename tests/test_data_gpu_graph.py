"""The GPU graph, checked without a GPU: DALI defines and serializes it, and its registry says what exists.

Only build() needs the driver. The serialized graph is a protobuf of DALI's PipelineDef; the few fields used here are
read from the wire format: operators are field 5 of the graph, with name 1, inputs 2, outputs 3 and arguments 4; an argument has
name 1, floats 3 and strings 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from nvidia.dali import backend, pipeline_def

from fasttricks.config import DataConfig
from fasttricks.data.pipeline import graph
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.pipeline.pixels import DaliPixels, GpuPixels, Pixels, choose_pixels
from fasttricks.system.distributed import World
from fasttricks.tasks.classification import CLASSIFICATION
from lib.interpreter import interpreted
from lib.tiny import configure


class Operator(NamedTuple):
    name: str
    device: str
    arguments: set[str]
    inputs: list[tuple[str, str]]
    """(device, argument name or "" for a positional input)"""


def fields(message: bytes) -> dict[int, list[Any]]:
    """Field number -> values of a protobuf message: ints of varints, bytes of the rest."""
    found: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            value: Any = varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            value, at = message[at : at + size], at + size
        found.setdefault(key >> 3, []).append(value)
    return found


def operators(config: DataConfig, *, training: bool, on_gpu: bool) -> list[Operator]:
    way = GpuPixels() if on_gpu else DaliPixels()
    pipeline = pipeline_def(graph.image_graph)(
        config,
        way if training else None,
        on_gpu=on_gpu,
        half=True,
        hw_decoder_load=0.0,
        batch_size=2,
        num_threads=1,
        device_id=None,
    )
    made = []
    for operator in map(fields, fields(pipeline.serialize())[5]):
        arguments = {a[1][0].decode(): a for a in map(fields, operator.get(4, []))}
        inputs = [(i[2][0].decode(), i[4][0].decode() if i[3][0] else "") for i in map(fields, operator.get(2, []))]
        made.append(Operator(operator[1][0].decode(), arguments["device"][5][0].decode(), set(arguments), inputs))
    return made


CASES = [(color, training) for color in ("paper", "published", "none") for training in (True, False)]


@pytest.mark.parametrize(("color", "training"), CASES)
@pytest.mark.parametrize("on_gpu", [True, False])
def test_every_operator_and_argument_is_registered(color: Any, training: bool, on_gpu: bool) -> None:
    registered = {
        "cpu": set(backend.RegisteredCPUOps()),
        "gpu": set(backend.RegisteredGPUOps()),
        "mixed": set(backend.RegisteredMixedOps()),
    }
    for operator in operators(DataConfig(color=color), training=training, on_gpu=on_gpu):
        assert operator.name in registered[operator.device], operator
        schema = backend.GetSchema(operator.name)
        given = {a for a in operator.arguments if not a.startswith("_")} - {"device", "preserve_name"}
        assert all(schema.HasArgument(argument) for argument in given), operator
        positional = [device for device, argument in operator.inputs if not argument]
        assert schema.MinNumInput() <= len(positional) <= schema.MaxNumInput(), operator
        if operator.device != "gpu":
            assert set(positional) <= {"cpu"}, operator
        for device, argument in operator.inputs:
            if argument:
                assert device == "cpu", operator  # DALI takes arguments from the CPU only
                assert schema.IsTensorArgument(argument), operator


@pytest.mark.parametrize("training", [True, False])
def test_what_runs_where(training: bool) -> None:
    """Pixels are touched on the GPU only, by the CPU graph's operators; colour, in training, by the kernel behind it."""
    on_gpu, on_cpu = (operators(DataConfig(), training=training, on_gpu=gpu) for gpu in (True, False))
    heavy = {"ImageSlice", "Image", "Resize", "CoordTransform", "CropMirrorNormalize"}
    where = {o.name.rpartition("__")[2]: o.device for o in on_gpu if o.name.rpartition("__")[2] in heavy}
    assert sorted(where.values()) == (["gpu", "mixed"] if training else ["gpu", "gpu", "mixed"])
    others = {o.name for o in on_gpu if o.device != "cpu" and o.name.rpartition("__")[2] not in heavy}
    assert others <= {"MakeContiguous", "Copy"}, "test_data_libraries.py: none that calls cuFFT or NPP"
    moves = {"MakeContiguous", "Copy"}
    left = {"CoordTransform", "Cast"} if training else set()  # to FP16, of the colours
    names = [
        sorted(n for n in (o.name.rpartition("__")[2] for o in made) if n not in moves | left)
        for made in (on_gpu, on_cpu)
    ]
    assert [n for n in names[0] if n != "ExternalSource"] == [n for n in names[1] if n != "ExternalSource"]
    assert names[0].count("ExternalSource") == names[1].count("ExternalSource") - training  # the matrix


class Serialized(Exception):
    """A graph is defined; to build it would take a driver."""


def engine_load(batches: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> float | None:
    """The share of a batch that the decoder in such a loader's graph gives to the GPU's JPEG engine; None: no such argument."""
    found: list[bytes] = []

    def define(graph: Any) -> Any:
        def make(*args: Any, device_id: int | None, **options: Any) -> Any:
            found.append(pipeline_def(graph)(*args, device_id=None, **options).serialize())
            raise Serialized

        return make

    monkeypatch.setattr("fasttricks.data.pipeline.decoder.pipeline_def", define)
    with pytest.raises(Serialized):
        next(iter(batches()))
    (decoder,) = (o for o in map(fields, fields(found[0])[5]) if o[1][0].startswith(b"decoders__"))
    arguments = {a[1][0].decode(): a for a in map(fields, decoder[4])}
    if "hw_decoder_load" not in arguments:
        return None
    (value,) = struct.unpack("<f", arguments["hw_decoder_load"][3][0])
    return round(value, 6)


@pytest.mark.parametrize(
    ("split", "deterministic", "device", "wanted"),
    [
        ("train", "on", "cuda", 0.0),
        ("train", "off", "cuda", 0.65),
        ("val", "on", "cuda", 0.0),
        ("val", "off", "cuda", 0.0),
        ("train", "off", "cpu", None),
        ("val", "on", "cpu", None),
    ],
)
def test_one_decoder_for_every_image_unless_the_run_may_differ(
    split: str,
    deterministic: Any,
    device: str,
    wanted: float | None,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Mixed decoding gives a part of each batch to the JPEG engine, which rounds otherwise: the place decides."""
    # the fused operator of the CPU cannot be serialized
    config = configure(tiny_data, tmp_path, "--data.operators", "dali", precision="fp32", deterministic=deterministic)
    world, task = World.alone(torch.device(device)), CLASSIFICATION
    train, val = task.open_data(config.data)
    batches = {
        "train": lambda: task.train_batches(config, train, world),
        "val": lambda: task.val_batches(config, val, world, batch_size=2, dtype=torch.float32),
    }
    assert engine_load(batches[split], monkeypatch) == wanted


def test_a_loader_of_ones_own_has_one_decoder_too_and_takes_another_share(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, wanted in (({}, 0.0), ({"hw_decoder_load": 0.9}, 0.9)):
        given: dict[str, Any] = {"batch_size": 2, "device": "cuda", "threads": 1, **options}
        assert engine_load(lambda given=given: Loader.open(tiny_data, "train", **given), monkeypatch) == wanted


@pytest.mark.parametrize(
    ("training", "device", "asked", "operators"),
    [
        (True, "cpu", "auto", "fused"),
        (True, "cpu", "fused", "fused"),
        (True, "cpu", "dali", "dali"),
        (True, "cuda", "auto", "gpu"),
        (True, "cuda:1", "dali", "gpu"),
        (False, "cpu", "auto", None),
        (False, "cuda", "fused", None),
    ],
)
def test_how_pixels_are_made(training: bool, device: str, asked: Any, operators: str | None) -> None:
    """The names are those that saved positions hold."""
    pixels = choose_pixels(DataConfig(operators=asked), training=training, device=torch.device(device))
    assert (pixels.operators if pixels is not None else None) == operators


def batch(folder: Any, config: DataConfig, pixels: Pixels, dtype: torch.dtype = torch.float32) -> Any:
    """One training batch on the CPU: as the GPU makes it, uint8 out of DALI and the rest in one kernel, or by DALI alone."""
    loader = Loader(folder, config, training=True, batch_size=8, device=torch.device("cpu"), dtype=dtype)
    loader._pixels = pixels
    return next(iter(loader))


def check_colors_behind_the_graph(root: Path) -> None:
    from fasttricks.data.sources.folder import scan_folder

    folder = scan_folder(root)
    for color in ("paper", "published", "none"):
        config = DataConfig(color=color, image_size=64, threads=1)  # type: ignore[arg-type]
        alone, ours = (batch(folder, config, pixels) for pixels in (DaliPixels(), GpuPixels()))
        assert torch.equal(alone.labels, ours.labels)
        assert ours.images.is_contiguous(memory_format=torch.channels_last)
        assert alone.images.shape == ours.images.shape == (8, 3, 64, 64)
        torch.testing.assert_close(ours.images, alone.images, rtol=1e-5, atol=2e-5)
        half = batch(folder, config, GpuPixels(), torch.float16).images
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), alone.images, rtol=2**-10, atol=2e-5)
    assert len(torch.unique(alone.images)) > 100


def test_colors_behind_the_graph_are_those_in_it(test_data: Any) -> None:
    """Real JPEGs through the uint8 graph and augment(), against DALI's own colour step; the CPU's composite."""
    check_colors_behind_the_graph(test_data("imagenet_samples") / "train")


@interpreted
def kernel_check(root: Path) -> None:
    check_colors_behind_the_graph(root)


@pytest.mark.slow
def test_the_kernel_behind_the_graph_gives_the_same(test_data: Any) -> None:
    """The same with the Triton kernel, under the interpreter."""
    kernel_check(root=test_data("imagenet_samples") / "train")


def test_the_check_can_fail() -> None:
    """An operator that the GPU lacks is what this file is for: the random crop window is one."""
    assert "RandomCropGenerator" not in backend.RegisteredGPUOps()


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_gpu_batches_are_the_cpu_batches(training: bool, test_data: Any) -> None:
    """Same draws on both; JPEG decoders differ by rounding."""
    from fasttricks.data.sources.folder import scan_folder

    folder = scan_folder(test_data("imagenet_samples") / "train")
    cpu, gpu = (
        next(iter(Loader(folder, DataConfig(), training=training, batch_size=16, device=torch.device(name))))
        for name in ("cpu", "cuda")
    )
    assert gpu.images.device.type == "cuda"
    assert torch.equal(cpu.labels, gpu.labels.cpu())
    assert (cpu.images - gpu.images.cpu()).abs().mean() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_a_busy_stream_gets_the_same_batches(training: bool, tiny_data: Path) -> None:
    """DALI writes into no memory that torch's stream has yet to read."""
    from fasttricks.data.sources.folder import scan_folder

    def batches(cycles: int) -> torch.Tensor:
        loader = Loader(
            scan_folder(tiny_data / "train"),
            DataConfig(image_size=160),
            training=training,
            batch_size=4,
            device=torch.device("cuda"),
        )
        found = []
        for batch in loader:
            found.append(batch.images.double().sum((1, 2, 3)))
            del batch
            torch.cuda._sleep(cycles)  # in front of the next batch's kernels
        return torch.cat(found)

    assert torch.equal(batches(1), batches(200_000_000))
