"""What commit 772f314 wrote resumes, evaluates and exports to the same bits, or is refused by name.

tests/fixtures/run-772f314.tar.xz holds two runs that were stopped within an epoch, `fp32` (average of the weights, mixup, the
paper's colour) and `fp16` (FP32 masters, dynamic loss scale, two micro-batches, distilled from `fp32`), the packed images that
they were trained on, and expected.json: what that commit made of them on the machine named there.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import torch as safetensors_torch

from bench.soak.tiny import digest_of
from fasttricks.commands import data as prepare
from fasttricks.commands import report, runs
from fasttricks.commands.evaluate import EvaluateConfig, evaluate_checkpoint
from fasttricks.commands.export import ExportConfig, export
from fasttricks.config import ConfigError
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.curves import draw_curves
from fasttricks.runs.folder import read_config
from fasttricks.runs.overview import look_at
from fasttricks.runs.records import read_metrics
from fasttricks.runs.saved import read_saved
from fasttricks.trainer import fit
from fasttricks.training.build import build
from fasttricks.training.run import Run
from lib.runs import records
from lib.tiny import ALONE, call

ARCHIVE = Path(__file__).parent / "fixtures" / "run-772f314.tar.xz"
KEPT = (
    "classes", "step", "epoch", "step_in_epoch", "unmeasured", "skipped_losses", "model", "optimizer", "loss_scale",
    "average", "average_updates", "ranks",
)  # fmt: skip
"""Of a checkpoint: all but names, times and what the run was made with."""
GROUP = ("params", "lr", "momentum", "weight_decay", "nesterov")
RUNS = pytest.mark.parametrize("name", ["fp32", "fp16"])


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is expected of the runs, which lie in the current folder."""
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fasttricks.runs.log.plot_curves", lambda *_: None)
    values: dict[str, Any] = json.loads((tmp_path / "expected.json").read_text())
    return values


def resumed(name: str) -> tuple[Run, bool]:
    """(The run, gone on with; whether the releases are those it began with). Others are refused by name first."""
    config = dataclasses.replace(read_config(Path(name)), resume=True)
    try:
        return build(config, ALONE), True
    except ConfigError:
        with pytest.raises(ConfigError, match=r"began with another; changed: .* -> .*--allow-other-versions"):
            build(config, ALONE)
        return build(dataclasses.replace(config, allow_other_versions=True), ALONE), False


@RUNS
def test_it_resumes_to_the_same_bits(name: str, expected: dict[str, Any]) -> None:
    run, same_releases = resumed(name)
    assert (run.step, run.epoch, run.step_in_epoch) == (6, 1, 2)
    fit(run)
    found, wanted = records(run), expected[name]["records"]
    for ours, theirs in zip(found, wanted, strict=True):
        if "top5" in theirs and ours["step"] > 6:  # of three classes, and written by this release
            assert theirs.pop("top5") == 100.0 >= ours.pop("top2") >= ours["top1"]
    assert [sorted(record) for record in found] == [sorted(record) for record in wanted]
    if same_releases and ALONE.device_name == expected["device"]:
        state = load_checkpoint(run.folder)
        for rank in state["ranks"]:
            del rank["log"]["seconds"]
        for group in (
            state["optimizer"]["param_groups"] if name == "fp16" else ()
        ):  # options that MasterSGD had not then
            for option in set(group) - set(GROUP):
                assert not group.pop(option), option
        assert digest_of({key: state[key] for key in KEPT}) == expected[name]["digest"]
        assert found == wanted
    else:  # another CPU adds in another order
        ours, theirs = ([r["train_loss"] for r in rows if "train_loss" in r] for rows in (found, wanted))
        assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.usefixtures("expected")
def test_its_three_classes_get_another_second_metric(capsys: pytest.CaptureFixture[str]) -> None:
    """From the resume on. What it wrote before stays as it is, and every command reads both."""
    run, _ = resumed("fp32")
    before = look_at(run.folder)
    assert (before.metrics, before.validations[0]["top5"]) == (("top1", "top5"), 100.0)
    summary = fit(run)
    assert "top5" not in summary and 100 >= summary["top2"] >= summary["top1"]
    table = list(csv.DictReader((run.folder / "metrics.csv").read_text("utf-8").splitlines()))
    assert [(row["epoch"], row["top5"] != "", row["top2"] != "") for row in table] == [
        ("1", True, False), ("2", False, True), ("3", False, True), ("4", False, True),
    ]  # fmt: skip
    curves = draw_curves(read_metrics(run.folder), run.metrics, title="fp32").axes[-1]
    assert [len(line.get_xdata()) for line in curves.get_lines()] == [4, 3]
    capsys.readouterr()
    assert call(runs.main, "fp32") == 0
    assert f"top1 {summary['top1']:.2f}  top2 {summary['top2']:.2f}  " in capsys.readouterr().out
    scores = f"top-1 {summary['top1']:.2f} %, top-2 {summary['top2']:.2f} %"
    card = (
        export(read_saved(run.folder), ExportConfig(onnx=False, output="now"), run.folder) / "README.md"
    ).read_text()
    assert f"validation images: {scores}, loss " in card
    old = {name: value for name, value in summary.items() if name != "top2"} | {"top5": 100.0}
    (run.folder / "summary.json").write_text(json.dumps(old))
    card = (
        export(read_saved(run.folder), ExportConfig(onnx=False, output="old"), run.folder) / "README.md"
    ).read_text()
    assert f"validation images: top-1 {summary['top1']:.2f} %, loss " in card


@pytest.mark.slow
@pytest.mark.usefixtures("expected")
def test_a_report_of_it_says_both() -> None:
    """The curves are those of its records; the figures are measured now."""
    assert call(report.main, "fp32", "--data.threads", "1") == 0
    page = Path("fp32/report.html").read_text("utf-8")
    assert re.findall(r"top-?\d", page.split("Learning rate")[0]).count("top5") == 2 and "top-2" in page
    assert "top-5" not in page


@RUNS
def test_it_evaluates_to_the_same_numbers(name: str, expected: dict[str, Any]) -> None:
    saved, wanted = read_saved(Path(name)), expected[name]["evaluated"]
    config = EvaluateConfig(
        device="cpu", precision=saved.config.precision, data=saved.config.data, eval=saved.config.eval
    )
    found = evaluate_checkpoint(config, saved, ALONE)
    known = {"top1": wanted["top1"], "val_images": wanted["images"]}
    exact = ALONE.device_name == expected["device"]
    assert wanted["top5"] == 100.0 >= found.pop("top2") >= wanted["top1"]
    assert found == {**known, "val_loss": wanted["loss"] if exact else pytest.approx(wanted["loss"], rel=1e-3)}


@RUNS
def test_it_exports_the_same_weights(name: str, expected: dict[str, Any]) -> None:
    target = export(read_saved(Path(name)), ExportConfig(onnx=False, output="exported"), Path(name))
    weights = safetensors_torch.load_file(target / "model.safetensors")
    assert digest_of(dict(sorted(weights.items()))) == expected[name]["exported"]


@pytest.mark.usefixtures("expected")
def test_the_pack_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(prepare.main, "check", "packed") == 0
    assert "packed: 35 images, all as they were packed" in capsys.readouterr().out


@pytest.mark.usefixtures("expected")
@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 1}, "changed: seed: 0 -> 1"), ({"accumulate": 4}, "changed: accumulate: 1 -> 4")],
)
def test_another_run_is_refused_by_the_name_of_what_differs(change: dict[str, int], message: str) -> None:
    config = dataclasses.replace(read_config(Path("fp32")), resume=True, **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        build(config, ALONE)
