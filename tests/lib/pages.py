"""A report's page whose every text tries to be markup and to write to the terminal."""

from __future__ import annotations

from typing import Any

EVIL = "<script>document.title='ran'</script>\x1b[31m"


def evil_facts(num_classes: int) -> dict[str, Any]:
    """The fields of page.RunFacts."""
    return {
        "name": EVIL,
        "subtitle": EVIL,
        "headline": [],
        "notes": [],
        "rows": (),
        "metrics": (),
        "no_curves": "there are none",
        "classes": [f"{EVIL}{k}" for k in range(num_classes)],
        "bad": {EVIL: EVIL},
        "config": {},
        "config_text": EVIL,
        "recipe": None,
        "command": EVIL,
        "versions": {"torch": "2"},
    }
