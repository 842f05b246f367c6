"""Transfer as a table: base networks in rows, each trained on by the recipe of another task (section 6 of the paper). No torch.

A base is a network of random weights, or weights as --init takes them: the same for each seed of a row, or for seed s those of
the base's own run with seed s. fasttricks/ablation/cells.py makes trainings of the rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fasttricks.ablation.paper import PAPERS_BASES, Cell, Table
from fasttricks.config import TIMM, TORCHVISION, ConfigError, TrainConfig, get_at, require, show_name
from fasttricks.config.recipes import OF_THE_WEIGHTS
from fasttricks.runs.fitted import like_weights
from fasttricks.runs.stored import RAW, CheckpointError, find_weights, is_export, run_of_best
from fasttricks.system.reading import Reader, is_there, read_range, regular_file
from fasttricks.system.schema import anything, fields, listed, table, text


class Transfer(NamedTuple):
    """A table of base networks."""

    task: str
    """The task of its rows."""
    recipe: str
    """The recipe that it takes where none is given."""
    splits: tuple[str, ...] = ("val",)
    """The splits that its runs can be compared on."""


TRANSFERS: Mapping[str, Transfer] = {
    "transfer-segment": Transfer("segmentation", "segment-ade20k", ("val", "test")),
    "transfer-detect": Transfer("detection", "detect-voc"),
}
"""By name."""
RANDOM = "random"
"""The base of random weights, as --bases names it."""
SEED = "{seed}"
"""Stands in a base's place for the seed of the row's run."""
RESULTS = "results.json"
FROM_RANDOM: Mapping[str, Any] = {"init": "", "optim.backbone_lr": 1.0, "model.freeze": ()}
"""The fields of a row of random weights, which must be learnt: none is frozen, and all have the heads' learning rate."""
_COLUMN = "base networks"
_CELL = fields({"table": text(), "column": text(), "row": text(), "runs": table(anything)}, {"folder": text(4096)})
_ABLATIONS = Reader(ConfigError, "must be as fasttricks.ablate wrote it", "give another folder", max_bytes=1 << 26)


@dataclass(frozen=True)
class Base:
    """A base network: a row of the table."""

    name: str
    init: str
    """As TrainConfig.init, with SEED where each seed has weights of its own; empty: random weights."""
    papers: str = ""
    """The row of the paper's table 6 that trained it; empty: another."""


def transfer(name: str, words: Sequence[str], seed: int, config: TrainConfig, given: Collection[str] = ()) -> Table:
    """The table called `name` of the bases that `words` name, as AblateConfig.bases has them. seed: the first of a row's. given:
    the fields that have the value of `config` in each row, whichever network the weights are of, as those of a command line do.

    Raises ConfigError where no base is named, a name comes twice, or a folder of an ablation has none.
    """
    task = TRANSFERS[name].task
    bases = [base for word in words for base in _read(word)]
    rule = f"must name the base networks, as --bases {RANDOM} plain=runs/plain 'tricks=runs/tricks-{SEED}'"
    require(bool(bases), "bases", " ".join(words), rule)
    names = [base.name for base in bases]
    twice = next((one for one in names if names.count(one) > 1), "")
    require(not twice, "bases", twice, "is the name of two rows; give each a name of its own, as NAME=RUN")
    require(not config.init, "init", config.init, "is given by the rows of the table; name it in --bases")
    networks = {base: _network(base, seed, config, given) for base in bases}
    first = next((networks[base] for base in bases if base.init), {})
    figures = PAPERS_BASES.get(task, {})
    cells = [
        Cell(
            base.name,
            _COLUMN,
            (),
            edits={**networks[base], "init": base.init} if base.init else {**first, **FROM_RANDOM},
            paper=figures.get(base.papers),
            as_it_is=True,
        )
        for base in bases
    ]
    return Table(name, f"{task} on base networks", tuple(cells))


def _network(base: Base, seed: int, config: TrainConfig, given: Collection[str]) -> Mapping[str, Any]:
    """The fields of the network that follow the weights of the base, but for those given."""
    follows = [path for path in OF_THE_WEIGHTS.get(config.recipe, ()) if path not in given]
    like = like_weights(config, of_seed(base.init, seed))
    return {path: get_at(like, path) for path in follows} if base.init else {}


def _read(word: str) -> list[Base]:
    """The bases that a word of AblateConfig.bases names."""
    name, equals, place = word.partition("=")
    if equals and not is_there(word):
        require(bool(name and place), "bases", word, "must be NAME=RUN")
        return [Base(name, _with_seeds(place))]
    if word == RANDOM:
        return [Base("random weights", "")]
    return _of_ablation(Path(word)) if is_there(Path(word, RESULTS)) else [Base(word, _with_seeds(word))]


def _with_seeds(place: str) -> str:
    """`place`, or its folders seed-0, seed-1, ... where it has such, as an ablation's training has."""
    folder, raw = Path(place.removesuffix(RAW)), RAW if place.endswith(RAW) else ""
    runs = (file.parent.name.removeprefix("seed-") for file in folder.glob("seed-*/config.json"))
    return f"{folder / f'seed-{SEED}'}{raw}" if any(map(str.isdigit, runs)) else place


def _of_ablation(folder: Path) -> list[Base]:
    """The trainings of an ablation that have a result, by row; by column and row where several columns have."""
    cells = _ABLATIONS.json(folder / RESULTS, fields({"cells": listed(_CELL)}))["cells"]
    cells = [cell for cell in cells if cell["runs"]]
    rule = "has no finished run"
    require(bool(cells), "bases", str(folder), f"{rule}; finish the ablation, or name others")
    rule = "does not say where its runs are, as an ablation before this release; call it again with --report"
    require(all("folder" in cell for cell in cells), "bases", str(folder), rule)
    several = len({cell["column"] for cell in cells}) > 1
    return [
        Base(
            f"{cell['column']}, {cell['row']}" if several else cell["row"],
            str(folder / cell["folder"] / f"seed-{SEED}"),
            cell["row"] if cell["table"] == "table6" and cell["column"].startswith("ResNet") else "",
        )
        for cell in cells
    ]


def of_seed(init: str, seed: int) -> str:
    """The weights of the row's run with that seed."""
    return init.replace(SEED, str(seed))


def lacks(init: str) -> str:
    """Why there are no weights `init`, or none of a finished run; empty where there are. A library's are not looked for."""
    if not init or init.startswith((TIMM, TORCHVISION)):
        return ""
    bare = Path(init.removesuffix(RAW))
    run = run_of_best(bare) or bare
    if is_there(run / "config.json") and not is_there(run / "summary.json") and not is_export(run):
        return f"{show_name(init)} is not finished; resume it"
    try:
        find_weights(bare)
    except CheckpointError:
        why = (
            "has no checkpoint; an ablation keeps those of its runs with --keep-checkpoints"
            if bare.is_dir()
            else "does not exist"
        )
        return f"{show_name(init)} {why}"
    return ""


def digest(init: str) -> str:
    """8 hexadecimal digits of the file of the weights, so that other weights of the same name are another run; empty: of none, or
    a library's. Cost: a read of the file.
    """
    if not init or init.startswith((TIMM, TORCHVISION)):
        return ""
    found = hashlib.blake2b(digest_size=4)
    with regular_file(find_weights(Path(init.removesuffix(RAW)))) as (descriptor, size):
        for start in range(0, size, 1 << 24):
            found.update(read_range(descriptor, start, min(1 << 24, size - start)))
    return found.hexdigest()
