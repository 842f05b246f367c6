"""The tables as data: the trainings that they name are the recipes', a row changes what it says, wrong names are answered."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fasttricks.ablation.cell_runs import CellRuns, plan_cells, training_name
from fasttricks.ablation.cells import DESIGNS, AblateConfig, extend, factorial, training_of
from fasttricks.ablation.jobs import Job
from fasttricks.ablation.markdown import markdown
from fasttricks.ablation.paper import PAPER_TABLES, Cell, Table, table2, table3, table4, table5, table6
from fasttricks.ablation.tables import TABLES, find_tables
from fasttricks.commands import ablate
from fasttricks.config import ConfigError, ModelConfig, TrainConfig, TricksConfig, replace_at
from fasttricks.config.cli import arguments_of, parse_recipe
from fasttricks.config.recipes import RECIPES
from fasttricks.config.resolve import require_resolved, resolve
from fasttricks.config.tricks import TRICKS, is_on
from fasttricks.runs.folder import config_digest, differences
from lib.configs import OF_CLASSIFIERS
from lib.tiny import REPOSITORY, call

CLASSES = ("ant", "bee", "cat")
CPU = torch.device("cpu")


def ablation(recipe: str, **changes: object) -> AblateConfig:
    """That recipe as an ablation takes it, with these fields changed."""
    return dataclasses.replace(extend(RECIPES[recipe]()), **changes)  # type: ignore[arg-type]


PAPER = ablation("resnet50d-tricks")
SMALL = ablation("cifar10-ablate", device="cpu")


def cells(table: Table, column: str) -> Sequence[Cell]:
    return [cell for cell in table.cells if cell.column.startswith(column)]


@pytest.mark.parametrize(
    ("cell", "recipe"),
    [
        *zip(table2().cells, ["resnet50-baseline", "inceptionv3-baseline", "mobilenet-baseline"], strict=True),
        *zip(table3().cells[::2], ["resnet50-baseline", "inceptionv3-baseline", "mobilenet-baseline"], strict=True),
        *zip(table3().cells[1::2], ["resnet50-efficient", "inceptionv3-efficient", "mobilenet-efficient"], strict=True),
        (table4().cells[-1], "resnet50-efficient"),
        (table5().cells[0], "resnet50-efficient"),
        *zip(
            [cell for cell in table6().cells if cell.row == "+ mixup, no distillation"],
            ["resnet50d-tricks", "inceptionv3-tricks", "mobilenet-tricks"],
            strict=True,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.column}:{value.row}".replace(" ", "-"),
)
def test_a_cell_is_the_papers_recipe(cell: Cell, recipe: str) -> None:
    """Field by field, at the paper's scale; the recipes are held to the paper in test_recipes.py."""
    assert differences(RECIPES[recipe](), training_of(cell, PAPER)) == []


STEPS = {
    "+ warm-up": {"schedule.warmup_epochs"},
    "+ zero gamma": {"model.zero_gamma"},
    "+ no bias decay": {"optim.bias_decay"},
    "+ FP16": {"precision"},
    "ResNet-B": {"model.name"},
    "ResNet-C": {"model.name"},
    "ResNet-D": {"model.name"},
    "+ cosine": {"schedule.decay"},
    "+ label smoothing": {"loss.smoothing"},
}


@pytest.mark.parametrize("config", [PAPER, SMALL], ids=["paper", "small"])
@pytest.mark.parametrize("table", [table4(), table5(), table6()], ids=lambda table: table.name)
def test_a_row_changes_only_what_it_names(table: Table, config: AblateConfig) -> None:
    seen = set()
    for column in {cell.column for cell in table.cells}:
        rows = [cell for cell in cells(table, column) if not cell.network]
        for before, cell in itertools.pairwise(rows):
            if cell.row not in STEPS:
                continue
            changed = differences(training_of(before, config), training_of(cell, config))
            assert {change.partition(":")[0] for change in changed} == STEPS[cell.row], cell
            seen.add(cell.row)
    assert seen == {cell.row for cell in table.cells} & set(STEPS)


def test_every_cell_of_the_small_recipe_sees_as_many_images() -> None:
    runs = [
        training_of(cell, SMALL) for table in (table4(), table5(), table6()) for cell in table.cells if not cell.network
    ]
    assert {run.epochs for run in runs} == {SMALL.epochs}
    assert {run.global_batch_size for run in runs} == {64, 512}
    large, small = (next(run for run in runs if run.global_batch_size == size) for size in (512, 64))
    assert large.peak_lr == 8 * small.peak_lr, "linear scaling"


def test_mixup_trains_for_longer_only_at_the_papers_scale() -> None:
    assert {training_of(cell, PAPER).epochs for cell in table6().cells if "mixup" in cell.tricks} == {200}
    assert {training_of(cell, PAPER).epochs for cell in table6().cells if "mixup" not in cell.tricks} == {120}


def test_tables_share_their_cells() -> None:
    """Table 5's A is the last of table 4, table 6 begins with table 5's D: one run of each on the CPU."""

    def name(cell: Cell) -> str:
        return training_name(training_of(cell, SMALL), 1, CPU)

    large = cells(table4(), "large")
    assert name(table5().cells[0]) == name(large[-1]) == name(large[-2])
    assert name(table5().cells[3]) == name(table6().cells[0])
    runs = {name(cell) for table in (table4(), table5(), table6()) for cell in table.cells if not cell.network}
    assert len(runs) == 14, "8 of table 4, 3 more of table 5, 3 more of table 6"


def test_a_row_that_changes_nothing_is_not_run() -> None:
    """FP16 on the CPU: fp32 again, so that its cell stays blank and says why; forced, it is a run of its own."""
    planned = {cell.cell.row: cell for cell in plan_cells(table4(), SMALL, CLASSES)}
    assert planned["+ FP16"].config is None
    assert planned["+ FP16"].reason.startswith("the same run as '+ no bias decay'")
    assert "--precision fp16" in planned["+ FP16"].reason
    forced = [cell.config for cell in plan_cells(table4(), dataclasses.replace(SMALL, precision="fp16"), CLASSES)]
    assert [config.precision for config in forced if config] == ["fp32", "fp32", "fp32", "fp32", "fp16"] * 2


def test_other_networks_are_run_only_where_asked_for() -> None:
    planned = {c.cell.row: c for c in plan_cells(table6(), SMALL, CLASSES) if c.cell.column == "MobileNet"}
    assert all(cell.config is None for cell in planned.values())
    assert planned["+ cosine"].reason == "mobilenet_v1 only with --other-networks"
    asked = [c for c in plan_cells(table6(), dataclasses.replace(SMALL, other_networks=True), CLASSES) if c.config]
    assert {c.config.model.name for c in asked if c.config} == {"resnet11d", "inception_v3", "mobilenet_v1"}


def test_distillation_waits_for_its_teacher() -> None:
    planned = {cell.cell.row: cell for cell in plan_cells(table6(), SMALL, CLASSES) if not cell.cell.network}
    blank = [row for row, cell in planned.items() if cell.config is None]
    assert blank == ["+ distillation, no mixup", "+ distillation and mixup"]
    way_out = "does not exist; train it first: python -m fasttricks.train cifar10-teacher"
    assert planned[blank[0]].reason == f"distill.teacher = 'runs/cifar10-teacher': {way_out}"


def test_figures_carry_their_marks() -> None:
    """Those that can be asserted are; every other says that it is recalled."""
    figures = {(cell.column, cell.row): cell.paper for table in (table5(), table6()) for cell in table.cells}
    sure = {place: str(figure) for place, figure in figures.items() if figure and "M" not in figure.marks.values()}
    resnet = "ResNet-D (the paper: ResNet-50-D)"
    assert sure == {
        (resnet, "+ distillation and mixup"): "79.29 [V] / 94.63 [V]",
        (resnet, "+ mixup, no distillation"): "79.15 [V] / 94.58 [V]",
        ("Inception-V3", "+ mixup, no distillation"): "78.77 [V] / 94.39 [V]",
        ("MobileNet", "+ label smoothing"): "72.93 [V] / 91.14 [V]",
        ("MobileNet", "+ mixup, no distillation"): "73.28 [V] / 91.30 [V]",
    }
    for make in PAPER_TABLES.values():
        for cell in make().cells:
            assert cell.paper is not None
            assert re.fullmatch(
                r"\d\d\.\d\d \[[VXM]\] / \d\d\.\d\d \[[VXM]\](, [\d.]+ min \[[VXM]\])?", str(cell.paper)
            )


@pytest.mark.parametrize("name", ["table4", "table5", "table6"])
def test_the_record_is_what_is_printed_of_its_results(name: str) -> None:
    """docs/ablation.md of bench/results/cifar10-ablate.json, to the letter; the plots' lines aside."""
    record = json.loads((REPOSITORY / "bench" / "results" / "cifar10-ablate.json").read_text())
    found = {(c["table"], c["column"], c["row"]): c for c in record["cells"]}
    table, cells = PAPER_TABLES[name](), []
    for cell in table.cells:
        saved = found[name, cell.column, cell.row]
        config = parse_recipe(saved["train"].split(), prog="test") if saved["train"] else None
        jobs = (Job(config, 1, ""),) if config else ()
        results = {int(seed): run | {"versions": {"commit": run["commit"]}} for seed, run in saved["runs"].items()}
        cells.append(CellRuns(cell, jobs, "".join(saved["notes"]), results))
    printed = markdown(table, cells, SMALL, record["data"], command=record["command"])
    docs = re.sub(r"!\[.*\n\n", "", (REPOSITORY / "docs" / "ablation.md").read_text())
    assert printed in docs


# ------------------------------------------------------------------------------------------------------------ designs
def test_designs_switch_the_recipes_own_tricks() -> None:
    config = ablation("cifar10")
    on = ("linear_scaling", "warmup", "no_bias_decay", "low_precision", "resnet_d", "cosine", "label_smoothing")
    alone, without = find_tables(["add-one", "leave-one-out"], config)
    assert [cell.tricks for cell in alone.cells] == [(), *((name,) for name in on)]
    assert [cell.tricks for cell in without.cells] == [on, *(tuple(n for n in on if n != name) for name in on)]
    for cell in (*alone.cells, *without.cells):
        run = training_of(cell, config)
        assert [name for name in on if is_on(run, name)] == list(cell.tricks)
        assert not is_on(run, "mixup") and not is_on(run, "zero_gamma"), "the recipe has them off"
        require_resolved(dataclasses.replace(run, run_dir="runs/x"))


@pytest.mark.parametrize("name", DESIGNS)
def test_a_network_without_residual_blocks_has_designs_over_the_tricks_that_fit_it(name: str) -> None:
    config = ablation("mobilenet-tricks", factors=("mixup", "cosine"))
    for cell in DESIGNS[name](config).cells:
        run = training_of(cell, config)
        assert [trick for trick in TRICKS if is_on(run, trick)] == [trick for trick in TRICKS if trick in cell.tricks]


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in OF_CLASSIFIERS if "resnet" not in RECIPES[recipe]().model.name]
)
@pytest.mark.parametrize("name", PAPER_TABLES)
def test_a_papers_table_of_a_network_without_variants_is_blank_where_it_names_one(name: str, recipe: str) -> None:
    config = ablation(recipe, device="cpu", other_networks=True)
    for runs in plan_cells(PAPER_TABLES[name](), config, CLASSES):
        needs = runs.cell.edits and not runs.cell.network
        assert (
            (runs.reason.startswith("does not apply: model.name = ") and not runs.jobs)
            if needs
            else runs.jobs or runs.reason
        )


@pytest.mark.parametrize("recipe", OF_CLASSIFIERS)
@pytest.mark.parametrize("network", ["", "mobilenet_v1", "timm:resnet50"])
def test_every_recipe_has_every_design_on_every_kind_of_network(network: str, recipe: str) -> None:
    """Over three of its own tricks; of a recipe that has none on, over those that are named."""
    config = ablation(recipe, device="cpu")
    if network:
        config = dataclasses.replace(config, model=ModelConfig(name=network))
    used = tuple(trick for trick in TRICKS if is_on(config, trick))[-3:] or ("mixup", "cosine")
    for name, make in DESIGNS.items():
        if name == "leave-one-out" and "baseline" in recipe:
            continue  # nothing to leave out
        table = make(dataclasses.replace(config, factors=used))
        runs = [training_of(cell, config) for cell in table.cells]
        for cell, run in zip(table.cells, runs, strict=True):
            assert [t for t in used if is_on(run, t)] == [t for t in used if t in cell.tricks]
        distinct = {training_name(run, 1, CPU) for run in runs}
        # half precision is none on the CPU, and a teacher is known by its weights, which are not there
        told = {tuple(t for t in cell.tricks if t not in ("low_precision", "distillation")) for cell in table.cells}
        assert len(distinct) == len(told)


def test_a_cell_lists_no_trick_of_the_ablations_own_command_line() -> None:
    config = resolve(ablation("cifar10"), {"tricks.off": ["warmup"], "tricks.on": ["mixup"]})
    runs = [training_of(cell, config) for cell in find_tables(["leave-one-out"], config)[0].cells]
    assert {run.tricks for run in runs} == {TricksConfig()}
    assert [is_on(runs[0], name) for name in ("warmup", "mixup")] == [False, True]


def test_factorial_has_every_subset_of_its_factors() -> None:
    config = ablation("cifar10", factors=("mixup", "cosine", "warmup"))
    table = factorial(config)
    runs = [training_of(cell, config) for cell in table.cells]
    found = {tuple(is_on(run, name) for name in config.factors) for run in runs}
    assert len(found) == len(runs) == 8
    assert all(is_on(run, "label_smoothing") for run in runs), "no factor: as in the recipe"


@pytest.mark.parametrize("name", DESIGNS)
def test_a_warm_up_that_is_on_keeps_the_recipes_length(name: str) -> None:
    config = ablation("cifar10", factors=("warmup",))
    lengths = {training_of(cell, config).schedule.warmup_epochs for cell in DESIGNS[name](config).cells}
    assert lengths == {0.0, RECIPES["cifar10"]().schedule.warmup_epochs}


# --------------------------------------------------------------------------------------------- names and command lines
def test_a_training_is_named_by_what_makes_a_difference() -> None:
    run = training_of(table5().cells[3], SMALL)
    same = dataclasses.replace(run, run_dir="elsewhere", recipe="other", log_steps=7, seed=5)
    assert training_name(same, 1, CPU) == training_name(run, 1, CPU)
    for path, value in (("epochs", 3), ("loss.smoothing", 0.05), ("precision", "bf16"), ("data.area", (0.5, 1.0))):
        assert training_name(replace_at(run, path, value), 1, CPU) != training_name(run, 1, CPU), path
    assert training_name(run, 2, CPU) != training_name(run, 1, CPU), "batch norm is each rank's own"
    assert config_digest(run) != config_digest(dataclasses.replace(run, seed=1))


def test_each_run_has_a_folder_of_its_own() -> None:
    tables = (table4(), table5(), table6())
    jobs = [job for table in tables for cell in plan_cells(table, SMALL, CLASSES) for job in cell.jobs]
    assert len({job.folder for job in jobs}) == 14 * 3
    assert {job.config.seed for job in jobs} == {0, 1, 2}
    by_folder: dict[Path, set[str]] = {}
    for job in jobs:
        by_folder.setdefault(job.folder, set()).add(config_digest(job.config))
    assert all(len(digests) == 1 for digests in by_folder.values())


def changed(config: TrainConfig) -> TrainConfig:
    """With a field of every kind changed."""
    edits = {
        "data.area": (0.25, 0.75),
        "data.antialias": False,
        "schedule.step_epochs": (0.125, 1e-3 + 1),
        "optim.base_lr": 1 / 3,
        "model.width": 0.3,
        "eval.flip": True,
        "compile_fallback": True,
        "seed": 12,
        "run_dir": "runs/x y",
    }
    for path, value in edits.items():
        config = replace_at(config, path, value)
    return config


@pytest.mark.parametrize("recipe", ["cifar10", "cifar10-ablate", "resnet50d-tricks"])
def test_the_command_line_of_a_run_gives_the_run(recipe: str) -> None:
    config = ablation(recipe)
    runs = [training_of(cell, config) for make in PAPER_TABLES.values() for cell in make().cells]
    for run in (*runs[::7], changed(RECIPES[recipe]())):
        run = dataclasses.replace(run, run_dir=run.run_dir or "runs/one")
        assert parse_recipe(arguments_of(run), prog="test") == run


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tabel4", "cifar10"], "table = 'tabel4': unknown; did you mean 'table4'?; the tables are table2, "),
        (["table7"], "table = 'table7': unknown; did you mean"),
        (["table4", "cifar11"], "table = 'cifar11': unknown"),
        (["leave-one"], "table = 'leave-one': unknown; did you mean 'leave-one-out'?"),
        (["add-one"], "table = 'add-one': needs a recipe for its tricks: "),
        (["cifar10"], "table = '': must be given before the recipe"),
        (["table4", "--seeds", "0"], "seeds = 0: must be 1 to 1000"),
        (["table4", "--seeds", "-3"], "seeds = -3: must be 1 to 1000"),
        (["table4", "--seeds", "3", "--more-seeds", "3"], "more_seeds = 3: must be 0, or more than seeds (3)"),
        (["table4", "--resume"], "resume = True: "),
        (["add-one", "cifar10", "--factors", "mixpu"], "trick = 'mixpu': unknown; did you mean 'mixup'?"),
        (
            ["leave-one-out", "cifar10", "--factors", "mixup"],
            "factors = ['mixup']: off in recipe cifar10: nothing to leave out",
        ),
        (["factorial", "cifar10"], "factors = ("),
        (["add-one", "mobilenet-tricks", "--factors", "resnet_d"], "does not apply to mobilenet_v1"),
    ],
)
def test_what_is_wrong_is_answered_in_a_line(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(ablate.main, *args, "--data.root", "nowhere") == 2
    shown = capsys.readouterr().err
    assert message in re.sub(r"\s*│\s*", " ", shown)


def test_help_lists_tables_and_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(ablate.main, "--help") == 0
    shown = capsys.readouterr().out
    for name in (*TABLES, *RECIPES):
        assert name in shown


def test_more_factors_than_can_be_crossed_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"are 7 tricks and 2\^7 cells; must be at most 6"):
        factorial(ablation("cifar10"))
