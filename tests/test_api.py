"""import fasttricks as ft: each function gives what the command of its name gives, and wrong arguments are errors before work."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fasttricks as ft
from fasttricks.config import UserError
from fasttricks.config.recipes import RECIPES
from fasttricks.data.sources.errors import DataError
from fasttricks.runs.stored import CheckpointError
from lib.forked import said_by
from lib.tiny import REPOSITORY, FinishedRun, environment

TINY: dict[str, Any] = {
    "epochs": 1,
    "global_batch_size": 16,
    "device": "cpu",
    "schedule": {"warmup_epochs": 0},
    "model": {"name": "resnet8d", "width": 0.125},
}


def train(data: Path, run_dir: Path, **fields: Any) -> ft.Result:
    sizes = {"root": str(data), "image_size": 32, "val_resize": 36, "threads": 1}
    return ft.train("demo", run_dir=run_dir, **{**TINY, "data": sizes, **fields})


def test_the_import_is_without_torch_and_the_functions_stay_functions() -> None:
    """python -m needs modules of the same names, whose import binds them in the package."""
    code = (
        "import sys, fasttricks as ft; assert 'torch' not in sys.modules; ft.list_recipes; assert 'torch' not in sys.modules\n"
        "import fasttricks.train, fasttricks.evaluate; from fasttricks import predict\n"
        "assert all(type(f).__name__ == 'function' for f in (ft.train, ft.evaluate, predict))\n"
        "assert {*ft.__all__} <= {*dir(ft)} and not hasattr(ft, 'trian')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_it_lists_is_there() -> None:
    assert ft.list_recipes() == list(RECIPES)
    for name in ft.list_models()[::7]:  # test_every_model.py builds all
        with torch.device("meta"):
            assert isinstance(ft.create_model(name, num_classes=7), torch.nn.Module)


def test_a_model_is_torchvisions_key_by_key() -> None:
    import torchvision

    with torch.device("meta"):
        ours, theirs = ft.create_model("resnet18b", 10), torchvision.models.resnet18(num_classes=10)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_train_evaluate_predict_and_load(tiny_data: Path, tmp_path: Path) -> None:
    result = train(tiny_data, tmp_path / "run")
    assert result.finished
    assert result.summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(result.metrics) == {"top1", "top2", "val_loss"}
    assert [path.parent for path in result.checkpoints] == [tmp_path / "run" / "checkpoints"]

    evaluated = ft.evaluate(result.run_dir)
    assert {name: evaluated[name] for name in result.metrics} == pytest.approx(result.metrics, abs=1e-6)
    assert ft.evaluate(result.checkpoints[0], tiny_data) == evaluated
    assert f"loss {evaluated['val_loss']:.4f}" in said_by("fasttricks.evaluate", str(result.run_dir))

    images = sorted((tiny_data / "val").rglob("*.jpg"))[:3]
    (alone,) = ft.predict(result.run_dir, images[0], top=1)
    found = ft.predict(result.run_dir, [*images, tmp_path / "none.jpg"], top=1)
    assert [prediction.path for prediction in found] == [*map(str, images), str(tmp_path / "none.jpg")]
    assert found[0].classes[0][0] == alone.classes[0][0]
    assert found[-1].error and not found[-1].classes
    said = said_by("fasttricks.predict", str(result.run_dir), *map(str, images), "--top", "1")
    assert re.findall(r"%  (\w+)", said) == [prediction.classes[0][0] for prediction in found[:-1]]

    saved = ft.load(result.run_dir)
    loader = ft.Loader.open(tiny_data, "val", batch_size=3, image_size=32, val_resize=36, threads=1, device="cpu")
    assert loader.classes == saved.classes and loader.root == tiny_data / "val"
    with torch.no_grad():
        right = sum((saved.network()(batch.images).argmax(1) == batch.labels).sum().item() for batch in loader)
    assert 100 * right / evaluated["val_images"] == pytest.approx(result.metrics["top1"])


@pytest.mark.slow
def test_a_run_is_that_of_the_command(tiny_data: Path, tmp_path: Path) -> None:
    """Sections as dicts, tricks by name and dotted names come to one config, and to the command's weights."""
    result = train(tiny_data, tmp_path / "run", tricks={"off": ["mixup"]}, **{"loss.smoothing": 0.2})
    options = "--epochs 1 --global-batch-size 16 --device cpu --schedule.warmup-epochs 0 --model.name resnet8d"
    options += " --model.width 0.125 --data.image-size 32 --data.val-resize 36 --data.threads 1"
    options += " --tricks.off mixup --loss.smoothing 0.2"
    said_by(
        "fasttricks.train", "demo", "--data.root", str(tiny_data), "--run-dir", str(tmp_path / "b"), *options.split()
    )
    of_command = ft.load(tmp_path / "b").weights
    assert all(torch.equal(value, of_command[name]) for name, value in ft.load(result.run_dir).weights.items())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"epocs": 3}, "field = 'epocs': unknown; did you mean 'epochs'?"),
        ({"epochs": "3"}, "epochs = '3': must be of the kind int"),
        ({"loss": {"smoothing": 2.0}}, "loss.smoothing = 2.0: must be"),
        ({"loss": 3}, "field = 'loss': is a section"),
        ({"tricks": {"off": ["mixupp"]}}, "trick = 'mixupp': unknown; did you mean 'mixup'?"),
        ({"data": {"root": "/nowhere"}}, "/nowhere: no such folder"),
    ],
)
def test_a_wrong_field_is_an_error_before_training(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        ft.train("demo", run_dir=tmp_path / "run", **fields)
    assert not (tmp_path / "run").exists()


def test_other_wrong_arguments(tmp_path: Path, finished_run: FinishedRun) -> None:
    with pytest.raises(UserError, match="did you mean 'demo'"):
        ft.train("dmeo")
    with pytest.raises(UserError, match=r"data\.root = 'a': is given as data too"):
        ft.evaluate(finished_run.folder, "b", **{"data.root": "a"})
    with pytest.raises(UserError, match="already exists and is never overwritten"):
        ft.train("demo", run_dir=finished_run.folder)
    for function in (ft.load, ft.evaluate, lambda path: ft.predict(path, [])):
        with pytest.raises(CheckpointError, match="must be a file, or a run folder"):
            function(tmp_path)
    with pytest.raises(DataError, match="split = 'test': must be train or val"):
        ft.Loader.open(finished_run.data, "test", batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="field = 'image_sise': unknown; did you mean 'image_size'"):
        ft.Loader.open(finished_run.data, "val", batch_size=1, image_sise=3)
    with pytest.raises(UserError, match="resnet50b is resnet50 in torchvision"):
        ft.create_model("resnet50")


@pytest.mark.slow
def test_the_example_runs(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example.py", str(tiny_data), json.dumps(TINY)])
    ran = runpy.run_path(str(REPOSITORY / "docs" / "example.py"))
    assert ran["result"].finished
    assert "training loss" in capsys.readouterr().out


def test_the_page_names_every_function_and_its_code_runs(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (REPOSITORY / "docs" / "api.md").read_text()
    assert {name for name in ft.__all__ if f"ft.{name}" not in page} == {"Result"}
    monkeypatch.chdir(tmp_path)
    for name in ("a.jpg", "b.jpg"):
        Path(name).write_bytes(next((tiny_data / "val").rglob("*.jpg")).read_bytes())
    torch.save(ft.create_model("resnet18b", num_classes=2).state_dict(), "resnet18.pth")
    Path("classes.txt").write_text("hen\nowl\n")
    called = []
    real = ft.train

    def small(recipe: str, data: str = "", **fields: Any) -> ft.Result:
        called.append(recipe)
        return real(recipe, tiny_data, **{**fields, **TINY, "run_dir": fields.get("run_dir", f"runs/{recipe}")})

    monkeypatch.setattr(ft, "train", small)
    exec("\n".join(line[4:] for line in page.splitlines() if line.startswith("    ")), {})
    assert called == ["demo", "cifar10"]
