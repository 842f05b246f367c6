"""The embedded demo data: a folder of JPEGs of ImageNet-like sizes, made on first use and kept in a cache.

No photographs can be shipped, so the project draws a set (demo_images.py) on which the whole recipe is seen at work
within minutes: JPEG decoding, random crops of images of every size and aspect ratio, flips and colour.

Each image has a generator of its own, seeded by (seed, split, class, index): whichever process draws it, and when, its
bytes are the same for the same versions of numpy and Pillow on the same kind of CPU. The folder's name is a digest
of all that decides its content, so that an edit of the drawing never meets old data.

A folder under its final name is whole: it is built beside it under another name and renamed, under a lock, so that the
ranks of a run make it once. Its manifest (files and bytes) finds later losses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL
from rich.console import Console

from fasttricks.data.sources import demo_images, demo_shapes
from fasttricks.data.sources.cache import cache_folder
from fasttricks.data.sources.errors import DataError
from fasttricks.data.sources.folder import ImageFolder, scan_folder
from fasttricks.system.ownership import Claim, Owner
from fasttricks.system.progress import counted
from fasttricks.system.reading import Reader
from fasttricks.system.schema import anything

CLASSES = tuple(demo_shapes.SHAPES)
SPLITS = ("train", "val")
MANIFEST = "manifest.json"
_MANIFESTS = Reader(DataError, "damaged", "it is drawn again")
_WORKER = "import sys; from fasttricks.data.sources.demo import _work; _work(sys.argv[1])"


def make_demo(
    cache: Path | None = None, *, seed: int = 0, num_train: int = 2500, num_val: int = 500, workers: int = 0
) -> Path:
    """The root of the demo data, train/CLASS/*.jpg and val/CLASS/*.jpg; drawn first where `cache` lacks it.

    cache: folder that gets the root as a subfolder; None: fasttricks in $XDG_CACHE_HOME or ~/.cache.
    seed: the seed of all images, 0 or more; another seed is another folder beside the first.
    num_train, num_val: images, each at least one a class; classes differ by at most one image.
    workers: drawing processes; 0: one a CPU core. The bytes do not depend on it.
    Raises ValueError for a number out of range and OSError where the images cannot be written.
    Cost: 3,000 images are 71 MB; drawing is bound by the CPU. Once they are made, a look at the size of each.
    """
    for name, number in (("num_train", num_train), ("num_val", num_val)):
        if number < len(CLASSES):
            raise ValueError(f"{name} = {number}: must be {len(CLASSES)} or more, an image for each class of the demo")
    if seed < 0 or workers < 0:
        raise ValueError(f"seed = {seed}, workers = {workers}: neither may be negative")
    cache = cache_folder() if cache is None else Path(cache)
    root = cache / f"demo-{_digest(seed, num_train, num_val)}"
    if _is_whole(root):
        return root
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with Claim(cache / f".{root.name}.lock", patience_s=math.inf, waiting=_say_who):
            if not _is_whole(root):  # another process may have made it while this one waited
                _build(root, seed, (num_train, num_val), workers)
    except OSError as error:
        way_out = "free 150 MB there, or set XDG_CACHE_HOME to a folder that can be written"
        raise OSError(f"the demo data cannot be written to {cache}: {error}; {way_out}") from error
    return root


def open_demo(split: str, classes: tuple[str, ...] | None) -> ImageFolder:
    """A split of the demo data. Raises DataError where it cannot be written, and as scan_folder."""
    try:
        root = make_demo()
    except OSError as error:
        raise DataError(f"data.root = 'demo': {error}") from error
    return scan_folder(root / split, classes=classes)


def _digest(seed: int, num_train: int, num_val: int) -> str:
    """12 hex digits of everything that decides the bytes: the drawing code, numpy, Pillow and the arguments."""
    parts = hashlib.sha256(repr((np.__version__, PIL.__version__, seed, num_train, num_val)).encode())
    for source in (__file__, demo_images.__file__, demo_shapes.__file__):
        parts.update(Path(source).read_bytes())
    return parts.hexdigest()[:12]


def _inventory(root: Path) -> dict[str, int]:
    """Number of images under `root` and their bytes."""
    sizes = [entry.stat().st_size for split in SPLITS for entry in (root / split).glob("*/*.jpg")]
    return {"images": len(sizes), "bytes": sum(sizes)}


def _is_whole(root: Path) -> bool:
    try:
        return bool(_MANIFESTS.json(root / MANIFEST, anything) == _inventory(root))
    except (OSError, DataError):
        return False


def _say_who(owner: Owner) -> None:
    Console(stderr=True).print(f"Waiting for the demo data, which {owner} makes", soft_wrap=True)


def _build(root: Path, seed: int, counts: tuple[int, int], workers: int) -> None:
    """Draw the data beside `root` and rename it there. The caller holds the lock, so older partial builds are dead."""
    console = Console(stderr=True)
    _remove_partial_builds(root)
    partial = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        total = sum(counts)
        console.print(f"Making the demo data, once: {total:,} JPEGs, about {total / 42:.0f} MB")
        for split in SPLITS:
            for name in CLASSES:
                (partial / split / name).mkdir(parents=True)
        _draw_all(partial, seed, counts, workers or min(len(os.sched_getaffinity(0)), 1 + total // 50), console)
        inventory = _inventory(partial)
        with (partial / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(inventory, file)
            file.flush()
            os.fsync(file.fileno())
        partial.chmod(0o755)  # mkdtemp makes it private
        if root.exists():  # damaged, or the caller would not build
            shutil.rmtree(root)
        partial.rename(root)
        megabytes = inventory["bytes"] / 1e6
        console.print(f"Made {inventory['images']:,} JPEGs, {megabytes:.0f} MB, in {root}", soft_wrap=True)
    finally:
        _remove_partial_builds(root)  # a worker of a killed build may have written after the removal above


def _remove_partial_builds(root: Path) -> None:
    for partial in root.parent.glob(f".{root.name}-*"):
        shutil.rmtree(partial, ignore_errors=True)


def _draw_all(folder: Path, seed: int, counts: tuple[int, int], workers: int, console: Console) -> None:
    """Run the workers to their end, with a progress bar. Raises OSError with the reason of the first that fails.

    Plain subprocesses, not multiprocessing: that forks a process that has threads, or imports the caller's main module
    (and torch with it) once a worker. All write one byte an image into one pipe, so a worker whose parent was killed
    ends at its next image.
    """
    read_end, write_end = os.pipe()
    env = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with contextlib.ExitStack() as stack:
        done = stack.enter_context(open(read_end, "rb", buffering=0))
        running: list[subprocess.Popen[str]] = []
        with open(write_end, "wb") as progress_pipe:
            for worker in range(workers):
                job = json.dumps([str(folder), seed, counts, worker, workers])
                command = [sys.executable, "-c", _WORKER, job]
                process = subprocess.Popen(command, env=env, stdout=progress_pipe, stderr=subprocess.PIPE, text=True)
                running.append(stack.enter_context(process))
                stack.callback(process.kill)
        advance = stack.enter_context(counted("drawing", sum(counts), console))
        while drawn := done.read(4096):
            advance(len(drawn))
        for process in running:
            reason = process.communicate()[1].strip().rpartition("\n")[2]
            if process.returncode:
                raise OSError(reason or f"a drawing process ended with {process.returncode}")


def _work(job: str) -> None:
    """Body of a worker: every `workers`-th image of the set, from `worker` on; a byte to standard output for each."""
    folder, seed, counts, worker, workers = json.loads(job)
    images = [
        (split, label, index)
        for split, count in enumerate(counts)
        for label in range(len(CLASSES))
        for index in range(label, count, len(CLASSES))
    ]
    for split, label, index in images[worker::workers]:
        path = Path(folder, SPLITS[split], CLASSES[label], f"{index:05d}.jpg")
        rng = np.random.default_rng([seed, split, label, index])
        image = demo_images.draw_image(rng, CLASSES[label])
        subsampling = "4:2:0" if rng.random() < 0.7 else "4:4:4"
        image.save(path, quality=int(rng.integers(60, 96)), subsampling=subsampling)
        os.write(1, b".")
