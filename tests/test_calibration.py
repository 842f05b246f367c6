"""The temperature against golden section and torchmetrics; stored for its weights alone, applied by predict and export."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from fasttricks.commands import evaluate, export, predict
from fasttricks.commands.calibrated import calibrate_checkpoint, fold
from fasttricks.config import DataConfig, ModelConfig, UserError
from fasttricks.learning.teacher import weights_digest
from fasttricks.models import build_model
from fasttricks.runs.calibration import (
    Calibration,
    CalibrationError,
    read_calibration,
    run_of,
    shown_as,
    write_calibration,
)
from fasttricks.runs.opened import open_saved
from fasttricks.runs.saved import read_saved
from fasttricks.tasks.answers import Answers, Outputs
from fasttricks.tasks.calibration import calibrate, fit_temperature, to_fit
from lib.hostile import NO_TABLES, Change
from lib.threads import CPU, Threads, ranks
from lib.tiny import FinishedRun, call

T = 2.5


def data(count: int, classes: int, scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and labels that are drawn from softmax(logits / scale), so that about `scale` calibrates them."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return scale * logits, labels


def nll(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    z = logits.astype(np.float64) / temperature
    z = z - z.max(1, keepdims=True)
    return float((np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), labels]).mean())


def golden_section(logits: Tensor, labels: Tensor) -> float:
    """The minimum of nll over log T."""
    arrays = logits.numpy(), labels.numpy()
    low, high, ratio = math.log(0.01), math.log(100), (math.sqrt(5) - 1) / 2
    for _ in range(80):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if nll(*arrays, math.exp(a)) < nll(*arrays, math.exp(b)) else (a, high)
    return math.exp((low + high) / 2)


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 10])
@pytest.mark.parametrize("scale", [0.05, 0.5, 1.0, 3.0, 40.0])
def test_the_temperature_minimises_the_nll(classes: int, scale: float) -> None:
    logits, labels = data(500, classes, scale)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(golden_section(logits, labels), rel=1e-6)
    assert found == pytest.approx(scale * fit_temperature(logits / scale, labels), rel=1e-5)
    assert found == pytest.approx(scale, rel=0.4)


def test_the_parts_that_bound_the_memory_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = data(203, 5, 2.0)
    whole = fit_temperature(logits, labels)
    monkeypatch.setattr("fasttricks.tasks.calibration._AT_ONCE", 35)
    assert fit_temperature(logits, labels) == pytest.approx(whole, rel=1e-10)  # the sums have another order


@pytest.mark.parametrize(
    ("logits", "labels", "wrong"),
    [
        (9 * torch.eye(4), torch.arange(4), "4 of 4 images to fit on are right: the best is 0"),
        (1e6 * torch.eye(4), torch.arange(4), "4 of 4 images to fit on are right: the best is 0"),
        (
            9 * torch.eye(4),
            (torch.arange(4) + 1) % 4,
            "0 of 4 images to fit on are right: the network is no better than",
        ),
        (torch.zeros(4, 4), torch.arange(4), "the network is no better than chance"),
    ],
)
def test_logits_without_a_best_temperature_are_refused(logits: Tensor, labels: Tensor, wrong: str) -> None:
    with pytest.raises(CalibrationError, match=wrong):
        fit_temperature(logits, labels)


# ------------------------------------------------------------------------------------------------------------ halves


def outputs(count: int, classes: int, scale: float) -> tuple[Outputs, list[str]]:
    logits, labels = data(count, classes, scale)
    return Outputs(logits, labels, torch.arange(count)), [
        f"c{label}/{n}.jpg" for n, label in enumerate(labels.tolist())
    ]


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 10])
def test_it_is_fitted_on_one_half_and_judged_on_the_other(classes: int) -> None:
    """Other logits in the half that is judged change its figures and not the temperature; torchmetrics finds the same errors."""
    from torchmetrics.classification import MulticlassCalibrationError

    found, names = outputs(900, classes, 3.0)
    chosen = torch.tensor([to_fit(name) for name in names])
    result = calibrate(found, names)
    assert (result.fitted_images, result.measured_images) == (int(chosen.sum()), 900 - int(chosen.sum()))
    assert result.temperature == fit_temperature(found.logits[chosen], found.labels[chosen])
    rest, labels = found.logits[~chosen].double(), found.labels[~chosen]
    oracle = MulticlassCalibrationError(classes, n_bins=15)
    assert result.ece_before == pytest.approx(oracle(rest.softmax(1), labels).item(), rel=1e-5)
    assert result.ece_after == pytest.approx(oracle((rest / result.temperature).softmax(1), labels).item(), rel=1e-5)
    for temperature, value in ((1.0, result.nll_before), (result.temperature, result.nll_after)):
        assert value == pytest.approx(nll(rest.numpy(), labels.numpy(), temperature), rel=1e-9)
    assert result.ece_after < result.ece_before / 2 and result.nll_after < result.nll_before
    changed = torch.where(chosen[:, None], found.logits, -found.logits)
    other = calibrate(found._replace(logits=changed), names)
    assert other.temperature == result.temperature and other.ece_after != result.ece_after


def test_an_image_is_always_of_the_same_half() -> None:
    names = [f"class/{n}.jpg" for n in range(2000)]
    assert [to_fit(name) for name in names[:8]] == [True, True, False, False, False, False, False, True]
    assert 900 < sum(map(to_fit, names)) < 1100
    assert to_fit("a/\udcff.jpg") in (True, False)  # a name that is no UTF-8


def test_halves_without_an_image_and_logits_that_are_not_finite_are_refused() -> None:
    found, _ = outputs(4, 3, 1.0)
    with pytest.raises(CalibrationError, match="0 to fit on and 4 to measure on"):
        calibrate(found, [next(n for n in map(str, range(99)) if not to_fit(n))] * 4)
    found.logits[1, 1] = math.nan
    with pytest.raises(CalibrationError, match="1 images have logits that are not finite"):
        calibrate(found, ["1", *(n for n in map(str, range(9)) if to_fit(n) != to_fit("1"))][:2] * 2)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("scale", [3.0, 0.0])
def test_every_rank_has_the_temperature_of_one_or_its_error(size: int, scale: float) -> None:
    found, names = outputs(120, 3, scale)
    images: Any = SimpleNamespace(name=names.__getitem__)
    network = nn.Linear(2, 2)
    saved: Any = SimpleNamespace(step=7, average=None, network=lambda average: network)

    def rank(world: Threads) -> Calibration | UserError:
        answers, mine = Answers(3, CPU, keep_logits=True), np.arange(120)[world.rank :: size]
        for numbers in np.array_split(mine, 3):
            answers.update(found.logits[numbers], found.labels[numbers], numbers)
        return calibrate_checkpoint(saved, answers, images, world, average=True, shown="24 pixels")

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(rank, ranks(size)))
    for result in results:
        if scale:
            assert isinstance(result, Calibration)
            assert result.temperature == calibrate(found, names).temperature
            assert (result.step, result.weights, result.digest) == (7, "raw", weights_digest(network))
            assert result.images == "24 pixels"
        else:
            assert isinstance(result, CalibrationError) and "no better than chance" in str(result)


# ----------------------------------------------------------------------------------------------------------- the file


@pytest.fixture
def run(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A finished run whose averaged weights have the temperature T."""
    folder = Path(shutil.copytree(finished_run.folder, tmp_path / "run"))
    saved = read_saved(folder)
    images = shown_as(saved.config.data, flip=saved.config.eval.flip)
    write_calibration(folder, calibration(weights_digest(saved.network()), saved.step, images))
    return folder


def calibration(digest: str, step: int, images: str) -> Calibration:
    figures = {"ece_before": 0.2, "ece_after": 0.1, "nll_before": 1.5, "nll_after": 1.25}
    of = {"step": step, "weights": "averaged", "digest": digest, "images": images}
    return Calibration(temperature=T, **of, fitted_images=6, measured_images=8, **figures)


def saying(**changes: Any) -> Change:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def without(name: str) -> Change:
    return lambda path: path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name})
    )


WRONG: dict[str, tuple[Change, str]] = NO_TABLES | {
    "no temperature": (without("temperature"), "must be a table with 'temperature' in it"),
    "zero": (saying(temperature=0), "temperature = 0: must be 0.01 to 100"),
    "negative": (saying(temperature=-1.5), "temperature = -1.5: must be 0.01 to 100"),
    "NaN": (saying(temperature=math.nan), "temperature = nan: must be 0.01 to 100"),
    "infinite": (saying(temperature=math.inf), "temperature = inf: must be 0.01 to 100"),
    "a text": (saying(temperature="2"), "temperature = '2': must be a number"),
    "true": (saying(temperature=True), "temperature = True: must be a number"),
    "a digest with a command": (saying(digest="\x1b[31m0000000000"), "must be 16 hex digits"),
    "a long digest": (saying(digest="0" * 999), "must be a text of at most 16 characters"),
    "weights of a third kind": (saying(weights="best"), "must be averaged or raw"),
    "an error above 1": (saying(ece_after=1.5), "ece_after = 1.5: must be 0 to 1"),
    "images of a number": (saying(images=24), "images = 24: must be a text"),
    "another field": (saying(code="x"), "code = 'x': must be left out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_was_changed_is_refused(name: str, run: Path) -> None:
    change, wrong = WRONG[name]
    change(run / "calibration.json")
    saved = read_saved(run)
    with pytest.raises(CalibrationError) as caught:
        read_calibration(saved.path, step=9, weights="averaged", digest="0" * 16)
    assert str(run / "calibration.json") in str(caught.value) and wrong in str(caught.value)
    assert "\n" not in str(caught.value) and "make it again" in str(caught.value)


@pytest.mark.parametrize("command", ["predict", "export"])
@pytest.mark.parametrize("case", ["none", "raw weights", "another step", "no run", "damaged", "other images"])
def test_no_other_weights_get_a_temperature(
    command: str, case: str, run: Path, finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, more, file = str(run), [], run / "calibration.json"
    wrong = "is of other weights (step 9, averaged weights "
    if case == "none":
        file.unlink()
        wrong = f"is not there; make it: fasttricks evaluate {run} --calibrate"
    elif case == "raw weights":
        more = ["--no-average"]
    elif case == "another step":
        saying(digest="0123456789abcdef", step=5)(file)
        wrong = "is of other weights (step 5, averaged weights 0123456789abcdef) than these (step 9, averaged weights "
    elif case == "no run":
        place = str(shutil.copy(run / "checkpoints" / "step-0000000009.pt", tmp_path))
        wrong = "is in no run folder"
    elif case == "other images":
        saying(images="99 pixels of 99, linear")(file)
        wrong = "was fitted on images of 99 pixels of 99, linear, and these are "
    else:
        file.write_text("{")
        wrong = "must be as `fasttricks evaluate RUN --calibrate` wrote it"
    image = str(next((finished_run.data / "val").rglob("*.jpg")))
    target = tmp_path / "out"
    args = [place, image] if command == "predict" else [place, "--no-onnx", "--output", str(target)]
    main = predict.main if command == "predict" else export.main
    assert call(main, *args, "--calibrated", *more) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and wrong in said.err and said.err.count("\n") == 1, said.err
    assert said.out == "" and not target.exists()


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("RUN/checkpoints/a.pt", "RUN"),
        ("RUN/export/model.safetensors", None),
        ("a.pt", None),
        ("/r/checkpoints/a.pt", "/r"),
    ],
)
def test_the_run_of_a_checkpoint(path: str, folder: str | None) -> None:
    assert run_of(Path(path)) == (None if folder is None else Path(folder))


def test_the_run_of_a_checkpoint_in_the_working_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    assert run_of(Path("step-0000000009.pt")) == run


# ------------------------------------------------------------------------------------------------ predict and export


def shares(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, float]:
    """Class -> its probability, as predict writes it to a file."""
    assert call(predict.main, *args) == 0, capsys.readouterr().err
    lines = capsys.readouterr().out.splitlines()[1:]
    return {line.split()[-1]: float(line.split()[0]) / 100 for line in lines}


def test_predict_and_every_consumer_of_the_export_have_the_temperature(
    run: Path, finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(next((finished_run.data / "val").rglob("*.jpg")))
    plain, calibrated = shares(capsys, str(run), image), shares(capsys, str(run), image, "--calibrated")
    assert list(plain) == list(calibrated), "the classes keep their order"
    for other in ("--no-flip", "--data.val-resize=40", "--data.interpolation=cubic", "--data.no-antialias"):
        assert call(predict.main, str(run), image, other, "--calibrated") == 2
        assert "calibrated: was fitted on images of " in capsys.readouterr().err
    powers = {name: share ** (1 / T) for name, share in plain.items()}
    for name, share in calibrated.items():
        assert share == pytest.approx(powers[name] / sum(powers.values()), abs=3e-4) != plain[name]
    first, again, bare = (str(tmp_path / name) for name in ("first", "again", "bare"))
    assert call(export.main, str(run), "--no-onnx", "--output", first, "--calibrated") == 0
    assert call(export.main, first, "--no-onnx", "--output", again, "--calibrated") == 0
    assert call(export.main, str(run), "--no-onnx", "--output", bare) == 0
    capsys.readouterr()
    for folder in (first, again):
        assert shares(capsys, folder, image) == pytest.approx(calibrated, abs=2e-4)
        assert shares(capsys, folder, image, "--calibrated") == pytest.approx(calibrated, abs=2e-4), (
            "it is not applied twice"
        )
        saved = open_saved(Path(folder))
        assert saved.temperature == T
        with safe_open(f"{folder}/model.safetensors", "np") as file:
            assert file.metadata()["temperature"] == repr(T)
        assert f"divided by {T}" in (Path(folder) / "README.md").read_text()
    assert (
        "calibration error 20.00 % before and 10.00 % after, loss 1.5000 and 1.2500"
        in Path(first, "README.md").read_text()
    )
    assert "## Calibration" not in Path(bare, "README.md").read_text() and open_saved(Path(bare)).temperature is None
    assert call(predict.main, bare, image, "--calibrated") == 2
    assert "holds no temperature itself" in capsys.readouterr().err
    weights = open_saved(Path(first)).weights
    for name, values in open_saved(Path(bare)).weights.items():
        torch.testing.assert_close(weights[name], values / T if name.startswith("fc.") else values)


@pytest.mark.parametrize(
    "name", ["resnet8d", "mobilenet_v1", "inception_v3", "timm:test_vit", "timm:test_efficientnet"]
)
def test_folding_divides_the_logits_of_every_kind_of_network(name: str) -> None:
    if name.startswith("timm:"):
        pytest.importorskip("timm")
    side = {"inception_v3": 75, "timm:test_vit": 160}.get(name, 32)
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name), 7).eval()
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        before = model(pixels)
        fold(model, T, DataConfig(image_size=side, val_resize=side))
        torch.testing.assert_close(model(pixels), before / T, rtol=1e-4, atol=1e-5)


class Shifted(nn.Module):
    """A network that adds to the outputs of its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(images.mean((2, 3))) + torch.tensor([5.0, 0, 0, 0])
        return logits


@pytest.mark.parametrize("model", [Shifted(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))])
def test_a_network_that_cannot_be_folded_is_refused(model: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="cannot be folded into this network"):
        fold(model, T, DataConfig(image_size=8, val_resize=8))


# ---------------------------------------------------------------------------------------------------------- evaluate


def test_evaluate_fits_stores_and_says_it(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The temperature is set: whether 14 images of noise have one depends on the training. Its effect is measured."""
    run = Path(shutil.copytree(finished_run.folder, tmp_path / "run"))
    monkeypatch.setattr("fasttricks.tasks.calibration.fit_temperature", lambda logits, labels: T)
    assert call(evaluate.main, str(run), "--calibrate", "--output", str(tmp_path / "a.json")) == 0
    said, stored = capsys.readouterr().out.splitlines()[-1], json.loads((run / "calibration.json").read_text())
    assert json.loads((tmp_path / "a.json").read_text())["calibration"] == stored
    assert stored["temperature"] == T and stored["fitted_images"] + stored["measured_images"] == 14
    names = [str(path.relative_to(finished_run.data / "val")) for path in (finished_run.data / "val").rglob("*.jpg")]
    assert stored["fitted_images"] == sum(map(to_fit, names))
    assert said.startswith("temperature 2.5000, fitted on ") and f"ECE {100 * stored['ece_before']:.2f} % -> " in said
    saved = read_saved(run)
    found = read_calibration(saved.path, step=9, weights="averaged", digest=weights_digest(saved.network()))
    assert dataclasses.asdict(found) == stored
    image = str(finished_run.data / "val" / names[0])
    assert shares(capsys, str(run), image, "--calibrated") != shares(capsys, str(run), image)


def test_without_a_temperature_the_answers_are_not_lost(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished_run.folder, tmp_path / "run"))
    monkeypatch.setattr("fasttricks.tasks.calibration._slopes", lambda logits, labels, beta: (1.0, 1.0))
    assert call(evaluate.main, str(run), "--calibrate", "--output", str(tmp_path / "a.json")) == 2
    said = capsys.readouterr()
    assert said.out.startswith("top-1 ") and "ECE " in said.out and (tmp_path / "a.json").is_file()
    assert said.err.startswith("error: calibrate: no temperature up to 100 fits, ") and said.err.count("\n") == 1
    assert not (run / "calibration.json").exists()


def test_calibrate_needs_a_run(finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = shutil.copy(finished_run.folder / "checkpoints" / "step-0000000009.pt", tmp_path)
    assert call(evaluate.main, str(file), "--calibrate") == 2
    said = capsys.readouterr()
    assert said.out == "" and "is stored in a run folder" in said.err and said.err.count("\n") == 1
