"""The tables by name: the paper's, the designs over a recipe's tricks, and base networks in another task."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from fasttricks.ablation.cells import DESIGNS, AblateConfig
from fasttricks.ablation.paper import PAPER_TABLES, Table
from fasttricks.ablation.transfer import TRANSFERS, transfer
from fasttricks.config import ConfigError, require, unknown

TABLES = (*PAPER_TABLES, *DESIGNS, *TRANSFERS)
"""The names of all tables."""


def find_tables(names: Iterable[str], config: AblateConfig, given: Collection[str] = ()) -> list[Table]:
    """The tables called `names`, for `config`. given: as for transfer(). Raises ConfigError with the nearest right name for an
    unknown one, and for one that is of another task than the recipe."""
    return [_find_table(check_name(name), config, given) for name in names]


def _find_table(name: str, config: AblateConfig, given: Collection[str]) -> Table:
    task = TRANSFERS[name].task if name in TRANSFERS else "classification"
    of_task = [table for table, one in TRANSFERS.items() if one.task == config.task]
    rule = f"cannot be ablated by {name}, which is of {task}; take {of_task[0] if of_task else f'a recipe of {task}'}"
    require(config.task == task, "task", config.task, rule)
    if name in TRANSFERS:
        splits = TRANSFERS[name].splits
        rule = f"is not there in {task}, which has {' and '.join(splits)}"
        require(config.split in splits, "split", config.split, rule)
        return transfer(name, config.bases, config.seed, config, given)
    rule = f"has no effect on {name}, and is for {' and '.join(TRANSFERS)}; leave it out"
    require(not config.bases, "bases", " ".join(config.bases), rule)
    require(config.split == "val", "split", config.split, rule)
    return PAPER_TABLES[name]() if name in PAPER_TABLES else DESIGNS[name](config)


def check_name(name: str) -> str:
    """`name` where it is a table. Raises ConfigError with the nearest right name."""
    if name not in TABLES:
        raise ConfigError(f"table = {name!r}: {unknown(name, TABLES)}; the tables are {', '.join(TABLES)}")
    return name
