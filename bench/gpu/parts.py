"""The parts of make gpu, in order: each with its share of the time and its needs. No torch: the starting process reads this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from fasttricks.system.extras import TRAIN_MODULES

Row = dict[str, Any]
"""A row of a part's table: column -> value. `error` holds a traceback in full."""
CARD = "card"
"""The first part, whose rows (name, value) the others are told."""
COPY_RATE, GPUS, CUDA = "copy rate", "GPUs", "CUDA device"
"""Names of its rows: bytes/s, read and written; a number; a yes or no."""
LAUNCHER, BUILDS = "Triton's launcher", "builds"
"""Another, and its value where Triton's kernels can be started; else the reason."""
_IMAGES = ("nvidia.dali", "simplejpeg", "PIL", "rich")
_RUNS = (*TRAIN_MODULES, "simplejpeg")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part: a process of its own, whose error, hang or lost device is its alone."""

    name: str
    title: str
    work: str
    """MODULE:FUNCTION, a function of a Job that yields rows."""
    seconds: float
    """Share of the time, in proportion to the other parts'."""
    modules: tuple[str, ...] = ()
    """Modules that it imports, beside torch, triton and numpy."""
    gpus: int = 1
    triton: bool = False
    """Whether it launches Triton's kernels, whose launcher Triton builds on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A part to be done, as its process is told."""

    part: str
    work: str
    device: str = "cuda"
    """cuda; or cpu, the walk: tiny shapes, no figure of a GPU."""
    seconds: float = 60.0
    """Time until the process is killed."""
    ranks: int = 2
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The rows of the first part: name -> value."""

    @property
    def tiny(self) -> bool:
        """Whether this is the walk on the CPU."""
        return self.device == "cpu"


PARTS = (
    Part(name=CARD, title="Card, driver, versions, roofs", work="bench.gpu.card:measure", seconds=25),
    Part(name="kernels", title="Kernels beside float64", work="bench.gpu.checks:measure", seconds=40, triton=True),
    Part(
        name="losses",
        title="Losses and mixup by device events",
        work="bench.gpu.losses:measure",
        seconds=50,
        triton=True,
    ),
    Part(
        name="batch_norm",
        title="Batch norm, addition and ReLU by device events",
        work="bench.gpu.norms:measure",
        seconds=35,
        triton=True,
    ),
    Part(name="step", title="Training step, eager", work="bench.gpu.steps:eager", seconds=75, triton=True),
    Part(
        name="step_graph",
        title="Training step as a CUDA graph, small batches",
        work="bench.gpu.steps:graphed",
        seconds=45,
        triton=True,
    ),
    Part(
        name="step_compiled",
        title="Training step, torch.compile",
        work="bench.gpu.steps:compiled",
        seconds=110,
        triton=True,
    ),
    Part(name="memory", title="Peak memory beside the plan", work="bench.gpu.memory:measure", seconds=35, triton=True),
    Part(name="profile", title="Kernels of a step", work="bench.gpu.profiled:measure", seconds=25, triton=True),
    Part(
        name="gpu_tests",
        title="Tests marked gpu",
        work="bench.gpu.checks:run_tests",
        seconds=50,
        modules=("pytest",),
        triton=True,
    ),
    Part(name="loader", title="Loader alone", work="bench.gpu.data:loader", seconds=45, modules=_IMAGES, triton=True),
    Part(
        name="end_to_end",
        title="Loader and step together",
        work="bench.gpu.data:together",
        seconds=30,
        modules=_RUNS,
        triton=True,
    ),
    Part(name="demo", title="The demo recipe", work="bench.gpu.runs:demo", seconds=60, modules=_RUNS, triton=True),
    Part(
        name="resume",
        title="Stopped and resumed, bit for bit",
        work="bench.gpu.runs:resume",
        seconds=45,
        modules=_RUNS,
        triton=True,
    ),
    Part(
        name="ranks",
        title="Several ranks: stopped, killed, scaling",
        work="bench.gpu.ranks:measure",
        seconds=105,
        modules=_RUNS,
        gpus=2,
        triton=True,
    ),
)


def why_skipped(part: Part, device: str, ranks: int, facts: Mapping[str, Any]) -> str:
    """The need of `part` that this machine does not meet, in words; empty where it meets all.

    facts: of the first part; a fact that is missing (that part failed) is taken to be met, and the part itself tells.
    """
    missing = [name for name in part.modules if not is_installed(name)]
    if missing:
        return f"needs {', '.join(missing)}: not installed"
    if part.gpus > 1 and ranks < part.gpus:
        return f"needs {part.gpus} ranks or more (--ranks)"
    if device == "cpu" or part.name == CARD:
        return ""
    if not facts.get(CUDA, True):
        return "needs a CUDA device: torch finds none"
    if facts.get(GPUS, ranks) < max(part.gpus, ranks if part.gpus > 1 else 1):
        return f"needs {max(part.gpus, ranks)} GPUs: the machine has {facts[GPUS]}"
    launcher = facts.get(LAUNCHER, BUILDS)
    return "" if launcher == BUILDS or not part.triton else launcher


def is_installed(module: str) -> bool:
    """Whether `module` can be found, without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
