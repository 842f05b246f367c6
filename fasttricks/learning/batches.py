"""The Protocol between the trainer and the loader of any task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from fasttricks.data.pipeline.shards import Shards


class Batches(Protocol):
    """The batches of one split, an epoch an iteration. data.Loader implements it."""

    @property
    def shards(self) -> Shards:
        """How an epoch is shared out over ranks and steps."""

    @property
    def note(self) -> str:
        """Why it is slower than it might be, for the header of a run; empty: it is not."""

    @property
    def bad(self) -> Mapping[str, str]:
        """Files that could not be used, by name, and why."""

    @property
    def operators(self) -> str:
        """Which code makes the pixels: each has other last bits."""

    def __len__(self) -> int:
        """Batches an epoch, equal on all ranks."""

    def __iter__(self) -> Iterator[Any]:
        """The rest of the epoch, each batch as it is asked for: within a step, of several, after those before it are launched.

        torch's global generator is the network's own random layers', and stays as it is.
        """

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, as JSON can hold it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at that position. Raises DataError where that was another data set, seed or sharding."""
