"""Checkpoints under kill -9, a full disk, code, damage and the wrong model."""

from __future__ import annotations

import io
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.soak.payloads import PAYLOADS, is_live, sealed
from fasttricks.config import ModelConfig
from fasttricks.models import build_model
from fasttricks.runs.checkpoint import FORMAT, load_checkpoint, load_weights, save_checkpoint
from fasttricks.runs.stored import (
    CheckpointError,
    DamagedError,
    checkpoint_path,
    checkpoints,
    keep_newest,
    newest_checkpoint,
    step_of,
)
from lib.forked import on_ranks
from lib.refusing import no_file_beyond
from lib.states import same, state
from lib.tables import mostly_slow

NO_PROCESS = 99_999_999  # above the largest number that Linux gives one

# ------------------------------------------------------------------------------------------------- save and load


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 3)
    save_checkpoint(path, state())
    assert os.listdir(tmp_path) == ["step-0000000003.pt"]
    assert same(load_checkpoint(path), state() | {"format": FORMAT, "path": str(path)})


def test_a_run_folder_gives_its_newest_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (9, 10, 1000, 11):
        save_checkpoint(checkpoint_path(folder, step), state(step))
    assert load_checkpoint(tmp_path)["step"] == 1000
    assert newest_checkpoint(folder) == checkpoint_path(folder, 1000)
    assert newest_checkpoint(tmp_path) is None


def test_keep_newest_drops_the_old_and_what_a_kill_left(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        checkpoint_path(tmp_path, step).touch()
    (tmp_path / f".step-0000000101.pt.{NO_PROCESS}.tmp").touch()
    writing = tmp_path / f".step-0000000102.pt.{os.getppid()}.tmp"  # by another process, which is there
    writing.touch()
    keep_newest(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == [writing.name, "step-0000000010.pt", "step-0000000100.pt"]
    keep_newest(tmp_path, 5)
    assert len(os.listdir(tmp_path)) == 3


USERS = (
    "step-0000000004-keep.pt", "step-0000000004 (1).pt", "step-best.pt", "step-latest.pt", "step-3.pt", "step-2.pt",
    "step-00000000009.pt", "step-0000000004.pt.bak", ".step-4.pt.99999999.tmp", ".step-best.tmp", "notes.txt",
)  # fmt: skip

"""What a user may put beside the checkpoints: names that this code never gives."""


@pytest.mark.parametrize("name", USERS)
def test_what_the_user_puts_beside_the_checkpoints_is_neither_read_nor_removed(name: str, tmp_path: Path) -> None:
    for step in (2, 3, 4):
        checkpoint_path(tmp_path, step).write_text(str(step))
    (tmp_path / name).symlink_to(checkpoint_path(tmp_path, 4)) if "latest" in name else (tmp_path / name).touch()
    assert [step_of(path) for path in checkpoints(tmp_path)] == [4, 3, 2]
    assert newest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 4)
    keep_newest(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "step-0000000003.pt", "step-0000000004.pt"])


def test_checkpoints_are_in_the_order_of_their_numbers_and_are_files(tmp_path: Path) -> None:
    steps = [7, 10**10 - 1, 10**10, 12 * 10**10]  # from ten digits on, names no longer sort by step
    for step in steps:
        checkpoint_path(tmp_path, step).touch()
    os.mkfifo(checkpoint_path(tmp_path, 13 * 10**10))
    checkpoint_path(tmp_path, 14 * 10**10).mkdir()
    checkpoint_path(tmp_path, 15 * 10**10).symlink_to("nowhere")
    assert [step_of(path) for path in checkpoints(tmp_path)] == steps[::-1]


def test_keep_newest_keeps_the_newest_of_a_marked_step_too(tmp_path: Path) -> None:
    for step in (5, 10, 11, 12, 13):
        checkpoint_path(tmp_path, step).touch()
    keep_newest(tmp_path, 2, also=lambda step: step % 5 == 0)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [13, 12, 10]
    checkpoint_path(tmp_path, 15).touch()
    keep_newest(tmp_path, 2, also=lambda step: step % 5 == 0)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [15, 13]


# ----------------------------------------------------------------------------------------------------- kill -9

KILLS_IN_A_SAVE, MOST_KILLS = 2, 60


def save_until_killed(run: Path) -> None:
    """A child saves without end and is killed, over and over; what it had reported as saved is there and whole, each time."""
    folder, step, kills, inside = run / "checkpoints", 0, 0, 0
    folder.mkdir()
    draws = random.Random(0)
    while inside < KILLS_IN_A_SAVE and kills < MOST_KILLS:
        kills += 1
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            while True:
                step += 1
                save_checkpoint(checkpoint_path(folder, step), state(step, size=500_000))
                os.write(writer, step.to_bytes(4, "big"))
                keep_newest(folder, 2)
        os.close(writer)
        saved = os.read(reader, 4)  # the first save is done: kill one of those that follow
        time.sleep(draws.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(reader, 4):
            saved = more
        os.close(reader)
        inside += any(name.endswith(".tmp") for name in os.listdir(folder))
        loaded = load_checkpoint(run)
        step = loaded["step"]
        assert step >= int.from_bytes(saved, "big"), "a checkpoint that was reported saved is gone"
        assert (loaded["model"]["weight"] == step).all() and len(loaded["model"]["weight"]) == 500_000
        for path in folder.glob("step-*.pt"):
            load_checkpoint(path)
    (run / "kills in a save").write_text(str(inside))


def test_after_kill_9_the_newest_checkpoint_loads(tmp_path: Path) -> None:
    """In a process that may fork, as it runs one thread."""
    on_ranks(1, save_until_killed, tmp_path)
    # how fast the disk is decides how many kills that takes
    assert (tmp_path / "kills in a save").read_text() == str(KILLS_IN_A_SAVE)


# --------------------------------------------------------------------------------------------------- a full disk


# Large: torch's own zip writer meets the error; small: it comes when Python flushes its buffer.
@pytest.mark.parametrize(("size", "limit"), [(1_000_000, 500_000), (100, 500)])
def test_a_full_disk_leaves_the_last_checkpoint_and_names_it(tmp_path: Path, size: int, limit: int) -> None:
    good = checkpoint_path(tmp_path, 1)
    save_checkpoint(good, state(1))
    with no_file_beyond(limit), pytest.raises(CheckpointError) as caught:
        save_checkpoint(checkpoint_path(tmp_path, 2), state(2, size))
    message = str(caught.value)
    assert message.startswith(f"checkpoint = '{checkpoint_path(tmp_path, 2)}': must be on a disk with room")
    assert f"the last good checkpoint is {good}" in message
    assert "File too large" in message  # the system's reason, not torch's "unexpected pos"
    assert os.listdir(tmp_path) == [good.name]
    assert load_checkpoint(good)["step"] == 1


def test_a_full_disk_leaves_the_file_of_the_same_name(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, state(1))
    with no_file_beyond(500), pytest.raises(CheckpointError):
        save_checkpoint(path, state(2))
    assert load_checkpoint(path)["step"] == 1


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no earlier checkpoint .*No such file or directory"):
        save_checkpoint(checkpoint_path(tmp_path / "gone", 1), state())


# ------------------------------------------------------------------------------------------- a file that is none


@pytest.mark.parametrize("forced", [False, True], ids=["", "torch's default is off"])
@pytest.mark.parametrize("name", PAYLOADS)
def test_a_file_that_holds_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, forced: bool
) -> None:
    """With the checksum that belongs to it, as an attacker would write it, and without."""
    path, made = checkpoint_path(tmp_path, 1), tmp_path / "made"
    body = PAYLOADS[name](made)
    assert is_live(body, made), "the payload shall run where it is let"
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for content in (sealed(body), body):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"nothing in it was run|it lacks \["):
            load_checkpoint(path)
        assert not made.exists()


@pytest.mark.parametrize("every", mostly_slow([5, 1], 5))
def test_every_flipped_bit_is_found(every: int, tmp_path: Path) -> None:
    """One in each byte (in make test, in each fifth), the zip's own and the checksum's included. torch alone misses most."""
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, state(size=4))
    whole = path.read_bytes()
    missed_by_torch = 0
    for at in range(0, len(whole), every):
        harmed = whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :]
        path.write_bytes(harmed)
        with pytest.raises(DamagedError):
            load_checkpoint(path)
        if at % 50 == 0:
            try:
                torch.load(path, weights_only=True)
                missed_by_torch += 1
            except Exception:
                continue
    assert missed_by_torch > 0


def test_a_flipped_weight_is_refused(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, state(step=3))
    content = path.read_bytes()
    three = torch.tensor(3.0).numpy().tobytes()
    at = content.index(three * 100)
    path.write_bytes(content[: at + 2] + b"\x41" + content[at + 3 :])
    assert torch.load(path, weights_only=True)["model"]["weight"][0] != 3.0  # torch takes it for a weight
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_checkpoint(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(path, state())
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError, match=r"must be a whole file of fasttricks\.train"):
            load_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"hello", b"\x80\x04K\x01.", b"PK\x05\x06" + bytes(18)], ids=["text", "pickle", "zip"]
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^checkpoint = '{path}': must be a whole file"):
        load_checkpoint(path)


def test_other_torch_files_and_other_formats_are_refused(tmp_path: Path) -> None:
    """Those of format 1 had no checksum: they are named for what they are, and not taken for damaged ones."""
    path = tmp_path / "file.pt"
    torch.save(build_model(ModelConfig(name="resnet8a", width=0.125), 2).state_dict(), path)
    with pytest.raises(CheckpointError, match="must have format 2, not None"):
        load_checkpoint(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(CheckpointError, match="must have format 2, not 'Tensor'"):
        load_checkpoint(path)
    torch.save({"format": 1, "model": {}}, path)
    with pytest.raises(CheckpointError, match="must have format 2, not 1; use a file that this version"):
        load_checkpoint(path)
    buffer = io.BytesIO()
    torch.save({"format": 3}, buffer)
    path.write_bytes(sealed(buffer.getvalue()))
    with pytest.raises(CheckpointError, match="must have format 2, not 3"):
        load_checkpoint(path)
    save_checkpoint(path, {"model": {}})
    with pytest.raises(CheckpointError, match=r"it lacks \['config', 'classes', 'fingerprint'"):
        load_checkpoint(path)
    torch.save({"format": FORMAT}, path)
    with pytest.raises(DamagedError):  # of this format, so its checksum was cut off
        load_checkpoint(path)


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "no.pt", tmp_path):
        with pytest.raises(CheckpointError, match=rf"^checkpoint = '{path}': must be a file, or a run folder"):
            load_checkpoint(path)


# ------------------------------------------------------------------------------------------------ another model


def weights_of(classes: int = 10, **config: Any) -> dict[str, torch.Tensor]:
    return build_model(ModelConfig(**{"name": "resnet10d", "width": 0.125} | config), classes).state_dict()


def test_weights_of_the_same_model_load() -> None:
    model = build_model(ModelConfig(name="resnet10d", width=0.125), 10)
    weights = weights_of()
    load_weights(model, weights, source="x.pt")
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({"classes": 11}, r"2 of another shape \(first: fc.weight \(11, 64\) for \(10, 64\)\)"),
        ({"width": 0.25}, r"of another shape \(first: conv1.6.weight \(16, 8, 3, 3\) for \(8, 8, 3, 3\)\)"),
        ({"name": "resnet18d"}, r"^((?!missing).)*unknown \(first: layer1.1.conv1.weight\)"),
        ({"name": "resnet10a"}, r"missing \(first: conv1.0.weight\).*unknown \(first: conv1.weight\)"),
        (None, r"found \d+ missing"),
    ],
    ids=["classes", "width", "depth", "variant", "empty"],
)
def test_weights_of_another_model_are_refused_and_change_nothing(other: dict[str, Any] | None, found: str) -> None:
    model = build_model(ModelConfig(name="resnet10d", width=0.125), 10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=found) as caught:
        load_weights(model, {} if other is None else weights_of(**other), source="x.pt")
    assert str(caught.value).startswith("checkpoint = 'x.pt': must hold this very model's weights: same model.name")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
