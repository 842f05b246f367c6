"""A run on a machine, on paper: batch, steps, memory, and the time that compute, memory traffic, link and loader take.

Arithmetic, data sheets and a step on fake tensors: no GPU is asked, and nothing is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, NamedTuple

from fasttricks.config import Range, TrainConfig, require
from fasttricks.config.resolve import require_switched
from fasttricks.planning.cards import Card, find_card

if TYPE_CHECKING:
    from fasttricks.data.pipeline.shards import Shards
    from fasttricks.planning.footprint import Footprint

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1000
_ASSUMED = {
    "segment-ade20k": (20_210, 150, "ADE20K"),
    "detect-voc": (16_551, 20, "VOC 07+12"),
    "places365": (1_803_460, 365, "Places365-Standard"),
}
"""Recipe -> images, classes and name of the data set that is assumed; else ImageNet."""
NODE = 8
"""GPUs of a node."""
USABLE = 0.8
"""Share of a card's memory for the counted parts; the rest is for parts that are not modelled."""
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """A recipe and the machine to train it on."""

    gpus: Annotated[int, Range(1)] = 8
    """GPUs of the run, eight a node; must divide global_batch_size / accumulate."""
    gpu: str = "v100"
    """v100 (16 GB), v100-32gb, t4 (16 GB), a100 (40 GB), a100-80gb, l4 (24 GB), rtx4090 (24 GB), h100 (80 GB), h200 (141 GB) or
    b200 (180 GB)."""
    images: Annotated[int, Range(1, 10**12, zero="count data.root, else ImageNet")] = 0
    """Training images; 0: as many as data.root has, or ImageNet where there is none."""
    efficiency: Annotated[float, Range(0, 1, above=True)] = 0.2
    """Share of the card's peak FLOP/s that a step reaches: assumed. Published runs of ResNet-50 made 0.1 to 0.3."""
    network_gbit: Annotated[float, Range(0, above=True)] = 100.0
    """Network of a node, 10^9 bits/s each way; used from two nodes on."""
    loader_rate: Annotated[float, Range(0, above=True, zero="not known")] = 0.0
    """Images/s that the loader of one node was measured to deliver; where it is not known, it is left out of the bottleneck."""

    host_ms: Annotated[float, Range(0, above=True, zero="not known")] = 0.0
    """Milliseconds that the training thread computes for a micro-batch, as python -m bench.host measures them; with --cuda-graph
    those of the loader. Where they are not known, they are left out of the bottleneck."""

    def __post_init__(self) -> None:
        super().__post_init__()
        find_card(self.gpu)

    @property
    def nodes(self) -> int:
        """Machines that hold the GPUs."""
        return -(-self.gpus // NODE)


class DataSize(NamedTuple):
    """The facts about the training data that a plan needs."""

    images: int
    classes: int
    source: str
    """Where the numbers are from."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run in numbers."""

    config: PlanConfig
    """Its precision is that of a GPU, never auto."""
    data: DataSize
    shards: Shards
    steps_per_epoch: int
    footprint: Footprint

    @property
    def card(self) -> Card:
        """The GPU."""
        return find_card(self.config.gpu)

    @property
    def warmup_steps(self) -> int:
        """Steps below the peak lr, and the first at it: as schedule.learning_rate has them."""
        steps = round(self.config.schedule.warmup_epochs * self.steps_per_epoch)
        return min(steps, self.config.epochs * self.steps_per_epoch - 1)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of a GPU by kind: live tensors at the peak, and the prefetched batches."""
        kinds = dict(self.footprint.at_peak)
        batch = kinds["input"] // self.config.accumulate
        return kinds | {"input": kinds["input"] + self.config.data.prefetch * batch}

    @property
    def memory_bytes(self) -> int:
        """All kinds together."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether it leaves room on the card for parts that are not modelled."""
        return self.memory_bytes <= USABLE * self.card.memory_gib * GIB

    @property
    def link_bytes(self) -> float:
        """Bytes that a GPU sends, and receives, a step: a ring of n ranks sends 2 (n - 1) / n of the bytes that it sums."""
        return 2 * (self.config.gpus - 1) / self.config.gpus * self.footprint.gradient_bytes

    @property
    def link_bandwidth(self) -> float:
        """Bytes/s of the ring: the card's link in a node. Over nodes the network, which a node's GPUs share, if it is slower."""
        network = self.config.network_gbit * 1e9 / 8
        return self.card.link_bandwidth if self.config.nodes == 1 else min(network, self.card.link_bandwidth)

    @property
    def seconds(self) -> Mapping[str, float]:
        """Time of a step in each part of the hardware. They overlap, so the longest decides.

        The loader is left out where its rate is not known, and the host where its milliseconds are not.
        """
        config = self.config
        seconds = {
            "compute": self.footprint.flops / (self.card.peak_flops[config.precision] * config.efficiency),
            "traffic": self.footprint.traffic_bytes / self.card.memory_bandwidth,
            "link": self.link_bytes / self.link_bandwidth,
        }
        host = {"host": config.accumulate * config.host_ms / 1e3} if config.host_ms else {}
        return seconds | host | ({"loader": self.node_images / config.loader_rate} if config.loader_rate else {})

    @property
    def node_images(self) -> float:
        """Images that a full node takes a step."""
        return self.config.global_batch_size / self.config.gpus * min(self.config.gpus, NODE)

    @property
    def loader_need(self) -> float:
        """Images/s that a node's loader must deliver so that nothing waits for it."""
        return self.node_images / max(time for name, time in self.seconds.items() if name != "loader")

    @property
    def bottleneck(self) -> str:
        """The part that takes longest: compute, traffic, link, host or loader."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def images_per_sec(self) -> float:
        """Over all GPUs."""
        return self.config.global_batch_size / self.seconds[self.bottleneck]

    @property
    def epoch_seconds(self) -> float:
        """Time of the training steps of an epoch, without validation."""
        return self.steps_per_epoch * self.seconds[self.bottleneck]


def make_plan(config: PlanConfig) -> Plan:
    """Count the run that `config` describes.

    Raises ConfigError for a trick that is not as listed, GPUs that do not divide the batch, a batch above the number of
    images, a precision that the card lacks, and as check_compile and check_graph; DataError for fewer images than GPUs and as
    find_dataset.
    """
    import torch

    from fasttricks.learning.compiled import check_compile
    from fasttricks.learning.precision import resolve_precision
    from fasttricks.learning.step_graph import check_graph
    from fasttricks.tasks import find_task

    require_switched(config)
    precision = resolve_precision(config.precision, torch.device("cuda"))
    has = find_card(config.gpu).peak_flops
    require(precision in has, "precision", precision, f"the {config.gpu} has {' and '.join(has)} only")
    check_gpus(config)
    check_compile(config.compile, ranks=config.gpus, accumulate=config.accumulate)
    check_graph(config, "cuda", ranks=config.gpus, steps_alike=find_task(config.task).facts.steps_alike)
    return count(dataclasses.replace(config, precision=precision), find_data_size(config))


def count(config: PlanConfig, data: DataSize) -> Plan:
    """The plan of a checked config."""
    from fasttricks.data.pipeline.shards import Shards
    from fasttricks.learning.learner import count_steps
    from fasttricks.planning.footprint import footprint
    from fasttricks.training.checks import check_batch

    batch_size = config.micro_batch_size(config.gpus)
    shards = Shards(num_images=data.images, batch_size=batch_size, world_size=config.gpus, source=data.source)
    check_batch(config, data.images)
    return Plan(
        config=config,
        data=data,
        shards=shards,
        steps_per_epoch=count_steps(shards, config),
        footprint=footprint(config, shards, data.classes),
    )


def check_gpus(config: PlanConfig) -> None:
    """Raise ConfigError, with the nearest number that does, where the GPUs do not divide the batch."""
    config.micro_batch_size(1)
    share = config.global_batch_size // config.accumulate
    fitting = [n for n in range(1, share + 1) if share % n == 0]
    nearest = min(fitting, key=lambda n: abs(n - config.gpus))
    parts = f"global_batch_size / accumulate ({config.global_batch_size} / {config.accumulate})"
    require(config.gpus in fitting, "gpus", config.gpus, f"must divide {parts}; the nearest is {nearest}")


def find_data_size(config: PlanConfig) -> DataSize:
    """The size given by --images, else that of data.root, else that of ImageNet or of _ASSUMED. Raises DataError."""
    images, classes, name = _ASSUMED.get(config.recipe, (IMAGENET_IMAGES, IMAGENET_CLASSES, "ImageNet"))
    if config.images or not config.data.root:
        classes = config.model.num_classes or classes
        return DataSize(config.images or images, classes, "--images" if config.images else name)
    from fasttricks.tasks import find_task
    from fasttricks.training.checks import num_classes

    train, _ = find_task(config.task).open_data(config.data)
    return DataSize(len(train), num_classes(config, train), str(train.root))


def with_more_accumulation(plan: Plan) -> Plan | None:
    """The plan with as few more micro-batches as make it fit the card; None where not even one image at once does.

    It compiles without CUDA graphs, which hold for one micro-batch.
    """
    from fasttricks.learning.compiled import without_cuda_graphs

    config = dataclasses.replace(plan.config, compile=without_cuda_graphs(plan.config.compile))
    for accumulate in range(config.accumulate + 1, config.global_batch_size // config.gpus + 1):
        if config.global_batch_size % (config.gpus * accumulate) == 0:
            other = count(dataclasses.replace(config, accumulate=accumulate), plan.data)
            if other.fits:
                return other
    return None
