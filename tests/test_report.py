"""fasttricks report: the page says what evaluate says, stays small, and shows hostile names without running them."""

from __future__ import annotations

import io
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.commands import evaluate, export, report
from fasttricks.data.sources.folder import ImageFolder
from fasttricks.reporting.charts import Line, line_chart, reliability_chart
from fasttricks.reporting.page import Facts, page
from fasttricks.system.distributed import World
from fasttricks.tasks.answers import Answered, Answers
from lib.tiny import FinishedRun, call

EVIL = (
    "<script>document.title='ran'</script>\"'><img src=x onerror=document.title='ran'>\u202e&amp;\x1b[31m\n" + "x" * 300
)
ALONE = World.alone(torch.device("cpu"))
ALLOWED = """html head meta title style body header h1 h2 h3 p main div b span figure figcaption svg line text polyline circle
rect table thead tbody tr th td bdi i img details summary pre code br"""


class Seen(HTMLParser):
    """The elements of a page, their attributes and its text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def harmless(content: str) -> Seen:
    """The page, which loads nothing and runs nothing."""
    seen = Seen(content)
    allowed = {*ALLOWED.split()}
    assert set(seen.tags) <= allowed, set(seen.tags) - allowed
    for name, value in seen.attributes:
        assert not name.startswith("on") and name not in ("href", "srcdoc", "action")
        assert name != "src" or value.startswith("data:image/")
    assert "default-src 'none'" in content and "script-src" not in content
    return seen


def answered(classes: int, images: int, seed: int = 0) -> Answered:
    """Answers of random logits that favour the label."""
    draws = torch.Generator().manual_seed(seed)
    answers = Answers(classes, ALONE.device)
    for first in range(0, images, 5000):
        labels = torch.randint(classes, (min(5000, images - first),), generator=draws)
        logits = torch.randn(len(labels), classes, generator=draws)
        logits[range(len(labels)), labels] += 3
        answers.update(logits, labels, np.arange(first, first + len(labels)))
    return answers.result(ALONE)


def photos(root: Path, count: int, names: str = "{}") -> ImageFolder:
    """`count` images, all of one file of 500 x 375 pixels of noise; a name that no disk takes is not on the disk."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)).save(file, "JPEG")
    (root / "photo.jpg").write_bytes(file.getvalue())

    class Photos(ImageFolder):
        def read(self, index: int) -> bytes:
            return file.getvalue()

    files = tuple(names.format(number) for number in range(count))
    return Photos(root=root, classes=("a",), files=files, labels=(0,) * count)


def facts(answers: Answered, images: ImageFolder, classes: list[str], **changes: Any) -> Facts:
    given: dict[str, Any] = {
        "name": "run",
        "subtitle": "resnet50d",
        "headline": [("top-1", "76.00 %")],
        "notes": [],
        "rows": (),
        "metrics": (),
        "no_curves": "there are none",
        "answers": answers,
        "classes": classes,
        "images": images,
        "max_pixels": 10**8,
        "train_counts": None,
        "calibration": None,
        "bad": {},
        "config": {},
        "config_text": "",
        "recipe": None,
        "command": "",
        "versions": {"torch": "2"},
    }
    return Facts(**{**given, **changes})


def test_the_page_of_a_run_says_what_evaluate_says(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run.folder, tmp_path / "run")
    for _ in range(2):  # the second replaces the first
        assert call(report.main, str(run), "--data.threads", "1") == 0
    assert capsys.readouterr().out.startswith(f"wrote {run}/report.html, 0.")
    seen = harmless((run / "report.html").read_text("utf-8"))
    assert call(evaluate.main, str(run), "--data.threads", "1") == 0
    said = capsys.readouterr().out
    top, ece = said.split()[1], said.split("ECE ")[1].split()[0]
    assert f"top-1{top} %" in seen.text and f"ECE{ece} %" in seen.text
    for line in said.splitlines()[2:5]:  # a class each: name, accuracy, images
        name, accuracy, _, images = line.split()
        assert f"{name}{accuracy} %{images}" in seen.text
    assert seen.tags.count("svg") == 4 and seen.tags.count("img") == seen.text.count(", is ") > 0
    assert "image_size: " in seen.text and "fasttricks.train" in seen.text and "torch 2" in seen.text


def test_an_export_has_no_curves_and_needs_an_output(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(export.main, str(finished_run.folder), "--no-onnx", "--output", str(tmp_path / "export")) == 0
    words = [str(tmp_path / "export"), "--data.root", str(finished_run.data), "--data.threads", "1"]
    assert call(report.main, *words) == 2
    assert "must be given where the checkpoint is not in a run folder" in capsys.readouterr().err
    assert call(report.main, *words, "--output", str(tmp_path / "a.html")) == 0
    seen = harmless((tmp_path / "a.html").read_text("utf-8"))
    assert "None: this checkpoint is not in a run folder." in seen.text and seen.tags.count("svg") == 1


@pytest.mark.parametrize("classes", [2, 30, 31])
def test_the_matrix_is_a_table_where_it_can_be_read(classes: int, tmp_path: Path) -> None:
    answers = answered(classes, 2000)
    content = page(facts(answers, photos(tmp_path, 2000), [f"class {k}" for k in range(classes)]))
    seen = harmless(content)
    assert (content.count('class="confusion"'), content.count('class="heat"')) == ((1, 0) if classes <= 30 else (0, 1))
    assert seen.text.count(", is ") == min(50, 2000 - int(answers.right.sum()))


@pytest.mark.slow
def test_500_classes_and_100_000_images_stay_small(tmp_path: Path) -> None:
    """50 thumbnails of noise, which compress worst; the longest names; every table at its longest."""
    names = [f"{k:03d} {'n' * 190}" for k in range(500)]
    rows = [
        {"epoch": e, "train_loss": 1 / e, "val_loss": 2 / e, "lr": 0.1 / e, "top1": 50.0 + e / 10}
        for e in range(1, 301)
    ]
    content = page(
        facts(
            answered(500, 100_000),
            photos(tmp_path, 100_000, "class/{}.jpg"),
            names,
            rows=rows,
            metrics=("top1",),
            train_counts=[1000] * 500,
            bad={f"train/{n}.jpg": "damaged or cut off" * 10 for n in range(5000)},
        )
    )
    harmless(content)
    size = len(content.encode())
    print(f"{size / 1e6:.2f} MB")
    assert size < 15e6


def hostile(tmp_path: Path) -> str:
    """A page whose every name from outside is EVIL."""
    answers = answered(3, 300)
    return page(
        facts(
            answers,
            photos(tmp_path, 300, EVIL.replace("{", "{{").replace("}", "}}") + "{}"),
            [EVIL, f"{EVIL}1", "\udcff"],
            name=EVIL,
            subtitle=EVIL,
            notes=[EVIL],
            rows=[{"epoch": epoch, EVIL: 50.0} for epoch in (1, 2)],
            metrics=(EVIL,),
            bad={EVIL: EVIL, "\udc80": "no image"},
            config={"data": {"root": EVIL}},
            config_text=EVIL,
            recipe={"data": {"root": ""}},
            command=EVIL,
            versions={EVIL: EVIL},
        )
    )


def test_hostile_names_are_shown_and_not_run(tmp_path: Path) -> None:
    seen = harmless(hostile(tmp_path))
    assert (
        "<script>document.title='ran'</script>" in seen.text and "\x1b" not in seen.text and "\u202e" not in seen.text
    )


@pytest.mark.slow
def test_a_browser_runs_nothing_of_them(tmp_path: Path) -> None:
    """A real one: the title is the page's own, and no element came of a name."""
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
    if browser is None:
        pytest.skip("needs chromium or google-chrome")
    file = tmp_path / "page.html"
    file.write_bytes(hostile(tmp_path).encode("utf-8", "backslashreplace"))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = Seen(done.stdout)
    assert "script" not in seen.tags and all(v.startswith("data:") for n, v in seen.attributes if n == "src")
    assert done.stdout.split("<title>")[1].split("</title>")[0].startswith("&lt;script&gt;document.title='ran'")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("nowhere",), "must be a file, or a run folder"),
        (("{run}", "--output", "a.pdf"), "output = 'a.pdf': must end in .html"),
        (("{run}", "--output", "nowhere/a.html"), "must be in a folder that is there and may be written to"),
        (("{run}", "--output", "taken.html"), "already exists and is never overwritten"),
        (("{run}", "--outptu", "a.html"), "--outptu"),
        (("{run}", "--data.root", "nowhere"), "nowhere"),
    ],
)
def test_a_wrong_argument_is_named_before_the_evaluation(
    args: tuple[str, ...],
    words: str,
    finished_run: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fasttricks.commands.evaluate.answer_checkpoint", lambda *a: pytest.fail("it evaluated"))
    (tmp_path / "taken.html").touch()
    assert call(report.main, *(arg.format(run=finished_run.folder) for arg in args)) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error


def test_charts_hold_their_points() -> None:
    assert line_chart([], "x", "y") == "" == line_chart([Line("a", [(1, float("nan"))])], "x", "y")
    count, right = [0] * 14 + [10], [0] * 14 + [5]
    chart = reliability_chart(count, right, [0.0] * 14 + [9.5])
    assert chart.count('class="bar"') == 1 and "confidence 0.950, accuracy 0.500, 10 images" in chart
