"""A network to evaluate, to predict with, to export or to learn from: of a run, a checkpoint, an export or another program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fasttricks.config import DataConfig, ModelConfig, TrainConfig, model_info
from fasttricks.data.sources import output_classes
from fasttricks.models import AUXILIARY, COUNTER, build_network, head_names
from fasttricks.runs.exported import Description, describe
from fasttricks.runs.saved import Saved, read_saved
from fasttricks.runs.stored import CheckpointError, find_weights
from fasttricks.runs.weights import AVERAGED, PLAIN, read_foreign, read_weights

_STATISTIC = "running_mean"


def open_saved(path: Path, model: ModelConfig | None = None, data: DataConfig | None = None) -> Saved:
    """The network at `path`: a run folder, a checkpoint, an export's folder, or a .pt, .pth or .safetensors file.

    model, data: those of a file of another program, where the user says them; its classes are the names of the export, those
    of data.class_order as a file, those of data.root, or the numbers of the outputs. None: nobody can say them.
    No code of a file is run. Raises CheckpointError for a file that is damaged, holds code, or whose network is not known,
    DataError for classes that are not its outputs, ConfigError for a network that is unknown. The file is read into memory.
    """
    description = describe(path)
    says = model is not None and model.name != ""
    if description is None or (not description.settled and not says and not description.config.model.name):
        return _run(path, own=description is None, can_say=model is not None)
    config = description.config
    if not description.settled:
        config = dataclasses.replace(config, model=model if model and says else config.model, data=data or config.data)
        _check_description(path, description, config.model)
    file = find_weights(path)
    found, averaged = _read(file)
    weights = _fitting(found, config.model)
    own, classes = model_info(config.model.name).family == "own", description.classes
    # describe() refuses the name of code in a file that is not settled, so the user gave this one
    trust = config.model.name if own and not description.settled else ""
    outputs = len(classes or ()) if own and not trust else _outputs(file, weights, config)
    if classes is None:
        classes = output_classes(config.data, outputs)
    if len(classes) != outputs:
        rule = f"names {len(classes)} classes, and its classifier has {outputs} outputs; export it again"
        raise CheckpointError(f"weights = {str(file)!r}: {rule}")
    return Saved(
        path=file,
        task=description.task,
        config=config,
        classes=classes,
        step=description.step,
        epoch=description.epoch,
        ranks=description.ranks,
        temperature=description.temperature,
        weights=weights,
        average=averaged and _fitting(averaged, config.model),
        foreign=not description.settled,
        trust=trust,
    )


def _run(path: Path, *, own: bool, can_say: bool) -> Saved:
    """A run's checkpoint; any other file is refused, by the network that it does not name where it may be another program's."""
    if own or path.suffix != ".safetensors":
        try:
            return read_saved(path)
        except CheckpointError as error:
            if own:
                raise
            raise CheckpointError(f"{error}; {_unnamed(can_say)}") from error
    raise CheckpointError(f"weights = {str(path)!r}: does not name its network; {_unnamed(can_say)}")


def _unnamed(can_say: bool) -> str:
    if can_say:
        return "where another program wrote it, give its network: --model.name NAME"
    return "a file of another program does not say its network: take a run, a checkpoint or an export of fasttricks"


def _check_description(path: Path, description: Description, model: ModelConfig) -> None:
    """Raise CheckpointError where the user says another network than the file."""
    recorded = description.config.model.name
    if recorded not in ("", model.name):
        rule = f"is not the network of {str(path)!r}, which is {recorded}; leave --model.name out"
        raise CheckpointError(f"model.name = {model.name!r}: {rule}")


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """(the weights, their average where there is one too)."""
    if file.suffix == ".safetensors":
        return dict(read_weights(str(file)).tensors), None
    found = read_foreign(file)
    plain = next((found[key] for key in (*PLAIN, "") if key in found), None)
    average = next((found[key] for key in AVERAGED if key in found), None)
    return (plain, average) if plain is not None else (average or {}, None)


def _fitting(weights: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """`weights` without an auxiliary classifier that the network goes without, and with the counters that old files lack."""
    kept = {name: tensor for name, tensor in weights.items() if model.aux_head or not name.startswith(AUXILIARY)}
    counters = [name.removesuffix(_STATISTIC) + COUNTER for name in kept if name.endswith(_STATISTIC)]
    return {**{name: torch.tensor(0) for name in counters}, **kept}


def _outputs(file: Path, weights: Mapping[str, Tensor], config: TrainConfig) -> int:
    """The number of classes of the classifier, among `weights`. Raises CheckpointError where it is not there."""
    model = config.model
    with torch.device("meta"):
        network = build_network(config, 2)
    names = head_names(network)
    found = next((name for name in names if name in weights and weights[name].dim()), "")
    if not found:
        rule = f"has no classifier of {model.name} ({' or '.join(names) or 'which has none'}); check --model.name"
        raise CheckpointError(f"weights = {str(file)!r}: {rule}")
    return len(weights[found]) - getattr(network, "background", 0)
