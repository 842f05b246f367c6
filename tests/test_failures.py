"""A lost rank, a card that failed and a full disk are told apart by what torch, gloo, NCCL and DALI say of them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from fasttricks.config import DistillConfig
from fasttricks.data.pipeline.decoder import DecodeError, Decoder
from fasttricks.learning import teacher
from fasttricks.learning.teacher import Teacher
from fasttricks.runs.checkpoint import load_checkpoint, save_checkpoint
from fasttricks.runs.stored import CheckpointError, checkpoint_path
from fasttricks.system.failures import card_failed, lost_rank
from lib.card import OnCard
from lib.states import state

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3763, "
WORK = "WorkNCCL(SeqNum=3, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000)"
KEY = (
    "[1] is setting up NCCL communicator and retrieving ncclUniqueId from [0] via c10d key-value store by key '0', but "
)
LOST: dict[str, RuntimeError] = {
    "NCCL, a peer ended": dist.DistBackendError(
        f"{NCCL}remote process exited or there was a network error, NCCL version 2.28.8\nncclRemoteError: A call failed possibly "
        "due to a network error or a remote process exiting prematurely.\nLast error:\nNET/OFI Request 0x7f completed with error."
    ),
    "NCCL, as an internal error": dist.DistBackendError(
        f"{NCCL}internal error, NCCL version 2.14.3\nncclInternalError: Internal check failed.\nLast error:\n"
        "Net : Connection closed by remote peer user<50260>"
    ),
    "NCCL, as a system error": dist.DistBackendError(
        f"{NCCL}unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.21.5\nncclSystemError: System call "
        "(e.g. socket, malloc) or external library call failed or device error.\nLast error:\n"
        "socketProgressOpt: Call to recv from 10.0.0.1<33759> failed : Connection reset by peer"
    ),
    "NCCL, no answer while it connects": dist.DistBackendError(
        "NCCL timeout when waiting for nonblocking call to become successful."
    ),
    "torch's watchdog": dist.DistBackendError(
        f"[Rank 1] Watchdog caught collective operation timeout: {WORK} ran for 600029 milliseconds before timing out."
    ),
    "after the watchdog": dist.DistBackendError(
        f"NCCL communicator was aborted on rank 1. Original reason for failure was: {WORK} ran for 600029 milliseconds"
    ),
    "the store, of a rank 0 that ended": dist.DistBackendError(
        f"{KEY}store->get('0') got error: Connection reset by peer. This may indicate a possible application crash on rank 0"
    ),
    "the store, of a rank that never came": dist.DistStoreError(
        "wait timeout after 600000ms, keys: /fasttricks_0/gpu_1"
    ),
    "the store's socket": dist.DistNetworkError("Failed to recv, got 0 bytes."),
    "gloo": RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"),
    "gloo, hung": RuntimeError("[unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation to complete"),
    "gloo, closed": RuntimeError("Remote peer closed the connection."),
}
CARD: dict[str, RuntimeError] = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 0 bytes free."),
    "an illegal access": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "the watchdog of a card with a screen": torch.AcceleratorError(
        "CUDA error: the launch timed out and was terminated"
    ),
    "an older torch": RuntimeError("CUDA error: the launch timed out and was terminated"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "NCCL, of its own card": dist.DistBackendError(
        f"{NCCL}unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclUnhandledCudaError: Call "
        f"to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory' in {WORK}"
    ),
    "NCCL's watchdog, of its own card": dist.DistBackendError(
        "NCCL communicator was aborted on rank 0. Original reason for failure was: NCCL error: unhandled cuda error"
    ),
    "DALI": RuntimeError(
        "CUDA runtime API error cudaErrorIllegalAddress (700): an illegal memory access was encountered"
    ),
    "DALI, memory": RuntimeError("CUDA allocation failed"),
}
OTHER: dict[str, RuntimeError] = {
    "two ranks on a GPU": dist.DistBackendError(
        f"{NCCL}invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27.5\nncclInvalidUsage: This usually "
        "reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0"
    ),
    "no shared memory": dist.DistBackendError(
        f"{NCCL}unhandled system error (run with NCCL_DEBUG=INFO for details), NCCL version 2.27.5\nncclSystemError: System call "
        "(e.g. socket, malloc) or external library call failed or device error.\nLast error:\nError while creating shared memory "
        "segment /dev/shm/nccl-1 (size 9637888), error: No space left on device (28)"
    ),
    "an operation's limit, not reached": dist.DistBackendError(
        f"{NCCL}invalid argument, NCCL version 2.27.5, in {WORK}"
    ),
    "a bad argument": RuntimeError("Tensors must be contiguous"),
    "no device": RuntimeError("Found no NVIDIA driver on your system."),
}


IN_TORCH = (
    b"ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    b"NCCL timeout when waiting for nonblocking call to become successful.",
    b"Watchdog caught collective operation timeout: ",
    b" milliseconds before timing out.",
    b"NCCL communicator was aborted on rank ",
    b"ncclUnhandledCudaError: Call to CUDA function failed.",
    b"Timeout(ms)=",
)


@pytest.mark.parametrize("name", [*LOST, *CARD, *OTHER])
def test_a_lost_rank_and_a_failed_card_are_told_apart(name: str) -> None:
    error = {**LOST, **CARD, **OTHER}[name]
    assert (lost_rank(error), card_failed(error)) == (name in LOST, name in CARD)


@pytest.mark.skipif(
    torch.version.cuda is None, reason="needs a CUDA build of torch, which has these words in its library"
)
def test_the_words_are_those_of_the_torch_that_is_installed() -> None:
    """Each of torch's own sentences, read from its library."""
    file = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as library:
        missing = [words for words in IN_TORCH if library.find(words) < 0]
    assert missing == []


# --------------------------------------------------------------------------------------- no other cause is said of them
class Unreadable(OnCard):
    """A tensor on a card that has failed: to read it is an error, by a copy or by torch.save()."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_a_failed_card_is_no_error_of_the_disk(tmp_path: Path) -> None:
    """The error is raised as it is; the last checkpoint stays, and no part of a new one is left."""
    good = checkpoint_path(tmp_path, 1)
    save_checkpoint(good, state(1))
    bad = state(2) | {"optimizer": {"state": [{"momentum_buffer": Unreadable(torch.ones(3))}]}}
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        save_checkpoint(checkpoint_path(tmp_path, 2), bad)
    assert os.listdir(tmp_path) == [good.name]
    assert load_checkpoint(good)["step"] == 1


def test_an_error_after_the_copy_is_the_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever torch's zip writer says; nothing of a card is left to fail."""

    def save(content: dict[str, Any], file: object) -> None:
        assert type(content["model"]["weight"]) is Tensor and not content["model"]["weight"].is_cuda
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(CheckpointError, match="must be on a disk with room"):
        save_checkpoint(checkpoint_path(tmp_path, 1), state() | {"model": {"weight": OnCard(torch.ones(3))}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", CARD)
def test_a_failed_card_is_no_wrong_size_of_the_teachers_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Flatten()
    asked = Teacher(model, name="n", digest="d", device=torch.device("cpu"), dtype=torch.float32)

    def fail(images: Tensor) -> Tensor:
        raise CARD[name]

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError) as caught:
        teacher._check_output(asked, DistillConfig(teacher="t"), 3, 32, torch.device("cpu"))
    assert caught.value is CARD[name]


@pytest.mark.parametrize("name", CARD)
@pytest.mark.parametrize("way", ["take", "decodes"])
def test_a_failed_card_is_no_bad_image(way: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI fails on whole batches; the loader then looks for the image that cannot be decoded, and would find every one."""

    class Pipeline:
        def schedule_run(self) -> None:
            pass

        def share_outputs(self) -> Any:
            raise failing

    made = object.__new__(Decoder)
    made._pipeline = Pipeline()  # type: ignore[assignment]
    monkeypatch.setattr(Decoder, "hand_over", lambda self, job: None)
    call = {"take": lambda: made.take(), "decodes": lambda: made.decodes(None)}[way]  # type: ignore[arg-type]
    failing: RuntimeError = CARD[name]
    with pytest.raises(RuntimeError) as caught:
        call()
    assert caught.value is failing
    failing = RuntimeError("Error in CPU operator `nvidia.dali.fn.decoders.image`: unsupported image")
    if way == "decodes":
        assert call() is False
    else:
        with pytest.raises(DecodeError, match="unsupported image"):
            call()
