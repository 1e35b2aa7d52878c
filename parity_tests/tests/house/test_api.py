"""docs/api.md: signatures as the code has them, and every block of Python run, in order, with what it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import qtx_ref

ROOT = Path(qtx_ref.__file__).parent.parent
PAGE = ROOT / "docs" / "api.md"
BLOCKS = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)


def build(*options: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "tools" / "build_api.py"), *options]
    return subprocess.run(program, capture_output=True, text=True, timeout=60)


def test_signatures_are_those_of_the_code() -> None:
    done = build("--check")
    assert done.returncode == 0, done.stderr


def test_blocks_run_and_print_what_the_page_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "api"}
    blocks = BLOCKS.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) >= 10
    for code, printed in blocks:
        exec(compile(code, str(PAGE), "exec"), names)
        assert capsys.readouterr().out == printed, code
