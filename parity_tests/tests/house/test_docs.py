"""The pages: links that lead somewhere, and a package page that needs none."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import qtx_ref

ROOT = Path(qtx_ref.__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "qtx_ref").rglob("*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https:", "http:")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name} links to {link}"
        assert not anchor or anchor in name_anchors(target.read_text(encoding="utf-8")), f"{page.name} links to {link}"


def test_the_package_page_needs_no_link() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    page = re.search(r'^readme = "(.+)"$', project, re.MULTILINE)[1]
    assert LINK.findall((ROOT / page).read_text(encoding="utf-8")) == []


def test_the_readme_is_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 80
