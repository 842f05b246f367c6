"""Webdataset's tars read in place: the same data set as the folder, an index that is kept, and errors by name."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fasttricks.config import DataConfig
from fasttricks.data.sources import webdataset
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import scan_folder
from fasttricks.data.sources.webdataset import TarImages, is_webdataset, open_webdataset, webdataset_holds
from lib.hostile import NO_FILES, Change
from lib.images import JPEG
from lib.layouts import tar_of, write_tars


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fasttricks"


def opened(root: Path, split: str = "train", classes: tuple[str, ...] | None = None) -> TarImages:
    return open_webdataset(DataConfig(root=str(root)), split, classes)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("numbers", [False, True])
def test_tars_are_the_data_set_of_the_folder(numbers: bool, shards: int, tiny_data: Path, tmp_path: Path) -> None:
    write_tars(tiny_data, tmp_path, numbers=numbers, shards=shards)
    train = opened(tmp_path)
    for found, split in ((train, "train"), (opened(tmp_path, "val", train.classes), "val")):
        folder = scan_folder(tiny_data / split)
        assert found.fingerprint() == folder.fingerprint() and found.classes == folder.classes and found.bad == {}
        assert [found.read(at) for at in range(len(found))] == [folder.read(at) for at in range(len(folder))]
        assert found.numbered == numbers


def test_the_index_is_made_once_and_again_where_a_tar_changes_or_it_is_damaged(
    tiny_data: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []
    read = webdataset._read_shard
    monkeypatch.setattr(webdataset, "_read_shard", lambda path: made.append(path) or read(path))
    write_tars(tiny_data, tmp_path)
    first = opened(tmp_path)
    assert opened(tmp_path).fingerprint() == first.fingerprint() and len(made) == 2
    os.utime(tmp_path / "train-0001.tar", (1, 1))
    opened(tmp_path)
    assert len(made) == 4
    for kept in cache.glob("*.npz"):
        kept.write_bytes(kept.read_bytes()[:-100])
    with pytest.warns(UserWarning, match=r"webdataset-\w+.npz: damaged \(its checksum fails\); it is made again"):
        again = opened(tmp_path)
    assert (again.fingerprint(), len(made)) == (first.fingerprint(), 6)
    assert not [path for path in cache.iterdir() if path.suffix != ".npz"], "neither locks nor parts"


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        ([10, 2, 2, 0], "", ("0", "2", "10")),
        ([1, 0, 1, 1], "zebra\nape\n", ("zebra", "ape")),
        (["b", "a", "c", "a"], "", ("a", "b", "c")),
        (["b", "a", "a", "a"], "b\na\n", ("b", "a")),
    ],
)
def test_classes_are_in_the_order_of_their_numbers(
    labels: list[int | str], names: str, classes: tuple[str, ...], tmp_path: Path
) -> None:
    if names:
        (tmp_path / "classes.txt").write_text(names)
    samples = [
        pair for at, label in enumerate(labels) for pair in ((f"{at}.cls", str(label).encode()), (f"{at}.jpg", JPEG))
    ]
    (tmp_path / "train.tar").write_bytes(tar_of(samples))
    found = opened(tmp_path)
    assert found.classes == classes and found.numbered == (names != "" or isinstance(labels[0], int))
    names_of = names.split() if names else None
    for at, label in enumerate(labels):
        name = names_of[label] if names_of and isinstance(label, int) else str(label)
        assert found.classes[found.labels[found.files.index(f"{name}/{at}.jpg")]] == name


def test_members_that_are_not_read_are_named_and_bad_images_are_bad(tmp_path: Path) -> None:
    long = "deep/" * 60 + "äöü"
    members = [
        ("README", b"hello"),
        (f"{long}.CLS", b"1"),
        (f"{long}.JPG", JPEG),
        (f"{long}.seg.png", JPEG),
        ("../../etc/passwd.cls", b"0"),
        ("../../etc/passwd.jpg", JPEG),
        ("/absolute.json", b'{"cls": 0, "label": 1}'),
        ("/absolute.webp", b"RIFF"),
        ("empty.cls", b"0"),
        ("empty.png", b""),
    ]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (tmp_path / "train.tar").write_bytes(tar_of(members, format=form))
        with pytest.warns(UserWarning, match="train: not read: 1 .seg.png, 1 without a name before and after a dot"):
            found = opened(tmp_path)
        assert found.files == ("0/../../etc/passwd.jpg", "0/empty.png", "1//absolute.webp", f"1/{long}.JPG")
        assert {found.name(at): why for at, why in found.bad.items()} == {
            "0/empty.png": "0 bytes long",
            "1//absolute.webp": "no image: first bytes b'RIFF'",
        }
        assert found.read(3) == found.read(0) == JPEG


def test_which_tars_are_of_which_split(tiny_data: Path, tmp_path: Path) -> None:
    def splits(*names: str) -> list[str]:
        root = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(b"")
        config = DataConfig(root=str(root))
        return [split for split in ("train", "val") if is_webdataset(config, split) and webdataset_holds(config, split)]

    assert splits("imagenet1k-train-0000.tar", "imagenet1k-validation-0000.tar") == ["train", "val"]
    assert splits("train/0000.tar", "val/0000.tar") == ["train", "val"]
    assert splits("train.tar") == ["train"]
    assert splits("trains.tar", "images.tar", "vale.tar") == []
    assert splits("train/ant/1.jpg", "val/ant/1.jpg", "train.tar", "val.tar") == [], "unpacked beside their archives"
    assert splits("train-0.tar", "val/ant/1.jpg") == ["train"], "val is a folder of class folders"
    with pytest.warns(UserWarning, match="its split test is taken for validation"):
        assert splits("train-0.tar", "test-0.tar") == ["train", "val"]
    with pytest.raises(DataError, match=r"train-val-0.tar: the name has the splits train and val; leave one in it"):
        splits("train-val-0.tar")
    for ending in (".tar.gz", ".tgz", ".tar.zst"):
        with pytest.raises(DataError, match=f"train-0{ending}: compressed, .*; unpack it once"):
            splits(f"train-0{ending}")


# ------------------------------------------------------------------------------------------------------- wrong samples
def tar(*members: tuple[str, bytes], classes: str = "") -> Change:
    """A folder with one tar, train-0.tar, of a good sample and these."""

    def change(root: Path) -> None:
        (root / "train-0.tar").write_bytes(tar_of([("good.jpg", JPEG), ("good.cls", b"0"), *members]))
        if classes:
            (root / "classes.txt").write_text(classes)

    return change


def typed(kind: bytes, **fields: object) -> Change:
    """A tar with a member of that type."""

    def change(root: Path) -> None:
        info = tarfile.TarInfo("x.jpg")
        info.type = kind
        for name, value in fields.items():
            setattr(info, name, value)
        with tarfile.open(root / "train-0.tar", "w") as opened:
            opened.addfile(info)

    return change


def harmed(harm: Callable[[bytes], bytes]) -> Change:
    """A tar of three samples, changed."""

    def change(root: Path) -> None:
        tar(("a.jpg", JPEG), ("a.cls", b"1"), ("b.jpg", JPEG), ("b.cls", b"1"))(root)
        path = root / "train-0.tar"
        path.write_bytes(harm(path.read_bytes()))

    return change


def second(*members: tuple[str, bytes]) -> Change:
    def change(root: Path) -> None:
        tar()(root)
        (root / "train-1.tar").write_bytes(tar_of(members))

    return change


def size_of(claimed: bytes) -> Callable[[bytes], bytes]:
    """The first header with another size and the checksum that belongs to it."""

    def harm(whole: bytes) -> bytes:
        header = bytearray(whole[:512])
        header[124:136] = claimed
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        return bytes(header) + whole[512:]

    return harm


def long_header(kind: bytes, size: int) -> Change:
    """A long name, or a pax header, of 8 GiB, as a hole in the file."""

    def change(root: Path) -> None:
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, size
        (root / "train-0.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT))
        os.truncate(root / "train-0.tar", size + 2048)

    return change


_PAX = tarfile.TarInfo("x.jpg")
_PAX.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x.jpg"}
_NUL = tarfile.TarInfo("x.cls")


def nul_name(root: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as opened:
        for name, held in (("x\0y.cls", b"1"), ("x\0y.jpg", JPEG)):
            info = tarfile.TarInfo(name.replace("\0", ""))
            info.size, info.pax_headers = len(held), {"path": name}
            opened.addfile(info, io.BytesIO(held))
    (root / "train-0.tar").write_bytes(buffer.getvalue())


WRONG: dict[str, tuple[Change, str]] = {
    "no label": (tar(("a.jpg", JPEG)), "train-0.tar: a: a sample with no label"),
    "no label in .json": (tar(("a.jpg", JPEG), ("a.json", b'{"id": 3}')), "train-0.tar: a: a sample with no label"),
    "no image": (tar(("a.cls", b"1")), "train-0.tar: a: a sample with no image"),
    "two images": (tar(("a.jpg", JPEG), ("a.png", JPEG)), "a: two images, a.jpg and a.png; name .* KEY.OTHER.png"),
    "a name twice": (tar(("good.jpg", JPEG)), "train-0.tar: good.jpg: good.jpg is there too"),
    "a name twice, in capitals": (tar(("good.CLS", b"1")), "train-0.tar: good.CLS: good.cls is there too"),
    "a key in two tars": (second(("good.jpg", JPEG), ("good.cls", b"1")), "train-1.tar: good: a sample .* train-0.tar too"),
    "a sample in two tars": (second(("x.jpg", JPEG)), "train-1.tar: x: a sample with no label"),
    "names beside numbers": (tar(("a.jpg", JPEG), ("a.cls", b"ant")), "good: label = 0 here, and 'ant' in .*: a; labels"),
    "an empty label": (tar(("a.jpg", JPEG), ("a.cls", b" \n")), "a.cls: label = '': must be a whole number, 0 or more"),
    "a negative label": (tar(("a.jpg", JPEG), ("a.cls", b"-1")), "a.cls: label = '-1': must be a whole number, 0 or more"),
    "a label with NUL": (tar(("a.jpg", JPEG), ("a.cls", b"a\0b")), "a.cls: label = 'a.x00b': must be"),
    "a label of 1 GB": (tar(("a.jpg", JPEG), ("a.cls", b"1" * 5000)), "a.cls: 5,000 bytes long, more than 4,096"),
    "a label of no UTF-8": (tar(("a.jpg", JPEG), ("a.cls", b"\xff")), "a.cls: .*can't decode byte 0xff"),
    "a true label": (tar(("a.jpg", JPEG), ("a.json", b'{"label": true}')), "a.json: label = True: must be a whole number"),
    "a list of labels": (tar(("a.jpg", JPEG), ("a.json", b'{"label": [1]}')), r"a.json: label = \[1\]: must be a whole"),
    "half a number": (tar(("a.jpg", JPEG), ("a.json", b'{"cls": 1.5}')), "a.json: label = 1.5: must be a whole number"),
    "no table": (tar(("a.jpg", JPEG), ("a.json", b"[1]")), "a.json: it = .*: must be a table"),
    "no JSON": (tar(("a.jpg", JPEG), ("a.json", b"{")), "a.json: Expecting"),
    "a label beyond the names": (tar(("a.jpg", JPEG), ("a.cls", b"2"), classes="x\ny\n"), "a: label = 2: must be one of the 2"),
    "a label of no name": (
        tar(("good2.jpg", JPEG), ("good2.cls", b"1"), classes="x\nx\n"),
        "classes.txt: the class name x stands twice in it",
    ),
    "a name of none": (
        lambda root: (
            (root / "train-0.tar").write_bytes(tar_of([("a.jpg", JPEG), ("a.cls", b"ant")])),
            (root / "classes.txt").write_text("aunt\nbee"),
        ),
        "a: label = 'ant': unknown; did you mean 'aunt'",
    ),
    "a gap in the names": (tar(classes="x\n\ny\n"), r"classes.txt: must hold the name .* \(label = '': must be"),
    "a link": (typed(tarfile.SYMTYPE, linkname="/etc/passwd"), "x.jpg: a link, a device, a pipe or sparse"),
    "a hard link": (typed(tarfile.LNKTYPE, linkname="good.jpg"), "x.jpg: a link, a device, a pipe or sparse"),
    "a device": (typed(tarfile.CHRTYPE), "x.jpg: a link, a device, a pipe or sparse"),
    "a pipe": (typed(tarfile.FIFOTYPE), "x.jpg: a link, a device, a pipe or sparse"),
    "sparse": (typed(tarfile.GNUTYPE_SPARSE), "x.jpg: a link, a device, a pipe or sparse"),
    "a NUL in a name": (nul_name, "a name with a NUL byte in it"),
    "no samples": (lambda root: (root / "train-0.tar").write_bytes(tar_of([])), "no sample in train-0.tar"),
    "empty": (lambda root: (root / "train-0.tar").write_bytes(b""), "train-0.tar: no tar, or cut or damaged .empty file"),
    "text": (lambda root: (root / "train-0.tar").write_bytes(b"hello" * 500), "train-0.tar: no tar, or cut or damaged"),
    "cut in a header": (harmed(lambda whole: whole[:700]), "no tar, or cut or damaged"),
    "cut in an image": (harmed(lambda whole: whole[: 512 + 40]), "good.jpg has .* bytes, more than follow"),
    "cut between members": (harmed(lambda whole: whole[: whole.rindex(b"b.jpg")]), "its end mark is missing; where it is whole"),
    "a harmed header": (harmed(lambda whole: whole.replace(b"a.jpg", b"A.jpg")), "no header at byte"),
    "another tar behind it": (harmed(lambda whole: whole + whole), "more follows its end mark at byte"),
    "compressed": (harmed(gzip.compress), r"train-0.tar: compressed; unpack it once \(gunzip\)"),
    "a size beyond the end": (harmed(size_of(b"77777777777\0")), "has 8,589,934,591 bytes, more than follow"),
    "a negative size": (harmed(size_of(b"\xff" * 12)), "no tar, or cut or damaged|more than follow"),
    "a name of 8 GiB": (long_header(tarfile.GNUTYPE_LONGNAME, 1 << 33), "a header of 8,589,934,592 bytes"),
    "a pax header of 8 GiB": (long_header(tarfile.XHDTYPE, 1 << 33), "a header of 8,589,934,592 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_tar_is_refused_by_name(kind: str, tmp_path: Path, cache: Path) -> None:
    change, said = WRONG[kind]
    root = tmp_path / "data"
    root.mkdir()
    change(root)
    with pytest.raises(DataError, match=said) as refused:
        opened(root)
    assert str(root) in str(refused.value) and len(str(refused.value)) < 1000
    assert not list(cache.iterdir()), "no index is left"


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "train-0.tar").write_bytes(tar_of([("good.jpg", JPEG), ("good.cls", b"0")]))
    (tmp_path / "train-1.tar").write_bytes(b"")
    change, said = NO_FILES[kind]
    change(tmp_path / "train-1.tar")
    if kind == "a folder":
        assert len(opened(tmp_path)) == 1, "a folder of that name is no tar"
    else:
        said = {"a link to nowhere": "No such file", "8 GiB": "more follows its end mark"}.get(
            kind, f"cannot be read .*{said}"
        )
        with pytest.raises(DataError, match=f"train-1.tar: .*{said}"):
            opened(tmp_path)


def test_a_class_that_train_lacks_and_one_without_good_images(tmp_path: Path) -> None:
    tar(("a.jpg", b"GIF89a"), ("a.cls", b"1"))(tmp_path)
    (tmp_path / "val-0.tar").write_bytes(tar_of([("v.jpg", JPEG), ("v.cls", b"7")]))
    with pytest.raises(DataError, match=r"val: 7/v.jpg: class 7 has no counterpart in train, which has 2 classes"):
        opened(tmp_path, "val", ("0", "1"))
    with pytest.raises(DataError, match=r"train: no image of class 1 can be used \(1/a.jpg: no image: first bytes"):
        opened(tmp_path)
    tar(classes="ant\nbee\ncat\n")(tmp_path)
    with pytest.warns(UserWarning, match=r"2 of 3 classes have no training image \(bee, cat\)"):
        assert opened(tmp_path).classes == ("ant", "bee", "cat")
    (tmp_path / "quarantine.jsonl").write_text('{"file": "train/ant/good.jpg", "reason": "blurred"}\n')
    with pytest.raises(DataError, match=r"no image of class ant can be used \(ant/good.jpg: quarantined: blurred\)"):
        opened(tmp_path)


def test_without_a_cache_the_error_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar()(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        DataError, match=r"its index cannot be written to the cache .*, or set XDG_CACHE_HOME to a folder"
    ):
        opened(tmp_path)
