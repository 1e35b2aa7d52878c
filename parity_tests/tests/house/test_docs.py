"""The pages: links that lead somewhere, commands that qtx takes, names that are there, a package page without links."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import shlex
from collections import Counter
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import qtx_ref
from parity_tests.table import list_cases
from qtx.cli import main

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


# --- commands ---------------------------------------------------------------------------------------------------------

FENCED = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("", "bash", "yaml")
INLINE = re.compile(r"`qtx ([a-z][^`]*)`")
COMMAND = re.compile(r"^(?:\$ |- run: | +- run: )?(?:qtx|python -m qtx|python cli\.py) (.*)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a command may write: parsing it asks."""
    monkeypatch.chdir(tmp_path)


def list_commands(page: str) -> list[str]:
    """Each command line of qtx in the page's code blocks, without comment."""
    lines = [line for kind, block in FENCED.findall(page) if kind in SHELL for line in COMMAND.findall(block)]
    return [re.split(r"\s+#|\s+\|\||\s+>\s", line)[0].strip() for line in lines]


COMMANDS = [(page, line) for page in PAGES for line in list_commands(page.read_text(encoding="utf-8"))]


def parse(line: str) -> None:
    """Parses a command line as qtx does, and runs nothing. Raises ClickException for what qtx would refuse."""
    command: click.Command = main
    words, context = shlex.split(line), click.Context(main, info_name="qtx")
    while isinstance(command, click.Group):
        if words[:1] in ([], ["--help"], ["--version"]):
            return
        name, got, words = command.resolve_command(context, words)
        command, context = got, click.Context(got, context, info_name=name)
    command.parse_args(context, words)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page.stem}-{line}"[:70] for page, line in COMMANDS])
def test_commands_of_the_pages_parse(page: Path, line: str) -> None:
    parse(line)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_within_sentences_parse(page: Path) -> None:
    """Of these, what a command or an option cannot do without may be missing."""
    for line in INLINE.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        with contextlib.suppress(click.MissingParameter, click.BadOptionUsage):
            parse(" ".join(line.replace("...", "").split()))


def test_there_are_commands_on_the_pages() -> None:
    assert {page.name for page, _ in COMMANDS} >= {"guide.md", "parity-in-ci.md", "sentiment.md", "package.md"}


def test_a_wrong_option_is_seen() -> None:
    for line in ("study --colour", "quantise x", "parity --only", "diff a.qtx"):
        with pytest.raises(click.ClickException):
            parse(line)


def test_the_guide_counts_the_parity_cases() -> None:
    table = re.compile(r"^\| ([a-z, ]+) \| *(\d*) *\| *(\d*) *\|", re.MULTILINE)
    page = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8").partition("\n## Parity\n")[2]
    shown = {frozenset(names.split(", ")): tuple(map(int, (a or "0", b or "0"))) for names, a, b in table.findall(page)}
    counts = [Counter(case.group for case in list_cases(backend)) for backend in ("torch", "ref")]
    assert {group for groups in shown for group in groups} == {group for each in counts for group in each}
    for groups, numbers in shown.items():
        assert tuple(sum(each[group] for group in groups) for each in counts) == numbers, groups


RUNS = re.compile(r"^```toml\n(base = .*?)^```", re.MULTILINE | re.DOTALL)


def test_a_run_that_a_page_shows_begins() -> None:
    """On any machine, with text of its own, and goes to its first step."""
    pytest.importorskip("tokenizers", reason="the extra text is not installed")
    (example,) = RUNS.findall((ROOT / "docs" / "guide.md").read_text(encoding="utf-8"))
    Path("my_texts").mkdir()
    for name in ("README", "CHANGELOG", "CONTRIBUTING"):
        Path("my_texts", f"{name}.txt").write_bytes((ROOT / f"{name}.md").read_bytes())
    Path("run.toml").write_text(example, encoding="utf-8")
    small = ["--set", "data.batch=2", "--set", "step.accumulate=1", "--set", "evaluation.every=none", "--stop", "1"]
    result = CliRunner().invoke(main, ["train", "run.toml", "--out", "out", *small])
    assert result.exit_code == 0, result.output
    assert Path("out", "model.safetensors").exists()


def test_files_that_the_pages_name_are_there() -> None:
    named = re.compile(r"`((?:qtx|qtx_ref|qtx_torch|parity_tests|tools|benchmarks|examples|docs)/[\w/.-]+)`")
    for page in PAGES:
        if page.name == "CHANGELOG.md":
            continue
        for path in named.findall(page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_names_that_have_moved_are_where_the_changelog_says() -> None:
    page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    modules = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", page, re.MULTILINE)
    moved = re.findall(r"^\| `([\w.]+)` \| (.+) \| `([\w.]+)` \| (.+) \|$", page, re.MULTILINE)
    assert len(modules) > 70 and len(moved) > 40
    for old, new in modules:
        assert old != new
        assert importlib.util.find_spec(new), f"{new}, for {old}"
    for old, names, new, now in moved:
        module = importlib.import_module(new)
        before = re.findall(r"`(\w+)`", names)
        after = before if now == "the same" else re.findall(r"`(\w+)`", now)
        assert len(before) == len(after), f"{old} and {new}"
        for name in after:
            assert hasattr(module, name), f"{new}.{name}, for {old}"
