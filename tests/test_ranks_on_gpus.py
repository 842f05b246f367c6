"""Which GPU a rank takes, that no two take one, and that they join over nccl with it named: without a GPU.

Processes on the CPU stand for the ranks; torch's answers on CUDA, and nccl, are replaced in them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist

from fasttricks.config import ConfigError
from fasttricks.system.distributed import Vote, World, check_own_gpus, gpu_of, join_world, resolve_device
from lib.forked import on_ranks

FIRST, SECOND = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"


def gpus(count: int, uuid: str = FIRST) -> dict[str, Any]:
    """torch's answers where a process sees so many GPUs, by the names of its functions."""
    return {
        "torch.cuda.is_available": lambda: count > 0,
        "torch.cuda.device_count": lambda: count,
        "torch.cuda.set_device": mock.Mock(),
        "torch.cuda.get_device_properties": lambda device: SimpleNamespace(uuid=uuid),
    }


def patched(stack: ExitStack, answers: Mapping[str, Any]) -> None:
    for name, answer in answers.items():
        stack.enter_context(mock.patch(name, answer))


@pytest.mark.parametrize(
    ("wanted", "count", "local_rank", "device"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 0, 3, "cpu"),
        ("cpu", 8, 3, "cpu"),
        ("auto", 1, 0, "cuda:0"),
        ("cuda", 1, 0, "cuda:0"),
        ("auto", 8, 0, "cuda:0"),
        ("auto", 8, 7, "cuda:7"),
        # each rank sees its own alone, by CUDA_VISIBLE_DEVICES: a launcher's, or of a MIG slice
        ("auto", 1, 1, "cuda:0"),
        ("cuda", 1, 7, "cuda:0"),
    ],
)
def test_the_gpu_of_a_rank(wanted: str, count: int, local_rank: int, device: str) -> None:
    with ExitStack() as stack:
        patched(stack, gpus(count))
        assert resolve_device(wanted, local_rank) == torch.device(device)


@pytest.mark.parametrize(
    ("wanted", "count", "local_rank", "said"),
    [
        ("cuda", 0, 0, r"^device = 'cuda': this torch \(.*\) finds no CUDA device; use --device cpu"),
        (
            "auto",
            2,
            2,
            "^local rank = 2: needs 3 GPUs, and this process sees 2; lower --nproc-per-node, or give each rank one",
        ),
        ("cuda", 4, 7, "^local rank = 7: needs 8 GPUs, and this process sees 4; lower"),
    ],
)
def test_too_few_gpus_are_refused(wanted: str, count: int, local_rank: int, said: str) -> None:
    with ExitStack() as stack:
        patched(stack, gpus(count))
        with pytest.raises(ConfigError, match=said):
            resolve_device(wanted, local_rank)


# --------------------------------------------------------------------------------------------------- no two on one GPU
@pytest.mark.parametrize(
    ("uuids", "visible", "shared"),
    [
        ((FIRST, SECOND), ("0", "1"), False),
        ((FIRST, SECOND), ("0", "0"), False),
        ((FIRST, FIRST), ("0", "0"), True),
        ((FIRST, FIRST), ("", ""), True),
        ((FIRST, FIRST), ("MIG-a", "MIG-b"), False),
        ((FIRST, FIRST), ("MIG-a", "MIG-a"), True),
    ],
    ids=["two GPUs", "each by its launcher", "one GPU", "one GPU, all visible", "two slices", "one slice"],
)
def test_two_ranks_never_share_a_gpu(
    uuids: tuple[str, str], visible: tuple[str, str], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank reads the names of all and says the same."""
    gpu, store = torch.device("cuda", 0), dist.HashStore()
    names = []
    for uuid, value in zip(uuids, visible, strict=True):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        monkeypatch.setattr(torch.cuda, "get_device_properties", gpus(1, uuid)["torch.cuda.get_device_properties"])
        names.append(gpu_of(gpu))
    said = set()
    for rank in (0, 1):
        store.set(f"gpu_{1 - rank}", names[1 - rank])
        store.set(f"gpu_{1 - rank}_read", "")
        monkeypatch.setattr("fasttricks.system.distributed.gpu_of", lambda _, name=names[rank]: name)
        try:
            check_own_gpus(World(rank=rank, size=2, local_rank=rank, local_size=2, device=gpu), store)
        except ConfigError as error:
            said.add(str(error))
    assert len(said) == shared
    for words in said:
        assert words.startswith(f"ranks = '0 and 1': must each have a GPU of their own, and share GPU-{FIRST}")
        assert "lower --nproc-per-node" in words and "by its own CUDA_VISIBLE_DEVICES" in words


# ------------------------------------------------------------------------------------------------------ two ranks join
def join(uuids: tuple[str, str], nccl: Callable[..., None]) -> Vote:
    """A rank's part, `nccl` in the place of init_process_group(): a vote over gloo beside it, by two ranks that have joined."""
    answers = gpus(1, uuids[int(os.environ["RANK"])]) | {"torch.distributed.init_process_group": nccl}
    with ExitStack() as stack:
        patched(stack, answers)
        with join_world("auto") as world:
            answers["torch.cuda.set_device"].assert_called_once_with(world.device)
            vote = Vote(world)
            assert [vote(world.rank == 1), vote(False)] == [False, True]
            vote.close()
    return vote


def with_a_gpu_each() -> None:
    """gloo joins in nccl's place, bound to the device as nccl's group is: Vote's group then is made for it too."""
    real, given = dist.init_process_group, []

    def nccl(backend: str, *, device_id: torch.device, **options: Any) -> None:
        given.append((backend, device_id))
        real("gloo", **options)
        dist.group.WORLD.bound_device_id = device_id  # type: ignore[union-attr]

    join((FIRST, SECOND), nccl)
    assert given == [("nccl", torch.device("cuda", 0))]


def with_one_gpu() -> None:
    """Refused before nccl, which fails in words of its own."""
    nccl = mock.Mock()
    with pytest.raises(ConfigError, match=r"^ranks = '0 and 1': must each have a GPU of their own"):
        join((FIRST, FIRST), nccl)
    nccl.assert_not_called()


@pytest.mark.parametrize("rank", [with_a_gpu_each, with_one_gpu])
def test_two_ranks_join(rank: Callable[[], None]) -> None:
    """Each sees one GPU as its number 0, whatever its own number is."""
    on_ranks(2, rank)
