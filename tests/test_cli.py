"""The command line: wrong names answered with the right ones, help for every field, the order recipe, tricks, fields."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from fasttricks.commands.evaluate import EvaluateConfig
from fasttricks.commands.predict import PredictConfig
from fasttricks.config import ConfigError, DataConfig, TrainConfig, UserError, field_rules, get_at, schema, transfer
from fasttricks.config.cli import parse_recipe
from fasttricks.config.options import ABSENT, FOREIGN, arities, option_docs
from fasttricks.config.recipes import RECIPES
from fasttricks.config.tricks import TRICKS
from fasttricks.data.sources import open_split
from fasttricks.system.command import run_main
from lib.configs import leaves, plain, words_of
from lib.tiny import write_images

ROOT = Path(__file__).parents[1]


def parse(*args: str) -> TrainConfig:
    return parse_recipe(args, prog="train")


# ------------------------------------------------------------------------------------------------ a wrong name


@pytest.mark.parametrize(
    ("args", "wrong", "nearest"),
    [
        (["resnet50-eficient"], "resnet50-eficient", "did you mean 'resnet50-efficient'?"),
        (["demo", "--optim.bse-lr", "0.1"], "--optim.bse-lr", "did you mean --optim.base-lr?"),
        (["demo", "--tricks.off", "mixupp"], "mixupp", "did you mean 'mixup'?"),
    ],
    ids=["recipe", "field", "trick"],
)
def test_a_misspelt_name_is_answered_with_the_nearest(args: list[str], wrong: str, nearest: str) -> None:
    """In a process of its own, as a user types it: exit status 2, no traceback, nothing on stdout."""
    command = [sys.executable, "-W", "error", "-m", "fasttricks.train", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": f"{ROOT / 'kernels'}"})
    answer = plain(done.stderr)
    assert (done.returncode, done.stdout) == (2, "")
    assert wrong in answer
    assert nearest in answer
    assert "Traceback" not in answer


@pytest.mark.parametrize(
    ("args", "nearest"),
    [
        (["--data.rot", "x"], "--data.root"),
        (["--epoch", "3"], "--epochs"),
        (["--schedule.warmup", "3"], "--schedule.warmup-epochs"),
        (["--loss.mixup", "0.1"], "--loss.mixup-alpha"),
        (["--tricks.of", "mixup"], "--tricks.off"),
        (["--no-data.antialias"], "--data.no-antialias"),
        (["--learning-rate", "0.1"], "--optim.base-lr"),
        (["--label-smoothing=0.1"], "--loss.smoothing"),
        (["--workers", "4"], "--data.threads"),
        (["--img_size", "64"], "--data.image-size"),
        (["--amp"], "--precision"),
        (["--output-dir", "x"], "--run-dir"),
        (["-b", "64"], "--global-batch-size"),
        (["--weight-decay", "0"], "--optim.weight-decay"),
        (["--pretrained"], "--init"),
        (["--weights", "x.pt"], "--init"),
        (["--freeze", "stem"], "--model.freeze"),
    ],
)
def test_an_option_that_people_type_is_answered_with_ours_and_its_help(args: list[str], nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse("demo", *args)
    right = nearest.removeprefix("--")
    said = (
        f"option = {args[0].partition('=')[0]!r}: unknown; did you mean {nearest}? ({option_docs(TrainConfig)[right]}"
    )
    assert str(error.value).startswith(said.rstrip("."))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--optimizer", "adam"], "the optimizer is Nesterov SGD; --optim.backend chooses"),
        (["--gpus", "8"], "torchrun --nproc-per-node N"),
        (["--xyzzy"], "unknown; train RECIPE --help lists the options"),
        (["demo2"], "takes one recipe, and has demo"),
        (["--resume", "runs/a"], "argument = 'runs/a'"),
    ],
)
def test_an_option_that_there_is_not(args: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        parse("demo", *args)


def test_other_trainers_options_stand_for_options_that_there_are() -> None:
    everywhere = {*arities(TrainConfig), *arities(EvaluateConfig), *arities(PredictConfig)}
    assert {right for right in FOREIGN.values() if right not in everywhere} == set()
    assert not (set(FOREIGN) | set(ABSENT)) & set(arities(TrainConfig))


@pytest.mark.parametrize(
    "args",
    [
        ["--epochs", "3", "demo", "--tricks.off", "mixup", "cosine"],
        ["--tricks.off", "mixup", "cosine", "demo", "--epochs=3"],
        ["--epochs", "3", "--tricks.off", "mixup", "cosine", "demo"],
    ],
)
def test_options_stand_in_any_order(args: list[str]) -> None:
    assert parse(*args) == parse("demo", "--epochs", "3", "--tricks.off", "mixup", "cosine")


@pytest.mark.parametrize(
    ("name", "network"), [("resnet18", "resnet18d"), ("resnet50b", "resnet50b"), ("inceptionv3", "inception_v3")]
)
def test_a_network_in_the_place_of_a_recipe_is_told_so(name: str, network: str) -> None:
    with pytest.raises(ConfigError, match=f"is a network, not a recipe; .* --model.name {network};"):
        parse(name)


def test_names_of_tricks_with_commas_are_told_to_be_apart() -> None:
    with pytest.raises(ConfigError, match="must be names apart, without commas: mixup cosine"):
        parse("demo", "--tricks.off", "mixup,cosine")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optim.base-lr", "-0.1"], "optim.base_lr = -0.1: must be above 0"),
        (["--epochs", "many"], "epochs = 'many': must be a whole number: 1 to 1000000; train RECIPE --help explains"),
        (["--epochs=2.5"], "epochs = '2.5': must be a whole number"),
        (["--epochs"], "epochs = '': needs a value: 1 to 1000000"),
        (["--optim.momentum", "x"], "optim.momentum = 'x': must be a number"),
        (["--data.area", "0.1"], "data.area = '0.1': needs 2 values"),
        (["--data.area", "0.1", "all"], "data.area = 'all': must be a number"),
        (["--resume=yes"], "resume = 'yes': takes no value"),
        (["--epochs", "3", "--schedule.warmup-epochs", "5"], "schedule.warmup_epochs = 5.0: must be below epochs (3)"),
        (["--data.color", "papr"], "data.color = 'papr': must be one of paper, published, none"),
        (["--tricks.off", "mixup", "--tricks.on", "mixup"], "tricks.off = ['mixup']: cannot be switched on and off"),
    ],
)
def test_a_wrong_value_is_answered_with_field_value_and_rule(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, as every error of the user."""
    with pytest.raises(ConfigError) as caught:
        parse("demo", *args)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert not capsys.readouterr().err


def test_an_unknown_recipe_is_an_error_of_the_user() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cifar10'"):
        parse("cifar")


def test_run_main_shows_a_warning_of_the_project_as_a_note_and_leaves_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of both ranks: rank 0 alone speaks for the project."""
    data = write_images(tmp_path / "data", train=3, val=3)
    (data / "val" / "ant" / ".hidden").touch()

    def main(args: Sequence[str]) -> None:
        warnings.warn("of this test", stacklevel=1)
        open_split(DataConfig(root=str(data)), "val")

    with warnings.catch_warnings(record=True) as left:
        warnings.simplefilter("always")
        for rank in ("0", "1"):
            for name, value in {
                "RANK": rank,
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "29500",
            }.items():
                monkeypatch.setenv(name, value)
            run_main(main)
    assert [str(warning.message) for warning in left] == ["of this test"] * 2
    note = capsys.readouterr().err
    assert note.startswith(f"note: {data}/val: skipped 1 hidden") and note.endswith("(ant/.hidden)\n")
    assert note.count("\n") == 1


def test_run_main_prints_a_user_error_as_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def main(_: object) -> None:
        raise UserError("x = 3: must be 4; give --x 4")

    with pytest.raises(SystemExit, match="2"):
        run_main(main)
    assert capsys.readouterr().err == "error: x = 3: must be 4; give --x 4\n"


# --------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize(("args", "status"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_help_lists_every_recipe_with_the_first_line_of_its_docstring(
    args: list[str], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=str(status)):
        parse(*args)
    lines = capsys.readouterr().out.splitlines()
    for name, recipe in RECIPES.items():
        first = (inspect.getdoc(recipe) or "").splitlines()[0]
        assert [line.split(maxsplit=1) for line in lines if line.split()[:1] == [name]] == [[name, first]]


def help_texts() -> dict[str, str]:
    """Dotted path -> the string under the field, by Python's own parser, and what its value must be."""
    texts = {}
    for node in (node for module in (schema, transfer) for node in ast.parse(inspect.getsource(module)).body):
        if isinstance(node, ast.ClassDef):
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    assert isinstance(field.target, ast.Name)
                    assert isinstance(text.value, ast.Constant)
                    texts[node.name, field.target.id] = str(text.value.value)
    found = {}
    for path, cls, name in leaves(TrainConfig):
        words = words_of(field_rules(cls)[name]) if name in field_rules(cls) else ""
        found[path] = f"{texts[cls.__name__, name]} {words}".strip()
    return found


def test_recipe_help_lists_every_field_with_its_text_and_every_trick(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("resnet50d-tricks", "--help")
    shown = plain(capsys.readouterr().out)
    for path, text in help_texts().items():
        flag = f"--{path.replace('_', '-')}"
        entry = rf" {flag}[ ,](?:(?!\(default: ).)*{re.escape(plain(text))} \(default: "
        assert re.search(entry, shown), path
        assert len(text) > 20, path
    for trick in TRICKS.values():
        assert f" {trick.name} {trick.section} {trick.summary} " in shown


def test_recipe_help_shows_the_recipes_values_and_its_tricks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse("resnet50d-tricks", "--tricks.off", "mixup", "--help")
    shown = plain(capsys.readouterr().out)
    assert re.search(r"--epochs INT [^-]*\(default: 200\)", shown)
    assert re.search(r"--loss.mixup-alpha FLOAT [^-]*\(default: 0\.0\)", shown)


# ------------------------------------------------------------------------------------- recipe, then tricks, then fields


@pytest.mark.parametrize("name", RECIPES)
def test_a_bare_recipe_is_the_recipe(name: str) -> None:
    assert parse(name) == dataclasses.replace(RECIPES[name](), run_dir=f"runs/{name}")


def test_fields_of_every_kind_are_read() -> None:
    args = "--epochs 7 --data.root x/y --data.area 0.3 0.9 --model.zero_gamma --optim.no-bias-decay --run-dir here"
    config = parse("resnet50-baseline", *args.split(), "--schedule.step-epochs", "2", "4", "--data.color", "none")
    got = [get_at(config, p) for p in ("epochs", "data.root", "data.area", "model.zero_gamma", "optim.bias_decay")]
    assert got == [7, "x/y", (0.3, 0.9), True, False]
    assert (config.run_dir, config.schedule.step_epochs, config.data.color) == ("here", (2, 4), "none")


def test_a_given_field_wins_over_a_trick() -> None:
    for args in (
        ["--tricks.off", "mixup", "--loss.mixup-alpha", "0.3"],
        ["--loss.mixup-alpha=0.3", "--tricks.off=mixup"],
    ):
        config = parse("resnet50d-tricks", *args)
        assert config.loss.mixup_alpha == 0.3
    assert parse("resnet50d-tricks", "--tricks.off", "mixup").loss.mixup_alpha == 0.0


def test_several_tricks_at_once() -> None:
    config = parse("resnet50d-tricks", "--tricks.off", "zero_gamma", "mixup", "resnet_d", "--epochs", "90")
    found = (config.model.zero_gamma, config.loss.mixup_alpha, config.model.name, config.epochs, config.tricks.off)
    assert found == (False, 0.0, "resnet50a", 90, ("zero_gamma", "mixup", "resnet_d"))


def test_fields_are_judged_once_the_tricks_are_applied() -> None:
    """One epoch has no room for the recipe's warm-up of five, but the trick takes that away."""
    assert parse("resnet50-efficient", "--epochs", "1", "--tricks.off", "warmup").schedule.warmup_epochs == 0


def test_a_trick_that_changes_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    parse("resnet50-baseline", "--tricks.off", "mixup", "cosine", "--tricks.on", "zero_gamma")
    lines = capsys.readouterr().err.splitlines()
    wanted = "note: trick {0} is off in recipe resnet50-baseline already; --tricks.off {0} changed nothing"
    assert lines == [wanted.format("mixup"), wanted.format("cosine")]
    assert parse("mobilenet-tricks", "--tricks.off", "resnet_d").tricks.off == ()
    wanted = "note: trick resnet_d does not apply to mobilenet_v1; --tricks.off resnet_d changed nothing\n"
    assert capsys.readouterr().err == wanted


def test_reading_arguments_imports_neither_torch_nor_dali() -> None:
    code = "import sys; from fasttricks.config.cli import parse_recipe; parse_recipe(['demo'], prog='x'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "nvidia", "matplotlib", "tensorboard"} & set(done.stdout.split())
