"""Boxes in pictures, of predict --draw and of fasttricks report: labels that can be read, and the scores of evaluate."""

from __future__ import annotations

import base64
import io
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.commands import evaluate as evaluation
from fasttricks.commands import predict, report
from fasttricks.config.options import FOREIGN, arities
from fasttricks.reporting.box_page import BoxFacts, box_page
from fasttricks.reporting.boxes import Box, paint_boxes, place_labels
from fasttricks.reporting.examples import Example, colors
from fasttricks.runs.saved import read_saved
from fasttricks.tasks.average_precision import AveragePrecision, BoxScores, Found
from fasttricks.tasks.detection import DETECTION, detect, truths
from lib.pages import EVIL, evil_facts
from lib.tiny import ALONE, FinishedRun, call

Rect = tuple[int, int, int, int]


def pictures(content: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', content)
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in found]


# ------------------------------------------------------------------------------------------------------------- the drawing
def scattered(count: int, side: int) -> list[Rect]:
    corners = np.sort(np.random.default_rng(0).integers(0, side + 1, (count, 2, 2)), axis=1)
    return [(int(a), int(b), max(int(a) + 1, int(c)), max(int(b) + 1, int(d))) for (a, b), (c, d) in corners]


PLACED: dict[str, tuple[list[Rect], tuple[int, int]]] = {
    "five boxes on one another": ([(40, 40, 300, 200)] * 5, (400, 300)),
    "one corner": ([(10, 10, 60 + 40 * k, 90 + 30 * k) for k in range(6)], (400, 300)),
    "a corner of the image": ([(0, 0, 200, 150), (0, 0, 90, 150), (350, 280, 400, 300)], (400, 300)),
    "the whole image": ([(0, 0, 400, 300)] * 4, (400, 300)),
    "thirty anywhere": (scattered(30, 800), (800, 800)),
}


@pytest.mark.parametrize("case", PLACED)
def test_labels_do_not_cover_one_another_and_lie_at_their_boxes_within_the_image(case: str) -> None:
    boxes, (width, height) = PLACED[case]
    places = place_labels(boxes, [(60, 16)] * len(boxes), (width, height)).tolist()
    for number, (left, top, right, bottom) in enumerate(places):
        assert (right - left, bottom - top) == (60, 16)
        assert left >= 0 and top >= 0 and right <= width and bottom <= height
        x1, y1, x2, y2 = boxes[number]
        assert left <= x2 and right >= x1 and top <= y2 and bottom >= y1
        for a, b, c, d in places[:number]:
            assert left >= c or right <= a or top >= d or bottom <= b, (number, places)


@pytest.mark.parametrize("size", [(100, 60), (40, 10), (1, 1)])
def test_more_labels_than_there_is_room_for_cover_as_little_as_they_can(size: tuple[int, int]) -> None:
    """The third of two places shares one with another; none leaves an image that is as large as a label."""
    label = (size[0], size[1] // 2 or 1)
    places = place_labels([(0, 0, *size)] * 3, [label] * 3, size)
    assert (places[:, :2] >= 0).all() and (places[:, 2:] <= size).all()
    assert len({tuple(place) for place in places.tolist()}) == (2 if size[1] > 1 else 1)


def test_difficult_boxes_are_dashed_and_the_surer_box_is_on_top() -> None:
    black, palette = Image.new("RGB", (200, 150)), {"a": (250, 0, 0), "b": (0, 250, 0)}
    shares = {}
    for hard in (False, True):
        box = Box("a", (20.0, 60.0, 180.0, 140.0), difficult=hard)
        row = np.array(paint_boxes(black, [box], palette))[139, 20:180, 0]  # the lower edge, which has no label
        shares[hard] = float((row == 250).mean())
    assert shares[False] == 1 and 0.4 < shares[True] < 0.6
    both = [Box("a", (20, 60, 180, 140), 0.9), Box("b", (20, 60, 180, 140), 0.8)]
    assert np.array(paint_boxes(black, both, palette))[139, 100].tolist() == [250, 0, 0]
    assert not np.array(black).any(), "a copy is painted"


def test_each_label_has_the_colour_of_its_class_and_can_be_read() -> None:
    """On boxes of one place, each colour covers a label's area; letters are black on light colours and white on dark ones."""
    names = [f"class {k}" for k in range(6)]
    palette = dict(zip(names, colors(6), strict=True))
    boxes = [Box(name, (20.0, 30.0, 280.0, 180.0), 0.9 - k / 10) for k, name in enumerate(names)]
    painted = np.array(paint_boxes(Image.new("RGB", (300, 200), (128, 128, 128)), boxes, palette))
    for color in palette.values():
        rows, columns = np.nonzero((painted == color).all(2))
        around = painted[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(int)
        ink = 255 if np.dot(color, (0.299, 0.587, 0.114)) <= 127 else 0
        assert len(rows) > 300 and (abs(around - ink).max(2) < 90).sum() > 20, "letters of ten pixels are smoothed"


@pytest.mark.parametrize("name", ["w" * 200, "\u5bb6" * 50, "", "a\nb\x1b[31m"])
@pytest.mark.parametrize("size", [(300, 200), (30, 20), (1, 1)])
@pytest.mark.parametrize("freetype", [True, False])
def test_any_name_and_image_can_be_drawn(
    name: str, size: tuple[int, int], freetype: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not freetype:
        from PIL import ImageFont

        monkeypatch.setattr(ImageFont, "load_default", lambda size=None: ImageFont.load_default_imagefont())
    boxes = [Box(name, (-5.0, 0.4, 1e6, 0.6), 0.5), Box(name, (size[0], size[1], size[0], size[1]))]
    painted = paint_boxes(Image.new("RGB", size), boxes, {name: (250, 250, 0)})
    assert painted.size == size and np.array(painted).any()


# ----------------------------------------------------------------------------------------------------------------- the page
def test_the_page_of_a_run_says_what_evaluate_says(detected_run: Path, tmp_path: Path) -> None:
    """Under an image stand the boxes of its picture, those of a score of draw_score or more: here half of all."""
    saved, file = read_saved(detected_run), tmp_path / "page.html"
    found = evaluation.answer_checkpoint(evaluation.as_run(saved.config), saved, ALONE)
    model, each, scores = saved.network().eval(), {}, found.answers
    for batch in DETECTION.val_batches(saved.config, found.images, ALONE, batch_size=1, dtype=torch.float32):
        assert batch.shown is not None
        each[found.images.name(int(batch.shown[0]))] = (*detect(model, batch.images, torch.no_grad), *truths(batch))
    least = round(float(torch.cat([boxes.scores for boxes, _ in each.values()]).median()), 4)
    assert call(report.main, str(detected_run), "--output", str(file), "--draw-score", str(least)) == 0
    content = file.read_text("utf-8")
    for name in ("map", "map_voc07", "map_area"):
        assert f"<b>{found.metrics[name]:.2f} %</b>" in content
    assert "<script" not in content and "default-src 'none'" in content and f"a score of {least} or more" in content
    for name, ap, objects in zip(saved.classes, scores.ap_area.tolist(), scores.objects.tolist(), strict=True):
        row = re.search(rf"<bdi>{name}</bdi></td><td class=\"n\">([0-9.]+) %", content)
        assert row.group(1) == f"{ap:.2f}" if row else not objects
    told = re.findall(r"<b>AP ([0-9.]+) %, (\d+) of (\d+) found, (\d+) wrong</b> <bdi>([^<]+)</bdi>", content)
    assert len(told) == len(pictures(content)) == 3 and all(float(a[0]) <= float(b[0]) for a, b in pairwise(told))
    aps = dict(zip(map(found.images.name, scores.images.tolist()), scores.image_ap.tolist(), strict=True))
    for ap, *counts, name in told:
        boxes, there = each[name]
        alone = AveragePrecision(3)
        alone.update([Found(*(part[boxes.scores >= least] for part in boxes))], [there], np.zeros(1, np.int64))
        want = alone.result(ALONE)
        right, objects = int(want.found.sum()), int((~there.difficult).sum())
        assert [int(one) for one in counts] == [right, objects, int(want.detections.sum()) - right]
        assert ap == f"{aps[name]:.1f}"
    assert sum(int(wrong) for *_, wrong, _ in told) > 0


def test_names_are_text(tmp_path: Path) -> None:
    grey, some = Image.new("RGB", (20, 10)), np.arange(150, dtype=np.float64)
    ap = np.where(some == 7, np.nan, some / 2)
    counts = some.astype(np.int64)
    content = box_page(
        BoxFacts(
            **evil_facts(150),
            scores=BoxScores(50.0, 60.0, ap, ap, counts, counts, counts, counts, ap),
            examples={"The worst": [Example(EVIL, "AP 1 %", (grey, grey))]},
            least_score=0.5,
        )
    )
    assert "<script" not in content and "\x1b" not in content
    assert "1 of 150 classes have no object here that counts" in content and len(content) < 1e6
    assert [one.size for one in pictures(content)] == [(46, 10)]


# ---------------------------------------------------------------------------------------------------------------- the score
def test_the_least_score_decides_which_boxes_are_drawn(
    detected_run: Path, tiny_boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table has all of them."""
    image, drawn = str(next((tiny_boxes / "VOC2007" / "JPEGImages").glob("1*.jpg"))), {}
    for score in ("0", "0.5", "1"):
        folder = tmp_path / score
        assert call(predict.main, str(detected_run), image, "--draw", str(folder), "--draw-score", score) == 0
        picture = np.array(Image.open(folder / f"{Path(image).stem}.png"))
        drawn[score] = int((picture != np.array(Image.open(image).convert("RGB"))).any(2).sum())
    assert drawn["0"] > drawn["0.5"] >= drawn["1"] == 0
    tables = {(tmp_path / score / "boxes.csv").read_text() for score in drawn}
    assert len(tables) == 1 and tables.pop().count("\n") > 2
    assert capsys.readouterr().out.endswith("no box\n")
    assert FOREIGN["conf"] in arities(predict.PredictConfig)


@pytest.mark.parametrize(
    ("main", "run", "options", "says"),
    [
        (predict.main, "detection", ["IMAGE", "--draw", "DIR", "--draw-score", "1.5"], "draw_score = 1.5: must be 0 to 1"),
        (predict.main, "segmentation", ["IMAGE", "--draw", "DIR", "--draw-score", "0.3"], "draw_score = 0.3: is for pictures"),
        (predict.main, "classification", ["IMAGE", "--draw-score", "0.3"], "draw_score = 0.3: is for pictures of detection, and"),
        (report.main, "segmentation", ["--draw-score", "0.3"], "draw_score = 0.3: is for pictures of detection, and"),
    ],
)  # fmt: skip
def test_a_score_without_effect_is_refused(
    main: Any,
    run: str,
    options: list[str],
    says: str,
    request: pytest.FixtureRequest,
    tiny_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fixture = {"detection": "detected_run", "segmentation": "segmented_run", "classification": "finished_run"}[run]
    made: Path | FinishedRun = request.getfixturevalue(fixture)
    folder = made.folder if isinstance(made, FinishedRun) else made
    places = {"IMAGE": str(next(tiny_data.rglob("*.jpg"))), "DIR": str(tmp_path / "drawn")}
    assert call(main, str(folder), *(places.get(option, option) for option in options)) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "drawn").exists()
