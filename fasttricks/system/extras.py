"""The optional dependencies, and the message where they are absent. Entry points check before they import anything else."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

TRAIN_MODULES = ("nvidia.dali", "tyro", "rich", "tensorboard", "matplotlib", "PIL")
"""Modules of the extra `train` that training cannot do without; pynvml it can, and says so (monitor.py)."""


def require_extra(extra: str, modules: Sequence[str], user: str) -> None:
    """Exit 2, saying that `user` needs them and how to install `extra`, where any of `modules` is absent."""
    if missing := missing_extra(extra, modules, user):
        print(f"error: {missing}", file=sys.stderr)
        raise SystemExit(2)


def missing_extra(extra: str, modules: Sequence[str], user: str) -> str:
    """Which of `modules`, that `user` needs, are absent, and how to install `extra`, which has them; empty where none is."""
    missing = [name for name in modules if not _present(name)]
    if not missing:
        return ""
    needed = f"{user} needs {', '.join(missing)}, not installed here"
    command = f"install it with: pip install 'fasttricks[{extra}]' (in a checkout: pip install '.[{extra}]')"
    return f"{needed}; {_activate() or command}"


def _activate() -> str:
    """How to take the set-up of this checkout (make setup), where another Python runs; empty where there is none."""
    venv = Path(__file__).parents[2] / ".venv"
    if not (venv / ".set-up").exists() or Path(sys.prefix).resolve() == venv.resolve():
        return ""
    return f"`make setup` has installed it in {venv}: run `source {venv}/bin/activate` first"


def _present(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is absent
        return False
