"""The soak's own parts: its table says what its file holds, and a sample of each kind survives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bench.soak import table, tiny
from fasttricks.config.recipes import demo
from lib.forked import python_m


def soak(output: Path, *args: str) -> dict[str, Any]:
    """The runs that `python -m bench.soak` added to `output`."""
    done = python_m("bench.soak", "--output", str(output), *args, give_up_s=540)  # below the limit of a test
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    runs: dict[str, Any] = json.loads(output.read_text())["runs"]
    return runs


@pytest.mark.slow
def test_a_sample_survives(tmp_path: Path) -> None:
    """A run of one rank, killed three times; saves, damage and code. A second call adds nothing. More ranks are slow."""
    only = ["--only", "kills", "signals", "saves", "flips", "truncations", "payloads"]
    counts = [
        *("--kills", "1", "--plain", "0", "--signals", "1", "--saves", "20", "--flips", "20", "--truncations", "5")
    ]
    runs = soak(tmp_path / "soak.json", *only, *counts)
    kinds = ("kills", "signals", "flips", "truncations", "payloads")
    assert [len(runs[kind]) for kind in kinds] == [1, 1, 20, 5, 12]
    assert all(result["ok"] for results in runs.values() for result in results)
    kills = runs["kills"][0]
    assert (kills["ranks"], len(kills["kills"])) == (1, 3)
    assert 2 * kills["changed"] >= tiny.STEPS
    assert table.count("saves", runs["saves"]) >= 20
    assert soak(tmp_path / "soak.json", *only, *counts) == runs


@pytest.mark.slow
@pytest.mark.parametrize(
    "counts",
    [
        {"kills": 4, "plain": 0},  # of one to four ranks
        {"signals": 2, "restarts": 1, "launchers": 1},
        {"hangs": 1},
    ],
    ids=" ".join,
)
def test_a_sample_of_ranks_survives(counts: dict[str, int], tmp_path: Path) -> None:
    options = [word for name, count in counts.items() for word in (f"--{name}", str(count))]
    runs = soak(tmp_path / "soak.json", *options, "--only", *(name for name in counts if name != "plain"))
    assert all(result["ok"] for results in runs.values() for result in results)
    assert all(result["seconds_until_gone"] <= 1 for result in runs.get("launchers", []))
    assert all(result["seconds_until_all_ended"] <= 10 + 35 for result in runs.get("hangs", []))


def test_a_failure_is_counted_and_ends_the_soak(tmp_path: Path) -> None:
    found = {"runs": {"hangs": [{"ok": False, "number": 0, "error": "x"}]}, "machine": "m", "versions": {"torch": "1"}}
    assert "| a rank that hangs ends all of them | runs, one rank stopped | 1 | 1 |" in table.markdown(found)


def test_the_page_has_the_table_of_the_file() -> None:
    """And promises nothing that failed, or that was not run."""
    found = json.loads(table.RESULTS.read_text())
    text = table.PAGE.read_text()
    assert table.markdown(found) in text
    assert [row[3] for row in table.rows(found)] == [0] * len(table.WORDS)
    assert all(row[2] > 0 for row in table.rows(found))


def test_the_page_s_options_are_fields() -> None:
    options = set(re.findall(r"`(--[a-z-]+)", table.PAGE.read_text())) - {"--max-restarts"}
    assert len(options) > 5
    for option in options:
        assert hasattr(demo(), option.removeprefix("--").replace("-", "_")), option
