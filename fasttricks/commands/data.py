"""Prepare a data set: fasttricks data scan | stats | split | pack | imagenet | check; each with --help."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fasttricks.commands import prog
from fasttricks.config import (
    DataConfig,
    Range,
    UserError,
    check_fields,
    require,
    show_classes,
    show_name,
    show_statistics,
)
from fasttricks.config.options import HELP, split_arguments

if TYPE_CHECKING:
    from fasttricks.data.packing.pack import PackConfig
    from fasttricks.data.sources import Source

PROG = prog("data")
USAGE = f"""usage:
  {PROG} scan DIR [--workers N]                        find damaged images, and list them in DIR/quarantine.jsonl
  {PROG} stats DIR [--images N] [--workers N]          mean, deviation, sizes and classes of the training images
  {PROG} split DIR OUT [--val-share 0.1]               train/ and val/ of links to the images of DIR, which has no val/
  {PROG} pack DIR OUT [--short-side N] [--quality Q]   DIR/train and DIR/val into shards
  {PROG} imagenet OUT --train-tar T --val-tar V --devkit-tar D [--short-side N] [--quality Q]
                                                              the official ImageNet archives into shards
  {PROG} check OUT                                     compare every packed byte with its checksum

Training takes DIR or OUT as --data.root, and honours the list. A stopped command continues when it is given again.
--help after its name lists the options of a command."""


@dataclass(frozen=True, kw_only=True)
class ScanConfig:
    """How to scan."""

    workers: Annotated[int, Range(0, 1024, zero="as many as cores")] = 0
    """Processes that decode."""
    max_pixels: Annotated[int, Range(1, unit="pixels")] = 100_000_000
    """Larger images, by the size in their header, count as bad, as data.max_pixels in training."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class StatsConfig(ScanConfig):
    """How to measure."""

    images: Annotated[int, Range(0, zero="all")] = 0
    """Images that are measured, drawn by a fixed seed."""
    labels: str = ""
    """The table of the images, as --data.labels in training."""
    label_separator: str = ""
    """The text between several labels of an image, as --data.label-separator in training."""


class NoOptions:
    """The fields of a command without options."""


def main(args: Sequence[str]) -> None:
    """Run the command that `args` name."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if args else 2)
    if args[0] not in COMMANDS:
        raise UserError(f"{args[0]!r} is no command of {PROG}: {', '.join(COMMANDS)} are")
    from fasttricks.system.command import ended_as_by_ctrl_c

    with ended_as_by_ctrl_c():
        COMMANDS[args[0]](args[1:])


def scan(args: Sequence[str]) -> None:
    """Decode every image below DIR, a data set or a part of one, strictly; list the bad ones in DIR/quarantine.jsonl."""
    from fasttricks.config.cli import parse
    from fasttricks.data.packing.scan import list_files, other_lists, scan_files
    from fasttricks.data.sources.errors import DataError
    from fasttricks.data.sources.quarantine import write_quarantine
    from fasttricks.data.sources.walk import why_none
    from fasttricks.system.progress import counted

    (root,), rest = _places(args, "scan", ("DIR",), ScanConfig)
    config = parse(ScanConfig(), rest, prog=f"{PROG} scan DIR", description=scan.__doc__ or "")
    if what := why_none(root):
        raise DataError(f"{root}: {what}; give the folder that holds train/ and val/")
    files = list_files(root)
    workers = config.workers or len(os.sched_getaffinity(0))
    try:
        with counted("scan", len(files)) as advance:
            images, bad = scan_files(root, files, workers=workers, max_pixels=config.max_pixels, advance=advance)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written, the same command begins again") from None
    if not images:
        shards = next((ending for ending in (".tar", ".parquet") if any(file.endswith(ending) for file in files)), "")
        way_out = "give the folder that holds train/ and val/"
        if shards:
            way_out = f"scan looks at image files, and not into {shards}: `{PROG} pack DIR OUT` names images that cannot be used"
        raise DataError(f"{root}: no image below it; {way_out}")
    for name, reason in bad.items():
        print(show_name(f"{name}: {reason}"))
    path = write_quarantine(root, bad)
    for other in other_lists(root, files):
        left = "too, which this scan does not change; remove it once its images are repaired"
        print(f"note: training honours {show_name(other)} {left}")
    listed = f"{len(bad):,} of {images:,} images are bad; listed in {show_name(path)}"
    print(listed if bad else f"all {images:,} images are good")


def stats(args: Sequence[str]) -> None:
    """Mean and deviation of the training images of DIR, as --data.mean and --data.std take them; their sizes and classes."""
    from fasttricks.config.cli import parse
    from fasttricks.data.packing.stats import draw_images, measure
    from fasttricks.data.sources import open_split
    from fasttricks.data.sources.class_counts import describe_counts
    from fasttricks.system.progress import counted

    (root,), rest = _places(args, "stats", ("DIR",), StatsConfig)
    config = parse(StatsConfig(), rest, prog=f"{PROG} stats DIR", description=stats.__doc__ or "")
    train = open_split(
        DataConfig(root=str(root), labels=config.labels, label_separator=config.label_separator), "train"
    )
    images = draw_images(len(train), config.images)
    print(f"{len(train):,} training images of {show_classes(len(train.classes))}, {describe_counts(train)}")
    workers = config.workers or len(os.sched_getaffinity(0))
    with counted("stats", len(images)) as advance:
        found = measure(train, images, workers=workers, max_pixels=config.max_pixels, advance=advance)
    for name, sides in (("width", found.widths), ("height", found.heights)):
        middle = sorted(sides.tolist())[len(sides) // 2]
        print(f"{name} {sides.min():,} to {sides.max():,} pixels, median {middle:,}")
    print(f"over {len(found.widths):,} images, R G B, 0 to 255: {show_statistics((found.mean, found.std))}")
    for image, why in islice(found.bad.items(), 20):
        print(show_name(f"left out: {train.name(image)}: {why}"))
    if len(found.bad) > 20:
        print(f"  and {len(found.bad) - 20:,} more; `{PROG} scan {show_name(root)}` lists all")
    flat = [name for name, value in zip("RGB", found.std, strict=True) if value < 1]
    if flat:
        print(f"note: the deviation of {' and '.join(flat)} is below 1, the least that --data.std takes")


def pack(args: Sequence[str]) -> None:
    """The images of DIR, whatever holds them, into OUT/train and OUT/val; into OUT/train alone where DIR has no val/."""
    from fasttricks.config.cli import parse
    from fasttricks.data.packing.pack import PackConfig
    from fasttricks.data.packing.place import PackPlaceConfig, require_apart, splits_of

    (root, out), rest = _places(args, "pack", ("DIR", "OUT"), PackPlaceConfig)
    config = parse(PackPlaceConfig(), rest, prog=f"{PROG} pack DIR OUT", description=pack.__doc__ or "")
    require_apart(root, out)
    splits = splits_of(config.place(root))
    pack_dataset(splits, out, PackConfig.of(config))
    if "val" not in splits:
        print(f"note: {show_name(root)} has no val/, so {show_name(out)} has none; train on it with --data.val-share")


def split(args: Sequence[str]) -> None:
    """DIR, which has no val/, as OUT/train and OUT/val: links to its images, divided as --data.val-share divides DIR."""
    from fasttricks.config.cli import parse
    from fasttricks.data.packing.links import write_links
    from fasttricks.data.packing.place import SplitConfig, require_apart
    from fasttricks.data.sources import find_dataset
    from fasttricks.system.progress import counted

    (root, out), rest = _places(args, "split", ("DIR", "OUT"), SplitConfig)
    config = parse(SplitConfig(), rest, prog=f"{PROG} split DIR OUT", description=split.__doc__ or "")
    require_apart(root, out)
    train, val = find_dataset(config.place(root))
    try:
        with counted("split", len(train) + len(val)) as advance:
            write_links({"train": train, "val": val}, out, advance)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("nothing was written, the same command begins again") from None
    counts = (
        f"{len(train):,} links to training and {len(val):,} to validation images of {show_classes(len(train.classes))}"
    )
    print(f"{show_name(out)}: {counts}; keep {show_name(root)} where it is")


def imagenet(args: Sequence[str]) -> None:
    """The three official archives of ILSVRC2012 into OUT/train and OUT/val, without unpacking them."""
    from fasttricks.config.cli import parse
    from fasttricks.data.packing.imagenet import ImagenetConfig, open_imagenet
    from fasttricks.data.packing.pack import PackConfig

    (out,), rest = _places(args, "imagenet", ("OUT",), ImagenetConfig)
    config = parse(ImagenetConfig(), rest, prog=f"{PROG} imagenet OUT", description=imagenet.__doc__ or "")
    for name in ("train_tar", "val_tar", "devkit_tar"):
        require(bool(getattr(config, name)), name, "", f"give the archive as --{name.replace('_', '-')}")
    train, val = open_imagenet(Path(config.train_tar), Path(config.val_tar), Path(config.devkit_tar))
    pack_dataset({"train": train, "val": val}, out, PackConfig.of(config))


def check(args: Sequence[str]) -> None:
    """Read every image of OUT and compare it with its checksum; exits 2 where one fails, and names it."""
    from fasttricks.data.sources.packed import open_packed
    from fasttricks.system.progress import counted
    from fasttricks.system.reading import is_there

    (out,), options = _places(args, "check", ("OUT",), NoOptions)
    if options:
        print(f"usage: {PROG} check OUT\n\n{check.__doc__}")
        raise SystemExit(0)
    bad, count = [], 0
    for split in ("train", "val"):
        if split == "val" and not is_there(out / split):
            continue
        images = open_packed(out / split)
        with counted(f"check {split}", len(images)) as advance:
            for index in range(len(images)):
                try:
                    images.read(index)
                except OSError as error:
                    if error.filename:  # its shard cannot be opened
                        raise
                    bad.append(f"{split}/{show_name(images.name(index))}: {error.strerror}")
                advance(1)
        count += len(images)
        for index, why in images.bad.items():
            print(show_name(f"{split}/{images.name(index)}: bad when it was packed, left out: {why}"))
    if bad:
        raise UserError("\n  ".join([f"{out}: {len(bad)} of {count} images are damaged:", *bad[:20]]))
    print(f"{show_name(out)}: {count:,} images, all as they were packed")


def pack_dataset(splits: dict[str, Source], out: Path, config: PackConfig) -> None:
    """Pack each split into a folder of OUT, with a progress bar, and print the results."""
    from fasttricks.data.packing.pack import pack_split
    from fasttricks.system.progress import counted

    for split, source in splits.items():
        try:
            with counted(f"pack {split}", len(source)) as advance:
                report = pack_split(source, out / split, config, advance)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("the same command continues where it stopped") from None
        change = config.altered or "byte for byte unchanged"
        print(f"{show_name(out / split)}: {len(source):,} images, {report.bytes / 1e6:,.1f} MB; {change}")
        for name, why in islice(report.troubles.items(), 20):
            print(show_name(f"  {split}/{name}: {why}"))
        if len(report.troubles) > 20:
            print(f"  and {len(report.troubles) - 20} more: see troubles in {show_name(out / split / 'pack.json')}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "scan": scan,
    "stats": stats,
    "split": split,
    "pack": pack,
    "imagenet": imagenet,
    "check": check,
}


def _places(args: Sequence[str], command: str, names: tuple[str, ...], cls: type) -> tuple[list[Path], list[str]]:
    """The paths that a command takes, and its options, which are the fields of `cls`."""
    given, options = split_arguments(args, cls, prog=f"{PROG} {command} {' '.join(names)}")
    if set(options) & set(HELP):
        return [Path(name) for name in names], options
    usage = f"{PROG} {command} {' '.join(names)}"
    if len(given) < len(names):
        raise UserError(f"{command} needs {' and '.join(names)}: {usage}")
    if len(given) > len(names):
        raise UserError(f"argument = {given[len(names)]!r}: {command} takes {' and '.join(names)} alone: {usage}")
    return [Path(place) for place in given], options
