"""make bench: turns, tables, files and the comparison, held to figures worked out by hand; the GPU's sizes without a GPU."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from bench import compare, end_to_end, images, losses, pairs, published, report, step, traffic, transfer_step
from bench.budget import Budget
from bench.pairs import Row, by_turns
from bench.report import BenchConfig, BenchData, step_cases
from fasttricks.config import ConfigError, get_at, replace_at
from fasttricks.config.recipes import RECIPES
from fasttricks.data.sources.folder import scan_folder
from fasttricks.system.distributed import World
from lib.configs import plain
from lib.tiny import ALONE, call, write_images


def scripted(*rates: float) -> Callable[[], float]:
    """A contestant with these rates, turn by turn."""
    turns = iter(rates)
    return lambda: next(turns)


def test_ratios_are_of_the_same_round_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_cpu_seconds", lambda: (0.0, 0.0))
    rows = by_turns({"ours": scripted(999, 10, 30, 20), "theirs": scripted(1, 5, 10, 20)}, rounds=3)
    assert rows[0].rates == (10, 30, 20) and rows[0].rate == 20 and rows[0].ratio == 1
    assert (rows[1].rate, rows[1].ratio, rows[1].ratio_low, rows[1].ratio_high) == (10, 2, 1, 3)


def test_who_begins_a_round_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_cpu_seconds", lambda: (0.0, 0.0))
    order: list[str] = []

    def contestant(name: str) -> Callable[[], float]:
        return lambda: order.append(name) or 1.0  # type: ignore[func-returns-value]

    by_turns({name: contestant(name) for name in "abc"}, rounds=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


@pytest.mark.parametrize(
    ("until_s", "rounds"),
    [(math.inf, 5), (36, 5), (35.9, 4), (30, 4), (29.9, 3), (7, 3)],
)
def test_rounds_that_would_end_too_late_are_left_out_and_three_are_always_taken(
    until_s: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two contestants of 2 and 4 s: 6 s of warm-up and 6 s a round."""
    now = [0.0]
    monkeypatch.setattr(pairs.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pairs, "_cpu_seconds", lambda: (0.0, 0.0))

    def lasting(seconds: float) -> Callable[[], float]:
        def measure() -> float:
            now[0] += seconds
            return 1 / seconds

        return measure

    rows = by_turns({"ours": lasting(2), "theirs": lasting(4)}, rounds=5, until_s=until_s)
    assert [len(row.rates) for row in rows] == [rounds] * 2 and rows[1].ratio == 2
    assert now[0] == 6 + 6 * rounds and (now[0] <= until_s or rounds == 3)


def test_a_disturbed_turn_is_not_taken_again_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_cpu_seconds", scripted((0, 0), (3e9, 1)))  # type: ignore[arg-type]
    assert pairs.undisturbed(scripted(1.0), until_s=0.0)[0] == 1.0


def test_the_tables_share_the_budget_and_leave_to_the_next_what_they_do_not_take(tmp_path: Path) -> None:
    whole = Budget(100.0, report.PARTS, started_s=1000.0)
    ends = [("loader", 0, 1), ("step", 0, 2), ("step", 1, 2), ("end_to_end", 1, 2), ("kernels", 2, 3)]
    assert [whole.until_s(*end) for end in ends] == pytest.approx([1017, 1032.5, 1048, 1085, 1087])
    assert Budget(100.0, ["kernels"], started_s=1000.0).until_s("kernels", 2, 3) == pytest.approx(1100)
    assert Budget(math.inf, report.PARTS).until_s("loader") == math.inf
    bench = report.Bench(BenchConfig(), torch.device("cpu"), tmp_path, Console(), whole)
    tell = [Row("ours", 1.0, 1.0, 1.0, 1.0, (1.0,) * 3, 0.0)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "by_turns", lambda *_, until_s: tell)
        table = bench.turns("title", "imgs/sec", {}, lambda rows: ["note"], 1.0)
    assert table.notes == ["note", "3 rounds of 5: the time budget"]


def test_a_disturbed_turn_is_taken_again_and_the_least_disturbed_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take 100 %, 30 %, 20 % of two CPUs in turns of a second: three tries, the last is kept, and its share is told."""
    monkeypatch.setattr(pairs.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(pairs.time, "perf_counter", scripted(0, 1, 1, 2, 2, 3))
    monkeypatch.setattr(pairs, "_cpu_seconds", scripted((0, 0), (3, 1), (3, 1), (4.6, 2), (4.6, 2), (6, 3)))  # type: ignore[arg-type]
    assert pairs.undisturbed(scripted(1.0, 2.0, 3.0)) == (3.0, pytest.approx(0.2))


def test_own_work_and_that_of_children_is_told_from_that_of_others() -> None:
    """A busy child of this process is not other work."""
    import subprocess
    import sys

    before = pairs._cpu_seconds()
    child = "import time; e = time.process_time() + 0.3\nwhile time.process_time() < e: pass"
    subprocess.run([sys.executable, "-c", child], check=True)
    after = pairs._cpu_seconds()
    assert after[1] - before[1] >= 0.25
    assert after[0] - before[0] >= after[1] - before[1] - 0.05


def test_on_a_gpu_the_papers_networks_and_batches_are_taken_on_one_gpu_and_on_all() -> None:
    cases = step_cases(BenchConfig(), torch.device("cuda"), gpus=8)
    assert len(cases) == 4 * 2 * 2 and all(case.device == "cuda" and case.compiled for case in cases)
    assert {(c.precision, c.ranks): c.batch_size for c in cases} == {
        ("fp32", 8): 256,
        ("fp16", 8): 1024,
        ("fp32", 1): 32,
        ("fp16", 1): 128,
    }
    assert {c.model: c.image_size for c in cases}["inception_v3"] == 299
    assert len(step_cases(BenchConfig(), torch.device("cuda"), gpus=1)) == 8
    (cpu,) = step_cases(BenchConfig(batch_size=4), torch.device("cpu"), gpus=0)
    assert (cpu.model, cpu.precision, cpu.batch_size, cpu.ranks) == ("resnet50d", "fp32", 4, 1)


@pytest.mark.parametrize("name", step.PAPER_NETWORKS)
def test_timms_network_is_the_same_as_ours(name: str) -> None:
    """By the number of parameters: what is compared is one network."""
    import timm

    from fasttricks.config import ModelConfig, model_info
    from fasttricks.models import build_model

    with torch.device("meta"):
        ours = build_model(ModelConfig(name=name), 1000)
        theirs = timm.create_model(model_info(name).timm, num_classes=1000)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


OURS, THEIRS = "fasttricks", "timm, channels-last"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "names"), [(1, [OURS]), (2, [OURS, THEIRS])])
def test_each_contestant_trains_in_processes_of_its_own(
    ranks: int, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CPUs with gloo as on GPUs with nccl; small, so that it is quick."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    case = step.StepCase(model="mobilenet_v1", batch_size=2 * ranks, image_size=32, ranks=ranks)
    monkeypatch.setattr(step, "CONTESTANTS", {name: step.CONTESTANTS[name] for name in names})
    with step.contestants(case) as measures:
        assert list(measures) == names
        assert all(measure() > 0 for measure in measures.values())


def test_timm_stands_there_with_our_allocators_setting_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where it is malloc's; as its user would start it, it has none."""
    assert step.KEPT in step.names_of(step.StepCase())
    assert step.KEPT not in step.names_of(step.StepCase(device="cuda"))
    case = step.StepCase(model="mobilenet_v1", batch_size=1, image_size=32)
    set_by = []
    for name in (THEIRS, step.KEPT):
        monkeypatch.setattr(step, "keep_freed_memory", lambda name=name: set_by.append(name))
        step.CONTESTANTS[name](case, ALONE, torch.randn(1, 3, 32, 32), torch.tensor([1]))
    assert set_by == [step.KEPT]


@pytest.mark.parametrize("deterministic", ["on", "off"])
@pytest.mark.parametrize("name", [OURS, f"{THEIRS}, torch.compile"])
def test_ours_and_theirs_ask_the_gpu_for_the_same(
    name: str, deterministic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the process of each, before its network is made."""
    asked: list[dict[str, bool]] = []
    monkeypatch.setattr(step, "ask_for_one_order", lambda device, **given: asked.append(given))
    monkeypatch.setattr(step, "MAKERS", {name: lambda *_: asked.append({"made": True})})
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    step.main(name, step.StepCase(batch_size=1, image_size=8, deterministic=deterministic))  # type: ignore[arg-type]
    assert asked == [{"on": deterministic == "on", "compiled": "compile" in name}, {"made": True}]
    assert step.StepCase(deterministic=deterministic).config.deterministic == deterministic  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_contestant_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = step.StepCase(batch_size=1, image_size=32, model="resnet50d", precision="fp16", device="cuda")
    if torch.cuda.is_available():
        pytest.skip("here it would not fail")
    monkeypatch.setattr(step, "CONTESTANTS", {"fasttricks": step.CONTESTANTS["fasttricks"]})
    with step.contestants(case) as measures, pytest.raises(step.ContestantError, match=r"fasttricks.*exit code"):
        measures["fasttricks"]()


@pytest.mark.parametrize("task", transfer_step.RECIPE)
def test_a_step_of_transfer_is_the_recipes_on_a_gpu_and_small_on_a_cpu(task: transfer_step.Task) -> None:
    recipe = RECIPES[transfer_step.RECIPE[task]]()
    (gpu,) = (case for case in transfer_step.cases(torch.device("cuda")) if case.task == task)
    (cpu,) = (case for case in transfer_step.cases(torch.device("cpu")) if case.task == task)
    assert gpu.device == "cuda" and "1 GPU" in gpu.title and cpu.device == "cpu"
    side = get_at(recipe, transfer_step.SIDE[task])
    assert (gpu.config.global_batch_size, gpu.image_size) == (recipe.global_batch_size, side)
    assert cpu.batch_size < gpu.batch_size and cpu.image_size < gpu.image_size
    assert (gpu.config.detect, gpu.config.segment) == (recipe.detect, recipe.segment)
    assert cpu.config.precision == gpu.config.precision == recipe.precision


@pytest.mark.slow
@pytest.mark.parametrize("task", transfer_step.RECIPE)
def test_ours_and_torchvisions_transfer_have_one_loss_and_one_gradient(task: transfer_step.Task) -> None:
    """Of the same weights, batch and samples, without dropout, whose draws differ."""
    case = transfer_step.TransferCase(task=task, batch_size=2, image_size=64)
    torch.manual_seed(0)
    batch = transfer_step.example(case, ALONE)
    torch.manual_seed(1)
    theirs = transfer_step.torchvisions(case)
    torch.manual_seed(1)
    learner = transfer_step.learner_of(case, ALONE)
    if task == "detection":
        theirs.transform = learner.model.transform  # torchvision's own would normalise the images
    for model in (theirs, learner.model):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    ours = learner.model.state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in theirs.state_dict().items())
    torch.manual_seed(2)
    expected = transfer_step.loss_of(theirs, batch, case)
    torch.manual_seed(2)
    loss, images = learner.task.loss(learner, batch, lam=1.0)
    loss = loss.sum()
    expected.backward()
    (loss / images).backward()
    assert images == 2 and float(loss.detach()) / images == pytest.approx(float(expected.detach()), rel=1e-5)
    trained = {name: weight for name, weight in theirs.named_parameters() if weight.requires_grad}
    assert trained.keys() == {name for name, weight in learner.model.named_parameters() if weight.requires_grad}
    for name, weight in trained.items():
        found = learner.model.get_parameter(name).grad
        assert found is not None and weight.grad is not None
        assert float((found - weight.grad).norm()) <= 1e-3 * float(weight.grad.norm()) + 1e-7, name


@pytest.mark.slow
@pytest.mark.parametrize("task", transfer_step.RECIPE)
def test_each_contestant_of_transfer_trains_in_a_process_of_its_own(
    task: transfer_step.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    case = transfer_step.TransferCase(task=task, batch_size=2, image_size=64)
    with transfer_step.contestants(case) as measures:
        assert list(measures) == ["fasttricks", "torchvision, channels-last", "torchvision, default layout"]
        assert all(measure() > 0 for measure in measures.values())


@pytest.mark.slow
def test_flops_are_those_of_the_network() -> None:
    """4.35 G multiply-adds forward of ResNet-50-D and twice as many backward; the first layer has no gradient of its input."""
    assert step.flops_per_image(step.StepCase(batch_size=1)) == pytest.approx(6 * 4.35e9, rel=0.02)


def test_end_to_end_is_judged_by_the_slower_part_and_by_what_sharing_cores_allows() -> None:
    """Alone 100 and 300 a second: on the same cores together at most 75. 60 is 60 % of the slower and 80 % of that."""
    rows = [
        Row(name, rate, 1, 1, 1, (rate,), 0.0) for name, rate in (("both", 60.0), ("loader", 300.0), ("step", 100.0))
    ]
    text = end_to_end.bounds(rows, 2, shared=True)
    assert "60.0% (60.0% to 60.0%) of the slower" in text and "80.0% (80.0% to 80.0%)" in text
    assert "cores" not in end_to_end.bounds(rows, 2, shared=False)


def result(path: Path, **ratios: tuple[float, float, float]) -> str:
    """A file as make bench writes it, of one table: peer=(ratio, lowest, highest)."""
    rows = [Row("ours", 10.0, 1.0, 1.0, 1.0, (9.0, 11.0), 0.0)]
    rows += [Row(name, 5.0, *ratio, (4.0, 6.0), 0.0) for name, ratio in ratios.items()]
    table = report.Measured("a table", "imgs/sec", rows, [])
    path.write_text(json.dumps({"device": "d", "versions": {}, "tables": {"step": [dataclasses.asdict(table)]}}))
    return str(path)


@pytest.mark.parametrize(
    ("new", "code"),
    [
        ((1.92, 1.85, 1.95), 0),  # 4 % lower: within the tolerance
        ((1.80, 1.70, 1.95), 1),  # 10 % lower in every round
        ((1.80, 1.70, 2.05), 0),  # one round above the old median: noise
        ((2.50, 2.40, 2.60), 0),
    ],
)
def test_a_lost_ratio_is_an_exit_code(
    new: tuple[float, float, float], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = result(tmp_path / "old.json", peer=(2.0, 1.9, 2.1), gone=(1.0, 1.0, 1.0))
    assert call(compare.main, old, result(tmp_path / "new.json", peer=new)) == code
    out = capsys.readouterr().out
    assert ("SLOWER" in out) == bool(code) and "not compared: a table: gone" in out


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"tables": {"step": [{"title": "t"}]}}'])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.json").write_text(text)
    good = result(tmp_path / "good.json", peer=(2.0, 1.9, 2.1))
    assert call(compare.main, good, str(tmp_path / "bad.json")) == 2
    assert "must be a JSON file that make bench wrote" in capsys.readouterr().err


def test_results_with_nothing_in_common_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = result(tmp_path / "a.json", one=(1, 1, 1)), result(tmp_path / "b.json", two=(1, 1, 1))
    assert call(compare.main, old, new) == 2
    assert "nothing" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 2},
        {"budget_s": -1},
        {"save": True, "output": "a.json"},
        {"models": ("resnet18d",)},
        {"batch_size": -1},
        {"data": {"images": 9}},
    ],
)
def test_a_wrong_option_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"must be|leave one out"):
        BenchConfig(**{k: BenchData(**v) if isinstance(v, dict) else v for k, v in changes.items()})


def column(table: Table, name: str) -> list[Any]:
    (found,) = (c for c in table.columns if c.header == name)
    return list(found.cells)


def test_published_rates_agree_with_the_minutes_of_the_paper() -> None:
    """13.3 and 4.4 minutes an epoch for its ResNet-50, variant A (table 3); each published row says that it was not measured."""
    rates = {(p.model, p.machine, p.precision, p.source): p.images_per_sec for p in published.PUBLISHED}
    assert len(rates) == len(published.PUBLISHED)
    for precision, minutes in (("fp32", 13.3), ("fp16", 4.4)):
        rate = rates["resnet50a", "8 x V100", precision, published.PAPER]
        assert published.minutes_an_epoch(rate) == pytest.approx(minutes, abs=0.05)
    table = published.rates_table({("resnet50b", "1 x here", "fp16"): 1000.0})
    labels = column(table, "kind")
    assert labels.count("measured") == 1 and labels.count(published.LABEL) == len(published.PUBLISHED)
    assert sum(bool(source) for source in column(table, "source")) == len(published.PUBLISHED)


def test_the_authors_logs_have_a_rate_for_each_variant() -> None:
    """B is the fastest and C the slowest there, and A's agrees with the paper's rate as those of the other networks do."""
    logs = {p.model: p.images_per_sec for p in published.PUBLISHED if p.source == published.LOGS}
    assert sorted((m for m in logs if m.startswith("resnet50")), key=lambda m: -logs[m]) == [
        f"resnet50{letter}" for letter in "bdac"
    ]
    paper = {
        p.model: p.images_per_sec for p in published.PUBLISHED if p.source in (published.PAPER, published.CONFIRMED)
    }
    assert all(
        logs[model] == pytest.approx(paper[model], rel=0.03) for model in ("resnet50a", "inception_v3", "mobilenet_v1")
    )


def test_times_to_an_accuracy_have_a_table_of_their_own() -> None:
    """A run of known epochs is within the rates of its machine; MLPerf's minutes at its own rate are 30 to 45 epochs."""
    table = published.reached_table()
    assert column(table, "top-1, %") == ["78.4", "75.9", "75.9", "73.8"]
    assert column(table, "minutes") == ["77.2", "13.27", "28.7", "14.9"]
    assert all(column(table, "source")) and set(column(table, "kind")) == {published.LABEL}
    rates = {(p.machine, p.source): p.images_per_sec for p in published.PUBLISHED}
    for run in published.REACHED:
        rate = rates.get((run.machine, run.source))
        if rate:
            assert 30 < run.minutes / published.minutes_an_epoch(rate) < 45
        else:
            assert run.epochs is not None
            assert 15_000 < run.epochs * published.IMAGENET_IMAGES / (60 * run.minutes) < 30_000


@pytest.mark.parametrize("mixup", [False, True])
def test_losses_that_are_compared_are_equal_and_who_is_left_out_is_said(mixup: bool) -> None:
    measures, skipped = losses.contestants(8, 10, torch.device("cpu"), mixup=mixup, compiled=False)
    assert list(measures) == ["fasttricks", "torch, eager"] and any("Liger" in reason for reason in skipped)
    assert all(measure() > 0 for measure in measures.values())
    logits = torch.randn(8, 10)
    ours, theirs = (loss(logits) for loss in losses.pair(8, 10, torch.device("cpu"), mixup=mixup))
    torch.testing.assert_close(ours, theirs)


def test_images_are_linked_or_shrunk_evenly(tmp_path: Path) -> None:
    write_images(tmp_path / "data", train=12, val=3)
    source = tmp_path / "data" / "train"
    linked = scan_folder(images.link_images(source, tmp_path / "links", 6))
    small = scan_folder(images.shrink_images(source, tmp_path / "small", 6, 8))
    assert len(linked) == len(small) == 6 and linked.classes == scan_folder(source).classes
    assert (tmp_path / "links" / linked.files[0]).is_symlink()


def test_the_whole_call_writes_tables_json_and_chart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins for what is measured: what a reader gets."""
    row = Row("fasttricks", 10.0, 1.0, 1.0, 1.0, (9.0, 11.0), 0.2)
    peer = Row("peer", 5.0, 2.0, 1.8, 2.2, (4.5, 5.5), 0.0)

    def measure(bench: report.Bench) -> Any:
        table = report.Measured("A table", "imgs/sec", [row, peer], ["skipped: nobody"])
        report.show(bench.console, table)
        yield table

    monkeypatch.setattr(report, "MEASURES", dict.fromkeys(report.PARTS, measure))
    monkeypatch.setattr(report, "OUT", tmp_path / "here")
    monkeypatch.setattr(report, "RESULTS", tmp_path / "committed")
    args = ["--data.root", str(tmp_path / "images"), "--parts", "loader", "step"]
    assert call(report.main, *args) == call(report.main, *args, "--save") == 0
    (out,) = (tmp_path / "here").glob("*-*.json")
    assert sorted(path.name for path in (tmp_path / "committed").iterdir()) == [out.name, f"{out.stem}.png"]
    text = capsys.readouterr().out
    assert "3 to 5 rounds in alternation after one of warm-up; time budget 540 s" in " ".join(text.split())
    assert "2.00 (1.80 to 2.20)" in text and "skipped: nobody" in text and "other work took up to 20%" in text
    written = json.loads(out.read_text())
    assert set(written["tables"]) == {"loader", "step"} and written["tables"]["step"][0]["rows"][1]["ratio"] == 2.0
    assert {"torch", "commit"} <= set(written["versions"]) and "note" in written["gpu"]
    assert written["device"] == World.alone(torch.device("cpu")).device_name
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in out.read_text(), "results are committed: where they were made is nobody's business"
    assert call(report.main, "--output", str(tmp_path / "out")) == 2
    assert "must end in .json" in plain(capsys.readouterr().err)
    assert Console


def test_traffic_of_both_batch_norms_by_kind() -> None:
    """Against the tensors of its layers: a MobileNet has no additions, and torch's ReLU6 moves five passes."""
    config = step.StepCase(model="mobilenet_v1", batch_size=4, image_size=64, precision="fp16").config
    torchs, ours = (traffic.count(replace_at(config, "model.norm", norm)) for norm in traffic.NORMS)
    kinds = {name: traffic.by_kind(one.traffic) for name, one in (("torch", torchs), ("ours", ours))}
    assert sum(kinds["ours"].values()) == ours.traffic_bytes < 0.65 * torchs.traffic_bytes
    assert kinds["ours"]["convolution"] == kinds["torch"]["convolution"] > 0
    assert kinds["ours"]["activation"] == 0 < kinds["torch"]["activation"]
    values = ours.again["batch_norm_act"]  # all activations once
    assert kinds["ours"]["batch norm"] == pytest.approx(5 * values, rel=0.05)
    assert kinds["torch"]["activation"] == pytest.approx(5 * values, rel=0.05)
    lines = list(traffic.table({"torch": torchs, "ours": ours}))
    assert lines[0] == "| GB | torch, once | torch, passes | ours, once | ours, passes |"
    total = [float(cell) for cell in lines[-2].strip("| ").split(" | ")[1:]]
    assert total == pytest.approx(
        [part / 1e9 for one in (torchs, ours) for part in (one.traffic_bytes, one.traffic_bytes + one.again.total())],
        abs=0.005,
    )
