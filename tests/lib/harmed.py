"""python -m lib.harmed full|deleted ARGUMENTS: fasttricks.train whose disk is full, or run folder gone, once it has saved."""

from __future__ import annotations

import resource
import shutil
import signal
import sys

from fasttricks import trainer
from fasttricks.commands import train
from fasttricks.system.command import run_main
from fasttricks.training.run import Run

_SAVE = trainer.save


def _harm(run: Run) -> None:
    _SAVE(run)
    if run.world.is_main and how == "full":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as in a new Python
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    elif run.world.is_main:
        shutil.rmtree(run.folder)


if __name__ == "__main__":
    how = sys.argv.pop(1)
    trainer.save = _harm
    run_main(train.main)
