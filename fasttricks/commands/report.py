"""Report a checkpoint: fasttricks report RUN [--output FILE.html] [--data.root DIR ...], as one page of HTML."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fasttricks.commands import prog
from fasttricks.commands.by_task import commands_of, require_drawn, tasks_with
from fasttricks.commands.evaluate import HIDDEN as EVALUATED
from fasttricks.commands.evaluate import RECORDED as OF_THE_RUN
from fasttricks.commands.evaluate import EvaluateConfig
from fasttricks.commands.network_config import DrawingConfig, ValidationConfig
from fasttricks.commands.pages import Reported
from fasttricks.commands.saved_run import FORMS, SavedRunCommand
from fasttricks.config import (
    UserError,
    read_launch,
    require,
    show_name,
)
from fasttricks.config.options import Hidden, value_of
from fasttricks.config.recipes import RECIPES
from fasttricks.runs.stored import is_export, run_of_best
from fasttricks.system.reading import is_there

if TYPE_CHECKING:
    from fasttricks.commands.evaluate import Evaluated
    from fasttricks.runs.saved import Saved
    from fasttricks.system.distributed import World

PROG = prog("report")
ABOUT = f"""One HTML page on a checkpoint and its validation images: scores, curves, calibration, classes, confusions, the most
confident mistakes as pictures, and the config; of a segmentation the IoU of each class, of a detection its average precision, and
images with truth and prediction. It loads nothing and runs no code.

{FORMS} A field that is not given is as in the run."""
NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportConfig(DrawingConfig, ValidationConfig):
    """How to report; other fields are those of the checkpoint's run."""

    output: str = ""
    """File to make, FILE.html, which must not exist; empty: report.html in the run folder, in the place of an earlier one."""


HIDDEN: Hidden = {cls: names for cls, names in EVALUATED.items() if cls is not EvaluateConfig}
RECORDED: Hidden = {
    ReportConfig: ("model",),
    **{c: names for c, names in OF_THE_RUN.items() if c is not EvaluateConfig},
}


def main(args: Sequence[str]) -> None:
    """Write the page of the checkpoint that `args` name."""
    command = SavedRunCommand(PROG, "CHECKPOINT", ABOUT, ReportConfig(), ReportConfig.as_run, HIDDEN, RECORDED)
    asked = command.read(args)
    folder = run_folder(asked.path)
    _require_page(asked.task)
    file = _place(asked.config.output if asked.config else value_of("output", asked.options), folder)
    if asked.config is not None and asked.config.model.name:  # else the file is refused first
        commands_of(asked.task).require_place(asked.config.data, "val")

    from fasttricks.commands.evaluate import answer_checkpoint
    from fasttricks.reporting.page import write_page
    from fasttricks.system.distributed import World, join_world, keep_freed_memory

    saved, config = command.open(asked)
    _require_page(saved.task)
    require_drawn(config.draw_score, saved.task)
    keep_freed_memory()
    given = {one.name: getattr(config, one.name) for one in dataclasses.fields(ValidationConfig)}
    with join_world(config.device) as world:
        found = answer_checkpoint(EvaluateConfig(**given), saved, world)
        device = World.alone(world.device)
    if read_launch().rank:
        return
    try:
        size = write_page(file, page_of(saved, config, found, folder, device))
    except OSError as error:
        raise UserError(
            f"output = {str(file)!r}: must be a place to write to; give another --output ({error})"
        ) from error
    print(f"wrote {show_name(file)}, {size / 1e6:.1f} MB")


def _require_page(task: str) -> None:
    tasks = tasks_with(lambda row: row.page)
    rule = f"has no answers for a page, which are for {tasks} alone; take a checkpoint of that, or evaluate this"
    require(commands_of(task).page is not None, "task", task, rule)


def run_folder(path: Path) -> Path | None:
    """The run folder of the checkpoint at `path`; None for an export and a file that lies elsewhere."""
    folder = run_of_best(path) or (path if path.is_dir() else path.parent.parent)
    return folder if is_there(folder / "config.json") and not is_export(folder) else None


def _place(output: str, folder: Path | None) -> Path:
    """The file to write. Raises ConfigError where it cannot be made, as far as can be told."""
    if not output:
        require(folder is not None, "output", output, "must be given where the checkpoint is not in a run folder")
        file = Path(folder or "", NAME)
        require(not file.is_dir(), "output", str(file), "is a folder; give another --output")
    else:
        file = Path(output)
        require(output.endswith((".html", ".htm")), "output", output, "must end in .html; give another name")
        rule = "already exists and is never overwritten; give another --output"
        require(not os.path.lexists(file), "output", output, rule)
    rule = "must be in a folder that is there and may be written to; give another --output"
    require(file.parent.is_dir() and os.access(file.parent, os.W_OK | os.X_OK), "output", str(file), rule)
    return file


def page_of(saved: Saved, config: ReportConfig, found: Evaluated, folder: Path | None, device: World) -> str:
    """The page. Reads the run folder, where there is one."""
    from fasttricks.config.resolve import resolve
    from fasttricks.runs.config_file import config_yaml
    from fasttricks.runs.folder import earlier_starts
    from fasttricks.runs.overview import look_at
    from fasttricks.tasks import find_task

    page = commands_of(saved.task).page
    assert page is not None, "_require_page was asked"
    run = look_at(folder) if folder is not None else None
    run = None if run is not None and run.problem else run
    recipe = resolve(RECIPES[saved.config.recipe]()) if saved.config.recipe in RECIPES else None
    starts = _starts(folder, earlier_starts)
    averaged = "averaged weights" if config.average and saved.average is not None else "weights"
    about = f"{saved.config.model.name}; the {averaged} of {saved.path}, step {saved.step:,}"
    facts = {
        "name": str(folder.name if folder is not None else saved.path),
        "subtitle": f"{about}, on the validation images of {config.data.root} ({device.device_name})",
        "rows": run.rows if run is not None else (),
        "metrics": run.metrics if run is not None else (),
        "no_curves": "the run has no record yet" if run is not None else "this checkpoint is not in a run folder",
        "classes": saved.classes,
        "bad": _bad_images(folder),
        "config": dataclasses.asdict(saved.config),
        "config_text": config_yaml(saved.config),
        "recipe": dataclasses.asdict(recipe) if recipe is not None else None,
        "command": starts[-1].get("command", "") if starts else "",
        "versions": _versions(folder),
    }
    metrics = find_task(saved.task).metrics_of(len(saved.classes))
    scores = [(one.label, f"{found.metrics[one.name]:.2f} {one.unit}") for one in metrics]
    if "val_loss" in found.metrics:
        scores.append(("loss", f"{found.metrics['val_loss']:.4f}"))
    counts = [("validation images", f"{found.metrics['val_images']:,.0f}"), ("classes", f"{len(saved.classes):,}")]
    return page(Reported(saved, config, found, folder, device, facts, scores, counts))


def _starts(folder: Path | None, read: Any) -> list[dict[str, str]]:
    try:
        found: list[dict[str, str]] = read(folder) if folder is not None else []
    except UserError:
        return []
    return found


def _versions(folder: Path | None) -> Mapping[str, str]:
    from fasttricks.runs.folder import CONFIGS, versions
    from fasttricks.system.schema import fields, table, text

    if folder is None:
        return versions()
    try:
        found: dict[str, Any] = CONFIGS.json(folder / "config.json", fields({}, {"versions": table(text())}))
    except UserError:
        return versions()
    recorded: dict[str, str] = found.get("versions", {})
    return recorded or versions()


def _bad_images(folder: Path | None) -> Mapping[str, str]:
    from fasttricks.runs.overview import SUMMARIES
    from fasttricks.system.schema import fields, table, text

    if folder is None or not is_there(folder / "summary.json"):
        return {}
    try:
        found: dict[str, Any] = SUMMARIES.json(folder / "summary.json", fields({}, {"bad_images": table(text(20_000))}))
    except UserError:
        return {}
    bad: dict[str, str] = found.get("bad_images", {})
    return bad
