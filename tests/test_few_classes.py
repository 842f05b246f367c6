"""Every command names the same metrics of a run: those of its number of classes."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

import fasttricks as ft
from fasttricks.commands import evaluate, export, report, runs
from lib.tiny import FinishedRun, call, write_images


class Case(NamedTuple):
    """A run, and its metrics: names by label."""

    run: Path
    labels: dict[str, str]


SLOW = pytest.mark.slow  # make test names the metrics of three and more classes in the tests of each command


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=SLOW), pytest.param(6, marks=SLOW)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run of so many classes. Not to be changed."""
    tops = {2: (1,), 3: (1, 2), 6: (1, 5)}[request.param]
    labels = {f"top-{k}": f"top{k}" for k in tops}
    if request.param == 3:
        finished: FinishedRun = request.getfixturevalue("finished_run")
        return Case(finished.folder, labels)
    folder = tmp_path_factory.mktemp("few")
    data = write_images(folder / "data", train=24, val=12, classes=[f"class {k}" for k in range(request.param)])
    result = ft.train(
        "cifar10",
        {"root": data, "image_size": 32, "val_resize": 36, "threads": 1},
        run_dir=folder / "run",
        epochs=1,
        global_batch_size=8,
        device="cpu",
        model={"name": "resnet8d", "width": 0.125},
        schedule={"warmup_epochs": 0.0},
    )
    assert list(result.metrics) == [*labels.values(), "val_loss"]
    return Case(result.run_dir, labels)


def tops(names: object) -> list[str]:
    """Those of the names that are metrics: `top` and a number."""
    return re.findall(r"\btop-?\d+\b", str(names))


def test_the_files_of_the_run(case: Case) -> None:
    names = list(case.labels.values())
    validated = [line for line in (case.run / "metrics.jsonl").read_text().splitlines() if "val_loss" in line]
    assert all(tops(list(json.loads(line))) == names for line in validated) and validated
    assert tops(list(json.loads((case.run / "summary.json").read_text()))) == names
    assert tops(next(csv.reader((case.run / "metrics.csv").read_text().splitlines()))) == names


def test_evaluate(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And `ft.evaluate`. A network of more classes is measured as one over data that has fewer."""
    assert call(evaluate.main, str(case.run), "--data.threads", "1", "--output", str(tmp_path / "a.json")) == 0
    assert tops(capsys.readouterr().out.splitlines()[0]) == list(case.labels)
    found = json.loads((tmp_path / "a.json").read_text())["metrics"]
    assert list(found) == [*case.labels.values(), "val_loss", "val_images"]
    assert ft.evaluate(case.run) == found
    names = [row["name"] for row in json.loads((tmp_path / "a.json").read_text())["classes"]]
    if len(names) == 2:
        return
    fewer = write_images(tmp_path / "fewer", train=2, val=8, classes=names[:2])
    assert list(ft.evaluate(case.run, fewer)) == list(found)


def test_the_card_the_page_and_the_list(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(export.main, str(case.run), "--output", str(tmp_path / "out"), "--no-onnx") == 0
    assert tops((tmp_path / "out" / "README.md").read_text()) == list(case.labels)
    page = tmp_path / "a.html"
    assert call(report.main, str(case.run), "--data.threads", "1", "--output", str(page)) == 0
    figures, curves = page.read_text("utf-8").split("<svg", 1)
    assert tops(figures) == list(case.labels)
    names = list(case.labels.values())
    assert list(dict.fromkeys(tops(curves))) == names
    capsys.readouterr()
    assert call(runs.main, str(case.run)) == 0
    assert tops(capsys.readouterr().out) == names
