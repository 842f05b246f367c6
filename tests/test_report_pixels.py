"""fasttricks report of a segmentation: the scores of evaluate, and images beside their truth and their prediction."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.commands import evaluate as evaluation
from fasttricks.commands import report
from fasttricks.data.masks.places import open_mask_split
from fasttricks.reporting.examples import Example, colors, paint_classes, pick, strip
from fasttricks.reporting.pixel_page import PixelFacts, pixel_page
from fasttricks.runs.saved import read_saved
from fasttricks.tasks.pixel_counts import PixelCounts, PixelScores
from fasttricks.tasks.segmentation import SEGMENTATION
from lib.pages import EVIL, evil_facts
from lib.tiny import ALONE, call


def pictures(content: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', content)
    return [Image.open(io.BytesIO(base64.b64decode(one))) for one in found]


def test_the_page_of_a_run_says_what_evaluate_says(
    segmented_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "page.html"
    assert call(report.main, str(segmented_run), "--output", str(file)) == 0
    saved, content = read_saved(segmented_run), file.read_text("utf-8")
    found = evaluation.answer_checkpoint(evaluation.as_run(saved.config), saved, ALONE)
    assert (
        f"<b>{found.metrics['miou']:.2f} %</b>" in content
        and f"<b>{found.metrics['pixel_accuracy']:.2f} %</b>" in content
    )
    for name, iou in zip(("sky", "road", "car"), found.answers.iou.tolist(), strict=True):
        assert re.search(rf"<bdi>{name}</bdi></td><td class=\"n\">{iou:.2f} %", content)
    assert "<script" not in content and "default-src 'none'" in content
    worst, middle, best = found.answers.image_iou[found.answers.image_iou.argsort()[[0, 2, 4]]].tolist()
    told = re.findall(r"<b>IoU ([0-9.]+) %</b>", content)
    assert told == [f"{worst:.1f}", f"{middle:.1f}", f"{best:.1f}"]
    assert len(pictures(content)) == 3 and all(one.width > 3 * 20 for one in pictures(content))
    capsys.readouterr()


def test_the_score_of_an_image_is_its_own_mean_iou(segmented_run: Path) -> None:
    """By a plain loop in numpy, over the classes that an image has or gets."""
    saved = read_saved(segmented_run)
    found = evaluation.answer_checkpoint(evaluation.as_run(saved.config), saved, ALONE).answers
    model, wanted = saved.network(), []
    source = open_mask_split(saved.config.data, "val")
    for batch in SEGMENTATION.val_batches(saved.config, source, ALONE, batch_size=1, dtype=torch.float32):
        with torch.no_grad():
            logits = torch.nn.functional.interpolate(model(batch.images), size=batch.masks.shape[1:], mode="bilinear")
        truth, guess = batch.masks[0].numpy(), logits.argmax(1)[0].numpy()
        truth, guess = truth[truth < 255], guess[truth < 255]
        pairs = [((truth == k) & (guess == k), (truth == k) | (guess == k)) for k in range(3)]
        ious = [both.sum() / either.sum() for both, either in pairs if either.any()]
        wanted.append(100 * np.mean(ious) if ious else np.nan)
    assert found.images.tolist() == list(range(5)) and len(set(wanted)) > 2
    np.testing.assert_allclose(found.image_iou, wanted, rtol=1e-12)


@pytest.mark.parametrize(
    ("count", "kinds"), [(0, {}), (1, {"The worst": [0]}), (2, {"The worst": [1], "The best": [0]})]
)
def test_few_images_are_each_shown_once(count: int, kinds: dict[str, list[int]]) -> None:
    assert pick(np.arange(count, 0, -1, dtype=np.float64)) == kinds


def test_the_worst_the_middle_and_the_best_are_picked() -> None:
    scores = np.random.default_rng(0).permutation(100).astype(np.float64)
    scores[scores == 50] = np.nan
    found = {kind: scores[places].tolist() for kind, places in pick(scores).items()}
    assert found["The worst"] == [0, 1, 2, 3, 4, 5] and found["The best"] == [94, 95, 96, 97, 98, 99]
    assert found["In the middle"] == [46, 47, 48, 49, 51, 52]


def test_image_truth_and_prediction_stand_side_by_side() -> None:
    palette, grey = colors(2), Image.new("RGB", (20, 10), (128, 128, 128))
    truth, found = (paint_classes(grey, np.full((10, 20), k, np.uint8), palette) for k in (255, 1))
    (shown,) = pictures(f'src="{strip(Example("a", "IoU 1 %", (grey, truth, found)))}"')
    assert shown.size == (72, 10)
    blue = [round(64 + value / 2) for value in palette[1]]
    for x, wanted in ((8, [128] * 3), (35, [64] * 3), (62, blue)):
        assert np.abs(np.array(shown, int)[5, x] - wanted).max() < 12


def test_many_classes_are_a_picture_and_names_are_text(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    confusion = draws.integers(0, 100, (150, 150)) + np.diag(np.full(150, 5000))
    iou = 100 * confusion.diagonal() / (confusion.sum(0) + confusion.sum(1) - confusion.diagonal())
    iou[7], confusion[7], confusion[:, 7] = np.nan, 0, 0
    grey = Image.new("RGB", (20, 10))
    content = pixel_page(
        PixelFacts(
            **evil_facts(150),
            scores=PixelScores(50.0, 60.0, iou, confusion),
            examples={"The worst": [Example(EVIL, "IoU 1 %", (grey, grey, grey))]},
        )
    )
    assert "<script" not in content and "\x1b" not in content and "1 of 150 classes have no pixel here" in content
    assert content.count("data:image/png") == 1 and content.count("data:image/jpeg") == 1 and len(content) < 1e6


def test_a_class_that_an_image_lacks_is_in_no_mean() -> None:
    """Counted by hand: class 0 has 2 of 3 pixels, class 1 has 1 of 2; class 2 is neither there nor predicted."""
    counts, none = PixelCounts(3, ALONE.device), PixelCounts(3, ALONE.device)
    counts.update(torch.tensor([[[0, 0, 1, 1, 2]]]), torch.tensor([[[0, 0, 0, 1, 255]]]))
    none.update(torch.tensor([[[0]]]), torch.tensor([[[255]]]))
    assert counts.mean_iou().item() == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    assert none.mean_iou().isnan()
