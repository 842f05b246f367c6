"""The arguments of a command that works on a checkpoint. All their errors come before torch is imported."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from fasttricks.config import ConfigError, TrainConfig, UserError
from fasttricks.config.cli import parse
from fasttricks.config.options import HELP, NOTHING, Hidden, arities, split_arguments, value_of
from fasttricks.runs.exported import describe, stand_in
from fasttricks.runs.folder import read_config
from fasttricks.runs.stored import find_weights, run_of_best
from fasttricks.system.reading import is_there

if TYPE_CHECKING:
    from fasttricks.runs.saved import Saved

T = TypeVar("T")

FORMS = """CHECKPOINT is a file, a run folder, of which the newest checkpoint is taken, RUN@best for its best one, or an export's
folder. A file of torchvision or timm (.pt, .pth, .safetensors) needs --model.name, its network; --data.class-order FILE names its
classes."""


class Asked(NamedTuple, Generic[T]):
    """The arguments that were given."""

    path: Path
    """The checkpoint's file, or its run folder, or an export."""
    more: list[str]
    """The further arguments."""
    options: list[str]
    config: T | None
    """The config by the run's config.json; None where there is none. The checkpoint's own config decides: config()."""
    task: str = "classification"
    """The task by the run's config.json."""


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
    recorded: Hidden = NOTHING
    """Fields that a run records, and only the user of a file of another program may say."""

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
        run, settled = recorded(Path(given[0])) if given else (None, False)
        config = self.config(run, options, settled=settled) if asks or run else None
        path, more = Path(given[0]), given[1:]
        find_weights(path)
        if more and self.takes == "CHECKPOINT":
            raise ConfigError(f"argument = {more[0]!r}: {self.prog} takes one checkpoint; an option begins with --")
        return Asked(path, more, options, config, run.task if run else "classification")

    def open(self, asked: Asked[T]) -> tuple[Saved, T]:
        """(the network that was asked for, the config to use it by). Raises as open_saved and config()."""
        from fasttricks.runs.opened import open_saved

        said = asked.config
        saved = open_saved(asked.path, getattr(said, "model", None), getattr(said, "data", None))
        return saved, self.config(saved.config, asked.options, settled=not saved.foreign)

    def config(self, run: TrainConfig | None, options: Sequence[str], *, settled: bool = False) -> T:
        """The config of `options`; a field that they leave out is as in `run`.

        settled: `run` is that of the checkpoint, whose recorded fields no option may change. Otherwise, where it names no
        network, the sizes of the images are those of the network that the options name.
        """
        default, hidden = self.default if run is None else self.as_run(run), self.hidden
        if settled:
            hidden = self._without_recorded(options)
        elif run is not None and not run.model.name and (name := value_of("model.name", options)):
            default = dataclasses.replace(default, data=stand_in(name).data)  # type: ignore[type-var]
        default = at_place(default, value_of("data.root", options))
        return parse(default, options, prog=f"{self.prog} {self.takes}", description=self.about, hidden=hidden)

    def _without_recorded(self, options: Sequence[str]) -> Hidden:
        """The fields to hide where a run records some. Raises ConfigError for an option that is one of them."""
        hidden = {
            cls: (*self.hidden.get(cls, ()), *self.recorded.get(cls, ())) for cls in (*self.hidden, *self.recorded)
        }
        words = [word.partition("=")[0] for word in options]
        left = arities(type(self.default), hidden)
        for word in words:
            name = word.removeprefix("--").replace("_", "-")
            if word.startswith("--") and name not in left and name in arities(type(self.default), self.hidden):
                raise ConfigError(f"option = {word!r}: the checkpoint records it; leave it out")
        return hidden


def at_place(config: T, root: str) -> T:
    """`config` for the images in `root`, empty for its own place, of which alone a run's val_share holds."""
    data = getattr(config, "data", None)
    if not root or data is None or os.path.realpath(root) == os.path.realpath(data.root):
        return config
    return dataclasses.replace(config, data=dataclasses.replace(data, val_share=0.0))  # type: ignore[type-var]


def recorded(path: Path) -> tuple[TrainConfig | None, bool]:
    """(the config recorded for the network at `path`, None where none is; whether it is that of a run).

    That of a run folder, or of a file in its checkpoints/, is in its config.json; an export has it in its metadata.
    """
    try:
        if description := describe(path):
            return description.config, description.settled
        folder = run_of_best(path) or (path if path.is_dir() else path.parent.parent)
        run = read_config(folder) if is_there(folder / "config.json") else None
    except UserError:  # told by the reader of the checkpoint
        return None, False
    return run, run is not None
