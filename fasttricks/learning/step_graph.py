"""A training step that is recorded once as a CUDA graph and then replayed: one launch of the host in place of hundreds."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fasttricks.config import TrainConfig, require
from fasttricks.learning.compiled import without_cuda_graphs
from fasttricks.learning.numbers import StepNumbers
from fasttricks.system.distributed import World, host_group

T = TypeVar("T")
Body = Callable[[Any, StepNumbers], T]
Recorder = Callable[[Callable[[], T]], tuple[Callable[[], object], T]]

WARM_UP = 12
"""Full steps of a process that are launched before one is recorded: they compile and load kernels, choose cuDNN's algorithms and
make the optimizer's state. They are steps of the run; none is extra."""


@dataclass(frozen=True)
class Streams:
    """The stream of a run's steps, and beside it that of its inputs, ordered by events. None, as on a CPU: nothing waits.

    A graph cannot be recorded on CUDA's default stream. The launched steps before it must be on its own stream, and so must the
    construction of DistributedDataParallel, as autograd keeps the stream of a weight.
    A batch that is made and copied on the stream of the inputs may be let go at once: its memory goes to a later operation there.
    """

    step: torch.cuda.Stream | None = None
    inputs: torch.cuda.Stream | None = None

    @classmethod
    def on(cls, device: torch.device) -> Streams:
        """New ones of a card."""
        return cls(torch.cuda.Stream(device), torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    @contextmanager
    def on_step(self) -> Iterator[None]:
        """Within, the step's is the current stream, after all that the one before was given, which then waits for it."""
        if self.step is None:
            yield
            return
        before = torch.cuda.current_stream(self.step.device)
        self.step.wait_stream(before)
        with torch.cuda.stream(self.step):
            yield
        before.wait_stream(self.step)

    def on_inputs(self) -> AbstractContextManager[object]:
        """Within, that of the inputs is the current stream."""
        return nullcontext() if self.inputs is None else torch.cuda.stream(self.inputs)

    def inputs_wait(self) -> None:
        """Have the inputs' stream wait for all that the step's was given."""
        if self.inputs is not None and self.step is not None:
            self.inputs.wait_stream(self.step)

    def step_waits(self) -> None:
        """Have the step's stream wait for all that the inputs' was given."""
        if self.inputs is not None and self.step is not None:
            self.step.wait_stream(self.inputs)


class StepGraph:
    """Steps of full batches on tensors that stay: WARM_UP are launched, the next is recorded, and from then on it is replayed.

    A replay launches all that `body` launched while it was recorded, on the same addresses and with the same numbers. So the
    batch and the numbers of a step are copied into tensors that stay. `body` may read nothing else that changes, and may change
    nothing on the host, as it is not called again. The bits are those of the steps without a graph; tests/test_step_graph.py
    shows it on the CPU.

    record: as cuda_graph, and of several ranks by on_all_ranks. streams: as Streams has them. Calls are within running().

    Costs: a copy of the batch on the device, and a launch for each number. The memory of a graph is its own: the activations of
    a step that is launched, as of the last batch of an epoch, lie beside it.
    """

    def __init__(self, record: Recorder[Any], streams: Streams = Streams()) -> None:
        self.launched = 0
        """Full steps launched so far; from WARM_UP on they are replayed."""
        self.streams, self._record = streams, record
        self._batch: Any = None
        self._numbers: StepNumbers | None = None
        self._replay: Callable[[], object] | None = None
        self._result: Any = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, steps are taken, on their stream. At its end, or an error, the recorded step is let go.

        NCCL ends no group while a graph holds collectives of it (https://github.com/pytorch/pytorch/issues/115388).
        """
        with self.streams.on_step():
            try:
                yield
            finally:
                self._replay = self._result = None
                gc.collect()  # the graph itself, should a cycle hold it

    def taken(self, batches: Iterable[T]) -> Iterator[T]:
        """`batches`, each made on the stream of the inputs: the device makes one while the step of the one before runs."""
        self.streams.inputs_wait()  # tensors of the loader's own, as a table of its labels, were made on the step's
        iterator = iter(batches)
        while True:
            with self.streams.on_inputs():
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def __call__(self, body: Body[T], batch: Any, numbers: StepNumbers, *, full: bool) -> T:
        """body(batch, numbers), whose tensors in the result the next call overwrites.

        full: whether the batches of all ranks are full, so that all replay the step or none does; else it is launched.
        Raises ValueError for a full batch of other shapes than the first.
        """
        if not full:
            self.streams.step_waits()
            launched = body(batch, numbers)
            self.streams.inputs_wait()  # they have the batch's memory again
            return launched
        batch, numbers = self._staged(batch, numbers)
        if self._replay is None and self.launched < WARM_UP:
            self.launched += 1
            return body(batch, numbers)
        if self._replay is None:
            self._replay, self._result = self._record(lambda: body(batch, numbers))
        self._replay()
        result: T = self._result
        return result

    def _staged(self, batch: Any, numbers: StepNumbers) -> tuple[Any, StepNumbers]:
        """Both in the tensors that stay."""
        given = _tensors(batch)
        if self._numbers is None:
            device = next(iter(given.values())).device
            # a field that is no tensor would keep the value of this batch
            others = {field.name: None for field in fields(batch) if field.name not in given}
            self._batch = replace(batch, **others, **{name: torch.empty_like(value) for name, value in given.items()})
            self._numbers = _map(numbers, lambda number: torch.zeros((), dtype=_dtype(number), device=device))
        for name, value in _tensors(self._batch).items():
            if value.shape != given[name].shape:
                was = f"{name} {tuple(value.shape)} was recorded, and now it is {tuple(given[name].shape)}"
                raise ValueError(f"cuda_graph: each full batch must have the shapes of the first: {was}")
        self.streams.inputs_wait()  # the step before has read its batch
        with self.streams.on_inputs():
            for name, value in _tensors(self._batch).items():
                value.copy_(given[name])
        self.streams.step_waits()
        # by fill_, whose number is an argument of its kernel: pinned memory could be written again before the device has read it
        assert self._numbers is not None
        for tensor, number in zip(_flat(self._numbers), _flat(numbers), strict=True):
            tensor.fill_(number)
        return self._batch, self._numbers


def _tensors(batch: Any) -> dict[str, Tensor]:
    return {f.name: value for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)}


def _dtype(number: float) -> torch.dtype:
    return torch.int64 if isinstance(number, int) else torch.float32


def _flat(numbers: StepNumbers) -> list[Any]:
    return [*numbers[:3], *numbers.lrs, numbers.gain]


def _map(numbers: StepNumbers, make: Callable[[Any], Tensor]) -> StepNumbers:
    step, share, lam, lrs, gain = numbers
    return StepNumbers(make(step), make(share), make(lam), tuple(map(make, lrs)), make(gain))


def cuda_graph(launch: Callable[[], T]) -> tuple[Callable[[], object], T]:
    """(the function that launches again all that `launch` launches now, the result of `launch`), on the current stream.

    Nothing runs before the first replay. The stream must not be CUDA's default one. Calls of CUDA on other streams continue:
    DALI's threads decode, and MasterSGD copies its tables. The random numbers of a replay are those of torch's generator at its
    time. A sync.
    """
    torch.cuda.synchronize()
    gc.collect()  # a tensor that is freed in a capture is freed for its replays too
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="relaxed"):
        result = launch()
    return graph.replay, result


def relaunch(launch: Callable[[], T]) -> tuple[Callable[[], object], T]:
    """As cuda_graph, by calling `launch` again: for tests and walks on a CPU. The tensors of the result stay the same, too."""
    result, done = launch(), [1]  # the first replay's work is done

    def replay() -> None:
        if done:
            done.clear()
            return
        for kept, new in zip(tree_leaves(result), tree_leaves(launch()), strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(new)

    return replay, result


def on_all_ranks(record: Recorder[T], world: World) -> Recorder[T]:
    """`record` on every rank or on none: where it fails on one, that rank raises its error, and the others ConfigError.

    A replay holds collectives, which would never end without the rank that has none. A collective, as is the call of the result.
    """
    if world.size == 1:
        return record
    group = host_group(world)  # a device's own may be of no use after a failure

    def recorded(launch: Callable[[], T]) -> tuple[Callable[[], object], T]:
        failed: Exception | None = None
        try:
            done = record(launch)
        except Exception as error:
            failed = error
        said = [""] * world.size
        mine = "" if failed is None else (str(failed).splitlines() or [type(failed).__name__])[0]
        dist.all_gather_object(said, mine, group=group)
        if failed is not None:
            raise failed
        if any(said):
            del done  # no replay, and NCCL would wait for the end of its graph, which the error's trace would hold
        for rank, words in enumerate(said):
            require(not words, "cuda_graph", True, f"could not be recorded on rank {rank} ({words}); leave it out")
        return done

    return recorded


def check_graph(config: TrainConfig, device: str, *, ranks: int, steps_alike: bool) -> None:
    """Raise ConfigError for a step that no graph can hold. device: cuda or cpu. steps_alike: as TaskFacts has it."""
    if not config.cuda_graph:
        require(
            not config.cuda_graph_ranks, "cuda_graph_ranks", True, "has no effect without --cuda-graph; leave it out"
        )
        return
    plain = without_cuda_graphs(config.compile)
    rules = [
        (device == "cuda", "needs a GPU; leave it out"),
        (
            ranks == 1 or config.cuda_graph_ranks,
            f"is for one rank, and here are {ranks}: no GPU has shown it with more; leave it out, or try --cuda-graph-ranks",
        ),
        (
            config.accumulate == 1,
            f"holds one micro-batch, and accumulate is {config.accumulate}; leave one of them out",
        ),
        (steps_alike, f"holds steps that never wait for the device, and those of task {config.task} do; leave it out"),
        (
            config.compile == plain,
            f"records the step, which --compile {config.compile} would too; take --compile {plain}",
        ),
        (not config.profile, "leaves the profile without the parts of a step; leave out --profile"),
        (
            config.schedule.first_size == 1,
            "holds images of one size, and schedule.first_size has them grow; leave one out",
        ),
        (not config.distill.cache, "holds no cache of the teacher's logits; leave out --distill.cache"),
        (
            config.optim.backend != "apex",
            "needs learning rates on the device; take --optim.backend auto, torch or fused",
        ),
    ]
    for holds, rule in rules:
        require(holds, "cuda_graph", True, rule)
