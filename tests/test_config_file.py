"""--config FILE and `fasttricks show`: a config as YAML and back, whose word wins, and files that are wrong or hostile."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fasttricks.commands import show, train
from fasttricks.config import TrainConfig, UserError, flatten
from fasttricks.config.cli import parse_extended, parse_recipe
from fasttricks.config.recipes import RECIPES
from fasttricks.config.resolve import resolve
from fasttricks.runs.config_file import config_yaml, load_config
from fasttricks.runs.fitted import fit_recipe
from fasttricks.runs.folder import read_config
from lib.tiny import FinishedRun, call, environment


def parse(*args: str) -> TrainConfig:
    return parse_recipe(args, prog="train", fit=fit_recipe, load=load_config)


def written(folder: Path, text: str, name: str = "c.yaml") -> str:
    (folder / name).write_text(text, "utf-8")
    return str(folder / name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shown_recipe_is_taken_back(recipe: str, tmp_path: Path, capsys: Any) -> None:
    """By --config, and by any reader of YAML 1.1, which reads bare words and numbers otherwise."""
    assert call(show.main, recipe) == 0
    file = written(tmp_path, capsys.readouterr().out)
    config = resolve(RECIPES[recipe]())
    assert parse("--config", file) == config
    fields = {name: list(value) if isinstance(value, tuple) else value for name, value in
              flatten(dataclasses.asdict(config)).items()}  # fmt: skip
    assert flatten(yaml.safe_load(Path(file).read_text())) == fields == load_config(file)
    differing = [line for line in Path(file).read_text().splitlines() if "# default: " in line]
    assert any(line.startswith("run_dir: ") for line in differing) and all("seed" not in line for line in differing)


ODD = (
    "on",
    "1e-4",
    "é 犬",
    "a: b # c",
    '"',
    "x\n\x1b",
    "~",
    "0x1",
    "1_000",
    "12:30",
    "2024-01-01",
    "timm:resnet50",
    "-",
    "=",
)


def test_every_value_of_a_field_is_taken_back(tmp_path: Path) -> None:
    for word in ODD:
        config = resolve(RECIPES["demo"](), {"data.root": word, "run_dir": word, "optim.weight_decay": 1e-5})
        assert parse("--config", written(tmp_path, config_yaml(config))) == config, word
    config = resolve(
        RECIPES["demo"](), {"model.freeze": ("stem", "on"), "seed": 2**62, "ema_decay": 0.0, "profile": True}
    )
    assert parse("--config", written(tmp_path, config_yaml(config))) == config


def test_the_command_line_wins_and_then_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "recipe: demo\nepochs: 7\nseed: 3\nloss.smoothing: 0.2\noptim: {base-lr: 1e-2}\n"
                   "tricks:\n  off: [warmup]\ndeterministic: off\n")  # fmt: skip
    config = parse("--config", file, "--seed", "4")
    assert (config.recipe, config.epochs, config.seed, config.run_dir) == ("demo", 7, 4, "runs/demo")
    assert (config.loss.smoothing, config.optim.base_lr, config.deterministic) == (0.2, 0.01, "off")
    assert config.schedule.warmup_epochs == 0 and config.tricks.off == ("warmup",)
    other = parse("cifar10", f"--config={file}", "--tricks.on", "mixup", "--loss.smoothing", "0.3")
    assert other == resolve(RECIPES["cifar10"](), {
        "epochs": 7, "seed": 3, "loss.smoothing": 0.3, "optim.base_lr": 0.01, "deterministic": "off",
        "tricks.on": ("mixup",), "tricks.off": ("warmup",),
    })  # fmt: skip
    again = parse("--config", file, "--tricks.on", "warmup")
    assert again.schedule.warmup_epochs == RECIPES["demo"]().schedule.warmup_epochs and again.tricks.off == ()
    assert parse("demo", "--config", written(tmp_path, '{"epochs": 9}', "c.json")).epochs == 9


def test_a_file_names_no_code_that_the_command_line_does_not(tmp_path: Path) -> None:
    file = written(tmp_path, "model.name: my.module:Net\n")
    for args in ([], ["--model.name", "other:Net"]):
        with pytest.raises(
            UserError, match=r"model\.name = 'my.module:Net': names code, which no file may run; where you"
        ):
            parse("demo", "--config", file, *args)
    assert parse("resnet50-baseline", "--config", file, "--model.name", "my.module:Net").model.name == "my.module:Net"
    with pytest.raises(UserError, match=r"distill\.trust_code = 'a:B': names code"):
        parse("demo", "--config", written(tmp_path, "distill: {trust-code: a:B}\n"))


@pytest.mark.parametrize("name", ["", "config.json"])
def test_a_run_is_repeated_by_its_folder_or_config(name: str, finished_run: FinishedRun) -> None:
    before = read_config(finished_run.folder)
    config = parse("--config", str(finished_run.folder / name))
    assert config.run_dir == f"runs/{before.recipe}" and not config.resume
    assert dataclasses.replace(config, run_dir=before.run_dir) == before


def test_plans_and_fitted_recipes_take_a_file(finished_run: FinishedRun, tmp_path: Path) -> None:
    from fasttricks.commands import plan

    file = written(tmp_path, f"recipe: finetune\ndata: {{root: {finished_run.data}}}\nschedule.warmup_epochs: 0\n")
    assert parse("--config", file) == parse(
        "finetune", "--data.root", str(finished_run.data), "--schedule.warmup-epochs", "0"
    )
    args = ["demo", "--config", written(tmp_path, "gpus: 4\nepochs: 3\n", "plan.yml")]
    planned = parse_extended(args, prog="plan", extend=plan.extend, load=load_config)
    assert (planned.gpus, planned.epochs) == (4, 3)


HOSTILE = {
    "epocs: 3": "c.yaml: field = 'epocs': unknown; did you mean 'epochs'?",
    "epochs: '3'": "c.yaml: epochs = '3': must be of the kind int",
    "epochs: 0": "c.yaml: epochs = 0: must be 1 to 1000000",
    "loss: {smoothing: 2}": "c.yaml: loss.smoothing = 2: must be",
    "loss: 3": "c.yaml: field = 'loss': is a section; name its fields one by one",
    "data: {area: 3}": "c.yaml: data.area = 3: must be a list",
    "data: {area: [0.5]}": "c.yaml: data.area = (0.5,): must be",
    "tricks: {off: [warmupp]}": "c.yaml: trick = 'warmupp': unknown; did you mean 'warmup'?",
    "recipe: dmeo": "recipe = 'dmeo': unknown; did you mean 'demo'?",
    "epochs: 3\nepochs: 4": "c.yaml: must be a table of fields, as epochs: 20 or loss: {smoothing: 0.1} ('epochs' comes twice)",
    "loss.smoothing: 0\nloss: {smoothing: 0}": "'loss.smoothing' comes twice",
    "a: &a [1]\nb: *a": "aliases (*name) are not read",
    "seed: !!python/object/apply:os.system ['touch made']": "could not determine a constructor for the tag",
    "1: 2": "the name 1 is no text",
    "- a": "(it is a list)",
    "": "(it has no fields)",
    "epochs: [": "c.yaml: must be a table of fields",
    "seed: " + "9" * 5000: "seed = '999",
    "data: " + "[" * 3000 + "]" * 3000: "c.yaml: must be a table of fields",
    "epochs: 3\x1b": "c.yaml: must be a table of fields",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_a_wrong_file_is_named_with_the_field_and_the_rule(text: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["--config", written(tmp_path, text)]
    with pytest.raises(UserError) as error:
        parse(*([] if "recipe" in text else ["demo"]), *args)
    assert HOSTILE[text] in str(error.value) and str(error.value).isprintable()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["demo", "--config"], "config = '': needs a file"),
        (["demo", "--config", "--epochs", "3"], "config = '': needs a file"),
        (["demo", "--config", "a.yaml", "--config", "b.yaml"], "config = 'a.yaml b.yaml': takes one file"),
        (["demo", "--config", "gone.yaml"], "gone.yaml: must be a table of fields"),
        (["demo", "--config", "c.toml"], "config = 'c.toml': must end in .yaml, .yml or .json, or be a run folder"),
        (["demo", "--config", "twice.json"], "twice.json: must be a table of fields, as epochs: 20 or"),
        (["demo", "--config", "list.json"], "list.json: must be a table of fields"),
        (["--config", "none.json"], "recipe = '': give one"),
    ],
)
def test_a_wrong_option_is_an_error(args: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, '{"epochs": 1, "epochs": 2}', "twice.json")
    written(tmp_path, "[1]", "list.json")
    written(tmp_path, "{}", "none.json")
    with pytest.raises(UserError) as error:
        parse(*args)
    assert message in str(error.value)


def test_show_needs_no_torch() -> None:
    """In a process of its own: this one has torch."""
    script = "import sys; from fasttricks.commands import show; show.main(['demo']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (0, "") and "recipe: demo\n" in done.stdout


def test_training_by_a_file(finished_run: FinishedRun, tmp_path: Path, monkeypatch: Any) -> None:
    """The command reads it before torch, and the run records the config that it made."""
    config = json.loads((finished_run.folder / "config.json").read_text())["config"]
    file = written(tmp_path, json.dumps({**config, "run_dir": str(tmp_path / "run"), "epochs": 1}), "c.json")
    assert call(train.main, "--config", file, "--log-steps", "2") == 0
    made = read_config(tmp_path / "run")
    assert (made.epochs, made.log_steps, made.data) == (1, 2, read_config(finished_run.folder).data)
