"""The table of docs/reliability.md, from bench/results/soak.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.soak import tiny

ROOT = Path(__file__).parents[2]
RESULTS, OUT = ROOT / "bench" / "results" / "soak.json", ROOT / "bench" / "out" / "soak.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- soak: made by make soak-save -->\n", "<!-- soak: end -->\n"


RANKS = (1, 2, 3, 4)
CELLS = len(RANKS) * len(tiny.KILLED)


def cell(number: int) -> tuple[int, str]:
    """(ranks, variant) of the kill run of this number."""
    return RANKS[number % len(RANKS)], tiny.KILLED[number // len(RANKS) % len(tiny.KILLED)]


def count(kind: str, done: list[dict[str, Any]]) -> int:
    """Runs of a kind; for saves, the saves in them."""
    return sum(result.get("saves", 1) for result in done)


def _worst(done: list[dict[str, Any]], field: str) -> str:
    values = [result[field] for result in done if field in result]
    return f"{max(values):.1f}" if values else "-"


def rows(found: dict[str, Any]) -> list[tuple[str, str, int, int, str]]:
    """(guarantee, test, n, failed, figures) of each kind."""
    runs: dict[str, list[dict[str, Any]]] = found["runs"]
    table = []
    for kind, (guarantee, test) in WORDS.items():
        done = runs.get(kind, [])
        failed = sum(not result["ok"] for result in done)
        table.append((guarantee, test, count(kind, done), failed, _figures(kind, done)))
    return table


WORDS = {
    "kills": ("kill -9 at any point, then the same command: the same weights, bit for bit", "runs killed 3 times"),
    "restarts": ("one rank killed under torchrun --max-restarts: the run resumes by itself", "runs, one rank killed"),
    "saves": ("a checkpoint on disk is complete, and the previous one exists", "saves in a loop that is killed"),
    "flips": ("a flipped bit is found, and the run resumes from the previous checkpoint", "bits flipped"),
    "truncations": ("a truncated file is found, and the run resumes from the previous checkpoint", "files cut"),
    "payloads": ("no code runs from a checkpoint", "payloads, each four ways"),
    "signals": ("SIGTERM, Ctrl-C: the run saves, exits 0, and resumes bit for bit", "runs stopped"),
    "launchers": ("torchrun killed: no orphan", "launchers killed"),
    "hangs": ("a rank that hangs ends all of them", "runs, one rank stopped"),
}


def _figures(kind: str, done: list[dict[str, Any]]) -> str:
    good = [result for result in done if result["ok"]]
    if kind == "kills":
        kills = [kill for result in good for kill in result["kills"]]
        which = {name: sum(kill["kind"] == name for kill in kills) for name in ("step", "save", "edge", "start")}
        inside = sum(kill["in_save"] for kill in kills)
        plain = sum(result["command"] == "plain" for result in good)
        return (
            f"{len(kills)} kills: {which['step']} at a random step, {which['save']} aimed at a save, {which['edge']} at an "
            f"epoch's end, {which['start']} at the start; {inside} left a half-written file; {plain} runs used the plain "
            "command, the others were forked after the imports"
        )
    if kind == "restarts":
        times = sorted(result["seconds_to_the_next_step"] for result in good)
        first = sorted(result["seconds_of_a_first_start"] for result in good)
        if not times:
            return ""
        within = sum(seconds <= 15 for seconds in times)
        return (
            f"{times[0]:.1f} to {times[-1]:.1f} s from the kill to the next step, {within} of {len(times)} within 15 s; the same "
            f"command's first start took {first[0]:.1f} to {first[-1]:.1f} s"
        )
    if kind == "saves":
        return f"{sum(result['killed_in_a_save'] for result in good)} of {len(good)} kills were inside a save"
    if kind == "signals":
        steps = [result["steps_until_saved"] for result in good] or [0]
        return f"saved at most {max(steps)} steps later; ended within {_worst(good, 'seconds_until_ended')} s"
    if kind == "launchers":
        return f"all ranks gone within {max([r['seconds_until_gone'] for r in good] or [0]):.2f} s"
    if kind == "hangs":
        return f"timeout 10 s: all ended after {_worst(good, 'seconds_until_all_ended')} s"
    return ", ".join(sorted({result["payload"] for result in good})) if kind == "payloads" else ""


def cells(done: list[dict[str, Any]]) -> str:
    """The kill runs by variant and ranks: how many ended in the same bits, and their steps that changed the weights."""
    lines = [
        f"| killed runs, same bits | {' | '.join(f'{ranks} rank(s)' for ranks in RANKS)} | steps that changed weights |",
        "|---" * (2 + len(RANKS)) + "|",
    ]
    for variant in tiny.KILLED:
        row = [[r for r in done if r["ok"] and (r["ranks"], r["variant"]) == (ranks, variant)] for ranks in RANKS]
        tried = [sum(cell(r["number"]) == (ranks, variant) for r in done) for ranks in RANKS]
        shown = [f"{len(good)} of {many}" for good, many in zip(row, tried, strict=True)]
        changed = sorted({r["changed"] for good in row for r in good})
        steps = f"{' to '.join(map(str, dict.fromkeys([changed[0], changed[-1]])))} of {tiny.STEPS}" if changed else ""
        lines.append(f"| {variant} | {' | '.join(shown)} | {steps} |")
    return "\n".join(lines) + "\n"


def markdown(found: dict[str, Any]) -> str:
    """The table, with the machine and the versions."""
    version = ", ".join(f"{name} {number}" for name, number in found["versions"].items() if name != "commit")
    head = "| guarantee | test | n | failed | figures |\n|---|---|---|---|---|\n"
    lines = [
        f"| {guarantee} | {test} | {n} | {failed} | {figures} |\n"
        for guarantee, test, n, failed, figures in rows(found)
    ]
    grid = cells(found["runs"].get("kills", []))
    return f"{head}{''.join(lines)}\n{grid}\n{found['machine']}, no GPU; {version}.\n"


def write(found: dict[str, Any]) -> None:
    """Put the table into the page."""
    text = markdown(found)
    if PAGE.exists():
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2])


if __name__ == "__main__":
    write(json.loads(RESULTS.read_text()))
