"""The bundled handwritten digits, and the batches cut from them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from qtx.data.splits import SPLITS, DataError, check_batch, check_split, digest, fingerprint, split_names
from qtx_ref.random import stream
from qtx_ref.spec import ModelSpec

Batch = dict[str, np.ndarray]
PIXEL_MAX = 16  # a pixel counts the dark ones of a 4x4 block


class ImageData:
    """Grey images, pixels scaled to [-1, 1], shuffled once by `seed` and divided 80/10/10.

    `images` (N, S, S) uint8 and `labels` (N,) uint8. `dropped` counts images left out because an earlier one is equal.
    """

    def __init__(self, source: str, images: np.ndarray, labels: np.ndarray, seed: int = 0) -> None:
        self.source, self.seed = source, seed
        hashes = [digest(image.tobytes()) for image in images]
        unique = sorted({value: index for index, value in reversed(list(enumerate(hashes)))}.values())
        self.dropped = len(images) - len(unique)
        order = stream(seed, source, "split").permutation(unique)
        names = np.array(split_names(len(order)))
        self._rows = {split: order[names == split] for split in SPLITS}
        self._hashes = hashes
        self.images = ((images[:, None].astype(np.float32) / PIXEL_MAX) - np.float32(0.5)) * 2  # (N, 1, S, S)
        self.labels = labels.astype(np.int64)  # (N,)
        self.classes = int(labels.max()) + 1

    def hashes(self, split: str) -> list[str]:
        """The sha256 of each of the split's images, in order."""
        check_split(split)
        return [self._hashes[row] for row in self._rows[split]]

    def fingerprint(self, split: str) -> str:
        """One sha256 for the whole split."""
        return fingerprint(self.hashes(split))

    def describe(self) -> dict:
        """What a checkpoint keeps of its data, as JSON values: the seed makes the same splits again."""
        return {
            "kind": "images",
            "source": self.source,
            "classes": self.classes,
            "seed": self.seed,
            "hashes": {split: self.hashes(split) for split in SPLITS},
            "fingerprints": {split: self.fingerprint(split) for split in SPLITS},
        }

    def check(self, spec: ModelSpec) -> None:
        """Refuses a model that takes other images or tells fewer classes apart."""
        have, want = self.images.shape[1:], (spec.channels, spec.image_size, spec.image_size)
        if have != want:
            raise DataError(f"{self.source} has images of shape {have} and the model takes {want}: use vit-tiny")
        if spec.classes < self.classes:
            raise DataError(f"{self.source} has {self.classes} classes and the model {spec.classes}: set its classes")

    def train_batches(self, spec: ModelSpec, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Batches of the train split, without end, from step `start` on; every image once per pass, newly shuffled.

        Batch `step` depends on (seed, step) alone.
        """
        self.check(spec)
        rows = self._rows["train"]
        check_batch(batch_size, len(rows), "train images")

        def batches() -> Iterator[Batch]:
            step = start
            while True:
                turn, place = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), len(rows))
                order = {t: stream(seed, "pass", t).permutation(rows) for t in np.unique(turn)}
                yield self._batch(np.array([order[t][p] for t, p in zip(turn, place, strict=True)]))
                step += 1

        return batches()

    def split_batches(
        self, split: str, spec: ModelSpec, batch_size: int, seed: int, limit: int | None = None
    ) -> Iterator[Batch]:
        """The split once, in order, at most `limit` batches; the last may be smaller. Nothing is drawn from `seed`."""
        self.check(spec)
        check_split(split)
        rows = self._rows[split]
        check_batch(batch_size, max(len(rows), batch_size), f"{split} images")
        rows = rows if limit is None else rows[: limit * batch_size]
        return (self._batch(rows[low : low + batch_size]) for low in range(0, len(rows), batch_size))

    def _batch(self, rows: np.ndarray) -> Batch:
        return {"images": self.images[rows], "labels": self.labels[rows]}


def digits(seed: int = 0) -> ImageData:
    """The 1797 digits of 8x8 pixels that are bundled; `seed` draws the splits."""
    tensors = load_file(Path(__file__).parent / "bundled" / "digits.safetensors")
    return ImageData("digits", tensors["images"], tensors["labels"], seed)
