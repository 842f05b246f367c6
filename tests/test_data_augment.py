"""What the graph does to an image, against the plain twin, and the distribution of what it draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import pipeline_def, types
from PIL import Image
from torchvision.transforms import v2

from fasttricks.config import DataConfig
from fasttricks.data.pipeline import draws, graph, reference
from fasttricks.data.pipeline.loader import Loader
from fasttricks.data.pipeline.pixels import graph_input
from fasttricks.data.sources.folder import ImageFolder, scan_folder
from lib.tables import covering, mostly_slow

CPU = torch.device("cpu")


def run(graph: Callable[[], Any], given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a graph on the CPU for the inputs `given`, each with an axis for the images."""
    count = len(next(iter(given.values())))
    pipeline = pipeline_def(graph)(batch_size=count, num_threads=2, device_id=None, prefetch_queue_depth=1)
    pipeline.build()
    return [np.array(output.as_array()) for output in pipeline.run(**given)]


def windows(height: int, width: int, **given: np.ndarray) -> list[np.ndarray]:
    """(start, extent) of the crop window, for so many aspects, areas and positions."""

    def window_graph() -> Any:
        shape = types.Constant(np.array([height, width, 3], np.int64), device="cpu")
        window = graph.crop_window(shape, DataConfig().area, graph_input("aspect", 0), graph_input("area", 0))
        return window["rel_start"], window["rel_shape"]

    return run(window_graph, {name: values.astype(np.float32) for name, values in given.items()})


def train(folder: ImageFolder, config: DataConfig, **arguments: Any) -> np.ndarray:
    """The first epoch of training, (N, S, S, 3) as the network sees it, in the order of the folder."""
    loader = Loader(folder, config, **{"training": True, "batch_size": 32, "device": CPU, **arguments})
    images = torch.cat([batch.images for batch in loader]).permute(0, 2, 3, 1).numpy()
    return images[np.argsort(draws.epoch_order(arguments.get("seed", 0), 0, len(folder)))]


PAPERS = {"mean": (123.68, 116.779, 103.939), "std": (58.393, 57.12, 57.375)}
OTHERS: dict[str, Any] = {"mean": (100.0, 127.5, 30.0), "std": (127.5, 64.0, 20.0)}


def pixels_of(loader: Loader, mean: Any = PAPERS["mean"], std: Any = PAPERS["std"]) -> np.ndarray:
    """All images of an epoch, (N, S, S, 3), normalisation undone with these constants."""
    images = torch.cat([batch.images for batch in loader]).permute(0, 2, 3, 1).double().numpy()
    return images * std + mean


def photos(root: Path, count: int = 60) -> ImageFolder:
    folder = scan_folder(root / "train")
    step = len(folder.files) // count
    return replace(folder, files=folder.files[::step], labels=folder.labels[::step])


@pytest.mark.parametrize(
    ("interpolation", "statistics"),
    mostly_slow(
        [("linear", {}), ("linear", OTHERS), ("cubic", {}), ("lanczos3", {})], ("linear", OTHERS), ("lanczos3", {})
    ),
)
def test_validation_pixels_agree_with_the_reference(
    interpolation: Any, statistics: dict[str, Any], test_data: Callable[[str], Path]
) -> None:
    """Decoder and filter of PIL: within one grey level everywhere, and the same value in 99 % of the pixels."""
    folder = photos(test_data("imagenet_samples"), 15)
    config = DataConfig(interpolation=interpolation, **statistics)
    got = pixels_of(Loader(folder, config, training=False, batch_size=32, device=CPU), **statistics)
    for image, file in zip(got, folder.files, strict=True):
        want = reference.validation_pixels(
            reference.decode(folder.root / file), image_size=224, val_resize=256, interpolation=interpolation
        )
        difference = np.abs(image - want)
        assert difference.max() < 1.001, file
        assert (difference > 0.5).mean() < 0.01, file


def test_validation_pixels_agree_with_what_torchvision_users_have(test_data: Callable[[str], Path]) -> None:
    """Resize(256), CenterCrop(224) of 8-bit PIL images: a grey level, 0.17 on average, where sizes round alike."""
    folder = photos(test_data("imagenet_samples"))
    transform = v2.Compose([v2.Resize(256), v2.CenterCrop(224)])
    got = pixels_of(Loader(folder, DataConfig(), training=False, batch_size=32, device=CPU))
    compared = 0
    for pixels, file in zip(got, folder.files, strict=True):
        image = reference.decode(folder.root / file)
        long_side = max(image.size) * 256 / min(image.size)
        if (
            long_side % 1 >= 0.5 or int(long_side) % 2
        ):  # torchvision cuts the long side, we round; odd margins are split otherwise
            continue
        difference = np.abs(pixels - np.asarray(transform(image), np.float64))
        assert difference.max() < 1.001, file
        assert difference.mean() < 0.3, file
        compared += 1
    assert compared >= 15


COLORS: list[tuple[Any, dict[str, Any]]] = [
    ("paper", {}),
    ("published", {}),
    ("none", {}),
    ("published", OTHERS),
    ("none", OTHERS),
]


@pytest.mark.parametrize(("colors", "operators"), covering(COLORS, ["fused", "dali"]))
def test_training_image_is_the_reference_with_the_same_draws(
    colors: tuple[Any, dict[str, Any]], operators: Any, test_data: Callable[[str], Path]
) -> None:
    """Crop, resize, flip, colour, noise, normalisation: a grey level before the colour step, as that amplifies it."""
    color, statistics = colors
    config = DataConfig(image_size=96, color=color, operators=operators, **statistics)
    folder, seed = photos(test_data("imagenet_samples"), 24), 5
    flipped = []
    for index, got in enumerate(train(folder, config, seed=seed)):
        drawn = draws.image_draws(seed, 0, np.array([index]))
        want = reference.training_image(reference.decode(folder.root / folder.files[index]), config, drawn)
        flipped.append(drawn.flip[0] < 0.5)
        difference = np.abs(got - want) * (statistics or PAPERS)["std"]
        # the resize may differ by a level in each channel; how much the colour step makes of that
        factors = [] if color == "none" else 0.6 + 0.8 * drawn.factors[0]
        white, black = (reference.augment_color(c, color, factors, (0, 0, 0)) for c in (np.eye(3), np.zeros((3, 3))))
        gain = np.abs(white - black).sum(0).max()
        assert difference.max() < 1.05 * gain, folder.files[index]
        assert difference.mean() < 0.3 * gain, folder.files[index]
    assert 0 < sum(flipped) < len(flipped)


@pytest.mark.parametrize(("height", "width"), [(300, 400), (375, 500), (640, 320), (200, 1500), (32, 32)])
def test_crop_window_follows_its_formula(height: int, width: int) -> None:
    """Aspect, area up to the largest that fits, and position are uniform: Kolmogorov-Smirnov, each at p > 1e-4."""
    drawn = draws.image_draws(0, 0, np.arange(4096))
    aspects = 3 / 4 + (4 / 3 - 3 / 4) * drawn.aspect
    start, extent = windows(height, width, aspect=aspects, area=drawn.area, position=drawn.position)
    assert (start >= 0).all()
    assert (start + extent <= 1 + 1e-6).all()
    aspect = extent[:, 1] * width / (extent[:, 0] * height)
    area = extent.prod(1)
    largest = np.minimum(np.minimum(aspect * height / width, width / (aspect * height)), 1)
    low = np.minimum(largest, 0.08)
    with_room = np.ptp(largest) > 0 and (largest > 0.081).all()
    uniforms = {
        "aspect": (aspect - 3 / 4) / (4 / 3 - 3 / 4),
        "top": start[:, 0] / np.maximum(1 - extent[:, 0], 1e-9),
        "left": start[:, 1] / np.maximum(1 - extent[:, 1], 1e-9),
    }
    if with_room:
        uniforms["area"] = (area - low) / (largest - low)
    for name, values in uniforms.items():
        loose = values[(extent < 1 - 1e-3).all(1)] if name in ("top", "left") else values
        if len(loose) > 1000:
            assert ks_distance(loose) < 2.23 / np.sqrt(len(loose)), name  # p = 1e-4
    assert np.corrcoef(aspect, start[:, 0])[0, 1] ** 2 < 0.1


def ks_distance(values: np.ndarray) -> float:
    """Largest distance of the empirical distribution from U[0, 1]."""
    values = np.sort(values)
    steps = np.arange(len(values) + 1) / len(values)
    return float(max(np.abs(values - steps[:-1]).max(), np.abs(values - steps[1:]).max()))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 50), (2, 2), (3000, 2)])
def test_an_image_of_a_pixel_or_two_is_trained_on(tmp_path: Path, width: int, height: int) -> None:
    Image.new("RGB", (width, height), (9, 99, 199)).save(tmp_path / "a.png")
    folder = ImageFolder(root=tmp_path, classes=("a",), files=("a.png",) * 64, labels=(0,) * 64)
    config = DataConfig(image_size=8, color="none", pca_noise=0)
    pixels = pixels_of(Loader(folder, config, training=True, batch_size=32, device=CPU))
    np.testing.assert_allclose(pixels, np.broadcast_to([9, 99, 199], pixels.shape), atol=1e-3)


def test_crop_window_agrees_with_the_reference() -> None:
    for height, width in ((300, 400), (640, 320), (100, 2000), (2, 2), (1, 40)):
        given = {"aspect": np.array([0.9]), "area": np.array([0.3]), "position": np.array([[0.25, 0.75]])}
        start, extent = windows(height, width, **given)
        want = reference.window(height, width, (0.08, 1.0), 0.9, 0.3, (0.25, 0.75))
        np.testing.assert_allclose(np.stack([start[0], extent[0]]), want, rtol=1e-5)


@pytest.mark.parametrize("probability", [0.0, 0.5, 0.9, 1.0])
def test_flip_rate(tmp_path: Path, probability: float) -> None:
    """An image with a bright left half, seen 600 times; the rate within 4.5 standard deviations."""
    Image.fromarray(np.repeat(np.repeat([[[255] * 3, [0] * 3]], 16, 1), 32, 0).astype(np.uint8)).save(
        tmp_path / "a.png"
    )
    folder = ImageFolder(root=tmp_path, classes=("a",), files=("a.png",) * 600, labels=(0,) * 600)
    config = DataConfig(image_size=8, val_resize=8, area=(1.0, 1.0), aspect=(1.0, 1.0), color="none", flip=probability)
    pixels = pixels_of(Loader(folder, config, training=True, batch_size=100, device=CPU))
    flipped = pixels[:, :, 0].mean((1, 2)) < pixels[:, :, -1].mean((1, 2))
    assert abs(flipped.mean() - probability) <= 4.5 * np.sqrt(probability * (1 - probability) / 600)


def smooth(mode: str, size: tuple[int, int] = (80, 64)) -> Image.Image:
    y, x = np.mgrid[: size[1], : size[0]]
    rgb = np.stack([x * 3, y * 3.5, 255 - x - y], -1).clip(0, 255).astype(np.uint8)
    return Image.fromarray(rgb).convert(mode)


def test_formats_and_names_that_users_have(tmp_path: Path) -> None:
    """Grey, CMYK, turned by EXIF, PNG with palette, grey or alpha, and a folder and file of non-ASCII name."""
    folder = tmp_path / "Bilder ü" / "犬 class"
    folder.mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    smooth("L").save(folder / "grey.jpg", quality=95)
    smooth("CMYK").save(folder / "cmyk.jpg", quality=95)
    smooth("RGB").save(folder / "exif.jpg", quality=95, exif=turned)
    smooth("RGB").save(folder / "naïve é.png")
    smooth("P").save(folder / "palette.png")
    smooth("L").save(folder / "grey.png")
    smooth("RGB").save(folder / "web.webp", lossless=True)
    smooth("RGB").save(folder / "bitmap.bmp")
    smooth("RGB").save(folder / "tagged.tiff")
    images = scan_folder(tmp_path / "Bilder ü")
    assert len(images.files) == 9
    config = DataConfig(image_size=32, val_resize=48)
    got = pixels_of(Loader(images, config, training=False, batch_size=4, device=CPU))
    for pixels, file in zip(got, images.files, strict=True):
        want = reference.validation_pixels(reference.decode(images.root / file), image_size=32, val_resize=48)
        assert np.abs(pixels - want).mean() < 1.0, file
        assert np.abs(pixels - want).max() < 4.0, file
    for batch in Loader(images, config, training=True, batch_size=4, device=CPU):
        assert torch.isfinite(batch.images).all()


def test_the_window_of_an_exif_turned_image_lies_on_the_upright_image(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth("RGB", (200, 100)).save(tmp_path / "exif.jpg", quality=95, exif=turned)
    folder = ImageFolder(root=tmp_path, classes=("a",), files=("exif.jpg",) * 40, labels=(0,) * 40)
    config = DataConfig(image_size=32, val_resize=32, color="none", pca_noise=0)
    image = reference.decode(tmp_path / "exif.jpg")
    for index, got in enumerate(train(folder, config)):
        want = reference.training_image(image, config, draws.image_draws(0, 0, np.array([index])))
        assert np.abs(got - want).max() * 58 < 2.5
