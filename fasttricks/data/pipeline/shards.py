"""How the images of an epoch are shared out over ranks and steps: whole numbers on the host. No torch, no DALI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fasttricks.data.sources.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Shards:
    """The epoch's order of images cut into one part a rank, and each part into batches.

    Every image is in one batch of one rank. Parts differ by one image at most, so in the last steps of an epoch a rank's
    batch may be short or empty, while all ranks take the same number of steps. Checked on 1 to 1024
    ranks by tests/test_data_loader.py and tests/test_many_ranks.py.

    Raises DataError for fewer images than ranks.
    """

    num_images: int
    batch_size: int
    """Images of a rank a step, 1 or more."""
    world_size: int
    source: str
    """Name of the data set or split, for the error."""

    def __post_init__(self) -> None:
        if self.num_images < self.world_size:
            few = f"{self.num_images} images for {self.world_size} ranks"
            raise DataError(f"{self.source}: {few}: each rank needs at least one; use fewer ranks or more images")

    def __len__(self) -> int:
        """Batches an epoch, equal on all ranks."""
        return -(-self.num_images // (self.world_size * self.batch_size))

    def part(self, rank: int) -> range:
        """Where in the order of an epoch the images of `rank` stand."""
        return range(self.num_images * rank // self.world_size, self.num_images * (rank + 1) // self.world_size)

    def global_count(self, step: int) -> int:
        """Images of batch `step`, 0 to len - 1, over all ranks."""
        size, larger = divmod(self.num_images, self.world_size)  # `larger` parts have one image more
        first, end = step * self.batch_size, (step + 1) * self.batch_size
        return (self.world_size - larger) * len(range(size)[first:end]) + larger * len(range(size + 1)[first:end])

    @property
    def smallest_batch(self) -> int:
        """Images of the smallest batch that any rank gets in an epoch, empty ones aside."""
        size, larger = divmod(self.num_images, self.world_size)
        sizes = [size, size + 1] if larger else [size]
        return min(size % self.batch_size or self.batch_size for size in sizes)


def require_same(root: Path, must_agree: Mapping[str, object], state: Mapping[str, object]) -> None:
    """Raise DataError where `state`, a saved position in the images of `root`, was of another data set, seed or sharding."""
    for field, value in must_agree.items():
        if state.get(field) != value:
            raise DataError(
                f"{root}: the saved position has {field} = {state.get(field)}, this run {value}; resume "
                f"with the same, or start a new run"
            )
