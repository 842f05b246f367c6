"""Classes of unlike size: drawn by data.balance, weighted by loss.class_weights, and said in the header."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.commands import train
from fasttricks.config import ConfigError, DataConfig, LossConfig, UserError, replace_fields
from fasttricks.config.recipes import cifar10
from fasttricks.data.pipeline.draws import balanced_order, epoch_order
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.sources.class_counts import class_counts, describe_counts
from fasttricks.data.sources.folder import ImageFolder, scan_folder
from fasttricks.learning.class_weights import class_weights
from lib.tables import mostly_slow
from lib.tiny import SHRINK, call

SIZES = {"ant": 40, "bee": 11, "cow": 2}
LABELS = np.repeat([0, 1, 2], list(SIZES.values()))
N = len(LABELS)


# ------------------------------------------------------------------------------------------------------------- the order
@pytest.mark.parametrize("balance", [0.25, 0.5, 1.0])
def test_the_turns_of_a_class_are_its_share(balance: float) -> None:
    """To within one an epoch, and over 400 epochs to within five deviations of that rounding."""
    sizes = np.array(list(SIZES.values()), float)
    shares = N * sizes ** (1 - balance) / (sizes ** (1 - balance)).sum()
    orders = [balanced_order(3, epoch, LABELS, balance) for epoch in range(400)]
    turns = np.array([np.bincount(LABELS[order % N], minlength=3) for order in orders])
    assert (turns.sum(1) == N).all()
    assert (np.abs(turns - shares) <= 1).all()
    assert (np.abs(turns.mean(0) - shares) < 5 * 0.5 / 400**0.5).all()


def test_images_of_a_class_come_equally_often_and_each_time_with_other_numbers() -> None:
    often = np.zeros(N)
    for epoch in range(400):
        order = balanced_order(0, epoch, LABELS, 1.0)
        assert len(np.unique(order)) == N, "a turn came twice: its crop would be the same"
        times = np.bincount(order % N, minlength=N)
        assert (np.sort(order // N)[-1] + 1) == times.max()
        for label in range(3):
            assert np.ptp(times[label == LABELS]) <= 1
        often += times
    for label in range(3):
        mean = often[label == LABELS].mean()
        assert np.abs(often[label == LABELS] - mean).max() < 5 * 0.5 * 400**0.5


def test_it_is_a_function_of_seed_and_epoch_and_without_effect_on_equal_classes() -> None:
    assert (balanced_order(1, 2, LABELS, 1.0) == balanced_order(1, 2, LABELS, 1.0)).all()
    for other in (balanced_order(2, 2, LABELS, 1.0), balanced_order(1, 3, LABELS, 1.0)):
        assert (balanced_order(1, 2, LABELS, 1.0) != other).any()
    equal = np.arange(60) % 4
    assert (balanced_order(1, 2, equal, 1.0) == epoch_order(1, 2, 60)).all()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise, as many a class as SIZES says; one of the two cows is no image."""
    folder, rng = tmp_path_factory.mktemp("unlike"), np.random.default_rng(0)
    for name, count in SIZES.items():
        for split, number in (("train", count), ("val", 2)):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (12, 16, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index:02d}.png")
    return folder


SMALL = DataConfig(image_size=8, val_resize=8, threads=1, color="none", pca_noise=0, balance=1.0, max_bad=0.5)


def batches(root: Path, ranks: int = 1, **changes: Any) -> list[list[Any]]:
    """The batches of an epoch of each rank."""
    images, config = scan_folder(root / "train"), replace_fields(SMALL, changes)
    options: dict[str, Any] = {"training": True, "batch_size": 12 // ranks, "device": torch.device("cpu"), "seed": 5}
    loaders = [Loader(images, config, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
    return [[(b.images.clone(), b.labels.tolist(), b.places, b.shown) for b in loader] for loader in loaders]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_loader_shows_them_so_on_any_number_of_ranks(root: Path, ranks: int) -> None:
    found = [batch for rank in batches(root, ranks) for batch in rank]
    turns = np.concatenate([places for *_, places, _ in found])
    assert (turns == balanced_order(5, 0, LABELS, 1.0)).all()
    labels = np.concatenate([labels for _, labels, *_ in found]).astype(int)
    assert (labels == LABELS[turns % N]).all()
    assert [*np.bincount(labels)] in ([18, 18, 17], [18, 17, 18], [17, 18, 18])


def test_an_image_has_another_crop_each_time(root: Path) -> None:
    found = batches(root)[0]
    images = torch.cat([images for images, *_ in found])
    shown = np.concatenate([shown for *_, shown in found])
    again = images[shown == N - 1]
    assert len(again) >= 8
    assert len({image.numpy().tobytes() for image in again}) == len(again)


def test_a_bad_image_of_a_rare_class_is_replaced_in_each_of_its_turns(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = scan_folder(root / "train")
    cut = tmp_path / "00.png"
    cut.write_bytes((root / "train" / "cow" / "00.png").read_bytes()[:60])
    broken = ImageFolder(
        root=Path("/"),
        classes=images.classes,
        files=tuple(
            str(Path(images.root, file)).lstrip("/") if number != N - 2 else str(cut).lstrip("/")
            for number, file in enumerate(images.files)
        ),
        labels=images.labels,
    )
    loader = Loader(broken, SMALL, training=True, batch_size=12, device=torch.device("cpu"), seed=5)
    found = list(loader)
    shown = np.concatenate([batch.shown for batch in found if batch.shown is not None])
    assert N - 2 not in shown and (shown == N - 1).sum() >= 17
    assert [*loader.bad] == [f"/{broken.files[N - 2]}"] and "bad image" in capfd.readouterr().err


def test_a_position_within_an_epoch_resumes(root: Path) -> None:
    images = scan_folder(root / "train")
    options: dict[str, Any] = {"training": True, "batch_size": 12, "device": torch.device("cpu"), "seed": 5}
    whole, first, second = (Loader(images, SMALL, **options) for _ in range(3))
    wanted = [batch.images.clone() for batch in whole][2:]
    walk = iter(first)
    next(walk), next(walk)
    second.load_state_dict(first.state_dict())
    assert [torch.equal(a.images, b) for a, b in zip(second, wanted, strict=True)] == [True] * 3


def test_validation_is_as_without(root: Path) -> None:
    images = scan_folder(root / "val")
    options: dict[str, Any] = {"training": False, "batch_size": 6, "device": torch.device("cpu")}
    one, other = (
        [b.images.clone() for b in Loader(images, replace_fields(SMALL, {"balance": b}), **options)] for b in (0.0, 1.0)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ----------------------------------------------------------------------------------------------------------- the weights
def test_balanced_weights_are_scikit_learns(root: Path) -> None:
    """n_samples / (n_classes * count), which sklearn.utils.class_weight states; their mean over the images is 1."""
    images = scan_folder(root / "train")
    weights = class_weights("balanced", images, max_pixels=1)
    assert weights is not None and class_weights("", images, max_pixels=1) is None
    np.testing.assert_allclose(weights.numpy(), [N / (3 * count) for count in SIZES.values()], rtol=1e-6)
    assert float(weights[torch.from_numpy(LABELS)].mean()) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "ant,1\nbee,2\ncow,10\n",
        "\ufeffclass,weight\r\ncow,5\r\n\r\nant,0.5\r\nbee,1\r\n",
        '"ant",0.1\n"bee", 0.2\ncow,1e0\n',
    ],
)
def test_a_files_weights_are_scaled_to_a_mean_of_1(text: str, root: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.csv").write_bytes(text.encode())
    weights = class_weights(str(tmp_path / "weights.csv"), scan_folder(root / "train"), max_pixels=1)
    assert weights is not None
    scale = N / (40 * 1 + 11 * 2 + 2 * 10)
    np.testing.assert_allclose(weights.numpy(), [scale, 2 * scale, 10 * scale], rtol=1e-6)


WRONG = {
    "no class ": ("ant,1\nbee,1\ncwo,1\n", "line 3: the data has no class cwo, the nearest is cow"),
    "a class too few": ("ant,1\nbee,1\n", "it lacks cow"),
    "twice": ("ant,1\nbee,1\ncow,1\nant,1\n", "line 4: ant stands in it twice"),
    "three columns": ("ant,1,2\nbee,1\ncow,1\n", "line 1 has 3 columns"),
    "no number": ("ant,x\nbee,1\ncow,1\n", "line 1: x is no number of 0 or more"),
    "negative": ("ant,-1\nbee,1\ncow,1\n", "line 1: -1 is no number of 0 or more"),
    "NaN": ("ant,nan\nbee,1\ncow,1\n", "line 1: nan is no number of 0 or more"),
    "infinite": ("ant,inf\nbee,1\ncow,1\n", "line 1: inf is no number of 0 or more"),
    "a sum of 0": ("ant,0\nbee,0\ncow,0\n", "every image weighs 0"),
    "empty": ("", "it lacks ant and 2 more"),
    "an open quote": ('"ant,1\nbee,1\n', "unexpected end of data"),
    "escapes": ("\x1b[31m,1\n", r"the data has no class \x1b[31m"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_refused_before_training(kind: str, root: Path, tmp_path: Path) -> None:
    text, words = WRONG[kind]
    (tmp_path / "weights.csv").write_text(text)
    words_of = ["--data.root", str(root), "--loss.class-weights", str(tmp_path / "weights.csv")]
    with pytest.raises(UserError) as caught:
        train.main(["cifar10", *SHRINK, *words_of, "--device", "cpu", "--run-dir", str(tmp_path / "run")])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_corrects_twice_or_needs_the_same_images_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"loss\.class_weights = 'balanced': would correct the same twice"):
        replace_fields(cifar10(), {"data.balance": 0.5, "loss.class_weights": "balanced"})
    replace_fields(cifar10(), {"data.balance": 0.5, "loss.class_weights": "weights.csv"})
    assert LossConfig(class_weights="x").class_weights == "x"


# ----------------------------------------------------------------------------------------------------------- whole runs
SAID: list[tuple[tuple[str, ...], str]] = [
    ((), "2 to 40 images a class (fewest: cow, most: ant); rare classes count little: --data.balance 1 draws,"),
    (("--data.balance", "1"), "(fewest: cow, most: ant); drawn alike"),
    (("--data.balance", "0.5"), "(fewest: cow, most: ant); drawn by n^0.5"),
    (("--loss.class-weights", "balanced"), "; their loss is weighted 0.442 to 8.83 (balanced)"),
]


@pytest.mark.parametrize(("options", "said"), mostly_slow(SAID, SAID[2], SAID[3]))
def test_a_run_says_it_and_resumes_with_its_own(
    options: tuple[str, ...], said: str, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cifar10", *SHRINK, "--data.root", str(root), "--device", "cpu", "--run-dir", str(tmp_path / "run")]
    words += ["--epochs", "1", "--schedule.warmup-epochs", "0", "--data.threads", "1", "--global-batch-size", "16"]
    assert call(train.main, *words, *options) == 0
    assert said in capsys.readouterr().out
    changed = ["--data.balance", "0.75"] if "--data.balance" not in options else ["--loss.class-weights", "balanced"]
    if options:
        assert call(train.main, *words, *changed, "--resume") == 2
        assert "a run resumes only with its own config" in capsys.readouterr().err


def test_a_changed_file_of_weights_is_refused_on_resume(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "weights.csv"
    file.write_text("ant,1\nbee,2\ncow,3\n")
    words = ["cifar10", *SHRINK, "--data.root", str(root), "--device", "cpu", "--run-dir", str(tmp_path / "run")]
    words += ["--epochs", "1", "--schedule.warmup-epochs", "0", "--data.threads", "1", "--global-batch-size", "16"]
    words += ["--loss.class-weights", str(file)]
    assert call(train.main, *words) == 0
    file.write_text("ant,1\nbee,2\ncow,4\n")
    assert call(train.main, *words, "--resume") == 2
    assert "class weights: [" in capsys.readouterr().err


def test_the_counts_in_words(root: Path) -> None:
    images = scan_folder(root / "train")
    assert class_counts(images).tolist() == [40, 11, 2]
    assert describe_counts(scan_folder(root / "val")) == "2 images a class"
