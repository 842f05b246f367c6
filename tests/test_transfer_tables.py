"""ablate transfer-segment and transfer-detect: base networks in rows, by seed, on either split; and what cannot be a base."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from fasttricks.ablation.cell_runs import CellRuns, plan_cells
from fasttricks.ablation.cells import AblateConfig, extend
from fasttricks.ablation.paper import PAPERS_BASES, table6
from fasttricks.ablation.tables import find_tables
from fasttricks.ablation.transfer import TRANSFERS
from fasttricks.ablation.worker import _on_split
from fasttricks.commands import ablate
from fasttricks.commands import evaluate as evaluation
from fasttricks.config import ConfigError, get_at
from fasttricks.config.cli import parse_recipe
from fasttricks.config.recipes import OF_THE_WEIGHTS, RECIPES
from fasttricks.runs.config_file import load_config
from fasttricks.runs.fitted import fit_recipe
from fasttricks.runs.folder import read_config, write_json
from fasttricks.runs.saved import read_saved
from fasttricks.tasks import find_task
from fasttricks.trainer import fit
from fasttricks.training.build import build
from lib.tiny import ALONE, DETECT, SHRINK, FinishedRun, call, environment

pytestmark = pytest.mark.usefixtures("no_curves")

CLASSES = ("sky", "road", "car")
SMALL = [
    *(*SHRINK, "--model.name", "resnet8d", "--segment.base-size", "40", "--data.val-resize", "40", "--epochs", "1"),
    *("--global-batch-size", "8", "--no-sync-batch-norm", "--seeds", "1", "--keep-checkpoints"),
]


@pytest.fixture(scope="module")
def masks(tiny_masks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny_masks with a test split: two images of validation. Not to be changed."""
    root = tmp_path_factory.mktemp("masks") / "root"
    shutil.copytree(tiny_masks, root)
    for kind in ("images", "masks"):
        (root / "test" / kind).mkdir(parents=True)
        for file in sorted((root / "val" / kind).iterdir())[:2]:
            shutil.copy(file, root / "test" / kind)
    return root


def planned(table: str, *bases: str, **changes: Any) -> list[CellRuns]:
    recipe = RECIPES[TRANSFERS[table].recipe]()
    config: AblateConfig = dataclasses.replace(extend(recipe), device="cpu", bases=bases, **changes)
    (found,) = find_tables([table], config)
    return plan_cells(found, config, CLASSES)


def copies(run: Path, folder: Path, seeds: range, name: str = "plain-{}") -> None:
    """The run once for each seed, each with a byte of its own in its checkpoints."""
    for seed in seeds:
        copy = Path(shutil.copytree(run, folder / name.format(seed)))
        for file in (copy / "checkpoints").iterdir():
            file.write_bytes(file.read_bytes() + bytes([seed]))


# ------------------------------------------------------------------------------------------------------------ the rows
@pytest.mark.parametrize("table", TRANSFERS)
def test_a_row_is_the_recipe_with_its_base_network(table: str, finished_run: FinishedRun) -> None:
    """Those of random weights have the others' network, all of it learnt at the heads' rate; nothing else differs."""
    run, plain = finished_run.folder, RECIPES[TRANSFERS[table].recipe]()
    base, random = (cell.config for cell in planned(table, f"plain={run}", "random"))
    assert base and random
    assert (base.init, random.init) == (str(run), "")
    for one in (base, random):
        assert (one.model.name, one.model.width, one.seed) == ("resnet8d", 0.125, 0)
        model = dataclasses.replace(plain.model, name="resnet8d", width=0.125, stem_stride=2)
        changed = {"model": model, "init": one.init, "run_dir": one.run_dir, "data": one.data, "device": "cpu"}
        expected = dataclasses.replace(plain, **changed)
        if not one.init:
            optim, model = dataclasses.replace(plain.optim, backbone_lr=1.0), dataclasses.replace(model, freeze=())
            expected = dataclasses.replace(expected, optim=optim, model=model)
        assert one == expected
        assert one.data == dataclasses.replace(plain.data, mean=one.data.mean, std=one.data.std)


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ([], {}),
        (["--model.stem-stride", "4"], {"model.stem_stride": 4}),  # the recipe's own
        (
            ["--model.stem-stride=1", "--data.mean", "1", "2", "3"],
            {"model.stem_stride": 1, "data.mean": (1.0, 2.0, 3.0)},
        ),
        (["--config", "FILE"], {"model.width": 0.25}),
    ],
)
@pytest.mark.parametrize("table", TRANSFERS)
def test_fields_that_are_given_do_not_follow_the_weights(
    table: str, words: list[str], changed: dict[str, Any], finished_run: FinishedRun, tmp_path: Path
) -> None:
    """In every row, that of random weights too; the others do. As of train --init, by which the first row is found."""
    write_json(tmp_path / "file.json", {"model": {"width": 0.25}})
    words = [str(tmp_path / "file.json") if word == "FILE" else word for word in words]
    bases = ["--bases", f"plain={finished_run.folder}", "random", "--run-dir", str(tmp_path / "a"), "--seeds", "1"]
    with mock.patch("fasttricks.ablation.queue.ablate", return_value=0) as ablation:
        ablate.main([table, *words, *bases, "--data.root", "demo"])
    (found,), config = ablation.call_args.args
    plain, random = (job.config for cell in plan_cells(found, config, CLASSES) for job in cell.jobs)
    recipe = [TRANSFERS[table].recipe, "--init", str(finished_run.folder), "--data.root", "demo"]
    train = parse_recipe([*recipe, *words], prog="train", fit=fit_recipe, load=load_config)
    for path in OF_THE_WEIGHTS[TRANSFERS[table].recipe]:
        right = changed.get(path, get_at(read_config(finished_run.folder), path))
        assert get_at(plain, path) == get_at(random, path) == get_at(train, path) == right, path


def test_each_seed_has_its_own_base(finished_run: FinishedRun, tmp_path: Path) -> None:
    """By {seed} in its place, or by folders seed-0, seed-1 there, as an ablation has; else one base for all."""
    copies(finished_run.folder, tmp_path, range(3))
    copies(finished_run.folder, tmp_path / "ablated", range(3), "seed-{}")
    bases = (
        f"a={tmp_path}/plain-{{seed}}",
        f"b={tmp_path / 'ablated'}",
        f"c={finished_run.folder}",
        f"d={tmp_path}/x.pt",
    )
    a, b, c, d = planned("transfer-segment", *bases, seeds=3, seed=0)
    inits = [[job.config.init for job in cell.jobs] for cell in (a, b, c)]
    assert inits[0] == [f"{tmp_path}/plain-{seed}" for seed in range(3)]
    assert inits[1] == [str(tmp_path / "ablated" / f"seed-{seed}") for seed in range(3)]
    assert inits[2] == [str(finished_run.folder)] * 3
    assert not d.jobs and d.notes == (f"{tmp_path}/x.pt does not exist",)
    assert [job.config.seed for job in a.jobs] == [0, 1, 2]
    assert len({job.folder for cell in (a, b, c) for job in cell.jobs}) == 9


def test_a_seed_without_a_base_is_left_out_and_named(finished_run: FinishedRun, tmp_path: Path) -> None:
    copies(finished_run.folder, tmp_path, range(3))
    copies(finished_run.folder, tmp_path, range(3, 4))
    shutil.rmtree(tmp_path / "plain-1" / "checkpoints")
    shutil.rmtree(tmp_path / "plain-2")
    (tmp_path / "plain-3" / "summary.json").unlink()
    (cell,) = planned("transfer-segment", f"{tmp_path}/plain-{{seed}}", seeds=4)
    assert [job.config.seed for job in cell.jobs] == [0]
    keeps = "an ablation keeps those of its runs with --keep-checkpoints"
    said = f"{tmp_path}/plain-1 has no checkpoint; {keeps}; {tmp_path}/plain-2 does not exist"
    assert cell.notes == (f"{said}; {tmp_path}/plain-3 is not finished; resume it",)


def test_other_weights_of_the_same_name_and_another_split_are_other_runs(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    copies(finished_run.folder, tmp_path, range(1))
    base = f"{tmp_path}/plain-0"

    def folder(**changes: Any) -> Path:
        (cell,) = planned("transfer-segment", base, **changes)
        return cell.jobs[0].folder

    first = folder()
    assert folder() == first != folder(split="test")
    for file in (tmp_path / "plain-0" / "checkpoints").iterdir():
        file.write_bytes(b"other")
    assert folder() != first and folder().parent == first.parent


def test_an_ablations_folder_has_a_row_for_each_of_its_trainings(
    finished_run: FinishedRun, tmp_path: Path, tiny_data: Path
) -> None:
    """With the paper's figures for the ResNet of table 6; rows of several columns have both names."""
    copies(finished_run.folder, tmp_path / "runs" / "abc", range(2), "seed-{}")
    column = table6().cells[0].column
    cells = [
        {"table": "table6", "column": column, "row": "+ cosine", "folder": "runs/abc", "runs": {"0": {}}},
        {"table": "table6", "column": column, "row": "+ label smoothing", "folder": "runs/gone", "runs": {}},
    ]
    write_json(tmp_path / "results.json", {"command": "x", "data": {}, "cells": cells})
    random, cosine = planned("transfer-segment", "random", str(tmp_path), seeds=2)
    assert (random.cell.row, cosine.cell.row) == ("random weights", "+ cosine")
    assert [job.config.init for job in cosine.jobs] == [str(tmp_path / "runs" / "abc" / f"seed-{s}") for s in (0, 1)]
    assert random.cell.paper is None and str(cosine.cell.paper) == "39.33 [M] / 79.25 [M]"
    cells.append({"table": "table6", "column": "MobileNet", "row": "+ cosine", "folder": "runs/abc", "runs": {"0": {}}})
    write_json(tmp_path / "results.json", {"command": "x", "data": {}, "cells": cells})
    rows = [cell.cell for cell in planned("transfer-segment", str(tmp_path))]
    assert [row.row for row in rows] == [f"{column}, + cosine", "MobileNet, + cosine"] and rows[1].paper is None
    del cells[0]["folder"]
    write_json(tmp_path / "results.json", {"command": "x", "data": {}, "cells": cells})
    with pytest.raises(ConfigError, match=r"does not say where its runs are.*call it again with --report"):
        planned("transfer-segment", str(tmp_path))


@pytest.mark.parametrize("task", [one.task for one in TRANSFERS.values()])
def test_the_papers_figures_have_the_tasks_own_metrics(task: str) -> None:
    names = [metric.name for metric in find_task(task).metrics_of(10)]
    assert list(PAPERS_BASES[task]) == [cell.row for cell in table6().cells[:6]]
    for figure in PAPERS_BASES[task].values():
        assert list(figure.values) == names[: len(figure.values)] and set(figure.marks.values()) == {"M"}


# --------------------------------------------------------------------------------------------------------------- a table
def pretend(scores: dict[tuple[str, int], float]) -> Any:
    """Runs that leave a result in place of training: the mIoU of (init, seed)."""

    def run_job(job: Any) -> str:
        job.folder.mkdir(parents=True)
        write_json(job.folder / "config.json", {"config": dataclasses.asdict(job.config)})
        found = {"miou": scores[job.config.init, job.config.seed], "pixel_accuracy": 80.0, "train_seconds": 1.0}
        more = {"cpu_seconds": 1.0, "device": "a device", "versions": {"commit": "abc"}}
        write_json(job.folder / "result.json", found | more)
        return ""

    return mock.patch("fasttricks.ablation.queue.run_job", side_effect=run_job)


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return {cells[0]: cells[1:] for line in lines for cells in [[c.strip() for c in line.strip("|").split("|")]]}


def test_differences_are_paired_by_seed_and_judged_where_the_interval_leaves_0_out(
    masks: Path, finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies(finished_run.folder, tmp_path, range(3))
    copies(finished_run.folder, tmp_path, range(3), "mixed-{}")
    plain, mixed = (f"{tmp_path}/{name}" for name in ("plain", "mixed"))
    scores = {("", seed): 30.0 + 5 * seed for seed in range(3)}
    scores |= {(f"{plain}-{seed}", seed): 34.0 + 5 * seed + 0.1 * (seed == 1) for seed in range(3)}
    scores |= {(f"{mixed}-{seed}", seed): 30.5 + 5 * seed + (seed - 1) for seed in range(3)}
    bases = ["--bases", "random", f"plain={plain}-{{seed}}", f"mixed up={mixed}-{{seed}}"]
    words = ["transfer-segment", *SMALL, *bases, "--data.root", str(masks), "--run-dir", str(tmp_path / "a")]
    with pretend(scores):
        assert call(ablate.main, *words, "--seeds", "3", "--split", "test") == 0
    out, text = capsys.readouterr().out, (tmp_path / "a" / "transfer-segment.md").read_text()
    assert "9 runs, 9 to do" in out and "mIoU 34.00 %" in out
    assert "19 training and 2 test images of 3 classes, 32 pixels, 1 epoch, recipe segment-ade20k." in text
    rows = rows_of(text)
    assert rows[""][:5] == ["mIoU", "pixel accuracy", "seeds", "difference to random weights", ""]
    assert rows["random weights"][:5] == ["35.00 ± 5.00", "80.00 ± 0.00", "3", "", ""]
    assert rows["plain"][3:5] == ["+4.03 (+3.89 to +4.18)", "real"]
    assert rows["mixed up"][3:5] == ["+0.50 (-1.98 to +2.98)", "not decided"]
    assert f"    python -m fasttricks.ablate {shlex.join([*words, '--seeds', '3', '--split', 'test'])}\n" in f"{text}\n"
    assert "validation image" not in text and "3 seeds or a difference that is the same in every seed." in text
    assert (tmp_path / "a" / "transfer-segment.png").stat().st_size > 5000
    raw = json.loads((tmp_path / "a" / "results.json").read_text())
    folders = [tmp_path / "a" / cell["folder"] for cell in raw["cells"]]
    assert all(len(list(folder.glob("seed-*/result.json"))) == 3 for folder in folders)


def test_the_papers_figures_are_shown_beside_bases_of_table_6(
    masks: Path, finished_run: FinishedRun, tmp_path: Path
) -> None:
    copies(finished_run.folder, tmp_path / "b" / "runs" / "abc", range(1), "seed-{}")
    column = table6().cells[0].column
    cells = [
        {"table": "table6", "column": column, "row": row, "folder": "runs/abc", "runs": {"0": {}}}
        for row in ("efficient", "+ cosine")
    ]
    write_json(tmp_path / "b" / "results.json", {"command": "x", "data": {}, "cells": cells})
    words = ["transfer-segment", *SMALL, "--bases", str(tmp_path / "b"), "--data.root", str(masks), "--report"]
    assert call(ablate.main, *words, "--run-dir", str(tmp_path / "a")) == 0
    text = (tmp_path / "a" / "transfer-segment.md").read_text()
    rows = rows_of(text)
    assert rows[""][-2:] == ["the paper, mIoU / pixel accuracy", "its difference"]
    assert rows["efficient"][-2:] == ["38.88 [M] / 78.88 [M]", ""]
    assert "+ cosine: the same run as 'efficient'" in text, "here: of the same base"
    assert rows["+ cosine"][-2:] == ["39.33 [M] / 79.25 [M]", "+0.45"]
    assert "The paper's figures are of ADE20K at its own scale: [M] as recalled, unverified." in text


# ----------------------------------------------------------------------------------------------------------- whole runs
def test_another_split_takes_the_place_of_validation_in_a_result(masks: Path, tmp_path: Path) -> None:
    """As evaluate scores the averaged weights there; the figures of validation are kept beside it."""
    own = SMALL[: SMALL.index("--seeds")]
    words = [
        "segment-ade20k",
        *own,
        "--ema-decay",
        "0.9",
        "--data.root",
        str(masks),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    config = parse_recipe(words, prog="test")
    summary = fit(build(config, ALONE))
    result = _on_split(config, "test", summary)
    saved = read_saved(tmp_path / "run")
    tested = dataclasses.replace(evaluation.as_run(saved.config), split="test")
    expected = evaluation.evaluate_checkpoint(tested, saved, ALONE)
    for name in ("miou", "pixel_accuracy"):
        assert result[name] == expected[name] and result["validation"][name] == summary[name]
    assert saved.average is not None and expected["val_images"] == 2 < summary["val_images"]
    assert result["val_loss"] == summary["val_loss"]


@pytest.fixture(scope="module")
def ablated(masks: Path, finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two rows with a seed, compared on the test split."""
    folder = tmp_path_factory.mktemp("transfer") / "a"
    bases = ["--bases", "random", f"plain={finished_run.folder}", "--split", "test"]
    words = ["transfer-segment", *SMALL, *bases, "--data.root", str(masks), "--run-dir", str(folder)]
    assert call(ablate.main, *words, "--ema-decay", "0.9") == 0
    return SimpleNamespace(folder=folder, words=[*words, "--ema-decay", "0.9"])


@pytest.mark.slow
def test_rows_are_trained_from_their_base_and_scored_on_the_test_split(
    ablated: SimpleNamespace, finished_run: FinishedRun
) -> None:
    found = {read_config(file.parent).init: file.parent for file in ablated.folder.glob("runs/*/*/result.json")}
    assert set(found) == {"", str(finished_run.folder)}
    assert f"init     {finished_run.folder}" in found[str(finished_run.folder)].with_suffix(".log").read_text()
    scores = set()
    for folder in found.values():
        saved = read_saved(folder)
        config = dataclasses.replace(evaluation.as_run(saved.config), split="test")
        expected = evaluation.evaluate_checkpoint(config, saved, ALONE)
        assert json.loads((folder / "result.json").read_text())["miou"] == expected["miou"]
        scores.add(f"{expected['miou']:.2f}")
    rows = rows_of((ablated.folder / "transfer-segment.md").read_text())
    assert {rows[name][0] for name in ("random weights", "plain")} == scores


@pytest.mark.slow
def test_a_second_call_trains_nothing(ablated: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch("fasttricks.ablation.queue.run_job", side_effect=AssertionError("a run")):
        assert call(ablate.main, *ablated.words) == 0
    assert "2 runs, 0 to do" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["transfer-segment"], "bases = '': must name the base networks, as --bases random plain=runs/plain"),
        (["transfer-segment", "--bases", "random", "random"], "bases = 'random weights': is the name of two rows"),
        (["transfer-segment", "--bases", "=runs/x"], "bases = '=runs/x': must be NAME=RUN"),
        (["transfer-segment", "--bases", "random", "--init", "x"], "init = 'x': is given by the rows of the table"),
        (
            ["transfer-segment", "cifar10", "--bases", "random"],
            "task = 'classification': cannot be ablated by transfer-s",
        ),
        (["table4", "--bases", "random"], "bases = 'random': has no effect on table4, and is for transfer-segment"),
        (["table4", "--split", "test"], "split = 'test': has no effect on table4"),
        (["table4", "segment-ade20k"], "which is of classification; take transfer-segment"),
        (["transfer-segmnt"], "table = 'transfer-segmnt': unknown; did you mean 'transfer-segment'?"),
    ],
)
def test_what_is_wrong_is_answered_in_a_line(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(ablate.main, *words, "--data.root", "nowhere", "--run-dir", str(tmp_path / "a")) == 2
    shown = capsys.readouterr().err
    assert says in re.sub(r"\s*│\s*", " ", shown) and not (tmp_path / "a").exists()


def test_a_place_without_a_test_split_is_refused_before_the_first_run(
    tiny_masks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["transfer-segment", *SMALL, "--bases", "random", "--split", "test", "--data.root", str(tiny_masks)]
    assert call(ablate.main, *words, "--run-dir", str(tmp_path / "a")) == 2
    assert "so there is no split test" in capsys.readouterr().err and not (tmp_path / "a").exists()


@pytest.mark.slow
def test_detection_is_compared_by_its_map(tiny_boxes: Path, finished_run: FinishedRun, tmp_path: Path) -> None:
    """Which has no validation loss; its rows learn from frozen batch norm, and from random weights that learn all."""
    bases = ["--bases", f"plain={finished_run.folder}", "random", "--seeds", "1", "--keep-checkpoints"]
    frozen = ["--model.freeze", "stem", "layer1", "batch_norm"]
    words = [
        "transfer-detect",
        *DETECT,
        *frozen,
        *bases,
        "--data.root",
        str(tiny_boxes),
        "--run-dir",
        str(tmp_path / "a"),
    ]
    assert call(ablate.main, *words, "--epochs", "1") == 0
    text = (tmp_path / "a" / "transfer-detect.md").read_text()
    assert "11 training and 5 validation images of 3 classes" in text
    rows = rows_of(text)
    assert rows[""][:4] == ["mAP", "mAP at 11 recalls", "mAP by area", "seeds"]
    found = {read_config(file.parent).init: file.parent for file in (tmp_path / "a").glob("runs/*/*/result.json")}
    assert set(found) == {"", str(finished_run.folder)}
    for folder, row in ((found[""], "random weights"), (found[str(finished_run.folder)], "plain")):
        saved = read_saved(folder)
        expected = evaluation.evaluate_checkpoint(evaluation.as_run(saved.config), saved, ALONE)
        assert rows[row][0] == f"{expected['map']:.2f}"
        assert saved.config.model.freeze == (("stem", "layer1", "batch_norm") if saved.config.init else ())


@pytest.mark.slow
def test_a_killed_table_continues_and_ends_as_one_that_was_not(
    masks: Path, finished_run: FinishedRun, tmp_path: Path
) -> None:
    """Killed in its second run, which starts from a base network: the first is left alone, the second is resumed."""

    def command(folder: Path) -> list[str]:
        bases = ["--bases", "random", f"plain={finished_run.folder}", "--split", "test", "--epochs", "12"]
        words = ["transfer-segment", *SMALL, *bases, "--data.root", str(masks), "--run-dir", str(folder)]
        return [sys.executable, "-m", "fasttricks.ablate", *words, "--checkpoint-steps", "1"]

    def results(folder: Path) -> dict[Path, str]:
        return {file.relative_to(folder): file.read_text() for file in folder.glob("runs/*/*/result.json")}

    def second() -> bool:
        saved = {file.parents[1] for file in (tmp_path / "a").glob("runs/*/*/checkpoints/step-*.pt")}
        return len(results(tmp_path / "a")) == 1 and len(saved) == 2

    process = subprocess.Popen(command(tmp_path / "a"), env=environment(), start_new_session=True)
    end = time.monotonic() + 240
    while not second():
        assert time.monotonic() < end and process.poll() is None, "it was caught in the second run"
        time.sleep(0.02)
    process.kill()
    process.wait()
    (first,) = results(tmp_path / "a").items()
    for folder in (tmp_path / "a", tmp_path / "b"):
        subprocess.run(command(folder), env=environment(), check=True)
    ours, whole = results(tmp_path / "a"), results(tmp_path / "b")
    assert ours[first[0]] == first[1] and ours.keys() == whole.keys() and len(ours) == 2
    (other,) = ours.keys() - {first[0]}
    assert "resume   " in (tmp_path / "a" / other).parent.with_suffix(".log").read_text()
    for file in ours:
        for name in ("miou", "pixel_accuracy", "val_loss", "validation"):
            assert json.loads(ours[file])[name] == json.loads(whole[file])[name]
