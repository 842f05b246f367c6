"""One walk: what scan examines is what training takes, by the same names and with the same verdicts, whatever the tree."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import fasttricks.training.build  # noqa: F401 (before a test gives up the right to read its file)
from fasttricks.commands import data as prepare
from fasttricks.commands import train
from fasttricks.config import DataConfig
from fasttricks.data.packing import scan
from fasttricks.data.packing.scan import list_files
from fasttricks.data.sources import find_dataset
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import scan_folder
from fasttricks.data.sources.quarantine import write_quarantine
from lib.images import KINDS, encoded, smooth
from lib.tiny import arguments, call

NEVER_MADE = "/nowhere-of-the-tests"
DAMAGED = KINDS["damaged scan"].make()  # type: ignore[operator, call-arg]
"""A JPEG whose damage scan alone finds: training sees it by the quarantine list."""


def images(folder: Path, count: int = 2, *, damaged: bool = False) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(encoded(smooth("RGB", shift=9 * number)))
    if damaged:
        (folder / "d.jpg").write_bytes(DAMAGED)


def plain(root: Path) -> None:
    images(root / "train" / "a")
    images(root / "train" / "b", damaged=True)
    images(root / "val" / "b")


def linked_classes(root: Path) -> None:
    images(root / "all" / "a")
    images(root / "all" / "b", damaged=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        for name in "ab":
            (root / split / name).symlink_to(f"../all/{name}")


def two_links_to_one_folder(root: Path) -> None:
    images(root / "all", damaged=True)
    images(root / "val" / "b")
    (root / "train").mkdir()
    for name in "ab":
        (root / "train" / name).symlink_to("../all")


def val_is_train(root: Path) -> None:
    plain(root)
    shutil.rmtree(root / "val")
    (root / "val").symlink_to("train")


def splits_elsewhere(root: Path) -> None:
    plain(root.with_name("elsewhere"))
    root.mkdir()
    for split in ("train", "val"):
        (root / split).symlink_to(f"../elsewhere/{split}")


def linked_files(root: Path) -> None:
    plain(root)
    (root / "train" / "b" / "e.jpg").symlink_to("d.jpg")


def beside(root: Path) -> None:
    """What lies beside the splits is examined too, once."""
    plain(root)
    images(root / "test" / "deep" / "er", damaged=True)
    (root / "again").symlink_to("test")


def with_entry(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    """The plain data set and one entry more in train/b."""

    def build(root: Path) -> None:
        plain(root)
        make(root / "train" / "b" / name)

    return build


@dataclass
class Tree:
    """How to make it, and what scan and training must say of it."""

    make: Callable[[Path], None]
    bad: tuple[str, ...] = ("train/b/d.jpg",)
    """Images that are not used, by the path that training uses."""
    refused: str = ""
    """What training refuses it for."""
    beside: int = 0
    """Images that are none of training's."""
    beside_bad: tuple[str, ...] = ()


def to(place: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(place)


B = "train/b/"
TREES = {
    "plain": Tree(plain),
    "class folders that are links": Tree(linked_classes, ("train/b/d.jpg", "val/b/d.jpg")),
    "two links to one folder": Tree(two_links_to_one_folder, ("train/a/d.jpg", "train/b/d.jpg")),
    "val -> train": Tree(val_is_train, ("train/b/d.jpg", "val/b/d.jpg")),
    "splits elsewhere": Tree(splits_elsewhere),
    "a link to a damaged file": Tree(linked_files, (B + "d.jpg", B + "e.jpg")),
    "folders beside": Tree(beside, beside=3, beside_bad=("again/deep/er/d.jpg",)),
    "a link up": Tree(with_entry("up", to("..")), refused="b/up is a folder inside a class folder"),
    "a link to itself": Tree(with_entry("up", to("."),), refused="b/up is a folder inside a class folder"),
    "a link up, named as an image": Tree(with_entry("up.jpg", to("..")), (B + "d.jpg", B + "up.jpg")),
    "a circle, named as an image": Tree(with_entry("l.jpg", to("l.jpg")), (B + "d.jpg", B + "l.jpg")),
    "a circle": Tree(with_entry("circle", to("circle"))),
    "dangling, named as an image": Tree(with_entry("no.jpg", to("nowhere")), (B + "d.jpg", B + "no.jpg")),
    "dangling": Tree(with_entry("notes", to("nowhere"))),
    "a folder named as an image": Tree(with_entry("f.jpg", Path.mkdir), (B + "d.jpg", B + "f.jpg")),
    "a folder": Tree(with_entry("f", Path.mkdir), refused="b/f is a folder inside a class folder"),
    "a pipe, named as an image": Tree(with_entry("p.jpg", os.mkfifo), (B + "d.jpg", B + "p.jpg")),
    "a pipe": Tree(with_entry("pipe", os.mkfifo)),
    "text": Tree(with_entry("notes.txt", lambda path: path.write_text("no image"))),
    "hidden": Tree(with_entry(".d.jpg", lambda path: path.write_bytes(DAMAGED))),
    "lost and found": Tree(with_entry("lost+found", Path.mkdir)),
    "a name without an end": Tree(with_entry("d", lambda path: path.write_bytes(DAMAGED)), (B + "d", B + "d.jpg")),
}  # fmt: skip


@pytest.fixture
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scan's processes as threads: a table of trees would take a second each to start them."""
    monkeypatch.setattr(scan, "worker_pool", ThreadPoolExecutor)


def prefixed(source: object, split: str) -> dict[str, bool]:
    """The images of a split by their path in the data set, and whether training uses them."""
    return {f"{split}/{source.name(i)}": i not in source.bad for i in range(len(source))}  # type: ignore[attr-defined, arg-type]


def opened(root: Path) -> tuple[dict[str, bool], list[str]]:
    """All images of both splits, and the fingerprints that a stopped run goes on by."""
    sources = dict(zip(("train", "val"), find_dataset(DataConfig(root=str(root))), strict=True))
    found = {name: used for split, source in sources.items() for name, used in prefixed(source, split).items()}
    return found, [source.fingerprint() for source in sources.values()]


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("name", TREES)
def test_scan_then_training(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_threads: None) -> None:
    """Scan of the data set, of a split, of its class folders: the list, the count and the images that training then uses."""
    tree, root = TREES[name], tmp_path / "data"
    tree.make(root)
    before = None if tree.refused else opened(root)
    for place in ("", "train", "train/b"):
        assert call(prepare.main, "scan", str(root / place), "--workers", "1") == 0
        last = capsys.readouterr().out.splitlines()[-1]
        listed = [json.loads(line)["file"] for line in (root / place / "quarantine.jsonl").read_text().splitlines()]
        wanted = [*tree.bad, *([] if place else tree.beside_bad)]
        inside = f"{place}/" if place else ""
        assert listed == sorted(bad.removeprefix(inside) for bad in wanted if bad.startswith(inside)), place
        if before is None:
            with pytest.raises(DataError, match=tree.refused):
                find_dataset(DataConfig(root=str(root)))
        else:
            mine = [image for image in before[0] if image.startswith(inside)]
            assert last.startswith(f"{len(listed)} of {len(mine) + (0 if place else tree.beside)} images are bad")
            found, fingerprints = opened(root)
            assert fingerprints == before[1], "a stopped run could not go on"
            assert found.keys() == before[0].keys()
            # val is train, or of the same folders, where a list of train is honoured for val too
            unused = {image for image, used in found.items() if not used}
            assert {image for image in unused if image.startswith(inside)} == {
                i for i in tree.bad if i.startswith(inside)
            }
        (root / place / "quarantine.jsonl").unlink()


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_list_that_names_no_images_changes_no_data_set(tmp_path: Path) -> None:
    """As a scan of an earlier release wrote it of dangling links: a stopped run goes on."""
    root = tmp_path / "data"
    plain(root)
    (root / "train" / "b" / "notes").symlink_to("nowhere")
    (root / "train" / "b" / "text").write_text("no image")
    before = opened(root)
    write_quarantine(root, {"train/b/notes": "unreadable", "train/b/text": "x", "train/b/gone.jpg": "x", "val": "x"})
    assert opened(root) == before


@pytest.mark.parametrize("place", ["", "train", "train/b"])
def test_lists_besides_that_of_a_scan_are_named(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], in_threads: None
) -> None:
    """Those of earlier scans of other parts, above and below: what they list is not used, whatever this scan says."""
    root = tmp_path / "data"
    plain(root)
    images(root / "test")
    for folder in ("", "train", "train/b", "test"):
        write_quarantine(root / folder, {"no.jpg": "x"})
    assert call(prepare.main, "scan", str(root / place), "--workers", "1") == 0
    shown = capsys.readouterr().out
    for folder in ("", "train", "train/b"):
        assert (f"training honours {root / folder / 'quarantine.jsonl'} too" in shown) == (folder != place), shown
    assert shown.count("note: ") == 2


def test_any_tree_is_walked(tmp_path: Path) -> None:
    """Three levels by each name, as one of them may be class folders; deeper, each folder once in each; no circle without end."""
    images(tmp_path / "tree" / "1" / "2" / "3" / "4")
    (tmp_path / "tree" / "1" / "2" / "3" / "again").symlink_to("4")
    (tmp_path / "tree" / "1" / "2" / "3" / "up").symlink_to(tmp_path / "tree")
    (tmp_path / "tree" / "b").symlink_to("1/2/3/4")
    images(tmp_path / "tree" / "photos.jpg")
    images(tmp_path / "tree" / "5" / "6" / "7" / "8")
    wanted = [f"{folder}/{number}.jpg" for folder in ("1/2/3/4", "5/6/7/8", "b", "photos.jpg") for number in range(2)]
    assert list_files(tmp_path / "tree") == wanted


# --------------------------------------------------------------------------------------------- folders that cannot be read
@contextmanager
def closed(root: Path, folder: str, mode: int) -> Iterator[None]:
    """`folder` with that mode, for a user who is not root; the current folder is `root`, as its parents may be closed to him."""
    before, user = Path.cwd(), os.geteuid()
    os.chdir(root)
    os.chmod(folder, mode)
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)
        os.chmod(folder, 0o755)
        os.chdir(before)


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
@pytest.mark.parametrize("folder", [".", "train", "train/b"])
def test_a_folder_that_cannot_be_read_is_named(
    folder: str, mode: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the kernel's word, to a user who is not root: by scan, by pack and by training, with the way out."""
    root = tmp_path / "data"
    plain(root)
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    commands = {
        "scan": lambda: call(prepare.main, "scan", ".", "--workers", "1"),
        "pack": lambda: call(prepare.main, "pack", ".", NEVER_MADE),
        "train": lambda: call(train.main, *arguments(Path(), Path(NEVER_MADE))),
    }
    for name, command in commands.items():
        if name != "scan" and (folder, mode) == (".", 0o111):
            continue  # both splits can be read
        with closed(root, folder, mode):
            code = command()
        captured = capsys.readouterr()
        assert code == 2 and "good" not in captured.out, name
        assert "Traceback" not in captured.err and captured.err.count("\n") == 1, (name, captured.err)
        assert "chmod u+rx" in captured.err and "Permission denied" in captured.err, (name, captured.err)
        assert folder in captured.err
    assert not Path(NEVER_MADE).exists() and not (root / "quarantine.jsonl").exists()


def test_a_class_folder_that_fails_otherwise_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a disk or a server does."""
    plain(tmp_path / "data")
    whole = os.scandir

    def failing(path: str) -> object:
        if str(path).endswith("train/b"):
            raise OSError(5, "Input/output error")
        return whole(path)

    monkeypatch.setattr(os, "scandir", failing)
    for ask in (lambda: list_files(tmp_path / "data"), lambda: scan_folder(tmp_path / "data" / "train")):
        with pytest.raises(DataError, match=r"train/b: Input/output error; its disk or server does not answer"):
            ask()
