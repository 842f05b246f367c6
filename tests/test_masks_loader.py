"""Order, shards, workers, resume and bad files of the loader of images with masks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasttricks.config import ConfigError, DataConfig, SegmentConfig
from fasttricks.data.annotated.pixels import normalise
from fasttricks.data.masks.batch import MaskBatch
from fasttricks.data.masks.loader import MaskLoader
from fasttricks.data.masks.pixels import read_pair
from fasttricks.data.masks.places import open_mask_split
from fasttricks.data.masks.source import IGNORED, MaskSource
from fasttricks.data.masks.views import draw_view, show, show_whole
from fasttricks.data.sources.errors import DataError
from fasttricks.system.refusals import refusal
from lib.masks import write_masks
from lib.tiny import environment

CPU = torch.device("cpu")
SEGMENT = SegmentConfig(base_size=20, scale=(0.5, 2.0), blur=0.5)
COUNT = 13
"""An odd number, whose last batch is short."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return write_masks(tmp_path_factory.mktemp("masks") / "root", train=COUNT, val=5)


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """One to be changed."""
    return Path(shutil.copytree(root, tmp_path / "root"))


def config(root: Path, **fields: Any) -> DataConfig:
    return DataConfig(**{"root": str(root), "image_size": 16, "val_resize": 18, "max_bad": 0.5, **fields})


def loader(root: Path, count: int = COUNT, **arguments: Any) -> MaskLoader:
    """Of the first `count` images."""
    training = arguments.setdefault("training", True)
    data = config(root, **arguments.pop("data", {}))
    source = open_mask_split(data, "train" if training else "val")
    source = replace(source, images=source.images[:count], masks=source.masks[:count])
    return MaskLoader(source, data, SEGMENT, **{"batch_size": 4, "device": CPU, "workers": 0, "seed": 3, **arguments})


def same(got: list[MaskBatch], want: list[MaskBatch]) -> None:
    """Assert that two epochs are equal, bit for bit."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks)
        assert a.places.tolist() == b.places.tolist() and a.shown.tolist() == b.shown.tolist()


def pictures(batches: list[MaskBatch]) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Image and mask of each place."""
    return {
        place: (batch.images[at], batch.masks[at])
        for batch in batches
        for at, place in enumerate(batch.places.tolist())
    }


def equal(got: dict[int, Any], want: dict[int, Any]) -> None:
    assert got.keys() == want.keys()
    assert all(torch.equal(a, b) for place in want for a, b in zip(got[place], want[place], strict=True))


def test_a_batch_is_the_views_of_its_images(root: Path) -> None:
    made = loader(root)
    for epoch in range(2):
        for batch in made:
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            assert (batch.images.dtype, batch.masks.dtype) == (torch.float32, torch.int64)
            assert batch.places.tolist() == batch.shown.tolist()
            for at, place in enumerate(batch.places.tolist()):
                source, data = made._source, made._config
                image, mask, _ = read_pair(source, place, data.max_pixels)
                view = draw_view(mask.shape, data, SEGMENT, seed=3, epoch=epoch, place=place)
                pixels, classes = show(image, mask, view, data)
                assert torch.equal(batch.images[at], normalise(pixels[None], data, torch.float32)[0])
                assert torch.equal(batch.masks[at], classes.long())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_each_image_once_in_each_epoch_over_all_ranks(root: Path, world_size: int) -> None:
    for count in (world_size, 4 * world_size - 1, 4 * world_size, 4 * world_size + 1):
        ranks = [loader(root, count, rank=rank, world_size=world_size) for rank in range(world_size)]
        orders = []
        for _ in range(3):
            epochs = [list(rank) for rank in ranks]
            seen = [[place for batch in batches for place in batch.places.tolist()] for batches in epochs]
            assert sorted(chain.from_iterable(seen)) == list(range(count))
            assert (
                [len(batches) for batches in epochs]
                == [len(rank) for rank in ranks]
                == [len(ranks[0].shards)] * world_size
            )
            for step, batches in enumerate(zip(*epochs, strict=True)):
                assert sum(map(len, batches)) == ranks[0].global_count(step)
                assert all(b.images.shape == (len(b), 3, 16, 16) and b.masks.shape == (len(b), 16, 16) for b in batches)
            orders.append(list(chain.from_iterable(seen)))
        assert count < 5 or len({*map(tuple, orders)}) == 3


def test_a_rank_may_get_an_empty_batch(root: Path) -> None:
    sizes = sorted(len(list(loader(root, 9, rank=rank, world_size=2))[1]) for rank in range(2))
    assert sizes == [0, 1]


def test_workers_prefetch_and_ranks_change_no_bit(root: Path) -> None:
    """Every image of the second epoch, also where another rank, process or batch has it."""

    def second(ranks: int = 1, **arguments: Any) -> list[MaskBatch]:
        made = [loader(root, rank=rank, world_size=ranks, **arguments) for rank in range(ranks)]
        for one in made:
            list(one)
        batches = list(chain.from_iterable(made))
        for one in made:
            one.close()
        return batches

    want = second()
    same(second(workers=1, data={"prefetch": 5}), want)
    same(second(workers=3), want)
    for got in (second(2), second(3, batch_size=5), second(2, workers=2), second(batch_size=COUNT)):
        equal(pictures(got), pictures(want))


@pytest.mark.parametrize("training", [True, False])
def test_resumed_from_every_step_of_an_epoch(root: Path, training: bool) -> None:
    """Into a new loader and into one in use; the rest of the epoch and the next are equal, bit for bit."""
    made = loader(root, training=training)
    list(made)
    states, epochs = [json.loads(json.dumps(made.state_dict()))], []
    for batch in made:
        epochs.append(batch)
        states.append(json.loads(json.dumps(made.state_dict())))
    following, used = list(made), loader(root, training=training)
    left = iter(used)
    next(left)
    for step, state in enumerate(states):
        for restored in (loader(root, training=training), used):
            restored.load_state_dict(state)
            same(list(restored), epochs[step:])
            same(list(restored), following)
    used.load_state_dict(states[1])
    same(list(left), epochs[1:])  # an iteration under way is moved too


def test_resumed_with_workers(root: Path) -> None:
    """Batches that are read ahead are not part of the position, and are dropped by a restored one."""
    whole = [list(one) for one in [loader(root)] * 2]
    made = loader(root, workers=2, data={"prefetch": 4})
    epoch = iter(made)
    same([next(epoch), next(epoch)], whole[0][:2])
    state = made.state_dict()
    same(list(epoch), whole[0][2:])
    same(list(made), whole[1])
    made.load_state_dict(state)
    same(list(made), whole[0][2:])
    other = loader(root, workers=1)
    other.load_state_dict(state)
    same(list(other), whole[0][2:])
    same(list(other), whole[1])
    made.close(), other.close()


def test_an_iteration_left_early_continues_where_it_was(root: Path) -> None:
    made, want = loader(root, workers=1), list(loader(root))
    for batch in made:
        head = [batch]
        break
    same(head + list(made), want)
    made.close()


@pytest.mark.parametrize(
    "change, field",
    [
        ({"seed": 1}, "seed"),
        ({"batch_size": 2}, "batch_size"),
        ({"world_size": 2}, "world_size"),
        ({"count": 12}, "files"),
    ],
)
def test_a_state_of_other_arguments_is_refused(root: Path, change: dict[str, Any], field: str) -> None:
    state = loader(root).state_dict()
    with pytest.raises(DataError, match=f"{field} = "):
        loader(root, **change).load_state_dict(state)


def test_validation_is_whole_images_in_order(root: Path) -> None:
    """One a batch whatever the batch size, with the mask as it is stored."""
    made = loader(root, training=False, batch_size=4, dtype=torch.float16)
    for _ in range(2):
        batches = list(made)
        assert [batch.shown.tolist() for batch in batches] == [[0], [1], [2], [3], [4]]
        for number, batch in enumerate(batches):
            pair = read_pair(made._source, number, 10**6)
            whole = show_whole(pair.image, made._config)
            assert min(whole.shape[:2]) == 18
            assert torch.equal(batch.images, normalise(whole[None], made._config, torch.float16))
            np.testing.assert_array_equal(batch.masks[0].numpy(), pair.mask)
    assert len(made.shards) == 5


def test_fewer_images_than_ranks(root: Path) -> None:
    with pytest.raises(DataError, match="2 images for 3 ranks"):
        loader(root, 2, world_size=3)


def test_a_filter_that_torchvision_lacks(root: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data.interpolation = 'lanczos3': must be linear or cubic for masks and boxes"
    ):
        loader(root, data={"interpolation": "lanczos3"})


def test_torchs_random_numbers_are_left_alone(root: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    made = loader(root, workers=1)
    list(made), list(loader(root))
    made.close()
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------------------------- bad files
BAD = {
    2: "damaged or cut off",
    7: "mask: value 3: must be 0 to 2",
    11: "no mask train/masks/011.png",
    5: "mask of 2 x 2 pixels",
}


def harm(root: Path, split: str = "train") -> None:
    """Images 2, 5, 7 and 11 are bad, each in its way."""
    from PIL import Image

    def folder(kind: str) -> Path:
        return root / split / kind

    file = folder("images") / "002.jpg"
    file.write_bytes(file.read_bytes()[:300])
    mask = np.array(Image.open(folder("masks") / "007.png"))
    mask[5, 5] = 3
    Image.fromarray(mask).save(folder("masks") / "007.png")
    (folder("masks") / "011.png").unlink()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(folder("masks") / "005.png")


def test_bad_images_are_named_and_replaced(copy: Path, root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By others that depend on the files alone; the rest is as it was."""
    want = [pictures(list(one)) for one in [loader(root)] * 2]
    harm(copy)
    made = loader(copy)
    epochs = [list(made), list(made)]
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 4
    for image, why in BAD.items():
        (line,) = [line for line in said if f"{image:03d}.jpg" in line.split(":")[0]]
        assert line.startswith(f"bad image train/images/{image:03d}.jpg: {why}") and line.endswith(
            "; replaced by another"
        )
        assert made.bad[f"train/images/{image:03d}.jpg"].startswith(why)
    assert len(made.bad) == 4
    stand_ins = []
    for epoch, batches in enumerate(epochs):
        got = pictures(batches)
        equal(
            {p: one for p, one in got.items() if p not in BAD},
            {p: one for p, one in want[epoch].items() if p not in BAD},
        )
        shown = dict(
            zip(*(np.concatenate([getattr(b, k) for b in batches]).tolist() for k in ("places", "shown")), strict=True)
        )
        assert shown.keys() == {*range(COUNT)}
        assert all((shown[p] != p and shown[p] not in BAD) if p in BAD else shown[p] == p for p in shown)
        for place in BAD:
            image, mask, _ = read_pair(made._source, shown[place], 10**6)
            view = draw_view(mask.shape, made._config, SEGMENT, seed=3, epoch=epoch, place=place)
            assert torch.equal(got[place][1], show(image, mask, view, made._config)[1].long())
        stand_ins.append([shown[place] for place in BAD])
    assert stand_ins[0] != stand_ins[1]
    others = [loader(copy, workers=2), *(loader(copy, rank=rank, world_size=2, batch_size=3) for rank in range(2))]
    equal(pictures(list(others[0])), pictures(epochs[0]))
    equal(pictures([*others[1], *others[2]]), pictures(epochs[0]))
    others[0].close()


def test_bad_images_are_left_out_of_validation(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(copy / "val")
    shutil.copytree(copy / "train", copy / "val")
    harm(copy, "val")
    made = loader(copy, training=False)
    for _ in range(2):
        batches = list(made)
        assert len(batches) == COUNT
        assert [len(batch) for batch in batches] == [int(number not in BAD) for number in range(COUNT)]
        assert all(b.images.shape[0] == b.masks.shape[0] == len(b.places) == len(b) for b in batches)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 4 and all(line.endswith("; left out") for line in said)


def test_bad_images_survive_a_resume(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    harm(copy)
    made = loader(copy)
    for _ in range(2):
        next(iter(made))
    state, rest = json.loads(json.dumps(made.state_dict())), list(made)
    capfd.readouterr()
    other = loader(copy)
    other.load_state_dict(state)
    known = {image for image, _ in state["bad"]}
    same(list(other), rest)
    assert other.bad == made.bad and len(other.bad) == 4
    assert len(capfd.readouterr().err.splitlines()) == len({*BAD} - known | {11} - known)


def test_one_rank_names_those_that_all_know(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copy / "train/masks/011.png").unlink()
    (copy / "train/images/012.jpg").unlink()
    for rank in range(2):
        made = loader(copy, rank=rank, world_size=2)
        list(made)
        assert made.bad == {
            "train/images/011.jpg": "no mask train/masks/011.png",
            "train/masks/012.png": "mask without an image",
        }
    assert capfd.readouterr().err.splitlines() == [
        "bad image train/images/011.jpg: no mask train/masks/011.png; replaced by another",
        "bad image train/masks/012.png: mask without an image; left out",
    ]


@pytest.mark.parametrize("training", [True, False])
def test_a_quarantined_image_is_not_shown(copy: Path, training: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Though it could be read."""
    split = "train" if training else "val"
    (copy / split / "images" / "quarantine.jsonl").write_text('{"file": "004.jpg", "reason": "blurred"}')
    shown = list(chain.from_iterable(batch.shown.tolist() for batch in loader(copy, training=training)))
    assert 4 not in shown and len(shown) == (COUNT if training else 4)
    then = "replaced by another" if training else "left out"
    assert capfd.readouterr().err == f"bad image {split}/images/004.jpg: quarantined: blurred; {then}\n"


def test_too_many_bad_images(copy: Path) -> None:
    harm(copy)
    made = loader(copy, data={"max_bad": 0.1})
    message = r"3 of 13 images are bad, over data.max_bad = 0.1 of them \(one is train/images/0"
    with pytest.raises(DataError, match=message):
        list(made)
    for number in range(10):
        (copy / f"train/masks/{number:03d}.png").unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"11 of 13 images are bad, over data.max_bad = 0.1 .*no mask train/masks/"):
        loader(copy, data={"max_bad": 0.1})


def test_masks_without_an_image_count_too(copy: Path) -> None:
    for number in range(10):
        (copy / f"train/images/{number:03d}.jpg").unlink()
    with pytest.raises(DataError, match=r"10 of 13 images are bad, over data.max_bad = 0.3 .*mask without an image"):
        loader(copy, data={"max_bad": 0.3})


def test_no_good_image(copy: Path) -> None:
    """Found as they are read, so that the search for another comes to its end."""
    for number in range(COUNT):
        (copy / f"train/images/{number:03d}.jpg").write_bytes(b"\xff\xd8\xff cut")
    with pytest.raises(DataError, match="no good image is left; JPEG without a size in its header"):
        list(loader(copy, data={"max_bad": 1.0}))


def test_a_class_that_no_training_mask_has(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Told once, after the first whole epoch, by the first rank."""
    (copy / "classes.txt").write_text("sky\nroad\ncar\nbicycle\n\n")
    made, other = loader(copy), loader(copy, rank=1, world_size=2)
    next(iter(made))
    state = made.state_dict()
    list(made), list(made), list(other)
    line = "warning: class bicycle (value 3) is in none of the 13 training masks; check the names and their order\n"
    assert capfd.readouterr().err == line
    resumed = loader(copy, workers=1)
    resumed.load_state_dict(state)
    list(resumed)
    assert capfd.readouterr().err == ""  # a part of an epoch says nothing
    list(resumed)
    assert capfd.readouterr().err == line
    resumed.close()
    list(loader(copy, rank=0, world_size=2))
    assert "none of the 6 training masks of rank 0;" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------------- workers
def children() -> set[int]:
    """The processes that this one has started."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended since
            found |= set(map(int, (task / "children").read_text().split()))
    return found


def test_workers_are_deaf_and_end_with_the_loader(root: Path) -> None:
    """A terminal's Ctrl-C and a batch system's SIGTERM reach all processes, and only the command is to answer."""
    before, made = children(), loader(root, workers=2)
    next(iter(made))
    workers = children() - before
    assert len(workers) == 2
    for worker in workers:
        (blocked,) = [
            int(line.split()[1], 16)
            for line in Path(f"/proc/{worker}/status").read_text().splitlines()
            if line.startswith("SigBlk")
        ]
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            assert blocked >> (number - 1) & 1
            os.kill(worker, number)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    assert len(list(made)) == 3
    assert children() - before == workers  # an epoch later they are the same
    del made
    assert children() == before


def test_a_killed_worker_is_one_line(root: Path) -> None:
    before, made = children(), loader(root, workers=1)
    epoch = iter(made)
    next(epoch)
    (worker,) = children() - before

    def kill() -> None:
        os.kill(worker, signal.SIGKILL)
        for _ in range(100):
            time.sleep(0.1)
            next(epoch)

    with pytest.raises(RuntimeError) as lost:
        kill()
    words = refusal(lost.value)
    assert words.startswith("a process that reads images has ended; is memory short? lower --data.threads or")
    assert str(worker) in words and "\n" not in words


def test_a_worker_dies_with_its_parent(tmp_path: Path) -> None:
    """Also where that is killed, or ends without a last word."""
    script = (
        "import os, sys, time\n"
        "from fasttricks.system.process import die_with_parent\n"
        "if os.fork() == 0:\n"
        "    die_with_parent()\n"
        "    open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "    time.sleep(60)\n"
        "while not os.path.exists(sys.argv[1]) or not open(sys.argv[1]).read():\n"
        "    time.sleep(0.01)\n"
        "os._exit(0)\n"
    )
    file = tmp_path / "pid"
    subprocess.run([sys.executable, "-c", script, str(file)], check=True, env=environment())
    for _ in range(100):
        state = Path(f"/proc/{file.read_text()}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it lives on")


def test_ignored_pixels_reach_the_batch(root: Path) -> None:
    masks = torch.cat([batch.masks.flatten() for batch in loader(root)])
    assert {*masks.unique().tolist()} == {0, 1, 2, IGNORED}


def test_ade20k(test_data: Callable[[str], Path]) -> None:
    """Three real images of three sizes: each with its mask at full size, its own short side at val_resize."""
    folder = test_data("seg_small") / "ade20k_sample" / "ADEChallengeData2016"
    data = DataConfig(root=str(folder), image_size=64, val_resize=96)
    made = MaskLoader(open_mask_split(data, "val"), data, SEGMENT, training=False, batch_size=2, device=CPU, workers=1)
    shapes = [(tuple(batch.images.shape), tuple(batch.masks.shape)) for batch in made]
    made.close()
    assert shapes == [
        ((1, 3, 96, 128), (1, 512, 683)),
        ((1, 3, 96, 131), (1, 364, 500)),
        ((1, 3, 96, 128), (1, 300, 400)),
    ]


def test_a_source_says_where_it_is(root: Path) -> None:
    made = loader(root)
    assert (made.root, made.classes, made.note, made.operators) == (root, ("sky", "road", "car"), "", "torchvision")
    assert isinstance(made._source, MaskSource)
