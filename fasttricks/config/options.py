"""Options as people type them: in any order, with the names that other trainers gave them. No tyro: an answer comes at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args, get_origin

from fasttricks.config.errors import ConfigError, nearest, require
from fasttricks.config.fields import field_docs, own_kinds
from fasttricks.config.ranges import field_rules

Hidden = Mapping[type, Collection[str]]
"""Dataclass -> its fields that a command has no use for."""
NOTHING: Hidden = MappingProxyType({})
MANY = -1
_NUMBERS = {int: "a whole number", float: "a number"}
HELP = ("-h", "--help")

FOREIGN = {
    **dict.fromkeys(("learning-rate", "lr", "lr0", "blr"), "optim.base-lr"),
    **dict.fromkeys(("batch-size", "batch", "bs", "b", "train-batch-size"), "global-batch-size"),
    **dict.fromkeys(("label-smoothing", "ls"), "loss.smoothing"),
    **dict.fromkeys(("workers", "num-workers", "j"), "data.threads"),
    **dict.fromkeys(("img-size", "imgsz", "input-size", "resolution", "train-crop-size", "size"), "data.image-size"),
    **dict.fromkeys(("val-resize-size", "resize-size"), "data.val-resize"),
    **dict.fromkeys(("amp", "fp16", "half", "bf16", "mixed-precision", "amp-dtype", "dtype"), "precision"),
    **dict.fromkeys(("output-dir", "output", "out", "log-dir", "logdir", "save-dir", "project", "work-dir"), "run-dir"),
    **dict.fromkeys(("mixup", "alpha"), "loss.mixup-alpha"),
    **dict.fromkeys(("arch", "model", "a", "network", "backbone"), "model.name"),
    **dict.fromkeys(("data", "data-dir", "data-path", "dataset", "train-dir", "imagenet"), "data.root"),
    **dict.fromkeys(("wd", "decay"), "optim.weight-decay"),
    **dict.fromkeys(("sched", "scheduler", "lr-scheduler", "lr-schedule"), "schedule.decay"),
    **dict.fromkeys(("warmup", "lr-warmup-epochs", "warmup-epoch"), "schedule.warmup-epochs"),
    **dict.fromkeys(("ema", "model-ema", "model-ema-decay"), "ema-decay"),
    **dict.fromkeys(("grad-accum", "accumulation-steps", "grad-accum-steps", "accum-iter"), "accumulate"),
    **dict.fromkeys(("teacher", "kd", "distillation"), "distill.teacher"),
    **dict.fromkeys(("save-freq", "save-every", "save-period", "checkpoint-hist"), "checkpoint-epochs"),
    **dict.fromkeys(("print-freq", "log-interval", "log-every", "log-freq"), "log-steps"),
    **dict.fromkeys(("eval-freq", "val-interval", "val-every"), "eval.every-epochs"),
    **dict.fromkeys(("sync-bn", "syncbn"), "sync-batch-norm"),
    **dict.fromkeys(("torchcompile", "torch-compile"), "compile"),
    **dict.fromkeys(("no-bias-decay", "norm-weight-decay"), "optim.no-bias-decay"),
    **dict.fromkeys(("topk", "k", "top-k"), "top"),
    **dict.fromkeys(("conf", "conf-thres", "confidence-threshold", "score-thr", "pred-score-thr"), "draw-score"),
    **dict.fromkeys(("tta",), "flip"),
    **dict.fromkeys(
        ("weights", "pretrained", "checkpoint", "initial-checkpoint", "model-path", "ckpt", "finetune"), "init"
    ),
    **dict.fromkeys(("freeze", "freeze-layers", "frozen-layers"), "model.freeze"),
}
"""An option of torchvision's, timm's, fastai's or ultralytics' trainers -> the same of ours."""
ABSENT = {
    **dict.fromkeys(
        ("optimizer", "opt", "adam", "adamw"),
        "the optimizer is Nesterov SGD; --optim.backend chooses its implementation",
    ),
    **dict.fromkeys(
        ("gpus", "devices", "num-gpus", "nproc", "nproc-per-node", "world-size", "ngpus"),
        "ranks are torchrun's: torchrun --nproc-per-node N -m fasttricks.train ...",
    ),
    **dict.fromkeys(("nesterov",), "momentum is Nesterov's in every run; --optim.momentum sets it"),
    **dict.fromkeys(("channels-last", "pin-mem", "pin-memory"), "is so in every run; leave it out"),
}
"""An option of such a trainer that we have none for -> the way out."""


class Option(NamedTuple):
    """One option of a command."""

    name: str
    """Without its dashes."""
    kind: Any
    """The type of its field."""
    doc: str
    """The string under its field."""
    rule: str = ""
    """The words after 'must be' of the rule of its field."""

    @property
    def values(self) -> int:
        """The number of its values, MANY for a list of any length."""
        if self.kind is bool:
            return 0
        if get_origin(self.kind) is not tuple:
            return 1
        return MANY if Ellipsis in get_args(self.kind) else len(get_args(self.kind))

    def check(self, words: Sequence[str], way_out: str) -> None:
        """Raise ConfigError for too few values, and for one that cannot be read as its type. Ranges are the config's to check."""
        field, rule = self.name.replace("-", "_"), f": {self.rule}" if self.rule else ""
        count = {0: "takes no value", 1: "needs a value"}.get(self.values, f"needs {self.values} values")
        require(self.values == MANY or len(words) == self.values, field, " ".join(words), f"{count}{rule}; {way_out}")
        parts = [part for part in get_args(self.kind) if part is not Ellipsis]
        kinds = parts if get_origin(self.kind) is tuple else [self.kind]
        for number, word in enumerate(words):
            kind = kinds[number % len(kinds)]
            if not _readable(word, kind):
                must = (
                    f"{_NUMBERS[kind]}{rule}" if kind in _NUMBERS else f"one of {', '.join(map(str, get_args(kind)))}"
                )
                raise ConfigError(f"{field} = {word!r}: must be {must}; {way_out}")


def options_of(cls: type, hidden: Hidden = NOTHING, prefix: str = "") -> Iterator[Option]:
    """Every option of the dataclass `cls`: one a field, two for a bool."""
    docs, rules = field_docs(cls), field_rules(cls)
    for field, kind in own_kinds(cls).items():
        if field in hidden.get(cls, ()):
            continue
        name = field.replace("_", "-")
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from options_of(kind, hidden, f"{prefix}{name}.")
            continue
        rule = rules[field].words if field in rules else ""
        for option in (name, f"no-{name}") if kind is bool else (name,):
            yield Option(prefix + option, kind, docs.get(field, ""), rule)


def all_but_given(cls: type, options: Sequence[str]) -> Hidden:
    """The fields of the dataclass `cls` and its sections that `options`, from split_arguments, do not name."""
    given = {word.lstrip("-").partition("=")[0].replace("_", "-") for word in options if _is_option(word)}
    shown: dict[type, set[str]] = {}

    def look(part: type, prefix: str) -> bool:
        """Whether an option of `part` is given."""
        found = shown.setdefault(part, set())
        for field, kind in own_kinds(part).items():
            name = field.replace("_", "-")
            if dataclasses.is_dataclass(kind):
                assert isinstance(kind, type)
                named = look(kind, f"{prefix}{name}.")
            else:
                named = bool({f"{prefix}{name}", f"{prefix}no-{name}"} & given)
            found |= {field} if named else set()
        return bool(found)

    look(cls, "")
    return {part: own_kinds(part).keys() - fields for part, fields in shown.items()}


def arities(cls: type, hidden: Hidden = NOTHING) -> dict[str, int]:
    """Option -> the number of its values, of the dataclass `cls`."""
    return {option.name: option.values for option in options_of(cls, hidden)}


def option_docs(cls: type) -> dict[str, str]:
    """Option -> the string under its field, of the dataclass `cls`."""
    return {option.name: option.doc for option in options_of(cls)}


def _readable(word: str, kind: Any) -> bool:
    """Whether `word` can be read as `kind`: a number, one of the words of a Literal, or any other."""
    if get_origin(kind) is Literal:
        return word in map(str, get_args(kind))
    if kind not in _NUMBERS:
        return True
    try:
        kind(word)
    except ValueError:
        return False
    return True


def split_arguments(
    args: Sequence[str],
    cls: type,
    *,
    prog: str,
    hidden: Hidden = NOTHING,
    is_name: Callable[[str], bool] = lambda word: False,
) -> tuple[list[str], list[str]]:
    """(arguments by position, options with their values) of `args`, which may be mixed in any order.

    cls: the dataclass whose fields the options are. is_name: says of a word that it ends a list of values.
    Raises ConfigError for an option that `cls` has not, with the right one, and as Option.check().
    """
    known = {option.name: option for option in options_of(cls, hidden)}
    given, options = [], []
    words = list(args)
    while words:
        word = words.pop(0)
        if not _is_option(word):
            given.append(word)
            continue
        options.append(word)
        if word in HELP:
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("_", "-")
        if name not in known or not word.startswith("--"):
            raise ConfigError(_no_option(word.partition("=")[0], name, cls, known, prog))
        option = known[name]
        values: list[str] = []
        while not equals and words and len(values) != option.values and not _is_option(words[0]):
            if option.values == MANY and is_name(words[0]):
                break
            values.append(words.pop(0))
        option.check([value] if equals else values, f"{prog} --help explains --{name}")
        options += values
    return given, options


def value_of(path: str, args: Sequence[str]) -> str:
    """The value that the options `args` give to the field at the dotted `path`, the last of several; empty: none."""
    value, option = "", "--" + path.replace("_", "-")
    for number, word in enumerate(args):
        name, equals, own = word.partition("=")
        if name.replace("_", "-") == option:
            value = own if equals else "".join(args[number + 1 : number + 2])
    return value


def _is_option(word: str) -> bool:
    """Whether `word` is an option, and not a value as -0.1."""
    return word.startswith("-") and len(word) > 1 and not word[1].isdigit() and word[1] != "."


def _no_option(word: str, name: str, cls: type, known: Collection[str], prog: str) -> str:
    """The answer to an unknown option: the right one with its help, or the reason why there is none."""
    if name in arities(cls):
        return f"option = {word!r}: has no effect here, only in training; leave it out"
    plain = name.removeprefix("no-")
    same = [one for one in known if one.rpartition(".")[2] == plain]
    section, _, last = plain.rpartition(".")
    off = f"{section}.no-{last}" if name != plain else ""  # --no-data.antialias
    right = off if off in known else FOREIGN.get(name, "") or (same[0] if len(same) == 1 else "")
    if right not in known and (absent := ABSENT.get(name)):
        return f"option = {word!r}: unknown; {absent}"
    if right not in known:
        right = nearest(name, known, 0.6) or next(_by_last_part(plain, known), "")
    help_text = f"{prog} --help lists the options"
    if not right:
        return f"option = {word!r}: unknown; {help_text}"
    return f"option = {word!r}: unknown; did you mean --{right}? ({option_docs(cls)[right].rstrip('.')}); {help_text}"


def _by_last_part(name: str, known: Collection[str]) -> Iterator[str]:
    last = {one.rpartition(".")[2]: one for one in known}
    if near := nearest(name, last, 0.7):
        yield last[near]
