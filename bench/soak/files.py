"""Checkpoint files: saves that are killed, bits that flip, tails that are cut, code that waits to be run."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch

from bench.soak import processes
from bench.soak.payloads import PAYLOADS, is_live, sealed
from bench.soak.runs import Lab, Result, expect
from fasttricks.runs.checkpoint import load_checkpoint, save_checkpoint
from fasttricks.runs.folder import read_config
from fasttricks.runs.stored import CheckpointError, DamagedError, checkpoint_path, checkpoints, keep_newest
from fasttricks.system.distributed import World
from fasttricks.training.resume import find_state

ALONE = World.alone(torch.device("cpu"))


def finished(lab: Lab) -> Path:
    """A copy of a finished run with at least two checkpoints, to do harm to."""
    whole, copy = lab.folder / "finished", lab.folder / "harmed"
    if not (whole / "summary.json").exists():
        pids = processes.fork_ranks(lab.arguments(lab.fresh(whole.name)), 1, lab.log(whole.name))
        expect(processes.wait(pids) == [0], f"the run failed: {lab.log(whole.name)}")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    return copy


# -------------------------------------------------------------------------------------------------------- saves, killed
def saves(lab: Lab, count: int, draws: random.Random) -> list[Result]:
    """A process saves without end and is killed, again and again, until so many saves were begun; each file is whole."""
    folder = lab.fresh("saves") / "checkpoints"
    folder.mkdir(parents=True)
    state = {name: value for name, value in load_checkpoint(finished(lab)).items() if name not in ("path", "format")}
    results, step = [], 0
    while step < count:
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            _save_without_end(folder, state, step, writer)
        os.close(writer)
        reported = step
        for _ in range(draws.randrange(1, 8)):
            reported = int.from_bytes(os.read(reader, 4), "big")
        time.sleep(draws.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while more := os.read(reader, 4):
            reported = int.from_bytes(more, "big")
        os.close(reader)
        inside = any(folder.glob(".step-*.tmp"))
        found = [load_checkpoint(path)["step"] for path in checkpoints(folder)]  # raises for one that is not whole
        expect(found[0] >= reported, f"{folder}: step {reported} was reported as saved, and the newest is {found[0]}")
        expect(len(found) > 1 or found[0] < 2, f"{folder}: one checkpoint alone is left")
        results.append({"saves": found[0] - step + inside, "killed_in_a_save": inside})
        step = found[0]
    return results


def _save_without_end(folder: Path, state: dict[str, Any], step: int, writer: int) -> None:
    while True:
        step += 1
        save_checkpoint(checkpoint_path(folder, step), state | {"step": step})
        os.write(writer, step.to_bytes(4, "big"))
        keep_newest(folder, 2)


# ------------------------------------------------------------------------------------------------------------- damage
def damage(lab: Lab, flips: int, truncations: int, draws: random.Random) -> list[Result]:
    """Bits flipped, and tails cut, in the newest checkpoint: each is found, and the run falls back to the one before."""
    folder = finished(lab)
    newest, before = checkpoints(folder / "checkpoints")[:2]
    whole = newest.read_bytes()
    wanted = load_checkpoint(before)["step"]
    results = []
    for kind in ["bit flip"] * flips + ["truncation"] * truncations:
        if kind == "bit flip":
            at = draws.randrange(8 * len(whole))
            harmed = bytearray(whole)
            harmed[at // 8] ^= 1 << at % 8
        else:
            at = draws.randrange(len(whole))
            harmed = bytearray(whole[:at])
        newest.write_bytes(harmed)
        try:
            load_checkpoint(newest)
            found = False
        except DamagedError:
            found = True
        expect(found, f"{kind} at {at} of {newest} was not found")
        state = load_checkpoint(before)
        config = dataclasses.replace(read_config(folder), run_dir=str(folder), resume=True)
        back = find_state(config, ALONE, json.loads(state["fingerprint"]))
        expect(
            back.state["step"] == wanted and "resuming from the previous one" in "".join(back.notes),
            f"{kind} at {at}: no way back",
        )
        back.set_damaged_aside()
        (newest.with_name(newest.name + ".damaged")).unlink()
        results.append({"kind": kind, "at": at})
    newest.write_bytes(whole)
    return results


# --------------------------------------------------------------------------------------------------------------- code
def payloads(lab: Lab) -> list[Result]:
    """Each payload, sealed with a right checksum and not, with torch's default and with it turned off."""
    folder = lab.fresh("payloads")
    folder.mkdir(parents=True)
    path, witness = folder / "step-0000000001.pt", folder / "ran"
    results = []
    for name, build in PAYLOADS.items():
        body = build(witness)
        live = is_live(body, witness)
        expect(live, f"{name} would run nowhere: it shows nothing")
        for forced in (False, True):
            for content in (sealed(body), body):
                path.write_bytes(content)
                if forced:
                    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
                try:
                    load_checkpoint(path)
                    refused = False
                except CheckpointError:
                    refused = True
                finally:
                    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
                expect(refused and not witness.exists(), f"{name}: refused {refused}, ran {witness.exists()}")
        results.append({"payload": name})
    return results
