"""Texts as documents in a folder, opened with a cache of their own."""

from __future__ import annotations

import json
from pathlib import Path

from qtx.data import DataSpec, Source, load
from qtx.data.tokenizing import BUNDLED
from qtx_ref.spec import Family, Head, ModelSpec

TOKENIZER = BUNDLED / "tokenizer.json"
OPT = ModelSpec(Family.OPT, 1, 8, 1, 8, Head.CAUSAL, vocab=2048, length=16)


def texts_of(count: int, first: int = 0) -> list[str]:
    return [f"document {i}: " + " ".join(f"word{(i * j) % 97}" for j in range(12)) for i in range(first, first + count)]


def write_lines(path: Path, texts: list[str], **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text, **more}) + "\n" for text in texts))
    return path


def folder_of(path: Path, texts: list[str]) -> str:
    """A folder with one file of JSONL, which is read as documents whatever its size."""
    write_lines(path / "a.jsonl", texts)
    return str(path)


def opened(source: str, spec: ModelSpec = OPT, **settings):
    return load(DataSpec(sources=(Source(source),), **settings), spec, tokenizer=TOKENIZER)
