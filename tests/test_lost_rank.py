"""One rank fails, and the others lose their connection to it: its error is what is read, theirs is a line."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from bench.soak.processes import free_port
from fasttricks.runs.checkpoint import save_checkpoint
from fasttricks.runs.stored import CheckpointError, checkpoint_path
from fasttricks.system.distributed import join_world
from lib.forked import forked, python_m, running
from lib.tiny import FinishedRun, arguments


def places(rank: int, port: int) -> dict[str, str]:
    """As torchrun tells a rank of two."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


def two_ranks(module: str, *args: str) -> list[CompletedProcess[str]]:
    """The ends of both ranks of a command."""
    port = free_port()
    with ExitStack() as stack:
        started = [stack.enter_context(running(module, *args, **places(rank, port))) for rank in (0, 1)]
        return [rank.wait() for rank in started]


def join_and_leave(port: int) -> None:
    """A rank 0 that is gone as soon as the ranks have met."""
    os.environ.update(places(0, port))
    with join_world("cpu"):
        os._exit(0)


def is_one_line(said: str) -> bool:
    """Whether a rank that lost another said so in one line, without a traceback."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    return len(lines) == 1 and lines[0].startswith("error: rank 1: another rank ended") and "Traceback" not in said


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_rank_that_loses_another_at_the_start_says_so_in_a_line(
    command: str, finished_run: FinishedRun, tmp_path: Path
) -> None:
    port = free_port()
    gone = forked(join_and_leave, port)
    args = arguments(finished_run.data, tmp_path / "run") if command == "train" else [str(finished_run.folder)]
    done = python_m(f"fasttricks.{command}", *args, **places(1, port))
    gone.join()
    assert done.returncode == 1
    assert is_one_line(done.stderr), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("full", "error: checkpoint = '{0}/checkpoints/step-0000000006.pt': must be on a disk with room"),
        ("deleted", "error: run_dir = '{0}': must be in a folder that stays during the run: {0} was deleted"),
    ],
)
def test_the_main_ranks_error_is_what_is_read(how: str, said: str, tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, second = two_ranks("lib.harmed", how, *arguments(tiny_data, folder))
    assert (first.returncode, second.returncode) == (2, 1), (first, second)
    assert first.stderr.strip().splitlines()[-1].startswith(said.format(folder)), first.stderr
    assert "--resume" in first.stderr and "Traceback" not in first.stderr
    assert is_one_line(second.stderr), second.stderr


def test_a_checkpoint_whose_folder_is_gone_is_not_called_a_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    with pytest.raises(
        CheckpointError, match=f"{folder} was deleted, moved or unmounted; bring it back and resume with"
    ):
        save_checkpoint(checkpoint_path(folder, 1), {"step": 1})
