"""torch.compile around the network of a run: a failure is one line, or a return to eager where that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fasttricks.config import Compile, ConfigError, require

_PLAIN: dict[Compile, Compile] = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""The modes that record CUDA graphs, each with the mode that does the same without."""


def without_cuda_graphs(mode: Compile) -> Compile:
    """The mode that compiles as `mode` does and records no CUDA graph; `mode` itself where it records none."""
    return _PLAIN.get(mode, mode)


def check_compile(mode: Compile, *, ranks: int, accumulate: int) -> None:
    """Raise ConfigError for a mode with CUDA graphs in a step of several micro-batches or ranks, on any device.

    A graph's backward pass leaves its gradients in memory that its next replay overwrites. With torch 2.1 a second micro-batch
    ended in wrong sums, with 2.10 and 2.13 in an error (pytorch#96693, #169545). Under DistributedDataParallel max-autotune is
    reported as broken (#140395) and reduce-overhead as a crash (#128218). One rank with one micro-batch keeps the rules of
    torch's CUDA graphs: zero_grad() lets the gradients go before the next replay; the teacher, the average of the weights and
    validation run eagerly; the loss takes the logits in the same step. It has not run on a GPU. The CPU records no graphs, so it
    loses nothing here, and a config is valid on both or on neither.
    """
    if without_cuda_graphs(mode) == mode:
        return
    rule = f"records CUDA graphs, which hold for one rank and one micro-batch, and here are {ranks} x {accumulate}"
    require(ranks * accumulate == 1, "compile", mode, f"{rule}; take --compile {without_cuda_graphs(mode)}")


class CompiledModel(nn.Module):
    """`model`, its forward and backward pass compiled at the first call, and again for the first batch of another size.

    mode: torch.compile's mode. fallback: where compilation fails, `say` so and run eagerly; else raise ConfigError. The
    weights stay those of `model`, under its own names, which no checkpoint sees changed. Costs half a minute to minutes
    at the first step; of later epochs nothing, as `compiled_graphs` shows.
    """

    def __init__(self, model: nn.Module, mode: Compile, *, fallback: bool, say: Callable[[str], None]) -> None:
        super().__init__()
        from torch._dynamo.exc import TorchDynamoException  # seconds, which a network that is not compiled is spared

        self._failure = TorchDynamoException
        self.model = model
        self._mode, self._fallback, self._say = mode, fallback, say
        # a bound method, not the module: a module that is compiled would be registered here a second time
        self._call: Callable[[Tensor], Tensor] = torch.compile(self._eager, mode=mode)

    def _eager(self, images_NCHW: Tensor) -> Tensor:
        logits: Tensor = self.model(images_NCHW)
        return logits

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits (N, num_classes)."""
        try:
            return self._call(images_NCHW)
        except self._failure as error:
            reason = f"torch.compile failed: {str(error).strip().splitlines()[0]}"
            if not self._fallback:
                way_out = "take --compile off, or --compile-fallback to run eagerly"
                raise ConfigError(f"compile = {self._mode!r}: {reason}; {way_out}") from error
            self._say(f"note: {reason}; the network runs eagerly (compile_fallback)")
            self._call = self._eager
            return self._call(images_NCHW)


@contextmanager
def told_of_compiling(mode: Compile, tell: Callable[[bool], None]) -> Iterator[None]:
    """Within the block, tell(True) is called where torch.compile begins to work and tell(False) where it has ended.

    That is at the first forward pass, at the first backward pass, and again for a batch of another size. Both calls come
    from the thread that compiles: for a backward pass on a GPU that is autograd's.
    """
    if mode == "off":
        yield
        return
    from torch._dynamo.callback import callback_handler

    begins = callback_handler.register_start_callback(lambda _: tell(True))
    ends = callback_handler.register_end_callback(lambda _: tell(False))
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begins)
        callback_handler.remove_end_callback(ends)


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process so far, recompilations for other sizes included."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
