"""The bundled handwritten digits or a folder of pictures per class, and the batches cut from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from qtx_ref.random import stream
from qtx_ref.spec import ModelSpec

from ..engines.backend import need
from .splits import (
    SPLITS,
    DataError,
    check_batch,
    check_split,
    digest,
    fingerprint,
    passes,
    split_names,
)

Batch = dict[str, np.ndarray]
PIXEL_MAX = 16  # of the digits: a pixel counts the dark ones of a 4x4 block
SHORT = 16  # hexadecimal digits of a picture's hash
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
MODES = {1: "L", 3: "RGB"}


class ImageData:
    """Images, shuffled once by `seed` and divided 80/10/10; pixels scaled to [-1, 1], or by a mean and a deviation.

    `dropped` counts images left out because an earlier one is equal.
    """

    def __init__(
        self,
        source: str,
        images: np.ndarray,
        labels: np.ndarray,
        seed: int = 0,
        *,
        names: Sequence[str] | None = None,
        largest: int = PIXEL_MAX,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
    ) -> None:
        """images (N, S, S) or (N, C, S, S) uint8 from 0 to `largest`, labels (N,) whole numbers; `names` of the classes,
        if any. mean and std, one or C numbers: a pixel x becomes (x / largest - mean) / std."""
        self.source, self.seed, self.largest = source, seed, largest
        hashes = [digest(image.tobytes()) for image in images]
        unique = sorted({value: index for index, value in reversed(list(enumerate(hashes)))}.values())
        self.dropped = len(images) - len(unique)
        if len(unique) < len(SPLITS):
            raise DataError(f"{source} has {len(unique)} different image(s) and each of {', '.join(SPLITS)} needs one")
        order = stream(seed, source if names is None else "labelled", "split").permutation(unique)
        split = np.array(split_names(len(order)))
        self._rows = {name: order[split == name] for name in SPLITS}
        self._hashes = hashes if names is None else [value[:SHORT] for value in hashes]
        self.pixels = images[:, None] if images.ndim == 3 else images  # (N, C, S, S)
        self._mean, self._std = (np.array(value, np.float32)[:, None, None] for value in (mean, std))
        self.labels = labels.astype(np.int64)  # (N,)
        self.classes = len(names) if names is not None else int(labels.max()) + 1
        self.names = None if names is None else tuple(names)

    def hashes(self, split: str) -> list[str]:
        """The sha256 of each of the split's images, in order."""
        check_split(split)
        return [self._hashes[row] for row in self._rows[split]]

    def labels_of(self, split: str) -> np.ndarray:
        """The class of each of the split's images, in order."""
        check_split(split)
        return self.labels[self._rows[split]]

    def fingerprint(self, split: str) -> str:
        """One sha256 for the whole split."""
        return fingerprint(self.hashes(split))

    def describe(self) -> dict:
        """What a checkpoint keeps of its data, as JSON values: the seed makes the same splits again."""
        return {
            "kind": "images",
            "source": self.source,
            "classes": self.classes,
            **({} if self.names is None else {"names": list(self.names)}),
            "seed": self.seed,
            "hashes": {split: self.hashes(split) for split in SPLITS},
            "fingerprints": {split: self.fingerprint(split) for split in SPLITS},
        }

    def check(self, spec: ModelSpec) -> None:
        """Refuses a model that takes other images or tells fewer classes apart."""
        have, want = self.pixels.shape[1:], (spec.channels, spec.image_size, spec.image_size)
        if have != want:
            raise DataError(f"{self.source} has images of shape {have} and the model takes {want}: use vit-tiny")
        if spec.classes and spec.classes < self.classes:
            raise DataError(f"{self.source} has {self.classes} classes and the model {spec.classes}: fine-tune it anew")

    def train_batches(self, spec: ModelSpec, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Batches of the train split, without end, from step `start` on; every image once per pass, newly shuffled.

        Batch `step` depends on (seed, step) alone.
        """
        self.check(spec)
        rows = self._rows["train"]
        check_batch(batch_size, len(rows), "train images")
        return (self._batch(chosen) for chosen in passes(rows, batch_size, seed, start))

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
        pixels = self.pixels[rows].astype(np.float32) / np.float32(self.largest)
        return {"images": (pixels - self._mean) / self._std, "labels": self.labels[rows]}


def digits(seed: int = 0) -> ImageData:
    """The 1797 digits of 8x8 pixels that are bundled; `seed` draws the splits."""
    tensors = load_file(Path(__file__).parent / "bundled" / "digits.safetensors")
    return ImageData("digits", tensors["images"], tensors["labels"], seed)


def folder(
    path: Path,
    spec: ModelSpec,
    *,
    names: Sequence[str] | None = None,
    scaling: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> ImageData:
    """DIR/<class name>/*.png and so on, resized (bilinear) to the model's image size and channels.

    names: the class names of a trained model; None: the folders', sorted. scaling: the `mean` and `std` of the model's
    pixels in [0, 1], one or one per channel; None: 0.5 and 0.5.

    Raises:
        DataError: no pictures, fewer than two classes, an unknown class, a picture that cannot be read.
        MissingExtra: without pillow.
    """
    files = sorted(file for file in path.glob("*/*") if file.suffix.lower() in PICTURES)
    found = sorted({file.parent.name for file in files})
    if len(files) < len(SPLITS) or len(found) < 2:
        raise DataError(
            f"{path} has {len(files)} pictures in {len(found)} folders: give a folder per class, two at least"
        )
    if names is not None and (strange := sorted(set(found) - set(names))):
        raise DataError(f"{path} has the class {strange[0]!r}; the model knows {', '.join(names[:8])}")
    if spec.channels not in MODES:
        raise DataError(f"the model has {spec.channels} channels: pictures have 1 or 3")
    classes = found if names is None else list(names)
    images = np.stack([picture(file, spec) for file in files])
    labels = np.array([classes.index(file.parent.name) for file in files])
    given = scaling or {"mean": (0.5,), "std": (0.5,)}
    for key in ("mean", "std"):
        if len(given[key]) not in (1, spec.channels) or not np.isfinite(given[key]).all():
            raise DataError(f"the model's pixel {key} is {given[key]!r}: give one number or one per channel")
    return ImageData(str(path), images, labels, seed, names=classes, largest=255, mean=given["mean"], std=given["std"])


def picture(file: Path, spec: ModelSpec) -> np.ndarray:
    """A picture's pixels, (C, S, S) uint8. Raises DataError naming the file where it cannot be read."""
    image = need("PIL.Image", "images", "a folder of pictures")
    try:
        with image.open(file) as opened:
            if opened.mode[0] in "IF":  # 16 or 32 bits a pixel, which convert would cut off at 255
                raise ValueError(f"its pixels are of mode {opened.mode}, and known are those of 8 bits")
            resized = opened.convert(MODES[spec.channels]).resize((spec.image_size,) * 2, image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as a picture ({error}): repair or remove it") from None
    return np.asarray(resized).reshape(spec.image_size, spec.image_size, spec.channels).transpose(2, 0, 1)
