"""Every page is in the index, and every link of a page leads to a file and a heading that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lib.tiny import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [
    *sorted(DOCS.glob("*.md")),
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "kernels/README.md")),
]


def links(page: Path) -> list[str]:
    """The targets of its links and pictures inside the repository."""
    text = re.sub(r"```[^`]*```|^    .*$|`[^`\n]*`", "", page.read_text(), flags=re.MULTILINE)
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]


def anchors(page: Path) -> set[str]:
    """The names of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_has_a_line_in_the_index() -> None:
    index = DOCS / "README.md"
    assert {(index.parent / link).resolve() for link in links(index)} == {
        page.resolve() for page in [*DOCS.glob("*.md"), REPOSITORY / "kernels" / "README.md"] if page != index
    }
    lines = [line for line in index.read_text().splitlines() if line and not line.startswith("#")]
    assert all(line.startswith("- [") or line in ("Use:", "Results:", "Development:") for line in lines)


def test_links_are_seen() -> None:
    """So that the tests above cannot pass on nothing."""
    assert sum(len(links(page)) for page in PAGES) > 40
    assert "the-same-bits-on-three-ranks-and-more" in anchors(DOCS / "distributed.md")
