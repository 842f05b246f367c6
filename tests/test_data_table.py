"""Images that a CSV or TSV lists: the data set of the class folders that it describes, or an error that names the line."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from fasttricks.config import DataConfig
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import ImageFolder, scan_folder
from fasttricks.data.sources.table import open_table, read_table, table_holds
from lib.hostile import NO_FILES
from lib.layouts import write_table

HEADER = b"path,label,split\n"


def opened(file: Path, split: str, classes: tuple[str, ...] | None = None, root: Path | None = None) -> ImageFolder:
    return open_table(DataConfig(root=str(root or file.parent), labels=str(file)), split, classes)


def crlf(text: str) -> bytes:
    return b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()


def turned(text: str) -> bytes:
    """The columns the other way round, with one more; the header has capitals and spaces; an empty line at the end."""
    rows = [row[::-1] for row in csv.reader(io.StringIO(text))]
    lines = [
        "split,Label, PATH ,note",
        *(f'{split},{label},{path},"of ""{label}"", at\nnoon"' for split, label, path in rows[1:]),
    ]
    return ("\n".join(lines) + "\n\n").encode()


def words(text: str) -> bytes:
    return text.replace(",val", ",Validation").replace(",train", ",training").encode()


def dotted(text: str) -> bytes:
    return text.replace("train/ant", "./train//./ant").encode()


FORMS: dict[str, Callable[[str], bytes]] = {
    "as written": str.encode,
    "BOM, CRLF": crlf,
    "quotes": lambda text: "".join(
        f'"{line.replace(",", chr(34) + "," + chr(34))}"\n' for line in text.splitlines()
    ).encode(),
    "other columns": turned,
    "words for the splits": words,
    "paths with dots": dotted,
    "no new line at the end": lambda text: text.rstrip("\n").encode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_the_data_set_of_the_folders_that_it_describes(form: str, tiny_data: Path, tmp_path: Path) -> None:
    file = write_table(tiny_data, tmp_path / "images.csv", lineterminator="\n")
    file.write_bytes(FORMS[form](file.read_text()))
    if form == "other columns":
        with pytest.warns(UserWarning, match="reads the columns path, label, split, and not note"):
            train = opened(file, "train")
    else:
        train = opened(file, "train")
    val = opened(file, "val", train.classes)
    for found, split in ((train, "train"), (val, "val")):
        folder = scan_folder(tiny_data / split)
        assert (found.files, found.labels, found.classes) == (folder.files, folder.labels, folder.classes)
        assert found.fingerprint() == folder.fingerprint() and found.bad == {}
        assert [found.read(at) for at in range(len(found))] == [folder.read(at) for at in range(len(folder))]


def test_tabs_no_split_and_paths_outside_of_the_splits(tiny_data: Path, tmp_path: Path) -> None:
    file = write_table(tiny_data, tmp_path / "images.tsv")
    rows = [line.split("\t")[:2] for line in file.read_text().splitlines()]
    file.write_text("".join("\t".join(row) + "\n" for row in rows))
    (tmp_path / "tables").mkdir()
    file = file.rename(tmp_path / "tables" / "all.tsv")
    config = DataConfig(root=str(tmp_path), labels="tables/all.tsv")
    assert table_holds(config, "train") and not table_holds(config, "val")
    everything = open_table(config, "train", None)
    folders = [scan_folder(tiny_data / split) for split in ("train", "val")]
    assert len(everything) == sum(map(len, folders)) and everything.root == tmp_path
    assert everything.files == tuple(sorted(everything.files, key=lambda name: (name.split("/")[1], name)))
    assert {everything.name(at) for at in range(len(everything))} == {
        f"{folder.root.name}/{name}" for folder in folders for name in folder.files
    }


def test_a_missing_file_is_bad_and_quarantine_lists_count(tiny_data: Path, tmp_path: Path) -> None:
    file = write_table(tiny_data, tmp_path / "images.csv")
    with open(file, "a") as more:
        more.write("train/ant/lost.jpg,ant,train\r\nimages.csv,bee,train\r\n")
    (tmp_path / "quarantine.jsonl").write_text('{"file": "train/cat/002.jpg", "reason": "blurred"}\n')
    train = opened(file, "train")
    assert {train.name(at): why for at, why in train.bad.items()} == {
        "images.csv": "no image: first bytes b'path,label,s'",
        "train/ant/lost.jpg": "unreadable: No such file or directory",
        "train/cat/002.jpg": "quarantined: blurred",
    }


def test_test_rows_are_validation_only_where_nothing_else_is(tmp_path: Path) -> None:
    file = tmp_path / "images.csv"
    file.write_bytes(HEADER + b"a,x,train\nb,x,test\n")
    with pytest.warns(UserWarning, match="its split test is taken for validation, as there is no val"):
        assert read_table(file)["val"].paths == ("b",)
    file.write_bytes(HEADER + b"a,x,train\nb,x,test\nc,x,val\n")
    with pytest.warns(UserWarning, match="its split test is not read: val is there too"):
        assert {split: rows.paths for split, rows in read_table(file).items()} == {"train": ("a",), "val": ("c",)}


WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "line 1: the header must have the columns path and label, separated by commas, but has none"),
    "a header alone": (HEADER, "no rows below the header"),
    "no column label": (b"path,class\na,b\n", "line 1: the header must have .*, but has path, class"),
    "semicolons": (b"path;label\na;b\n", "line 1: .* separated by commas, but has path;label"),
    "a column twice": (b"path,label,Label\na,b,c\n", "line 1: the header has the column label twice"),
    "a cell too few": (HEADER + b"a,x,train\nb,x\n", "line 3: 2 cells, where the header has 3"),
    "a cell too many": (HEADER + b"a,x,train,y\n", "line 2: 4 cells, where the header has 3"),
    "no label": (HEADER + b"a,x,train\n\nb,,train\n", "line 4: label = '': must be the name of a class"),
    "space around a label": (HEADER + b"a, x,train\n", "line 2: label = ' x': must be .* without space around it"),
    "no path": (HEADER + b",x,train\n", "line 2: path = '': must name a file below data.root"),
    "an absolute path": (HEADER + b"/etc/passwd,x,train\n", "line 2: path = '/etc/passwd': must be relative"),
    "a path that leaves": (HEADER + b"a/../../b,x,train\n", "line 2: path = 'a/../../b': must stay below data.root"),
    "a path that leaves first": (HEADER + b"../b,x,train\n", "line 2: path = '../b': must stay below data.root"),
    "a path twice": (HEADER + b"a,x,train\nb,x,val\na,x,train\n", "line 4: path = 'a': line 2 names it too"),
    "a path with two labels": (HEADER + b"a,x,train\n./a,y,train\n", "line 3: path = 'a': line 2 names it too"),
    "a path in two splits": (HEADER + b"a,x,train\na,x,val\n", "line 3: path = 'a': line 2 names it too"),
    "an unknown split": (HEADER + b"a,x,trian\n", "line 2: split = 'trian': unknown; did you mean 'train'"),
    "no split": (HEADER + b"a,x,\n", "line 2: split = '': unknown; train, val and test are known"),
    "NUL": (HEADER + b"a,x,train\nb,\0,train\n", "line 3: a NUL byte"),
    "not UTF-8": (HEADER + b"a,x,train\nb,\xff,train\n", "line 3: not UTF-8 .* at byte 2 of the line"),
    "UTF-16": ("path,label\na,b\n".encode("utf-16"), "line 1: "),
    "a quote that stays open": (HEADER + b'a,x,train\nb,"x,train\nc,x,train\n', "line 4: unexpected end of data"),
    "text behind a quote": (HEADER + b'a,"x"y,train\n', "line 2: ',' expected after '\"'"),
    "one long cell": (HEADER + b'"' + b"a" * 200_000 + b'",x,train\n', "line 2: field larger than field limit"),
    "one long line": (HEADER + b"," * (1 << 21), "must be a table in lines of at most 1 MiB .*more than 1,048,576"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_table_is_refused_by_line(kind: str, tmp_path: Path) -> None:
    content, said = WRONG[kind]
    file = tmp_path / "images.csv"
    file.write_bytes(content)
    with pytest.raises(DataError, match=said) as refused:
        opened(file, "train")
    assert str(refused.value).startswith(str(file)) and len(str(refused.value)) < 1000


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "images.csv"
    file.write_bytes(HEADER + b"a,x,train\n")
    change, said = NO_FILES[kind]
    change(file)
    expected = {"8 GiB": "a line of more than 1,048,576 bytes|NUL", "a link to nowhere": "no such file"}.get(kind, said)
    with pytest.raises(DataError, match=expected):
        opened(file, "train")


def test_a_place_or_a_class_that_is_not_there(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_table(tiny_data, tmp_path / "images.csv")
    with pytest.raises(DataError, match=r"nowhere: no such folder; give the folder that the paths .* begin at"):
        opened(file, "train", root=tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"no such file; --data.labels is relative to data.root.* \(it is in the working"
    ):
        open_table(DataConfig(root=str(tiny_data), labels="images.csv"), "train", None)
    with pytest.raises(DataError, match=r"images.txt': the name must end in .csv \(commas\) or .tsv"):
        opened(file.rename(tmp_path / "images.txt"), "train")
    file = (tmp_path / "images.txt").rename(file)
    with pytest.raises(DataError, match=r"line \d+: label = 'cat' has no counterpart in train, which has 2 classes"):
        opened(file, "val", ("ant", "bee"))
    with open(file, "a") as more:
        more.write("train/x.jpg,dog,train\r\ntrain/y.jpg,dog,train\r\n")
    lost = r"line 61: no image of class 'dog' can be used \(train/x.jpg: unreadable: No such file"
    with pytest.raises(DataError, match=lost):
        opened(file, "train")
