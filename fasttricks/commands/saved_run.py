"""The arguments of a command that works on a checkpoint. All their errors come before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from fasttricks.config import ConfigError, TrainConfig
from fasttricks.config.cli import parse
from fasttricks.config.options import HELP, NOTHING, Hidden, split_arguments
from fasttricks.runs.folder import read_config
from fasttricks.runs.stored import find_checkpoint
from fasttricks.system.reading import is_there

T = TypeVar("T")


class Asked(NamedTuple, Generic[T]):
    """The arguments that were given."""

    path: Path
    """The checkpoint's file, or its run folder."""
    more: list[str]
    """The further arguments."""
    options: list[str]
    config: T | None
    """The config by the run's config.json; None where there is none. The checkpoint's own config decides: config()."""


class SavedRunCommand(NamedTuple, Generic[T]):
    """The arguments of such a command: CHECKPOINT, perhaps more arguments, and the fields of a config."""

    prog: str
    takes: str
    """Its arguments by position, in words."""
    about: str
    default: T
    """Without a run."""
    as_run: Callable[[TrainConfig], T]
    """The config's defaults, of a run's."""
    hidden: Hidden = NOTHING
    """Fields that have no effect in the command."""

    def read(self, args: Sequence[str]) -> Asked[T]:
        """The arguments of the command. Imports no torch.

        Prints the help, for which no checkpoint has to be there, and exits 0; exits 2 without a checkpoint and at a wrong value.
        Raises ConfigError for a wrong option or argument, CheckpointError for a path without a checkpoint.
        """
        given, options = split_arguments(args, type(self.default), prog=f"{self.prog} CHECKPOINT", hidden=self.hidden)
        asks = bool(set(options) & set(HELP))
        if not given and not asks:
            print(f"usage: {self.prog} {self.takes} [--section.field value ...]\n\n{self.about}")
            raise SystemExit(2)
        run = recorded(Path(given[0])) if given else None
        config = self.config(run, options) if asks or run else None
        path, more = Path(given[0]), given[1:]
        find_checkpoint(path)
        if more and self.takes == "CHECKPOINT":
            raise ConfigError(f"argument = {more[0]!r}: {self.prog} takes one checkpoint; an option begins with --")
        return Asked(path, more, options, config)

    def config(self, run: TrainConfig | None, options: Sequence[str]) -> T:
        """The config of `options`; a field that they leave out is as in `run`."""
        default = self.default if run is None else self.as_run(run)
        return parse(default, options, prog=f"{self.prog} {self.takes}", description=self.about, hidden=self.hidden)


def recorded(path: Path) -> TrainConfig | None:
    """The config that config.json records of the run of `path`, a run folder or a file in its checkpoints/; None without one."""
    folder = path if path.is_dir() else path.parent.parent
    try:
        return read_config(folder) if is_there(folder / "config.json") else None
    except ConfigError:
        return None
