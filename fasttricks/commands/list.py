"""List the networks, recipes or tricks: fasttricks list models | recipes | tricks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fasttricks.commands import prog
from fasttricks.config import NETWORKS, TIMM, UserError, unknown
from fasttricks.config.recipes import RECIPES, summary
from fasttricks.config.tricks import TRICKS

PROG = prog("list")


def models() -> list[str]:
    """The networks of --model.name."""
    return [*NETWORKS, f"{TIMM}NAME, any network of timm, where timm is installed"]


def recipes() -> list[str]:
    """The recipes with a line each."""
    return [f"{name:26s} {summary(name)}" for name in RECIPES]


def tricks() -> list[str]:
    """The tricks of --tricks.on and --tricks.off, with their section of the paper."""
    return [f"{trick.name:22s} {trick.section:4s} {trick.summary}" for trick in TRICKS.values()]


KINDS: dict[str, Callable[[], list[str]]] = {"models": models, "recipes": recipes, "tricks": tricks}
USAGE = f"usage: {PROG} {' | '.join(KINDS)}"


def main(args: Sequence[str]) -> None:
    """Print the names of one kind, a line each."""
    if not args or args[0] in ("-h", "--help"):
        print("\n".join([USAGE, *(f"  {kind:8s} {lines.__doc__}" for kind, lines in KINDS.items())]))
        raise SystemExit(0 if args else 2)
    kind, *more = args
    if kind not in KINDS:
        raise UserError(f"kind = {kind!r}: {unknown(kind, KINDS)}; the kinds are {', '.join(KINDS)}")
    if more:
        raise UserError(f"{more[0]!r}: {PROG} takes one kind alone")
    print("\n".join(KINDS[kind]()))
