"""`python -m bench.traffic`: the bytes that a training step moves, by kind of operator, with torch's batch norm and ours.

Counted on fake tensors, for any network, precision and batch, in seconds and without a GPU. `once`: each operator's inputs and
outputs once, as fasttricks.plan has it. `passes`: batch norm's second passes too, which its kernels need. As Markdown.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import get_args

from bench.step import StepCase
from fasttricks.config import Precision, TrainConfig, replace_at
from fasttricks.config.recipes import RECIPES
from fasttricks.data.pipeline.shards import Shards
from fasttricks.planning.footprint import Footprint, footprint
from fasttricks.planning.planner import IMAGENET_CLASSES, IMAGENET_IMAGES

KINDS = {
    "convolution": ("convolution", "convolution_backward"),
    "batch norm": ("native_batch_norm", "native_batch_norm_backward", "batch_norm_act", "batch_norm_act_backward"),
    "activation": ("relu", "relu_", "threshold_backward", "hardtanh", "hardtanh_", "hardtanh_backward"),
    "addition": ("add", "add_"),
    "pooling": ("avg_pool2d", "avg_pool2d_backward", "max_pool2d_with_indices", "max_pool2d_with_indices_backward"),
}
"""Kind -> its operators; the fused batch norm has the activation and the additions in it."""
NORMS = ("torch", "fused")


def count(config: TrainConfig) -> Footprint:
    """A step of one rank on ImageNet."""
    size = config.micro_batch_size(1)
    shards = Shards(num_images=IMAGENET_IMAGES, batch_size=size, world_size=1, source="ImageNet")
    return footprint(config, shards, IMAGENET_CLASSES)


def by_kind(traffic: Counter[str]) -> dict[str, int]:
    """Bytes of each kind, and of all other operators."""
    found = {kind: sum(traffic[name] for name in names) for kind, names in KINDS.items()}
    return found | {"others": traffic.total() - sum(found.values())}


def table(counted: dict[str, Footprint]) -> Iterator[str]:
    """The lines of the table: GB of each kind, of all, and of live activations at the peak."""
    columns = [part for name in counted for part in (f"{name}, once", f"{name}, passes")]
    yield f"| GB | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    traffics = [part for one in counted.values() for part in (one.traffic, one.traffic + one.again)]
    kinds = [by_kind(traffic) for traffic in traffics]
    for kind in kinds[0]:
        yield f"| {kind} | {' | '.join(f'{found[kind] / 1e9:.2f}' for found in kinds)} |"
    yield f"| all | {' | '.join(f'{traffic.total() / 1e9:.2f}' for traffic in traffics)} |"
    live = [f"{one.at_peak['activations'] / 1e9:.3f}" for one in counted.values() for _ in range(2)]
    yield f"| live activations | {' | '.join(live)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=StepCase.model)
    parser.add_argument("--precision", default="fp16", choices=[one for one in get_args(Precision) if one != "auto"])
    parser.add_argument("--batch", type=int, default=128, help="images")
    options = parser.parse_args()
    config = RECIPES["resnet50d-tricks"]()
    chosen = {"model.zero_gamma": False, "model.name": options.model, "precision": options.precision}
    for path, value in {**chosen, "global_batch_size": options.batch}.items():
        config = replace_at(config, path, value)
    print(f"A step of {options.batch} images, {options.model}, {options.precision}\n")
    print("\n".join(table({norm: count(replace_at(config, "model.norm", norm)) for norm in NORMS})))


if __name__ == "__main__":
    main()
