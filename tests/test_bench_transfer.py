"""make transfer: its commands are those of train and ablate, it ends in time, continues, and prints the tables."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bench import transfer
from bench.transfer import BASES, TABLES, Work, base_commands, find_data, run_all, table_command
from fasttricks.commands import ablate
from fasttricks.config.cli import parse_recipe
from lib.masks import write_masks
from lib.tiny import SMALLEST, write_images


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(data=tmp_path / "data", out=tmp_path / "out", until_s=time.monotonic() + 100, jobs=2)


def test_each_base_is_trained_once_a_seed_and_continued(work: Work, tmp_path: Path) -> None:
    commands = base_commands(work, tmp_path)
    configs = [parse_recipe(words[2:], prog="test") for words, _ in commands]
    assert len(configs) == len(BASES) * transfer.SEEDS and {config.seed for config in configs} == {0, 1, 2}
    assert len({config.run_dir for config in configs}) == len(configs) and not any(one.resume for one in configs)
    by_seed = [dataclasses.replace(one, seed=0, run_dir="") for one in configs if one.seed == 1]
    assert len({str(one) for one in by_seed}) == len(BASES), "each with settings of its own"
    first, second, *_ = (Path(one.run_dir) for one in configs)
    first.mkdir(parents=True)
    second.mkdir()
    (second / "summary.json").touch()
    left = [parse_recipe(words[2:], prog="test") for words, _ in base_commands(work, tmp_path)]
    assert len(left) == len(configs) - 1 and left[0].resume and not left[1].resume


@pytest.mark.parametrize("table", TABLES)
def test_a_table_has_random_weights_and_each_base_by_seed(table: str, work: Work, tmp_path: Path) -> None:
    """As fasttricks.ablate reads the command."""
    with mock.patch("fasttricks.ablation.queue.ablate", return_value=0) as called:
        ablate.main(table_command(work, table, tmp_path)[2:])
    (tables, config), _ = called.call_args
    assert [one.name for one in tables] == [table] and config.seeds == transfer.SEEDS
    assert [cell.row for cell in tables[0].cells] == ["random weights", *BASES]
    trained = {
        config.run_dir for config in (parse_recipe(w[2:], prog="test") for w, _ in base_commands(work, tmp_path))
    }
    inits = [cell.edits["init"] for cell in tables[0].cells[1:]]
    assert {init.replace("{seed}", str(seed)) for init in inits for seed in range(transfer.SEEDS)} == trained


def test_data_that_is_not_there_is_named(work: Work) -> None:
    work.data.mkdir()
    with pytest.raises(SystemExit, match=r"must hold cifar10/ or cifar10.tar; give --data DIR, or set FASTTRICKS_TEST"):
        find_data(work.data, "cifar10")
    with pytest.raises(SystemExit, match=r"must hold cifar10/"):
        transfer.main(["--data", str(work.data), "--check"])


def test_commands_run_side_by_side_with_a_log_each_and_a_failure_is_named(
    work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each waits for the other's file; the third fails."""
    wait = "import sys, time, pathlib as p\nmine, other = map(p.Path, sys.argv[1:])\nmine.touch()\n"
    wait += "while not other.exists(): time.sleep(0.01)\nprint('done')"
    names = [str(tmp_path / name) for name in "ab"]
    commands = [
        (["-S", "-c", wait, *names], tmp_path / "1.log"),
        (["-S", "-c", wait, *names[::-1]], tmp_path / "2.log"),
    ]
    assert run_all(commands, work) and (tmp_path / "2.log").read_text() == "done\n"
    assert not run_all([(["-S", "-c", "raise SystemExit(3)"], tmp_path / "3.log")], work)
    assert f"ended with 3: {tmp_path / '3.log'}" in capsys.readouterr().out


def test_at_the_end_of_the_time_runs_are_asked_to_end_and_no_other_begins(work: Work, tmp_path: Path) -> None:
    begun = (
        "import signal, sys, time, pathlib as p\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(print('saved')))\n"
    )
    begun += "p.Path(sys.argv[1]).touch()\ntime.sleep(60)"
    short = dataclasses.replace(work, jobs=1, until_s=time.monotonic() + 2.0)
    commands = [(["-S", "-c", begun, str(tmp_path / str(n))], tmp_path / f"{n}.log") for n in range(2)]
    assert not run_all(commands, short)
    assert (tmp_path / "0").exists() and (tmp_path / "0.log").read_text() == "saved\n" and not (tmp_path / "1").exists()


@pytest.mark.slow
def test_the_whole_call_trains_the_bases_and_the_tables_and_prints_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """On drawn data, one seed."""
    write_images(tmp_path / "data" / "cifar10", train=45, val=14)
    masks = write_masks(tmp_path / "data" / "seg_small" / "camvid", train=12, val=4, sides=(40, 60))
    (masks / "val").rename(masks / "test")
    write_masks(masks, train=12, val=4, sides=(40, 60))
    options = (
        "--split test --epochs 1 --global-batch-size 4 --no-sync-batch-norm --data.image-size 32 --data.val-resize 36"
    )
    small: dict[str, Any] = {
        "transfer-segment": ("seg_small", "camvid", [*options.split(), "--segment.base-size", "36"])
    }
    monkeypatch.setattr(transfer, "TABLES", {name: transfer.Small(*values) for name, values in small.items()})
    monkeypatch.setattr(transfer, "BASES", {"plain": ["cifar10", *SMALLEST, "--epochs", "1"]})
    monkeypatch.setattr(transfer, "SEEDS", 1)
    monkeypatch.setattr(transfer, "CLASSIFIER", [])
    words = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "out"), "--jobs", "1"]
    assert transfer.main([*words, "--tables", "transfer-segment"]) == 0
    results = json.loads((tmp_path / "out" / "transfer-segment" / "results.json").read_text())
    assert [list(cell["runs"]) for cell in results["cells"]] == [["0"], ["0"]]
    out = capfd.readouterr().out
    assert "| random weights |" in out and "| plain |" in out and "not finished" not in out
    with mock.patch("bench.transfer.base_commands", return_value=[]):
        assert transfer.main([*words, "--tables", "transfer-segment"]) == 0, "nothing is left"
