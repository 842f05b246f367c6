"""The commands: `fasttricks NAME ...`, and `python -m fasttricks.NAME ...`, which torchrun needs. None imports torch before
it has read its arguments."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import NamedTuple

from fasttricks.config.errors import UserError, unknown
from fasttricks.system.extras import TRAIN_MODULES, require_extra
from fasttricks.system.process import die_with_launcher


class Command(NamedTuple):
    """One command."""

    summary: str
    module: str
    """Has main(args)."""
    prints_result: bool = False
    """As run_main."""
    needs: tuple[str, ...] = TRAIN_MODULES
    """The modules of the extra `train` that it cannot do without."""


COMMANDS = {
    "train": Command("train a recipe", "fasttricks.commands.train"),
    "evaluate": Command("accuracy and loss of a checkpoint", "fasttricks.commands.evaluate", prints_result=True),
    "predict": Command("the likeliest classes of images", "fasttricks.commands.predict", prints_result=True),
    "export": Command("safetensors, ONNX and a model card", "fasttricks.commands.export", needs=("tyro",)),
    "ablate": Command("the paper's tables, or a recipe's tricks one by one", "fasttricks.commands.ablate"),
    "plan": Command(
        "memory, time and bottleneck of a run on N GPUs",
        "fasttricks.commands.plan",
        prints_result=True,
        needs=("tyro", "rich", "PIL"),
    ),
    "cost": Command(
        "parameters, FLOPs and time of networks", "fasttricks.commands.cost", prints_result=True, needs=("tyro",)
    ),
    "data": Command(
        "scan, pack and check a data set", "fasttricks.commands.data", needs=("tyro", "rich", "PIL", "simplejpeg")
    ),
    "report": Command(
        "a page on a checkpoint: classes, confusions, mistakes", "fasttricks.commands.report", prints_result=True
    ),
    "runs": Command("list runs, and compare them", "fasttricks.commands.runs", prints_result=True, needs=("tyro",)),
    "show": Command(
        "a recipe's config as YAML, for --config", "fasttricks.commands.show", prints_result=True, needs=("tyro",)
    ),
    "list": Command("list models, recipes or tricks", "fasttricks.commands.list", prints_result=True, needs=()),
}
USAGE = "\n".join(
    [
        "usage: fasttricks COMMAND ...",
        "",
        "commands:",
        *(f"  {name:9s} {command.summary}" for name, command in COMMANDS.items()),
        "",
        "fasttricks COMMAND --help describes a command. fasttricks --version shows the version.",
        "Under torchrun: torchrun --nproc-per-node N -m fasttricks.train ...",
    ]
)
_MODULES = {"data": "fasttricks.data.prepare"}
"""Where `python -m` finds a command that is not fasttricks.NAME."""
_as_one_command = False


_NO_MODULES = ("list", "report", "runs")
"""The commands that `python -m` does not find by their own names."""


def prog(name: str) -> str:
    """How the user calls command `name`: as `fasttricks NAME` or as `python -m fasttricks.NAME`, as this process was started."""
    return (
        f"fasttricks {name}"
        if _as_one_command or name in _NO_MODULES
        else f"python -m {_MODULES.get(name, f'fasttricks.{name}')}"
    )


def start(name: str, args: Sequence[str] | None = None) -> None:
    """Run command `name` on `args`, by default on sys.argv, and end the process as run_main does."""
    die_with_launcher()
    command = COMMANDS[name]
    require_extra("train", command.needs, name)
    from fasttricks.system.command import run_main

    run_main(
        partial(_main, command.module, sys.argv[1:] if args is None else args), prints_result=command.prints_result
    )


def _main(module: str, args: Sequence[str], _: Sequence[str]) -> None:
    import_module(module).main(args)


def main() -> None:
    """The console script `fasttricks`, and `python -m fasttricks`."""
    global _as_one_command
    _as_one_command = True
    name, args = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name in COMMANDS:
        return start(name, args)
    from fasttricks.system.command import run_main

    return run_main(partial(_answer, name))


def _answer(name: str, _: Sequence[str]) -> None:
    if name in ("-V", "--version"):
        from fasttricks import __version__

        print(f"fasttricks {__version__}")
    elif name in ("", "-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if name else 2)
    else:
        raise UserError(f"command = {name!r}: {unknown(name, COMMANDS)}; the commands are {', '.join(COMMANDS)}")
