"""What a user can get wrong: one line that names value, rule and way out, exit code 2, and no run folder left behind."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fasttricks import trainer
from fasttricks.commands import evaluate, export, predict, train
from fasttricks.config import ConfigError, Range, TrainConfig, field_rules
from fasttricks.config.cli import parse_recipe
from fasttricks.runs import checkpoint
from fasttricks.training.build import build
from lib.configs import edges, leaves, plain
from lib.tiny import ALONE, FinishedRun, arguments, call

EPOCH_1 = "step-0000000003.pt"


@pytest.fixture
def data(tiny_data: Path, tmp_path: Path) -> Path:
    """A copy of the tiny data, to be spoilt."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.fixture
def refuse(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """refuse(*arguments) trains, sees it refused as a user's mistake has to be, and returns the message."""

    def run(*more: str, recipe: str = "cifar10") -> str:
        code = call(train.main, *arguments(data, tmp_path / "run", *more, recipe=recipe))
        captured = capsys.readouterr()
        assert code == 2, captured.out + captured.err
        assert not (tmp_path / "run").exists()
        assert "Traceback" not in captured.err
        assert "imgs/sec" not in captured.out, "training began"
        return captured.err

    return run


def says(error: str, *wanted: str) -> None:
    """Hold `error` to be one line that has all of `wanted`."""
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    for part in wanted:
        assert part in error


def test_no_such_folder(refuse: Callable[..., str], tmp_path: Path) -> None:
    says(refuse("--data.root", str(tmp_path / "nowhere")), str(tmp_path / "nowhere"), "no such folder", "--data.root")


def test_no_folder_given(refuse: Callable[..., str]) -> None:
    says(
        refuse("--data.root", ""), "data.root = ''", "must be the folder that holds train/ and val/", "give --data.root"
    )


def test_empty_folder(refuse: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    says(
        refuse("--data.root", str(tmp_path / "empty")),
        str(tmp_path / "empty"),
        "the folder is empty",
        "the layout is ROOT/train/<class>",
    )


def test_one_class_alone(refuse: Callable[..., str], data: Path) -> None:
    for split in ("train", "val"):
        for name in ("bee", "cat"):
            shutil.rmtree(data / split / name)
    says(
        refuse("--global-batch-size", "4"),
        f"data.root = '{data}'",
        "must have 2 or more classes, but has only ant",
        "add others",
    )


def test_no_class_folders(refuse: Callable[..., str], data: Path) -> None:
    for path in [*(data / "train").rglob("*.jpg")]:
        path.rename(data / "train" / path.name)
    for folder in (data / "train").iterdir():
        if folder.is_dir():
            folder.rmdir()
    says(refuse(), str(data / "train"), "no class folders", "the layout is ROOT/train/<class>")


def test_a_class_in_val_that_train_lacks(refuse: Callable[..., str], data: Path) -> None:
    (data / "val" / "cat").rename(data / "val" / "dog")
    says(refuse(), str(data / "val"), "dog", "no counterpart in train", "add it there or remove it here")


def test_too_many_files_that_are_no_images(refuse: Callable[..., str], data: Path) -> None:
    """3 of 48 is over the 5 % that are replaced."""
    for number in range(3):
        (data / "train" / "bee" / f"notes-{number}.jpg").write_text("buzz")
    error = refuse()
    says(error, "3 of 48 images are bad", "data.max_bad = 0.05", "bee/notes-2.jpg: no image", "repair or remove them")


def test_num_classes_that_disagrees(refuse: Callable[..., str]) -> None:
    says(refuse("--model.num-classes", "10"), "model.num_classes = 10", "must be the 3 classes of", "or 0")


def test_a_batch_larger_than_the_data(refuse: Callable[..., str]) -> None:
    error = refuse("--global-batch-size", "64")
    says(error, "global_batch_size = 64", "at most the 45 training images", "lower --global-batch-size")


@pytest.mark.parametrize(
    ("recipe", "more", "options"),
    [
        ("resnet50d-tricks-distill", [], "--global-batch-size 8 --tricks.off distillation"),
        (
            "resnet50-baseline",
            ["--accumulate", "3", "--model.num-classes", "1000"],
            "--global-batch-size 6 --model.num-classes 0",
        ),
    ],
)
def test_a_papers_recipe_on_small_data_gets_all_its_refusals_at_once(
    recipe: str, more: list[str], options: str, data: Path, tmp_path: Path
) -> None:
    """And the options to copy are all that it takes."""
    given = [recipe, "--data.root", str(data), "--run-dir", str(tmp_path / "run"), "--device", "cpu", *more]
    with pytest.raises(ConfigError, match=f"^{recipe}: [23] settings do not suit this data or machine:\n") as error:
        build(parse_recipe(given, prog="train"), ALONE)
    *refusals, add = str(error.value).splitlines()[1:]
    assert add == f"  add: {options}"
    assert len(refusals) == (3 if more else 2)
    assert not (tmp_path / "run").exists()
    run = build(parse_recipe([*given, *options.split()], prog="train"), ALONE)
    run.claim.__exit__(None, None, None)
    assert run.steps_per_epoch == -(-45 // run.config.global_batch_size)


def test_a_last_batch_of_one_image_on_one_pixel(refuse: Callable[..., str]) -> None:
    """45 images in batches of 11 leave one; stride 4 and two halvings more make its 16 pixels one, where batch norm fails."""
    sides = ("--data.image-size", "16", "--model.stem-stride", "4", "--model.name", "resnet8d")
    error = refuse("--global-batch-size", "11", *sides)
    says(error, "global_batch_size = 11", "leaves a batch of one image", "give another --global-batch-size")


def test_embedded_images_that_cannot_be_written(
    refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file where a folder is needed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    says(refuse("--data.root", "demo"), "data.root = 'demo'", str(tmp_path / "cache"))


def test_a_batch_that_accumulate_does_not_divide(refuse: Callable[..., str]) -> None:
    says(refuse("--accumulate", "3"), "global_batch_size = 16", "ranks x accumulate (1 x 3)", "the nearest is 15")


def test_unknown_recipe(refuse: Callable[..., str]) -> None:
    says(refuse(recipe="cifar01"), "recipe = 'cifar01'", "did you mean 'cifar10'?")


def test_unknown_trick(refuse: Callable[..., str]) -> None:
    says(refuse("--tricks.off", "mixpu"), "trick = 'mixpu'", "did you mean 'mixup'?")


def test_unknown_model(refuse: Callable[..., str]) -> None:
    says(refuse("--model.name", "resnet8x"), "model.name = 'resnet8x'", "resnet8")


NUMBERS = [
    (path, edges(cls, name)[1], field_rules(cls)[name].message)
    for path, cls, name in leaves(TrainConfig)
    if isinstance(field_rules(cls).get(name), Range)
]


@pytest.mark.parametrize(("path", "outside", "rule"), NUMBERS, ids=[path for path, _, _ in NUMBERS])
def test_a_value_out_of_range(refuse: Callable[..., str], path: str, outside: list[float], rule: str) -> None:
    """tyro's to print, in a box."""
    flag, value = f"--{path.replace('_', '-')}", outside[0]
    assert f"{path} = {value!r}: {rule}" in plain(refuse(f"{flag}={value!r}"))


def test_an_unknown_field(refuse: Callable[..., str]) -> None:
    assert "--model.width" in refuse("--modle.width", "0.5")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent(refuse: Callable[..., str]) -> None:
    says(refuse("--device", "cuda"), "device = 'cuda'", "finds no CUDA device", "--device cpu")


def test_a_run_folder_that_is_a_file(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("mine")
    assert call(train.main, *arguments(data, tmp_path / "run")) == 2
    says(capsys.readouterr().err, "run_dir = ", "must be a folder", "give another --run-dir")
    assert (tmp_path / "run").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------ checkpoints
def evaluation_error(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert call(evaluate.main, *args) == 2
    return capsys.readouterr().err


def test_a_checkpoint_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says(
        evaluation_error(capsys, str(tmp_path / "no.pt")), "no.pt", "must be a file, or a run folder", "check the path"
    )


def test_a_checkpoint_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pt").write_text("not a checkpoint")
    says(evaluation_error(capsys, str(tmp_path / "text.pt")), "text.pt", "nothing in it was run", "use another one")


def test_a_checkpoint_of_another_model(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file whose weights are not those of the network that it names."""
    state = torch.load(finished_run.folder / "checkpoints" / "step-0000000009.pt", weights_only=True)
    saved = json.loads(state["config"])
    saved["model"]["width"] = 0.25
    checkpoint.save_checkpoint(tmp_path / "other.pt", {**state, "config": json.dumps(saved)})
    error = evaluation_error(capsys, str(tmp_path / "other.pt"))
    says(
        error,
        "other.pt",
        "must hold this very model's weights",
        "of another shape",
        "conv1.6.weight (8, 8, 3, 3) for (16, 8, 3, 3)",
    )


def test_a_checkpoint_of_an_older_version(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole, but of the format before: every reader of checkpoints says so, and writes nothing."""
    old, image = tmp_path / "old.pt", str(next(finished_run.data.glob("val/*/*.jpg")))
    state = torch.load(finished_run.folder / "checkpoints" / "step-0000000009.pt", weights_only=True)
    torch.save({**state, "format": 1}, old)
    for command in (
        (evaluate.main, str(old)),
        (predict.main, str(old), image),
        (export.main, str(old), "--output", str(tmp_path / "out"), "--no-onnx"),
        (train.main, *arguments(finished_run.data, tmp_path / "run", "--distill.teacher", str(old))),
    ):
        assert call(*command) == 2
        says(capsys.readouterr().err, "old.pt", "must have format 2, not 1", "use a file that this version")
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]


def test_resuming_from_another_model(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = arguments(data, tmp_path / "run", "--epochs", "1")
    assert call(train.main, *args) == 0
    capsys.readouterr()
    assert call(train.main, *args, "--model.width", "0.25", "--resume") == 2
    says(capsys.readouterr().err, "model.width: 0.125 -> 0.25", "a run resumes only with its own config")


# --------------------------------------------------------------------------------------------------------- while training
@pytest.fixture
def fill_disk() -> Iterator[Callable[[int], None]]:
    """fill_disk(room): from now on the system refuses to let a file grow beyond so many bytes, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda room: resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", [100_000, 0], ids=["for small files only", "for nothing"])
def test_a_full_disk_leaves_the_last_checkpoint_and_resume_goes_on(
    room: int,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fill_disk: Callable[[int], None],
) -> None:
    """Full from the end of the first epoch on: at the next save, or at the next line of the log already."""
    args = arguments(data, tmp_path / "run")
    save = trainer.save

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save", lambda run: (save(run), fill_disk(room)))
        code = call(train.main, *args)
    fill_disk(resource.RLIM_INFINITY)
    captured = capsys.readouterr()
    assert code == 2, captured.out + captured.err
    assert "Traceback" not in captured.err
    error = captured.err.strip().splitlines()[-1]
    says(f"{error}\n", "must be on a disk with room", "free some", "--resume", EPOCH_1)
    kept = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["best.pt", EPOCH_1], "no half-written file"
    assert checkpoint.load_checkpoint(kept / EPOCH_1)["epoch"] == 1
    assert call(train.main, *args, "--resume") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train_loss" in line] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_damaged_image_is_named_and_replaced(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of each split, the first by its end, the second before training; the run ends, and its summary has both."""
    image = data / "train" / "bee" / "004.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    (data / "val" / "ant" / "000.jpg").write_bytes(b"buzz")
    count = len(list(data.glob("val/*/*")))
    args = arguments(data, tmp_path / "run", "--data.max-bad", "0.1")
    assert call(train.main, *args) == 0
    said = capsys.readouterr().err
    assert "bad image bee/004.jpg: damaged or cut off" in said and "replaced by another of its class" in said
    assert "bad image ant/000.jpg: no image: first bytes b'buzz'; left out" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["bad_images"]) == ["train/bee/004.jpg", "val/ant/000.jpg"]
    assert summary["bad_images"]["val/ant/000.jpg"] == "no image: first bytes b'buzz'"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["val_images"] for line in lines if "top1" in line} == {summary["val_images"]} == {count - 1}
