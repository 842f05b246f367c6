"""python -m fasttricks.ablate as its user meets it: on tiny data, to the end, twice, and what stops it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from fasttricks.ablation.cell_runs import plan_cells, training_name
from fasttricks.ablation.cells import extend
from fasttricks.ablation.jobs import Job, claimed
from fasttricks.ablation.paper import table6
from fasttricks.ablation.queue import POLL_S
from fasttricks.commands import ablate
from fasttricks.config import ConfigError, DistillConfig
from fasttricks.config.recipes import RECIPES
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.folder import read_config
from fasttricks.trainer import fit
from fasttricks.training.build import build
from lib.forked import on_ranks
from lib.tiny import ALONE, SMALLEST, call, configure, environment, on_terminal, write_images


def arguments(data: Path, folder: Path, *more: str, design: str = "leave-one-out", epochs: int = 1) -> list[str]:
    """Two cells of a network of a few thousand weights; `more` wins."""
    small = [*SMALLEST, "--epochs", str(epochs), "--factors", "label_smoothing", "--seeds", "2"]
    return [design, "cifar10", *small, "--data.root", str(data), "--run-dir", str(folder), *more]


def finished(folder: Path) -> dict[Path, dict[str, Any]]:
    """Run folder -> result."""
    return {file.parent: json.loads(file.read_text()) for file in folder.glob("runs/*/*/result.json")}


@pytest.fixture(scope="module")
def ablated(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A whole ablation: two cells, one seed, the checkpoints kept. Not to be changed."""
    folder = tmp_path_factory.mktemp("ablated") / "all"
    args = arguments(tiny_data, folder, "--keep-checkpoints", "--seeds", "1")
    assert call(ablate.main, *args) == 0
    return SimpleNamespace(folder=folder, args=args)


def table(folder: Path) -> dict[str, list[str]]:
    """Row -> its cells, of the Markdown."""
    lines = [line for line in (folder / "leave-one-out.md").read_text().splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for line in lines[2:] for cells in [[c.strip() for c in line.strip("|").split("|")]]}


def test_the_table_is_of_the_runs(ablated: SimpleNamespace) -> None:
    scores = {}
    for folder, result in finished(ablated.folder).items():
        summary = json.loads((folder / "summary.json").read_text())
        assert {name: result[name] for name in summary} == summary
        name = "all of them" if read_config(folder).loss.smoothing else "without label_smoothing"
        scores[name] = [f"{summary['top1']:.2f}", f"{summary['top2']:.2f}", "1"]
    assert {name: row[:3] for name, row in table(ablated.folder).items()} == scores
    assert table(ablated.folder)["without label_smoothing"][4] == "one seed: not judged"


def test_the_report_names_data_scale_machine_and_command(ablated: SimpleNamespace, tiny_data: Path) -> None:
    text = (ablated.folder / "leave-one-out.md").read_text()
    scale = "45 training and 14 validation images of 3 classes, 32 pixels, 1 epoch, recipe cifar10"
    assert f"{tiny_data.name}: {scale}." in text
    assert f"python -m fasttricks.ablate {' '.join(ablated.args)}" in text
    assert "2 runs on " in text and " CPU seconds each; commit " in text
    with Image.open(ablated.folder / "leave-one-out.png") as plot:
        assert min(plot.size) >= 250
    raw = json.loads((ablated.folder / "results.json").read_text())
    assert [list(cell["runs"]) for cell in raw["cells"]] == [["0"], ["0"]]
    assert all(run["cpu_seconds"] > 0 for cell in raw["cells"] for run in cell["runs"].values())


@pytest.mark.slow
def test_a_cell_is_what_train_makes_of_its_command_line(ablated: SimpleNamespace, tmp_path: Path) -> None:
    """Bit for bit, weights and momentum, though its process was forked with torch imported and others came before it."""
    raw = json.loads((ablated.folder / "results.json").read_text())
    cell = raw["cells"][1]
    given = cell["train"].split()
    (ours,) = (f for f in finished(ablated.folder) if read_config(f).seed == 0 and read_config(f).loss.smoothing == 0)
    # in a process of its own, with as many threads as the cell had, on which last bits depend: that is of the server which
    # forked it, and another test may have started that
    device = json.loads((ours / "summary.json").read_text())["device"]
    env = environment(OMP_NUM_THREADS=device.rpartition(", ")[2].removesuffix(" threads"))
    command = [sys.executable, "-m", "fasttricks.train", *given, "--run-dir", str(tmp_path / "alone")]
    assert subprocess.run(command, env=env, capture_output=True, check=False).returncode == 0
    assert json.loads((tmp_path / "alone" / "summary.json").read_text())["device"] == device
    alone = load_checkpoint(tmp_path / "alone")
    cells = load_checkpoint(ours)
    assert alone["model"].keys() == cells["model"].keys()
    for name, value in alone["model"].items():
        assert torch.equal(value, cells["model"][name]), name
    momentum = [state["momentum_buffer"] for state in alone["optimizer"]["state"].values()]
    assert momentum
    for mine, other in zip(momentum, cells["optimizer"]["state"].values(), strict=True):
        assert torch.equal(mine, other["momentum_buffer"])
    assert json.loads((tmp_path / "alone" / "summary.json").read_text())["top1"] == cell["runs"]["0"]["top1"]


def train_and_list_imports(data: str, folder: str) -> None:
    before = set(sys.modules)
    fit(build(configure(Path(data), Path(folder)), ALONE))
    (Path(folder) / "imports").write_text("\n".join(sorted(sys.modules.keys() - before)))


def test_a_run_imports_next_to_nothing_that_its_server_has_not(tiny_data: Path, tmp_path: Path) -> None:
    """torch._dynamo alone is 900 modules, and more seconds than such a run trains for."""
    on_ranks(1, train_and_list_imports, str(tiny_data), str(tmp_path / "run"))
    assert len(listed := (tmp_path / "run" / "imports").read_text().split()) < 100, listed


def test_a_second_call_trains_nothing(ablated: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.stat().st_mtime_ns for file in ablated.folder.glob("runs/**/*") if file.is_file()}
    with mock.patch("fasttricks.ablation.queue.run_job", side_effect=AssertionError("a run")):
        assert call(ablate.main, *ablated.args) == 0
    assert "2 runs, 0 to do" in capsys.readouterr().out
    assert before == {file: file.stat().st_mtime_ns for file in ablated.folder.glob("runs/**/*") if file.is_file()}


def test_a_distillation_is_known_by_its_teachers_weights(ablated: SimpleNamespace) -> None:
    """Another teacher, another run; one of other classes is refused."""
    config = extend(RECIPES["cifar10-ablate"]())
    names = set()
    for folder in finished(ablated.folder):
        taught = dataclasses.replace(config, distill=DistillConfig(teacher=str(folder)))
        rows = [cell for cell in plan_cells(table6(), taught, ("ant", "bee", "cat")) if cell.config]
        assert [cell.cell.row for cell in rows] == [cell.row for cell in table6().cells[:6]], (
            "none waits, none is another's"
        )
        names.add(training_name(rows[3].config, 1, torch.device("cpu")))
        with pytest.raises(ConfigError, match="knows 3 classes, the training images have 2"):
            plan_cells(table6(), taught, ("ant", "bee"))
    assert len(names) == 2


def test_other_data_is_refused(ablated: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_images(tmp_path / "two", train=45, val=14, classes=("ant", "bee"))
    assert call(ablate.main, *ablated.args, "--data.root", str(other)) == 2
    error = capsys.readouterr().err
    assert f"data.root = {str(other)!r}: must be the data set that {ablated.folder} was started with" in error
    assert "classes: 3 -> 2" in error


# ------------------------------------------------------------------------------------------- without a run being done
def failing(job: Any) -> str:
    raise AssertionError(f"trained {job.label}")


@pytest.fixture
def no_run() -> Any:
    with mock.patch("fasttricks.ablation.queue.run_job", side_effect=failing) as run:
        yield run


@pytest.mark.usefixtures("no_run")
def test_another_number_of_classes_is_refused(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(ablate.main, *arguments(tiny_data, tmp_path / "a", "--model.num-classes", "10")) == 2
    assert f"model.num_classes = 10: must be the 3 classes of {tiny_data / 'train'}" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize(
    "more, words",
    [
        ("--compile reduce-overhead --ranks 2", "compile = 'reduce-overhead': "),
        ("--compile reduce-overhead --accumulate 2", "compile = 'reduce-overhead': "),
        ("--ranks 3", "global_batch_size = 16: must be a multiple of ranks x accumulate (3 x 1); the nearest is 15"),
    ],
)
def test_a_run_that_would_fail_is_refused_before_the_first(
    more: str, words: str, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(ablate.main, *arguments(tiny_data, tmp_path / "a", *more.split())) == 2
    assert f"error: {words}" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.usefixtures("no_run")
@pytest.mark.parametrize("keep", [False, True])
def test_too_little_disk_is_refused(
    keep: bool, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """4 runs of ResNet-50 with an average: 25.6 M weights, three times in a checkpoint; two are kept, one is written."""
    args = arguments(tiny_data, tmp_path / "a", "--model.name", "resnet50d", "--model.width", "1", "--ema-decay", "0.9")
    free = SimpleNamespace(free=10_000_000)
    with mock.patch("fasttricks.ablation.preflight.shutil.disk_usage", return_value=free):
        assert call(ablate.main, *args, *(["--keep-checkpoints"] if keep else [])) == 2
    error = capsys.readouterr().err
    found = re.search(r"4 runs need about ([\d,]+) MB there \(a checkpoint is ([\d.]+) MB\), but 10 MB are free", error)
    assert found, error
    one = 3 * 4 * 23.5  # ResNet-50-D without the 1000 classes' 2 M weights
    assert float(found[2]) == pytest.approx(one, rel=0.02)
    assert float(found[1].replace(",", "")) == pytest.approx((11 if keep else 3) * one, rel=0.03)
    assert ("leave out --keep-checkpoints" in error) == keep


@pytest.mark.usefixtures("no_run")
def test_a_report_before_any_run_is_blank(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(ablate.main, *arguments(tiny_data, tmp_path / "a", "--report")) == 0
    assert table(tmp_path / "a") == {"all of them": [""] * 6, "without label_smoothing": [""] * 6}
    assert not (tmp_path / "a" / "leave-one-out.png").exists()
    assert f"written: leave-one-out.md, results.json in {tmp_path / 'a'}/\n" in capsys.readouterr().out


@pytest.mark.usefixtures("no_run")
def test_under_torchrun_it_is_refused(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert call(ablate.main, *arguments(tiny_data, tmp_path / "a")) == 2
    assert "give --ranks, without torchrun" in capsys.readouterr().err


def pretend(scores: Callable[[Any], dict[str, Any]]) -> Any:
    """Runs that leave the result that `scores` gives, in place of training."""

    def run_job(job: Any) -> str:
        from fasttricks.runs.folder import write_json

        result = scores(job)
        if "failed" in result:
            return str(result["failed"])
        job.folder.mkdir(parents=True)
        write_json(job.folder / "config.json", {"config": dataclasses.asdict(job.config)})
        more = {"cpu_seconds": 1.0, "device": "a device", "versions": {"commit": "abc"}}
        write_json(job.folder / "result.json", result | more)
        return ""

    return mock.patch("fasttricks.ablation.queue.run_job", side_effect=run_job)


@pytest.fixture
def no_plot() -> Any:
    """Saves the half second of a plot."""
    with mock.patch("fasttricks.ablation.report.plot") as plot:
        yield plot


def score(job: Any) -> dict[str, Any]:
    smooth = job.config.loss.smoothing > 0
    return {"top1": 50.0 + job.config.seed - (2.5 if smooth else 0), "top2": 90.0, "val_loss": 1.0}


@pytest.mark.usefixtures("no_plot")
def test_means_deviations_and_pairs_are_the_standard_librarys(tiny_data: Path, tmp_path: Path) -> None:
    draws = random.Random(0)  # means 20 points apart: an image of the fourteen is 7.1
    drawn: dict[bool, dict[int, float]] = {True: {}, False: {}}

    def scores(job: Any) -> dict[str, Any]:
        own = drawn[job.config.loss.smoothing > 0]
        own[job.config.seed] = draws.gauss(70 if job.config.loss.smoothing else 50, 2)
        return {"top1": own[job.config.seed], "top2": 90.0, "val_loss": 1.0}

    with pretend(scores):
        assert call(ablate.main, *arguments(tiny_data, tmp_path / "a", "--seeds", "3", "--seed", "5")) == 0
    assert drawn[True].keys() == drawn[False].keys() == {5, 6, 7}
    rows = table(tmp_path / "a")
    for name, values in (("all of them", drawn[True]), ("without label_smoothing", drawn[False])):
        expected = f"{statistics.mean(values.values()):.2f} ± {statistics.stdev(values.values()):.2f}"
        assert rows[name][:3] == [expected, "90.00 ± 0.00", "3"]
    differences = [drawn[False][seed] - drawn[True][seed] for seed in (5, 6, 7)]
    middle, half = statistics.mean(differences), 4.302653 * statistics.stdev(differences) / 3**0.5
    assert rows["without label_smoothing"][3] == f"{middle:+.2f} ({middle - half:+.2f} to {middle + half:+.2f})"
    assert rows["without label_smoothing"][4] == ("real" if abs(middle) > half else "not decided")


@pytest.mark.usefixtures("no_plot")
@pytest.mark.parametrize(("classes", "second"), [(2, None), (3, 2), pytest.param(6, 5, marks=pytest.mark.slow)])
def test_the_columns_are_those_of_the_number_of_classes(classes: int, second: int | None, tmp_path: Path) -> None:
    """The paper's own stay those of ImageNet. Runs of an earlier release, which lack top-2, leave its column blank."""
    names = [f"top{k}" for k in (1, second) if k]
    data = write_images(tmp_path / "data", train=24, val=2 * classes, classes=[f"class {k}" for k in range(classes)])
    args = ["--data.root", str(data), "--run-dir", str(tmp_path / "a"), *SMALLEST, "--epochs", "6", "--seeds", "1"]
    with pretend(lambda job: {**dict.fromkeys(("top1", *names), 50.0), "val_loss": 1.0}):
        assert call(ablate.main, "table4", "cifar10", *args) == 0

    def shown() -> list[list[str]]:
        """The cells of the heads and of the first row."""
        rows = [row for row in (tmp_path / "a" / "table4.md").read_text().splitlines() if row.startswith("|")]
        return [[cell.strip() for cell in row.split("|")[2:]] for row in (rows[0], rows[2])]

    head, first = shown()
    labels = [name.replace("top", "top-") for name in names]
    assert head[: len(names) + 1] == [*labels, "seeds"] and "the paper, top-1 / top-5" in head
    assert first[: len(names) + 1] == [*["50.00"] * len(names), "1"]
    ran = [
        run
        for cell in json.loads((tmp_path / "a" / "results.json").read_text())["cells"]
        for run in cell["runs"].values()
    ]
    assert ran and all([name for name in run if name.startswith("top")] == names for run in ran)
    for file in (tmp_path / "a").glob("runs/*/*/result.json"):
        old = {name: value for name, value in json.loads(file.read_text()).items() if name not in names[1:]}
        file.write_text(json.dumps(old | {"top5": 100.0}))
    assert call(ablate.main, "table4", "cifar10", *args, "--report") == 0
    wanted = {2: ["50.00", "1"], 3: ["50.00", "", "1"], 6: ["50.00", "100.00", "1"]}[classes]
    assert shown()[1][: len(wanted)] == wanted


@pytest.mark.usefixtures("no_plot")
def test_more_seeds_go_where_they_would_decide(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of three seeds warmup's differences are 0, 10, 20 (10 +- 24.8), smoothing's 20.1, 20, 20.1, cosine's -10, 0, 10.

    An image of the fourteen is 7.1 points.
    """

    def scores(job: Any) -> dict[str, Any]:
        seed, config = job.config.seed, job.config
        top1 = 50.0
        top1 += 10 * (seed % 3) if config.schedule.warmup_epochs == 0 else 0
        top1 += 20 + 0.1 * (seed % 2) if config.loss.smoothing == 0 else 0
        top1 += 10 * ((seed % 3) - 1) if config.schedule.decay == "step" else 0
        return {"top1": top1, "top2": 90.0, "val_loss": 1.0}

    factors = ["--factors", "warmup", "label_smoothing", "cosine", "--schedule.warmup-epochs", "0.5"]
    with pretend(scores) as run:
        more = ["--seeds", "3", "--more-seeds", "8", *factors]
        assert call(ablate.main, *arguments(tiny_data, tmp_path / "a", *more)) == 0
    seeds = {name: row[2] for name, row in table(tmp_path / "a").items()}
    assert seeds == {"all of them": "8", "without warmup": "8", "without label_smoothing": "3", "without cosine": "3"}
    assert run.call_count == 4 * 3 + 2 * 5
    assert "10 more runs where they would decide" in capsys.readouterr().out
    assert table(tmp_path / "a")["without warmup"][4] == "real"


def test_a_run_that_diverged_is_said_and_not_judged(tiny_data: Path, tmp_path: Path) -> None:
    def scores(job: Any) -> dict[str, Any]:
        smooth = job.config.loss.smoothing > 0
        return score(job) if smooth or job.config.seed else {"diverged": "loss = nan"}

    with pretend(scores):
        assert call(ablate.main, *arguments(tiny_data, tmp_path / "a", "--seeds", "3")) == 0
    row = table(tmp_path / "a")["without label_smoothing"]
    assert row[:5] == ["51.50 ± 0.71", "90.00 ± 0.00", "2, 1 diverged", "", "a run diverged: not judged"]


@pytest.mark.usefixtures("no_plot")
def test_a_run_that_failed_leaves_its_cell_blank(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others are run; the command says so and exits 1; the next call tries it again."""
    args = arguments(tiny_data, tmp_path / "a")
    with pretend(lambda job: score(job) if job.config.loss.smoothing else {"failed": "error: no room"}):
        assert call(ablate.main, *args) == 1
    assert table(tmp_path / "a")["without label_smoothing"] == [""] * 6
    assert table(tmp_path / "a")["all of them"][2] == "2"
    assert "seed 1 failed: error: no room" in (tmp_path / "a" / "leave-one-out.md").read_text()
    assert "2 run(s) failed" in capsys.readouterr().err
    with pretend(score) as run:
        assert call(ablate.main, *args) == 0
    assert run.call_count == 2


@pytest.mark.usefixtures("no_plot")
def test_what_another_process_trains_is_waited_for_and_taken_over(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other holds two runs when this one comes: one it finishes, the other it loses in its death."""
    args, ran = arguments(tiny_data, tmp_path / "a"), []
    with pretend(score):
        assert call(ablate.main, *args) == 0
    runs = sorted(finished(tmp_path / "a"))
    results = [(run / "result.json").read_bytes() for run in runs]
    shutil.rmtree(tmp_path / "a")
    others = contextlib.ExitStack()
    for run in runs[:2]:
        assert others.enter_context(claimed(Job(SimpleNamespace(run_dir=str(run), task="classification"), 1, "")))

    def sleep(seconds: float) -> None:
        assert seconds == POLL_S and sorted(ran) == runs[2:], "every other run came first"
        runs[0].mkdir()
        (runs[0] / "config.json").write_text(json.dumps({"config": configs[0]}))
        (runs[0] / "result.json").write_bytes(results[0])
        others.close()

    configs: list[Any] = []

    def scored(job: Any) -> dict[str, Any]:
        ran.append(job.folder)
        return score(job)

    def known(job: Any) -> None:
        if job.folder == runs[0] and not configs:
            configs.append(dataclasses.asdict(job.config))

    result = Job.result
    monkeypatch.setattr(Job, "result", lambda job: (known(job), result(job))[1])
    monkeypatch.setattr("fasttricks.ablation.queue.time.sleep", sleep)
    with pretend(scored):
        assert call(ablate.main, *args) == 0
    assert sorted(ran[:2]) == runs[2:] and ran[2:] == [runs[1]]
    assert "2 runs are another process's; waiting for them" in capsys.readouterr().out
    assert [row[2] for row in table(tmp_path / "a").values()] == ["2", "2"]


@pytest.mark.usefixtures("no_plot")
def test_factorial_tells_main_effects(tiny_data: Path, tmp_path: Path) -> None:
    """Smoothing takes 20 points, cosine gives 8; both together, 3 more, of which each gets half. Seeds differ by 0, 1, 0."""

    def scores(job: Any) -> dict[str, Any]:
        smooth, cosine = job.config.loss.smoothing > 0, job.config.schedule.decay == "cosine"
        return {
            "top1": 50 + job.config.seed - 20 * smooth + (8 + job.config.seed % 2) * cosine + 3 * smooth * cosine,
            "top2": 90.0,
            "val_loss": 1.0,
        }

    factors = ["--factors", "label_smoothing", "cosine"]
    args = arguments(tiny_data, tmp_path / "a", *factors, "--seeds", "3", design="factorial")
    with pretend(scores):
        assert call(ablate.main, *args) == 0
    text = (tmp_path / "a" / "factorial.md").read_text()
    assert "| label_smoothing | -18.50 | no spread between seeds: not judged |" in text
    half = 4.302653 * statistics.stdev([0, 1, 0]) / 3**0.5
    middle = 9.5 + 1 / 3
    assert f"| cosine | {middle:+.2f} ({middle - half:+.2f} to {middle + half:+.2f}) | real |" in text


# ------------------------------------------------------------------------------------------------------ real, and slow
def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "fasttricks.ablate", *args]


def wait_for(ready: Callable[[], bool], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_ablation_goes_on(sign: signal.Signals, tiny_data: Path, tmp_path: Path) -> None:
    """The parent alone is killed in its second run: the run ends too; the next call leaves the first as it is, resumes the
    second from its checkpoint, and ends with the weights of an ablation that was not killed."""
    more = ["--seeds", "1", "--keep-checkpoints"]
    args = arguments(tiny_data, tmp_path / "a", *more, epochs=30)
    process = subprocess.Popen(command(*args), env=environment(), start_new_session=True)

    def second() -> list[Path]:
        saved = (tmp_path / "a").glob("runs/*/seed-0/checkpoints/*.pt")
        return [file for file in saved if file.parents[1] not in finished(tmp_path / "a")]

    wait_for(lambda: len(finished(tmp_path / "a")) == 1 and bool(second()))
    process.send_signal(sign)
    assert process.wait(60) == (130 if sign == signal.SIGTERM else -sign)
    wait_for(lambda: subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).returncode != 0, 30)
    (first,) = finished(tmp_path / "a")
    assert second(), "it was caught in the second run"
    before = (first / "result.json").stat().st_mtime_ns
    assert subprocess.run(command(*args), env=environment(), check=False).returncode == 0
    assert (first / "result.json").stat().st_mtime_ns == before
    (other,) = finished(tmp_path / "a").keys() - {first}
    assert "resume   " in other.with_suffix(".log").read_text()
    # started alike: OMP_NUM_THREADS=1 and one thread by a call give other last bits
    subprocess.run(command(*arguments(tiny_data, tmp_path / "b", *more, epochs=30)), env=environment(), check=True)
    for folder in (first, other):
        ours, whole = load_checkpoint(folder), load_checkpoint(tmp_path / "b" / folder.relative_to(tmp_path / "a"))
        assert all(torch.equal(value, whole["model"][name]) for name, value in ours["model"].items())


@pytest.mark.slow
def test_two_processes_share_the_runs(tiny_data: Path, tmp_path: Path) -> None:
    """The same command twice at once: each run is trained by one of them, and both tell of all."""
    both = command(*arguments(tiny_data, tmp_path / "a", "--seeds", "3"))
    processes = [subprocess.Popen(both, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    trained = [re.findall(r"^ *(\d)/6 .* top-1 ", text, re.MULTILINE) for text in said]
    assert sorted(trained[0] + trained[1]) == list("123456") and all(trained)
    tables = [text[text.index("## ") :] if "## " in text else text[text.index("# ") :] for text in said]
    assert tables[0] == tables[1] and len(finished(tmp_path / "a")) == 6


@pytest.mark.slow
def test_ctrl_c_says_what_is_left(tiny_data: Path, tmp_path: Path) -> None:
    args = arguments(tiny_data, tmp_path / "a", epochs=60)
    code, shown = on_terminal(*command(*args), until="1/4", keys=b"\x03")
    assert code == 130, shown
    assert "Traceback" not in shown
    assert re.search(r"stopped; [23] of 4 runs are left; the same command continues", shown)
    assert "seed" in (tmp_path / "a" / "leave-one-out.md").read_text()


@pytest.mark.slow
def test_a_cell_of_two_ranks_is_torchruns(tiny_data: Path, tmp_path: Path) -> None:
    args = arguments(tiny_data, tmp_path / "a", "--ranks", "2", "--seeds", "1", "--keep-checkpoints")
    assert subprocess.run(command(*args), env=environment(), check=False).returncode == 0
    results = finished(tmp_path / "a")
    assert [result["ranks"] for result in results.values()] == [2, 2]
    assert all(len(load_checkpoint(folder)["ranks"]) == 2 for folder in results)


@pytest.mark.slow
def test_a_run_with_a_damaged_image_or_rate_is_told(tiny_data: Path, tmp_path: Path) -> None:
    """Real processes: a rate that makes the loss infinite is a result, a file that cannot be decoded a failure."""
    huge = arguments(tiny_data, tmp_path / "a", "--optim.base-lr", "1e30", "--seeds", "1")
    assert subprocess.run(command(*huge), env=environment(), check=False).returncode == 0
    assert table(tmp_path / "a")["all of them"][:3] == ["", "", "0, 1 diverged"]
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_data, damaged)
    image = next((damaged / "train" / "ant").iterdir())
    image.write_bytes(image.read_bytes()[:200])
    done = subprocess.run(
        command(*arguments(damaged, tmp_path / "b", "--seeds", "1", "--data.max-bad", "0")),
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"ant/{image.name}" in done.stdout and "over data.max_bad = 0" in done.stdout
    assert os.listdir(tmp_path / "b" / "runs"), "the log stays"
