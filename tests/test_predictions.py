"""predict of folders, to files, and of features: each format read back, hostile names, and what a stopped command leaves."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

import fasttricks as ft
from fasttricks.commands import predict, prediction_files
from fasttricks.commands.prediction_files import Prediction
from fasttricks.config import ConfigError
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.files import Paths, find_images
from fasttricks.models import Embedder
from lib.forked import running
from lib.refusing import no_file_beyond
from lib.tables import mostly_slow
from lib.tiny import FinishedRun, call

NOT_UTF8 = os.fsdecode(b"im\xe4ge.jpg")
HOSTILE = ("=cmd|'-C'!A1.jpg", "+1.jpg", "-1.jpg", "@sum.jpg", "\t1.jpg", "\r1.jpg", "a\n\x1b[31mb.jpg", NOT_UTF8)


@pytest.fixture(scope="module")
def album(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of images, one image without an ending, a damaged one, files that are none, and links: one a loop."""
    root = tmp_path_factory.mktemp("album")
    source = [path.read_bytes() for path in sorted((finished_run.data / "val").rglob("*.jpg"))[:5]]
    (root / "b" / "c").mkdir(parents=True)
    for name, content in zip(("z.jpg", "b/2.jpg", "b/1.JPG", "b/c/noending", "b/c/3.jpg"), source, strict=True):
        (root / name).write_bytes(content)
    (root / "b" / "damaged.jpg").write_bytes(source[0][:60])
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.jpg").write_bytes(source[0])
    (root / "b" / "loop").symlink_to(root)
    (root / "linked.jpg").symlink_to("b/2.jpg")
    return root


IN_ALBUM = ["linked.jpg", "z.jpg", "b/1.JPG", "b/2.jpg", "b/damaged.jpg", "b/c/3.jpg", "b/c/noending"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """{"file", "classes", "error", "embedding"} of each row of a file of predictions, by the reader of its format."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text("ascii").splitlines()]
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))
    else:
        rows = pq.read_table(path).to_pylist()
    found = []
    for row in rows:
        ranks = sorted(int(name.removeprefix("class_")) for name in row if name.startswith("class_"))
        classes = [[row[f"class_{n}"], float(row[f"probability_{n}"])] for n in ranks if row[f"class_{n}"]]
        found.append({**row, "classes": classes})
    return found


# ------------------------------------------------------------------------------------------------ folders


def test_a_folder_stands_for_the_images_in_it_and_below(album: Path) -> None:
    with pytest.warns(UserWarning, match=r"skipped 2 hidden or .* and 1 other names of folders .*notes\.txt.*loop"):
        found = find_images([str(album), "gone.jpg", str(album / "z.jpg")])
    assert list(found) == [*(f"{album}/{name}" for name in IN_ALBUM), "gone.jpg", str(album / "z.jpg")]


def test_folders_that_hold_no_image_or_cannot_be_listed_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    with pytest.raises(DataError, match="empty: no image in it, nor in a folder below; name a folder with images"):
        find_images([str(tmp_path / "empty")])


def test_paths_are_those_that_were_added() -> None:
    paths, known = Paths(), []
    for folder, names in (("", ["a", ""]), ("x/", [NOT_UTF8, "b\n"]), ("x/", ["c"]), ("y/", []), ("é/", ["犬"])):
        paths.add(folder, names)
        known += [folder + name for name in names]
    assert list(paths) == known and len(paths) == len(known) == 6
    with pytest.raises(IndexError):
        paths[6]


def test_standard_input_names_paths(album: Path, finished_run: FinishedRun, capsys: Any, monkeypatch: Any) -> None:
    lines = io.BytesIO(os.fsencode(f"{album}/z.jpg\n\n{album}/b/2.jpg\r\n{album}/b/c"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(lines))
    assert call(predict.main, str(finished_run.folder), "-", "--top", "1") == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert shown == [f"{album}/{name}" for name in ("z.jpg", "b/2.jpg", "b/c/3.jpg", "b/c/noending")]
    assert call(predict.main, str(finished_run.folder), "-") == 2
    assert "images = '-': standard input names none" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("suffix", prediction_files.KINDS)
@pytest.mark.filterwarnings("ignore:skipped")
def test_a_file_has_a_row_an_image(
    suffix: str, album: Path, finished_run: FinishedRun, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The probabilities are those of the API, to the last bit, over batches and row groups of several sizes."""
    monkeypatch.setattr(predict, "BATCH_SIZE", 3)
    monkeypatch.setattr(prediction_files, "_ROW_GROUP", 2)
    out = tmp_path / f"out{suffix}"
    embed = () if suffix == ".csv" else ("--embed",)
    assert call(predict.main, str(finished_run.folder), str(album), "--top", "2", "--output", str(out), *embed) == 1
    said = capsys.readouterr()
    assert f"wrote 7 predictions to {out}\n" in said.out
    assert "error: 1 of 7 images could not be used; the column error says why\n" in said.err
    assert os.listdir(tmp_path) == [out.name]
    wanted = ft.predict(finished_run.folder, album, top=2, embed=bool(embed))
    rows = rows_of(out)
    assert [row["file"] for row in rows] == [f"{album}/{name}" for name in IN_ALBUM] == [one.path for one in wanted]
    for row, one in zip(rows, wanted, strict=True):
        assert row["classes"] == [list(pair) for pair in one.classes] and row["error"] == one.error
        assert len(row["classes"]) == (0 if "damaged" in one.path else 2)
        if embed:
            assert row["embedding"] == (None if one.embedding is None else one.embedding.tolist())
    if suffix == ".parquet":
        kinds = {field.name: str(field.type) for field in pq.read_schema(out)}
        embedding = re.sub(r"<.*: ", "<", kinds.pop("embedding"))
        assert embedding == "list<float>" and kinds == {
            "file": "string",
            "class_1": "string",
            "probability_1": "double",
            "class_2": "string",
            "probability_2": "double",
            "error": "string",
        }


def test_names_that_a_spreadsheet_runs_or_a_terminal_obeys(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: Any
) -> None:
    """In a .csv they are harmless; a .jsonl and a .parquet have them as they are, but for bytes that are no UTF-8."""
    content = next((finished_run.data / "val").rglob("*.jpg")).read_bytes()
    (tmp_path / "in").mkdir()
    for name in HOSTILE:
        (tmp_path / "in" / name).write_bytes(content)
    monkeypatch.chdir(tmp_path / "in")
    for suffix in prediction_files.KINDS:
        assert len(ft.predict(finished_run.folder, HOSTILE, output=f"../out{suffix}")) == len(HOSTILE)
    cells = [row["file"] for row in rows_of(tmp_path / "out.csv")]
    first = ["'=cmd|'-C'!A1.jpg", "'+1.jpg", "'-1.jpg", "'@sum.jpg", r"'\t1.jpg", r"'\r1.jpg"]
    assert cells == [*first, r"a\n\x1b[31mb.jpg", r"im\udce4ge.jpg"]
    assert (tmp_path / "out.csv").read_text("utf-8").replace("\n", "").isprintable()
    assert [row["file"] for row in rows_of(tmp_path / "out.jsonl")] == list(HOSTILE)
    assert [row["file"] for row in rows_of(tmp_path / "out.parquet")] == [*HOSTILE[:-1], r"im\udce4ge.jpg"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "x.txt"), "output = 'x.txt': must end in .csv, .jsonl, .parquet; give another name"),
        (("--output", "there.csv"), "output = 'there.csv': already exists and is never overwritten"),
        (
            ("--output", "half.csv"),
            "'half.partial.csv' has the predictions of a command that was stopped, or still runs",
        ),
        (("--output", "none/x.csv"), "output = 'none/x.csv': must be a place to write to; give another (No such file"),
        (("--output", "x.csv", "--embed"), "embed = True: does not fit into the cells of a .csv; give --output a"),
        (("--embed",), "embed = True: needs a file to write to; add --output FILE, a .parquet or a .jsonl"),
        (("--output", "x.jsonl", "empty"), "empty: no image in it"),
    ],
)
@pytest.mark.parametrize("foreign", [False, True])
def test_a_wrong_output_is_an_error_before_the_network_is_loaded(
    options: tuple[str, ...], message: str, foreign: bool, finished_run: FinishedRun, tmp_path: Path, capsys: Any,
    monkeypatch: Any,
) -> None:  # fmt: skip
    """Of a run, whose config is known, and of a file of another program."""
    monkeypatch.chdir(tmp_path)
    for name in ("there.csv", "half.partial.csv", "a.jpg", "w.pt"):
        Path(name).write_text("kept")
    Path("empty").mkdir()
    before = sorted(os.listdir())
    monkeypatch.setattr(predict.SavedRunCommand, "open", lambda *_: pytest.fail("the network is loaded"))
    place = ("w.pt", "--model.name", "resnet18b") if foreign else (str(finished_run.folder),)
    assert call(predict.main, place[0], "a.jpg", *options, *place[1:]) == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir()) == before
    assert Path("half.partial.csv").read_text() == Path("there.csv").read_text() == "kept"


def test_several_ranks_are_refused(finished_run: FinishedRun, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert call(predict.main, str(finished_run.folder), "a.jpg") == 2
    assert "ranks = 2: predict is one process; start it without torchrun" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="ranks = 2: is written by one process"):
        prediction_files.Output(str(tmp_path / "x.csv"), embed=False)


def test_pyarrow_is_asked_for_by_its_extra(finished_run: FinishedRun, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("fasttricks.system.extras._present", lambda name: name != "pyarrow")
    assert call(predict.main, str(finished_run.folder), "a.jpg", "--output", "x.parquet") == 2
    assert "error: a .parquet file needs pyarrow, not installed here; install it with" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ a stopped command

ROWS = [Prediction(f"{n}.jpg", [("ant", 0.5 + n / 100), ("bee", 0.4)]) for n in range(5)]


def write(path: Path, rows: list[Prediction], then: Callable[[], object] = lambda: None) -> None:
    with prediction_files.Output(str(path), embed=False) as file:
        file.begin(2)
        for row in rows:
            file.written(row)
        then()


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("suffix", prediction_files.KINDS)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError("of the network")])
def test_a_stopped_command_keeps_its_rows(suffix: str, error: BaseException, tmp_path: Path, capsys: Any) -> None:
    partial = tmp_path / f"out.partial{suffix}"
    with pytest.raises(type(error)) as raised:
        write(tmp_path / f"out{suffix}", ROWS, lambda: raising(error))
    words = f"the predictions of the first 5 images are in {partial}"
    assert words in (str(raised.value) if isinstance(error, KeyboardInterrupt) else capsys.readouterr().err)
    assert os.listdir(tmp_path) == [partial.name]
    assert [row["file"] for row in rows_of(partial)] == [row.path for row in ROWS]


@pytest.mark.parametrize("suffix", prediction_files.KINDS)
@pytest.mark.parametrize("flushed", [False, True], ids=["at the end", "at a row"])
def test_a_full_disk_keeps_whole_rows(
    suffix: str, flushed: bool, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The kernel refuses the last of the bytes; a .parquet has no end then, and is removed."""
    monkeypatch.setattr(prediction_files, "_ROW_GROUP", 1 if flushed else 100)
    out, rows = tmp_path / f"out{suffix}", ROWS * (400 if flushed else 1)
    with no_file_beyond(9000 if flushed else 90), pytest.raises(OSError, match="File too large"):
        write(out, rows)
    said, partial = capsys.readouterr().err, tmp_path / f"out.partial{suffix}"
    if suffix == ".parquet":
        assert (
            said.startswith("note: no prediction is kept: a .parquet is read by its end") and os.listdir(tmp_path) == []
        )
        return
    kept = rows_of(partial)
    assert said == f"note: the predictions of the first {len(kept):,} images are in {partial}\n" and kept
    assert [row["classes"] for row in kept] == [list(map(list, row.classes)) for row in rows[: len(kept)]]


@pytest.mark.slow
def test_sigterm_keeps_the_rows_of_a_real_command(finished_run: FinishedRun, tmp_path: Path) -> None:
    image, folder, partial = (
        next((finished_run.data / "val").rglob("*.jpg")),
        tmp_path / "in",
        tmp_path / "x.partial.csv",
    )
    folder.mkdir()
    for number in range(20_000):
        os.link(image, folder / f"{number:05}.jpg")
    with running(
        "fasttricks.predict", str(finished_run.folder), str(folder), "--output", str(tmp_path / "x.csv")
    ) as it:
        while not (partial.exists() and partial.stat().st_size):
            assert it.process.is_alive(), it.wait()
        it.signal(signal.SIGTERM)
        done = it.wait()
    rows = rows_of(partial)
    words = f"stopped; the predictions of the first {len(rows):,} images are in {partial}\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", words)
    assert [row["file"] for row in rows] == [f"{folder}/{number:05}.jpg" for number in range(len(rows))] and len(
        rows
    ) < 20_000


def test_a_command_without_a_row_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), prediction_files.Output(str(tmp_path / "x.csv"), embed=False):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_an_output_that_another_program_makes_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "x.jsonl"
    with pytest.raises(ConfigError, match=r"was made by another program .*predictions are in .*x\.partial\.jsonl"):
        write(out, ROWS[:1], lambda: out.write_text("theirs"))
    assert out.read_text() == "theirs" and len(rows_of(tmp_path / "x.partial.jsonl")) == 1


# ------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["resnet10t", "convnext_atto", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "mobilenetv3_small_050",
         "efficientnet_b0", "levit_128s", "regnetx_002", "resnetv2_50x1_bit"],
        "resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050", "levit_128s",
    ),
)  # fmt: skip
def test_features_are_those_of_timm(name: str) -> None:
    """Against timm's own forward_head(pre_logits=True), which leaves a map where the classifier is a convolution."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(2, 3, 224 if re.search("vit|deit", name) else 64, 224 if re.search("vit|deit", name) else 64)
    embedder = Embedder(model)
    with torch.no_grad():
        model(images)
        wanted = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(embedder.take(), wanted.flatten(1))


@pytest.mark.parametrize("name", ["resnet8d", "resnet50a", "mobilenet_v1", "inception_v3"])
def test_features_of_our_own_networks_are_the_mean_of_the_last_map(name: str) -> None:
    model = ft.create_model(name, num_classes=7, width=0.125).eval()
    images, embedder = torch.randn(2, 3, 75, 75), Embedder(model)
    with torch.no_grad():
        logits, features = model(images), embedder.take()
        torch.testing.assert_close(features, model.features(images)[-1].mean((2, 3)))  # type: ignore[operator]
        model(images)
        model(images.flip(3))
        both = embedder.take()
        model(images.flip(3))
        torch.testing.assert_close(both, (features + embedder.take()) / 2)
    assert logits.shape == (2, 7) and features.dtype == torch.float32 and not torch.equal(both, features)


def test_a_network_without_a_vector_before_its_classes_is_refused() -> None:
    none, uncalled = nn.Sequential(nn.Conv2d(3, 7, 1)), nn.Sequential(nn.Flatten(), nn.Linear(3, 7))
    with pytest.raises(ConfigError, match=r"embed = True: finds no classifier .* give it a method get_classifier"):
        Embedder(none)
    uncalled.fc = nn.Linear(3, 7)
    uncalled.forward = lambda x: x  # type: ignore[method-assign]
    embedder = Embedder(uncalled)
    uncalled(torch.ones(2, 3))
    with pytest.raises(ConfigError, match="must get one vector an image, but got none; leave --embed out"):
        embedder.take()
