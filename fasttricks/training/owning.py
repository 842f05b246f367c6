"""From looking at a run folder to owning it: the last thing that build() does before a run is written."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fasttricks.config import ConfigError, TrainConfig, UserError
from fasttricks.runs.begin import check_run_dir, claim_run, is_empty_run
from fasttricks.runs.folder import no_place, open_run
from fasttricks.runs.stored import BEST_FILE, checkpoints, keep_copy
from fasttricks.system.distributed import World
from fasttricks.system.reading import is_there
from fasttricks.training.best import BestSoFar
from fasttricks.training.resume import Resumed


def own(config: TrainConfig, world: World, resumed: Resumed) -> AbstractContextManager[object]:
    """The main rank's claim on the run folder, with the run's config.json in it; nothing on the others. A collective.

    Raises ConfigError on all ranks alike where another process has it, or has had it since it was looked at.
    """
    claim, refusal = None, ""
    if world.is_main:
        try:
            claim = claim_run(config)
            check_same(config, resumed)
            resumed.set_damaged_aside()
            note_what_was_there(config, resumed)
            open_run(config, resumed.extended)
        except UserError as error:
            refusal = str(error)
        except OSError as error:
            refusal = str(no_place(config, error))
    refusal = world.gather(refusal.encode())[0].decode()
    if refusal:
        if claim is not None:
            claim.release()
        raise ConfigError(refusal)
    return claim or nullcontext()


def note_what_was_there(config: TrainConfig, resumed: Resumed) -> None:
    """Have the run say that it takes a folder over, has lost its best checkpoint, or extends a finished run, whose checkpoint is
    kept; keep a best one that a kill left without its name. Raises OSError."""
    folder = Path(config.run_dir)
    if (folder / "config.json").exists() and is_empty_run(folder):
        resumed.notes.append("the folder is taken over from a run that ended before its first checkpoint")
    best = BestSoFar()
    best.load_state_dict(resumed.state)
    if best.best is not None and best.best.step == resumed.state["step"] and not resumed.state["unmeasured"]:
        keep_copy(Path(resumed.path), BEST_FILE, again=True)  # it may have been killed between the two
    elif best.best is not None and not is_there(folder / "checkpoints" / BEST_FILE):
        resumed.notes.append(f"{BEST_FILE}, of the best validation, after epoch {best.best.epoch}, is gone")
    if resumed.extends:
        kept = keep_copy(Path(resumed.path), f"epochs-{resumed.extended[-1]['from_epochs']}.pt")
        resumed.notes.append(f"the finished run's checkpoint is kept as {kept}")


def check_same(config: TrainConfig, resumed: Resumed) -> None:
    """Raise ConfigError where the run folder is no longer as it was when find_state() looked."""
    check_run_dir(config)
    found = [path for path in checkpoints(Path(config.run_dir) / "checkpoints") if path not in resumed.damaged]
    if config.resume and found[:1] != ([Path(resumed.path)] if resumed else []):
        rule = "another process has resumed it since; give the same command again"
        raise ConfigError(f"run_dir = {config.run_dir!r}: {rule}")
