"""Every command over every recipe and every network: a new one of either is tested here by being registered.

A row is a recipe with its own network, or the recipe `cifar10` with another network. make test takes a few rows and commands,
make test-all every pair.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path

import pytest
import torch

from fasttricks.ablation.cells import DESIGNS
from fasttricks.commands import ablate, cost, evaluate, export, plan, predict, train
from fasttricks.config import NETWORKS, model_info
from fasttricks.config.cli import parse_recipe
from fasttricks.config.recipes import RECIPES
from fasttricks.config.tricks import TRICKS, is_on
from fasttricks.runs.checkpoint import load_checkpoint
from fasttricks.runs.saved import read_saved
from lib.cards import blocks, run_blocks
from lib.configs import OF_CLASSIFIERS
from lib.tiny import call

TIMM = ("timm:test_resnet", "timm:test_vit", "timm:test_efficientnet")
ROWS = {**{name: name for name in OF_CLASSIFIERS}, **{f"cifar10 with {name}": name for name in (*NETWORKS, *TIMM)}}
"""Row -> its recipe, or the network that cifar10 is trained with."""
SIDES = {"inception_v3": 75}
"""Pixels of the smallest images that a network takes; 32 where it is not named."""
REFUSED = {"inception_v3": 40, "timm:test_vit": 40}
"""Pixels that a network does not take: too few, or no whole patches. The others take 24."""
NO_FP16 = ("timm:test_vit",)
"""Networks with layers that fp16 with FP32 masters does not know."""


class Run:
    """A row's run of three steps on the tiny images, trained when it is first asked for. Not to be changed."""

    def __init__(self, row: str, data: Path, folder: Path, teacher: Callable[[], Path]) -> None:
        name = ROWS[row]
        recipe, self.network = (name, RECIPES[name]().model.name) if name in RECIPES else ("cifar10", name)
        self.data, self._folder = data, folder
        side, options = SIDES.get(self.network, 32), model_info(self.network).options
        args = [
            recipe,
            "--model.name",
            self.network,
            "--data.root",
            str(data),
            "--run-dir",
            str(folder),
            "--device",
            "cpu",
        ]
        args += ["--epochs", "1", "--global-batch-size", "16", "--schedule.warmup-epochs", "0", "--log-steps", "1"]
        args += ["--data.image-size", f"{side}", "--data.val-resize", f"{side + 4}", "--data.threads", "1"]
        args += ["--model.width", "0.125" if "width" in options else "1"]
        args += [] if "stem_stride" in options else ["--model.stem-stride", "4"]
        self.args = [*args, *(["--distill.teacher", str(teacher())] if RECIPES[recipe]().distill.teacher else [])]

    @cached_property
    def folder(self) -> Path:
        assert call(train.main, *self.args) == 0
        return self._folder

    @cached_property
    def tricks(self) -> list[str]:
        """Those that the run has on."""
        config = parse_recipe(self.args, prog="test")
        return [name for name in TRICKS if is_on(config, name)]


# --------------------------------------------------------------------------------------------------- the duties of a command
def resumes(run: Run, tmp_path: Path) -> None:
    """A second epoch after the first that is done."""
    shutil.copytree(run.folder, tmp_path / "run")
    more = ["--run-dir", str(tmp_path / "run"), "--epochs", "2", "--resume"]
    assert call(train.main, *run.args, *more) == 0
    before, after = load_checkpoint(run.folder), load_checkpoint(tmp_path / "run")
    assert (before["step"], after["step"]) == (3, 6)
    assert before["model"].keys() == after["model"].keys()


def evaluates(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """As the run's last validation; a size that the network cannot take is refused."""
    summary = json.loads((run.folder / "summary.json").read_text())
    capsys.readouterr()
    assert call(evaluate.main, str(run.folder)) == 0
    assert capsys.readouterr().out.startswith(f"top-1 {summary['top1']:.2f} %  top-2 {summary['top2']:.2f} %  loss ")
    refuses_a_size(evaluate.main, [], run, capsys)


def predicts(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    image = next((run.data / "val" / "bee").iterdir())
    capsys.readouterr()
    assert call(predict.main, str(run.folder), str(image)) == 0
    path, *rows = capsys.readouterr().out.splitlines()
    shares = {row.split()[-1]: float(row.split()[0]) for row in rows}
    assert path == str(image) and shares.keys() == {"ant", "bee", "cat"}
    assert sum(shares.values()) == pytest.approx(100, abs=0.02)
    refuses_a_size(predict.main, [str(image)], run, capsys)


def refuses_a_size(main: Callable[..., None], images: list[str], run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """As train does, where the network has one that it does not take; the others answer."""
    side = REFUSED.get(run.network, 24)
    sizes = ["--data.image-size", f"{side}", "--data.val-resize", f"{side}"]
    code, said = call(main, str(run.folder), *images, *sizes), capsys.readouterr()
    if run.network in REFUSED:
        assert code == 2
        assert said.err.startswith(f"error: data.image_size = {side}: is not accepted by {run.network} (")
        assert said.err.count("\n") == 1
    else:
        assert code == 0, said.err


def exports_what_loads_back(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the card's own Python, to the network's own probabilities; the card names the tricks that are on."""
    target = tmp_path / "out"
    assert call(export.main, str(run.folder), "--output", str(target), "--no-onnx") == 0
    saved, (prepare, *libraries) = read_saved(run.folder), blocks(target)
    assert libraries
    for library in libraries:
        found = run_blocks([prepare, library], target, monkeypatch)
        with torch.no_grad():
            expected = saved.network()((torch.from_numpy(found["pixels"]) - found["mean"]) / found["std"]).softmax(1)[0]
        torch.testing.assert_close(found["shares"], expected, rtol=1e-4, atol=1e-5)
    row = re.search(r"^\| tricks \| (.*) \|$", (target / "README.md").read_text(), re.MULTILINE)
    used = [name for name in run.tricks if name != "low_precision"]  # the run was in fp32
    assert row is not None and row[1] == (", ".join(used) or "none")


def ablates(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every design is planned on the images, cell by cell; nothing is trained."""
    on = run.tricks[:3]
    for design in DESIGNS if on else ():
        more = ["--run-dir", str(tmp_path / design), "--report", "--factors", *on]
        capsys.readouterr()
        assert call(ablate.main, design, *run.args, *more) == 0
        shown = capsys.readouterr().out
        assert f"## {design}: " in shown
        rows = {"add-one": len(on) + 1, "leave-one-out": len(on) + 1, "factorial": 2 ** len(on) + len(on)}
        tables = [
            line
            for line in shown.splitlines()
            if line.startswith("| ") and not line.startswith(("| ---", "| |", "| main"))
        ]
        assert len(tables) == rows[design]


def is_planned(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    machine, precision = ["--gpus", "2", "--gpu", "l4"], []
    capsys.readouterr()
    if run.network in NO_FP16:  # auto on a GPU, which training refuses there too
        assert call(plan.main, *run.args, *machine) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: precision = 'fp16': ") and said.endswith("take --precision bf16 or fp32\n")
        precision = ["--precision", "bf16"]
    assert call(plan.main, *run.args, *machine, *precision) == 0
    shown = capsys.readouterr().out
    assert "fits 24 GiB" in shown and "GPU-hours" in shown
    found = re.search(r"torchrun --nproc-per-node 2 -m fasttricks\.train (\S+) ", shown)
    assert found is not None and found[1] == run.args[0]


def is_costed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    side = f"{SIDES.get(run.network, 32)}"
    capsys.readouterr()
    assert call(cost.main, "--networks", run.network, "--rounds", "0", "--batch-size", "2", "--image-size", side) == 0
    assert re.search(rf"^\| {run.network} \| {side} \| [\d.]+ \| ", capsys.readouterr().out, re.MULTILINE)


COMMANDS: dict[str, Callable[..., None]] = {
    "resume": resumes,
    "evaluate": evaluates,
    "predict": predicts,
    "export": exports_what_loads_back,
    "ablate": ablates,
    "plan": is_planned,
    "cost": is_costed,
}
QUICK = {
    *(("mobilenet-tricks", command) for command in ("resume", "predict", "export", "ablate")),
    ("cifar10 with timm:test_vit", "evaluate"),
    ("mobilenet-efficient", "cost"),
    ("mobilenet-efficient", "plan"),
}
"""What make test runs: networks that are no ResNets of ours, and each command once."""
PAIRS = [
    pytest.param(row, command, id=f"{row}-{command}", marks=() if (row, command) in QUICK else pytest.mark.slow)
    for row in ROWS
    for command in COMMANDS
]


@pytest.fixture(scope="module")
def rows(
    tiny_data: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], Run]:
    """rows(row) is its run: the same for every command."""
    teacher = partial(request.getfixturevalue, "teacher_run")
    return cache(lambda row: Run(row, tiny_data, tmp_path_factory.mktemp("rows") / "run", teacher))


@pytest.mark.parametrize(("row", "command"), PAIRS)
def test_it_works(
    row: str,
    command: str,
    rows: Callable[[str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "timm" in row:
        pytest.importorskip("timm")
    given = {"tmp_path": tmp_path, "monkeypatch": monkeypatch, "capsys": capsys}
    work = COMMANDS[command]
    work(rows(row), **{name: given[name] for name in work.__annotations__ if name in given})


def test_the_sample_has_every_command() -> None:
    assert {command for _, command in QUICK} == COMMANDS.keys()
    assert {(row, command) for row in ROWS for command in COMMANDS} >= QUICK
