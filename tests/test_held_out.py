"""Places without a val/: their images are held out by a hash of the name, whatever holds them; classes are limited by it too."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from fasttricks.commands import data as prepare
from fasttricks.commands import evaluate, train
from fasttricks.config import ConfigError, DataConfig
from fasttricks.config.recipes import FITTED, finetune
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources import Source, find_dataset, open_split, require_place
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.held_out import hold_out, limit_classes
from fasttricks.data.sources.listed import read_at
from fasttricks.data.sources.quarantine import write_quarantine
from fasttricks.runs.fitted import fit_recipe
from lib.layouts import write_parquets, write_tars
from lib.tiny import arguments, call, write_images

SHARE = 0.2


def place_of(name: str) -> Fraction:
    """The number in [0, 1) of an image, exactly."""
    return Fraction(int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big"), 2**64)


def names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def labelled(source: Source) -> dict[str, int]:
    return dict(zip(names(source), source.labels, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders alone: 90 images of 3 classes."""
    return write_images(tmp_path_factory.mktemp("whole"), train=90, val=0) / "train"


def in_root(whole: Path, place: Path) -> Path:
    return whole


def of_train_alone(whole: Path, place: Path) -> Path:
    (place / "train").symlink_to(whole)
    return place


def packed(whole: Path, place: Path) -> Path:
    assert call(prepare.main, "pack", str(whole), str(place / "pack")) == 0
    return place / "pack"


def listed(whole: Path, place: Path) -> Path:
    for name in ("ant", "bee", "cat"):
        (place / name).symlink_to(whole / name)
    rows = [f"{path.relative_to(whole)},{path.parent.name}" for path in whole.glob("*/*.jpg")]
    (place / "images.csv").write_text("\n".join(["path,label", *rows]))
    return place


def in_tars(whole: Path, place: Path) -> Path:
    write_tars(whole.parent, place)
    for empty in place.glob("val-*"):
        empty.unlink()
    return place


def in_parquet(whole: Path, place: Path) -> Path:
    write_parquets(whole.parent, place)
    for empty in (place / "data").glob("validation-*"):
        empty.unlink()
    return place


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {
    "root": in_root,
    "train": of_train_alone,
    "pack": packed,
    "table": listed,
    "tars": in_tars,
    "parquet": in_parquet,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_divided_by_the_rule(
    layout: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Labels are torchvision's, and the order that of the whole; both parts read, locate and name their own images."""
    import torchvision

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "place").mkdir()
    place = DataConfig(
        root=str(LAYOUTS[layout](whole, tmp_path / "place")), labels="images.csv" if layout == "table" else ""
    )
    oracle = torchvision.datasets.ImageFolder(str(whole))
    labels = {Path(path).read_bytes(): label for path, label in oracle.samples}
    config = replace(place, val_share=SHARE)
    source, (training, val) = open_split(place, "train"), find_dataset(config)
    assert names(val) == [name for name in names(source) if place_of(name) < SHARE] and 5 < len(val) < 40
    assert names(training) == [name for name in names(source) if place_of(name) >= SHARE]
    assert training.classes == val.classes == tuple(oracle.classes)
    found = {part.read(index): label for part in (training, val) for index, label in enumerate(part.labels)}
    assert found == labels and len(labels) == 90
    assert all(read_at(part.locate(index)) in labels for part in (training, val) for index in (0, len(part) - 1))
    if layout != "parquet":  # its names are of rows
        assert names(source) == [str(Path(path).relative_to(whole)) for path, _ in oracle.samples]
    assert names(open_split(config, "val")) == names(val) and names(open_split(config, "train")) == names(training)
    assert len(open_split(replace(place, val_share=1), "val")) == 90
    limited, same = find_dataset(replace(config, limit_per_class=5))
    assert names(limited) == names(limit_classes(training, 5)) and same.fingerprint() == val.fingerprint()
    assert labelled(find_dataset(replace(config, class_order="natural"))[0]) == labelled(training)


def test_added_images_move_none_that_are_there(whole: Path, tmp_path: Path) -> None:
    root = shutil.copytree(whole, tmp_path / "copy")
    config = DataConfig(root=str(root), val_share=SHARE)
    before = [set(names(part)) for part in find_dataset(config)]
    write_images(tmp_path / "more", train=300, val=0)
    for path in (tmp_path / "more" / "train").rglob("*.jpg"):
        shutil.copy(path, root / path.parent.name / f"new-{path.name}")
    after = [set(names(part)) for part in find_dataset(config)]
    assert all(old < new for old, new in zip(before, after, strict=True))


def test_the_order_of_the_classes_relabels_both_parts(tmp_path: Path) -> None:
    root = write_images(tmp_path, train=60, val=0, classes=("1", "2", "10")) / "train"
    natural, code = (
        find_dataset(DataConfig(root=str(root), val_share=SHARE, class_order=order))
        for order in ("natural", "codepoint")
    )
    for ours, theirs in zip(natural, code, strict=True):
        assert names(ours) == names(theirs) and ours.classes == ("1", "2", "10")
        assert [ours.classes[label] for label in ours.labels] == [theirs.classes[label] for label in theirs.labels]
        assert ours.fingerprint() != theirs.fingerprint()


def small(root: Path, counts: dict[str, int]) -> Path:
    write_images(root / "made", train=1, val=0)
    (image,) = (root / "made").rglob("*.jpg")
    for name, count in counts.items():
        (root / "small" / name).mkdir(parents=True)
        for index in range(count):
            shutil.copy(image, root / "small" / name / f"{index}.jpg")
    return root / "small"


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
def test_every_class_has_an_image_in_each_part(share: float, tmp_path: Path) -> None:
    """Where the rule leaves a class none, that of the least hash is held out, or that of the greatest is not."""
    root = small(tmp_path, {f"class {number}": 2 + number for number in range(5)})
    training, val = find_dataset(DataConfig(root=str(root), val_share=share))
    for name in training.classes:
        images = sorted((one for one in names(training) + names(val) if one.startswith(name)), key=place_of)
        count = min(max(sum(place_of(one) < share for one in images), 1), len(images) - 1)
        assert sorted(images[:count]) == sorted(one for one in names(val) if one.startswith(name))


def test_bad_images_count_for_none(tmp_path: Path) -> None:
    """The rule places them, but neither the guarantee nor a limit takes one for an image, and one good image is too few."""
    root = small(tmp_path, {"a": 6, "b": 2})
    bad = sorted((f"a/{index}.jpg" for index in range(6)), key=place_of)[:4]
    write_quarantine(root, dict.fromkeys(bad, "torn"))
    training, val = find_dataset(DataConfig(root=str(root), val_share=1e-9))
    good = [name for name in names(val) if name not in bad and name.startswith("a/")]
    assert len(good) == 1 and set(bad) <= set(names(training))
    assert [training.name(index) for index in training.bad] == sorted(bad)
    limited, _ = find_dataset(DataConfig(root=str(root), val_share=1e-9, limit_per_class=5))
    assert not limited.bad and not set(names(limited)) & set(bad)
    write_quarantine(root, dict.fromkeys([*bad, good[0]], "torn"))
    with pytest.raises(
        DataError, match=r"data\.val_share = 1e-09: class a of .* has one good image.*; add images to it"
    ):
        find_dataset(DataConfig(root=str(root), val_share=1e-9))


@pytest.mark.parametrize("most", [1, 5, 29, 30, 1000])
def test_a_limit_takes_the_least_hashes_of_each_class(most: int, whole: Path) -> None:
    source = open_split(DataConfig(root=str(whole)), "train")
    found = names(limit_classes(source, most))
    by_class = [[name for name in names(source) if name.startswith(one)] for one in source.classes]
    least = [name for images in by_class for name in sorted(images, key=place_of)[:most]]
    assert found == sorted(least) and set(found) <= set(names(limit_classes(source, most + 1)))
    training, val = find_dataset(DataConfig(root=str(whole), val_share=SHARE, limit_per_class=most))
    rest, held = hold_out(source, SHARE)
    assert names(val) == names(held) and names(training) == names(limit_classes(rest, most))
    assert len(open_split(DataConfig(root=str(whole), limit_per_class=most), "train")) == 3 * min(most, 30)


def with_val(whole: Path, tmp_path: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(whole)
    return tmp_path


def val_alone(whole: Path, tmp_path: Path) -> Path:
    (tmp_path / "val").symlink_to(whole)
    return tmp_path


WAYS = r"hold out a share of its images by --data\.val-share 0\.1 .*, or .* `fasttricks data split DIR OUT`"
REFUSED: dict[str, tuple[Callable[[Path, Path], Path], float, str]] = {
    "class folders, no share": (in_root, 0, rf"holds no val/ \(there is ant, bee, cat\); {WAYS}"),
    "train alone, no share": (of_train_alone, 0, rf"holds no val/ \(there is train\); {WAYS}"),
    "a pack of train, no share": (packed, 0, rf"holds no val/ \(there is train\); {WAYS}"),
    "val alone": (val_alone, 0, r"holds no train/ \(there is val\); the layout is"),
    "all of it": (in_root, 1, r"data\.val_share = 1: must be below 1 for training"),
    "a val of its own": (with_val, 0.1, r"data\.val_share = 0\.1: .* has one; leave it out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_contradiction_is_named_before_any_list_is_read(case: str, whole: Path, tmp_path: Path) -> None:
    make, share, message = REFUSED[case]
    config = DataConfig(root=str(make(whole, tmp_path)), val_share=share)
    for ask in (lambda: require_place(config, "train", "val"), lambda: find_dataset(config)):
        with pytest.raises(DataError, match=message):
            ask()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"data\.val_share = .*: must be 0 \(off\) to 1"):
        DataConfig(val_share=share)


def test_ranks_see_one_split_and_a_loader_resumes_within_it(whole: Path) -> None:
    config = DataConfig(root=str(whole), val_share=SHARE, limit_per_class=10, image_size=16, val_resize=16, threads=1)
    training, val = find_dataset(config)
    options = {"device": torch.device("cpu"), "batch_size": 4}
    for ranks in (1, 2, 3, 4):
        for source, is_training in ((training, True), (val, False)):
            loaders = [
                Loader(source, config, training=is_training, rank=rank, world_size=ranks, **options)  # type: ignore[arg-type]
                for rank in range(ranks)
            ]
            seen = [image for loader in loaders for batch in loader for image in batch.places.tolist()]
            assert sorted(seen) == list(range(len(source)))
    first, again = (Loader(training, config, training=True, **options) for _ in range(2))  # type: ignore[arg-type]
    steps = iter(first)
    next(steps)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for one, other in zip(steps, again, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    moved = find_dataset(DataConfig(root=str(whole), val_share=SHARE / 2))[0]
    with pytest.raises(DataError, match="the saved position has files"):
        Loader(moved, config, training=True, **options).load_state_dict(first.state_dict())  # type: ignore[arg-type]


def test_a_run_holds_out_says_so_and_is_evaluated_alike(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, more = tmp_path / "run", ["--data.limit-per-class", "10", "--global-batch-size", "8", "--epochs", "1"]
    begun = arguments(whole, run, "--data.val-share", "0.2", *more)
    assert call(train.main, *begun) == 0
    held = len(hold_out(open_split(DataConfig(root=str(whole)), "train"), 0.2)[1])
    out = capsys.readouterr().out
    counts = f"30 training and {held} validation images (held out: data.val_share 0.2)"
    assert f"{counts} (at most 10 a class for training: data.limit_per_class) of 3 classes in {whole}" in out
    summary = json.loads((run / "summary.json").read_text())

    def evaluated(*args: str) -> tuple[int, str]:
        code = call(evaluate.main, str(run), *args)
        shown = capsys.readouterr()
        return code, shown.out + shown.err

    (tmp_path / "link").symlink_to(whole)
    for same in ([], ["--data.root", str(whole)], ["--data.root", str(tmp_path / "link")]):
        assert (
            evaluated(*same) == (0, evaluated()[1])
            and f"loss {summary['val_loss']:.4f}  {held} images" in evaluated()[1]
        )
    other = shutil.copytree(whole, tmp_path / "other")
    assert evaluated("--data.root", str(other))[0] == 2 and "holds no val/" in evaluated("--data.root", str(other))[1]
    assert "  90 images  " in evaluated("--data.root", str(other), "--data.val-share", "1")[1]
    (tmp_path / "both").mkdir()
    assert "  90 images  " in evaluated("--data.root", str(with_val(whole, tmp_path / "both")))[1]
    # resumed: with another share or limit refused by the field's name
    again = arguments(whole, run, "--data.val-share", "0.3", *more, "--resume")
    assert call(train.main, *again) == 2 and "data.val_share: 0.2 -> 0.3" in capsys.readouterr().err


def test_a_fitted_recipe_counts_the_images_that_are_left(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, counts = {"data.root": str(whole), "data.val_share": "0.2", "data.limit_per_class": "2"}, []
    monkeypatch.setitem(FITTED, "finetune", lambda images: (counts.append(images), finetune())[1])
    for left_out in ("", "data.limit_per_class"):
        given.pop(left_out, "")
        fit_recipe("finetune", lambda path: given.get(path, ""))
    assert counts == [6, 90 - len(open_split(DataConfig(root=str(whole), val_share=0.2), "val"))]


def test_a_split_written_down_is_the_split_held_out(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By names, labels, bad images and fingerprint, so that a run may change over; through relative links that hold."""
    root = shutil.copytree(whole, tmp_path / "images")
    held_out = DataConfig(root=str(root), val_share=0.1)
    one, other = (part.name(3) for part in find_dataset(held_out))
    write_quarantine(root, {one: "torn", other: "grey"})
    (root / "ant" / "none.jpg").write_text("no image")
    (tmp_path / "place").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "place")
    out = tmp_path / "way" / "out"
    assert call(prepare.main, "split", str(root), str(out)) == 0
    said = capsys.readouterr().out
    links = list(out.rglob("*.jpg"))
    assert len(links) == 91 and all(link.is_symlink() and not os.path.isabs(os.readlink(link)) for link in links)
    for ours, theirs in zip(find_dataset(held_out), find_dataset(DataConfig(root=str(out))), strict=True):
        assert (labelled(ours), names(ours), dict(ours.bad)) == (labelled(theirs), names(theirs), dict(theirs.bad))
        assert ours.fingerprint() == theirs.fingerprint() and ours.bad
        assert [ours.read(index) for index in range(len(ours))] == [theirs.read(index) for index in range(len(theirs))]
        assert f"{len(ours)} links" in said or f"{len(ours)} to validation images of 3 classes" in said
    assert (out / "quarantine.jsonl").is_file() and not list((tmp_path / "place").glob(".*"))
    # the same command again
    assert call(prepare.main, "split", str(root), str(out)) == 2
    assert "out: holds something; give a new folder or an empty one" in capsys.readouterr().err
    (tmp_path / "place").rename(tmp_path / "moved")  # with the images where they were
    assert len(find_dataset(DataConfig(root=str(tmp_path / "moved" / "out")))[0]) > 60


def test_a_pack_with_a_share_has_both_splits(whole: Path, tmp_path: Path) -> None:
    assert call(prepare.main, "pack", str(whole), str(tmp_path / "pack"), "--val-share", "0.2") == 0
    assert call(prepare.main, "check", str(tmp_path / "pack")) == 0
    held_out = find_dataset(DataConfig(root=str(whole), val_share=0.2))
    for ours, theirs in zip(held_out, find_dataset(DataConfig(root=str(tmp_path / "pack"))), strict=True):
        assert (labelled(ours), ours.fingerprint()) == (labelled(theirs), theirs.fingerprint())


NOT_WRITTEN: dict[str, tuple[Callable[[Path, Path], Path], str, list[str], str]] = {
    "a pack": (
        packed,
        "out",
        [],
        "is a part of a file, to which no link leads; write the split down by `fasttricks data pack",
    ),
    "a val of its own": (with_val, "out", [], "has one; leave it out"),
    "out within": (of_train_alone, "inside", [], "must not lie in DIR"),
    "a killed one before": (
        in_root,
        "killed",
        [],
        ".killed.partial: another split makes it, or was killed; remove it if",
    ),
    "no share": (in_root, "out", ["--val-share", "0"], "val_share = 0.0: must be above 0 and below 1"),
    "a file in its way": (in_root, "file", [], "file: holds something"),
    "a file above": (in_root, "file/out", [], "the links cannot be written (File exists); give another OUT"),
}


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_a_split_that_cannot_be_written_leaves_nothing(
    case: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, out, more, message = NOT_WRITTEN[case]
    (tmp_path / "place").mkdir()
    root = make(whole, tmp_path / "place")
    (tmp_path / ".killed.partial").mkdir()
    (tmp_path / "file").touch()
    place = root if out == "inside" else tmp_path
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert call(prepare.main, "split", str(root), str(place / out), *more) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before
