"""The view of an image and its mask: against Pillow and loops in NumPy given the draws, and the draws' distribution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fasttricks.config import DataConfig, SegmentConfig
from fasttricks.data.annotated.pixels import normalise, short_side_to
from fasttricks.data.annotated.samples import stand_in
from fasttricks.data.masks.source import IGNORED
from fasttricks.data.masks.views import View, draw_view, show, show_whole

DATA = DataConfig(image_size=32, val_resize=40, mean=(120.4, 117.5, 104.0), std=(58.0, 57.0, 57.5))
SEGMENT = SegmentConfig(base_size=40, scale=(0.5, 2.0), blur=0.5)
SEED = 5


def smooth(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) and a mask (H, W) of some classes and IGNORED."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    mask = rng.integers(0, 5, (height, width)).astype(np.uint8)
    mask[rng.random(mask.shape) < 0.1] = IGNORED
    return np.array(image), mask


def nearest(length: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixel nearest to each of `new` centres, and where a centre lies between two pixels the lower of the two."""
    twice = (2 * np.arange(new) + 1) * length
    return twice // (2 * new), (twice - 1) // (2 * new)


def twin(image: np.ndarray, mask: np.ndarray, view: View, data: DataConfig) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same without torch, without blur: Pillow's pixels, and the masks between which ties decide."""
    side, (height, width) = data.image_size, mask.shape
    kind = {"linear": Image.Resampling.BILINEAR, "cubic": Image.Resampling.BICUBIC}[data.interpolation]
    resized = np.asarray(Image.fromarray(image).resize((view.width, view.height), kind))
    masks = [
        mask[np.ix_(rows, columns)] for rows in nearest(height, view.height) for columns in nearest(width, view.width)
    ]
    full = [np.empty((side, side, 3), np.uint8), *(np.full((side, side), IGNORED, np.uint8) for _ in masks)]
    full[0][:] = np.round(data.mean)
    for target, one in zip(full, (resized, *masks), strict=True):
        part = one[view.top : view.top + side, view.left : view.left + side]
        target[: part.shape[0], : part.shape[1]] = part[:, ::-1] if view.flip else part
    return full[0], full[1:]


@pytest.mark.parametrize("interpolation", ["linear", "cubic"])
@pytest.mark.parametrize("size", [(48, 64), (64, 48), (50, 50), (23, 120), (31, 33), (40, 2), (1, 1)])
def test_against_pillow(size: tuple[int, int], interpolation: str) -> None:
    """Larger and smaller, with and without filling; the classes exactly, the pixels to a grey level, of five thousand one to two.

    Both round after the first direction and after the second, but with weights of other widths.
    """
    data, (image, mask) = replace(DATA, interpolation=interpolation), smooth(*size)  # type: ignore[arg-type]
    filled, differences = 0, []
    for place in range(20):
        view = draw_view(size, data, replace(SEGMENT, blur=0.0), seed=SEED, epoch=1, place=place)
        pixels, classes = show(image, mask, view, data)
        want_pixels, want_masks = twin(image, mask, view, data)
        assert pixels.dtype == classes.dtype == torch.uint8
        differences.append(np.abs(pixels.numpy().astype(int) - want_pixels))
        assert np.any([classes.numpy() == one for one in want_masks], 0).all()
        assert (classes.numpy() == want_masks[0]).mean() > 0.9
        filled += min(view.height, view.width) < data.image_size
    assert np.max(differences) <= 2 and np.mean(np.array(differences) > 1) < 1 / 5000
    assert 0 < filled < 20


def test_an_image_and_its_mask_stay_together() -> None:
    """The class of a pixel is its colour: after any view without blur the colour still says it, but at the borders of classes."""
    mask = np.random.default_rng(1).integers(0, 3, (7, 9)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
    image = np.eye(3, dtype=np.uint8)[mask] * 200
    for place in range(20):
        view = draw_view(mask.shape, DATA, replace(SEGMENT, blur=0.0), seed=SEED, epoch=0, place=place)  # type: ignore[arg-type]
        pixels, classes = show(image, mask, view, DATA)
        there = classes != IGNORED
        assert (pixels.argmax(2)[there] == classes[there]).float().mean() > 0.97
        assert there.any()


def test_the_blur_is_a_gaussian() -> None:
    """Against a float64 sum over 7 x 7 pixels; a blur of deviation 0 changes nothing."""
    (_, mask), plain = smooth(60, 60), View(60, 60, 10, 10, 0.0, False)
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8)
    sharp = show(image, mask, plain, DATA)[0]
    for sigma in (1.0, 0.6, 0.3):
        weights = np.exp(-np.square(np.arange(-3, 4)) / (2 * sigma**2))
        weights /= weights.sum()
        padded = np.pad(sharp.numpy().astype(np.float64), ((3, 3), (3, 3), (0, 0)), "reflect")
        want = sum(weights[y] * weights[x] * padded[y : y + 32, x : x + 32] for y in range(7) for x in range(7))
        found, classes = show(image, mask, plain._replace(blur=sigma), DATA)
        assert np.abs(found.numpy() - want).max() <= 1
        assert not torch.equal(found, sharp)
        np.testing.assert_array_equal(classes.numpy(), mask[10:42, 10:42])
    assert torch.equal(show(image, mask, plain._replace(blur=1e-9), DATA)[0], sharp)


def views(count: int, size: tuple[int, int], **fields: float) -> list[View]:
    segment = replace(SEGMENT, blur=fields.pop("blur", SEGMENT.blur))
    data = replace(DATA, **fields)  # type: ignore[arg-type]
    return [draw_view(size, data, segment, seed=SEED, epoch=place % 7, place=place // 7) for place in range(count)]


def test_the_distribution_of_the_views() -> None:
    """3000 of a landscape: the short side is uniform on 20 to 80, the place on its range, coins and deviation as asked."""
    from scipy import stats

    drawn = views(3000, (60, 90), flip=0.25, blur=0.4)
    short = np.array([view.height for view in drawn])
    assert (short.min(), short.max()) == (20, 80)
    assert stats.chisquare(np.bincount(short)[20:]).pvalue > 1e-3
    assert all(view.width == int(view.height * 90 / 60) for view in drawn)
    for at, length in (("top", "height"), ("left", "width")):
        spare = np.array([getattr(view, length) - 32 for view in drawn])
        place = np.array([getattr(view, at) for view in drawn])
        assert (place[spare <= 0] == 0).all() and (spare <= 0).any()
        assert ((place >= 0) & (place <= np.maximum(spare, 0))).all()
        wide = spare > 20
        share = (place[wide] + 0.5) / (spare[wide] + 1)
        assert stats.kstest(share, "uniform").pvalue > 1e-3
        assert {0, 1} <= {*place[wide]} and (place[wide] == spare[wide]).any()
    flips, blurs = (np.array([getattr(view, name) for view in drawn]) for name in ("flip", "blur"))
    assert abs(flips.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 3000)
    assert abs((blurs > 0).mean() - 0.4) < 4 * np.sqrt(0.4 * 0.6 / 3000)
    assert stats.kstest(blurs[blurs > 0], "uniform").pvalue > 1e-3
    columns = np.array([[view.height, view.top / max(1, view.height - 31), flip, blur > 0] for view, flip, blur in
                        zip(drawn, flips, blurs, strict=True)])  # fmt: skip
    big = columns[columns[:, 0] > 52]
    correlation = np.corrcoef(big.T) - np.eye(4)
    assert np.abs(correlation).max() < 4 / np.sqrt(len(big))


def test_never_and_always() -> None:
    drawn = views(200, (60, 90), flip=0.0, blur=0.0)
    assert not any(view.flip or view.blur for view in drawn)
    drawn = views(200, (60, 90), flip=1.0, blur=1.0)
    assert all(view.flip and view.blur for view in drawn)


def test_a_view_is_a_pure_function_of_seed_epoch_and_place() -> None:
    def one(seed: int, epoch: int, place: int) -> View:
        return draw_view((60, 90), DATA, SEGMENT, seed=seed, epoch=epoch, place=place)

    keys = [(seed, epoch, place) for seed in (0, 1, 2**40) for epoch in (0, 1, 9) for place in (0, 1, 10**6)]
    assert len({one(*key) for key in keys}) == len(keys)
    assert [one(*key) for key in keys] == [one(*key) for key in reversed(keys)][::-1]


def test_a_stand_in_is_any_image() -> None:
    from scipy import stats

    found = np.array([stand_in(SEED, place // 100, place % 100, 10) for place in range(2000)])
    assert stats.chisquare(np.bincount(found, minlength=10)).pvalue > 1e-3
    assert (found.min(), found.max()) == (0, 9)


@pytest.mark.parametrize("size", [(360, 480), (480, 360), (100, 100), (7, 50), (1, 3), (683, 512)])
def test_the_short_side_as_torchvision_resizes_it(size: tuple[int, int]) -> None:
    from torchvision.transforms.v2 import functional

    for side in (8, 240, 520):
        want = functional.resize(torch.zeros((1, *size), dtype=torch.uint8), [side]).shape[1:]
        assert short_side_to(side, *size) == tuple(want)


@pytest.mark.parametrize("size", [(360, 480), (480, 360), (100, 100), (683, 512), (1, 300)])
def test_the_long_side_as_the_authors_scale_it(size: tuple[int, int]) -> None:
    """gluon-cv, segbase.py: the long side is uniform on 0.5 to 2 times base_size, the short one in proportion, rounded."""
    from scipy import stats

    segment = SegmentConfig(base_size=520, base_side="long", scale=(0.5, 2.0))
    found = [draw_view(size, DATA, segment, seed=SEED, epoch=0, place=place) for place in range(1000)]
    long, short = (np.array([side(view.height, view.width) for view in found]) for side in (max, min))
    np.testing.assert_array_equal(short, np.maximum(1, np.floor(long * min(size) / max(size) + 0.5)))
    assert all((view.height > view.width) == (size[0] > size[1]) or view.height == view.width for view in found)
    assert 260 <= long.min() < 265 and 1035 < long.max() <= 1040
    assert stats.kstest((long - 259.5) / 781, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("size", [(45, 64), (64, 45), (20, 20)])
def test_the_whole_image_of_validation(size: tuple[int, int]) -> None:
    image, _ = smooth(*size)
    found, (height, width) = show_whole(image, DATA), short_side_to(40, *size)
    assert found.shape == (height, width, 3)
    want = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(found.numpy() - want).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_normalised_once(dtype: torch.dtype, count: int) -> None:
    raw = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 5, 7, 3), np.uint8))
    found = normalise(raw, DATA, dtype)
    assert (found.dtype, found.shape) == (dtype, (count, 3, 5, 7))
    assert found.is_contiguous(memory_format=torch.channels_last) or not count
    want = (raw.permute(0, 3, 1, 2).double() - torch.tensor(DATA.mean).double().view(3, 1, 1)) / torch.tensor(
        DATA.std
    ).double().view(3, 1, 1)
    torch.testing.assert_close(found.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_filled_with_the_mean() -> None:
    """To half a grey level, so that the filled part is nearly 0 after normalisation."""
    image, mask = smooth(10, 10)
    pixels, classes = show(image, mask, View(10, 10, 0, 0, 0.0, True), DATA)
    assert normalise(pixels[None], DATA, torch.float32)[0, :, 10:].abs().max() <= 0.5 / min(DATA.std) + 1e-6
    assert (classes[10:] == IGNORED).all() and (classes[:, 10:] == IGNORED).all()
    np.testing.assert_array_equal(classes[:10, :10].numpy(), mask[:, ::-1])
