"""The GPU graph, checked without a GPU: DALI defines and serializes it, and its registry says what exists.

Only build() needs the driver. The serialized graph is a protobuf of DALI's PipelineDef; the few fields used here are
read from the wire format: operators are field 5 of the graph, with name 1, inputs 2, outputs 3 and arguments 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from nvidia.dali import backend, pipeline_def

from fasttricks.config import DataConfig
from fasttricks.data import Loader, dali


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
    pipeline = pipeline_def(dali._graph)(
        config, training=training, on_gpu=on_gpu, half=True, batch_size=2, num_threads=1, device_id=None
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
    """Pixels are touched on the GPU only, and the CPU graph is the same operators on the CPU."""
    on_gpu, on_cpu = (operators(DataConfig(), training=training, on_gpu=gpu) for gpu in (True, False))
    heavy = {"ImageSlice", "Image", "Resize", "CoordTransform", "CropMirrorNormalize"}
    where = {o.name.rpartition("__")[2]: o.device for o in on_gpu if o.name.rpartition("__")[2] in heavy}
    assert sorted(where.values()) == ["gpu", "gpu", "mixed"]
    extra = [o.name for o in on_gpu if o.name == "MakeContiguous" or o.name == "Copy"]
    assert sorted(o.name for o in on_gpu) == sorted([o.name for o in on_cpu] + extra)


def test_the_check_can_fail() -> None:
    """An operator that the GPU lacks is what this file is for: the random crop window is one."""
    assert "RandomCropGenerator" not in backend.RegisteredGPUOps()


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_gpu_batches_are_the_cpu_batches(training: bool, test_data: Any) -> None:
    """Same draws on both; JPEG decoders differ by rounding."""
    from fasttricks.data import scan_folder

    folder = scan_folder(test_data("imagenet_samples") / "train")
    cpu, gpu = (
        next(iter(Loader(folder, DataConfig(), training=training, batch_size=16, device=torch.device(name))))
        for name in ("cpu", "cuda")
    )
    assert gpu.images.device.type == "cuda"
    assert torch.equal(cpu.labels, gpu.labels.cpu())
    assert (cpu.images - gpu.images.cpu()).abs().mean() < 0.05
