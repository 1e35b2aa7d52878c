"""The bundled handwritten digits or a folder of pictures per class, and the batches cut from them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import numpy as np
from safetensors.numpy import load_file

from qtx_ref.random import stream
from qtx_ref.spec import ModelSpec
from qtx_ref.spec.base import is_number

from ..engines.backend import need
from ..engines.protocols import Batch
from .augmenting import Draws, change_image, soften
from .reading import open_regular
from .rows import join_names, shorten
from .spec import Augmentation, DataSpec
from .splits import (
    SHORT,
    SPLITS,
    ClassifiedItems,
    DataError,
    check_batch,
    check_split,
    describe_splits,
    digest,
    fingerprint,
    iterate_passes,
    name_splits,
)
from .walking import list_files

if TYPE_CHECKING:
    from PIL.Image import Image

PIXEL_MAX = 16  # of the digits: a pixel counts the dark ones of a 4x4 block
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# whatever the ending says; Pillow knows some that run code
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
SPLIT_NAMES = (*SPLITS, "val", "valid", "validation", "test", "dev", "eval")
PIXELS = 2**27  # of a picture while it is resized
MOST = 1e30  # of a mean or deviation, which float32 still holds
LONGEST = 2**15  # pixels of a side that a model asks for
MODES = {1: "L", 3: "RGB"}


class ImageData(ClassifiedItems):
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
        augment: Augmentation = Augmentation(),  # noqa: B008  # frozen
    ) -> None:
        """images (N, S, S) or (N, C, S, S) uint8 from 0 to `largest`, labels (N,) whole numbers; `names` of the
        classes, if any. mean and std, one or C numbers: a pixel x becomes (x / largest - mean) / std."""
        self.source, self.seed, self.largest, self.augment = source, seed, largest, augment
        hashes = [digest(image.tobytes()) for image in images]
        unique = sorted({value: index for index, value in reversed(list(enumerate(hashes)))}.values())
        self.dropped = len(images) - len(unique)
        if len(unique) < len(SPLITS):
            raise DataError(f"{source} has {len(unique)} different image(s) and each of {', '.join(SPLITS)} needs one")
        order = stream(seed, source if names is None else "labelled", "split").permutation(unique)
        split = np.array(name_splits(len(order)))
        self._rows = {name: order[split == name] for name in SPLITS}
        self._hashes = hashes if names is None else [value[:SHORT] for value in hashes]
        self.pixels = images[:, None] if images.ndim == 3 else images  # (N, C, S, S)
        self._mean, self._std = (np.array(value, np.float32)[:, None, None] for value in (mean, std))
        self.labels = labels.astype(np.int64)  # (N,)
        self.classes = len(names) if names is not None else int(labels.max()) + 1
        self.names = None if names is None else tuple(names)

    def fingerprint(self, split: str) -> str:
        """One sha256 for the whole split."""
        return fingerprint(self.hashes(split))

    def describe(self) -> dict[str, object]:
        """What a checkpoint keeps of its data, as JSON values: the seed makes the same splits again."""
        return {
            "kind": "images",
            "source": self.source,
            "classes": self.classes,
            **({} if self.names is None else {"names": list(self.names)}),
            "seed": self.seed,
            **describe_splits(self),
            **DataSpec(augment=self.augment).describe(),
        }

    def check(self, spec: ModelSpec) -> None:
        """Refuses a model that takes other images or tells fewer classes apart."""
        have, want = self.pixels.shape[1:], (spec.channels, spec.image_size, spec.image_size)
        if have != want:
            raise DataError(f"{self.source} has images of shape {have} and the model takes {want}: use vit-tiny")
        if spec.classes and spec.classes < self.classes:
            raise DataError(f"{self.source} has {self.classes} classes and the model {spec.classes}: fine-tune it anew")

    def train_batches(
        self, spec: ModelSpec, batch_size: int, seed: int, start: int = 0, rows: slice | None = None
    ) -> Iterator[Batch]:
        """Batches of the train split, without end, from step `start` on; every image once per pass, newly shuffled.

        Batch `step` depends on (seed, step) alone, and so does what the images are augmented by. rows: those of a batch
        that are made; None: all.
        """
        self.check(spec)
        images = self._rows["train"]
        check_batch(batch_size, len(images), "train images")
        own = rows or slice(None)
        passes = enumerate(iterate_passes(images, batch_size, seed, start), start)
        if self.augment == Augmentation():
            return (self._batch(chosen[own]) for _, chosen in passes)
        return (
            self._change(chosen, own, spec.classes, Draws(self.augment, batch_size, seed, s)) for s, chosen in passes
        )

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

    def _change(self, rows: np.ndarray, own: slice, classes: int, draws: Draws) -> Batch:
        """The rows `own` of a batch, augmented; `soft_labels` (B, classes) where labels are mixed or smoothed."""
        how = self.augment

        def make(places: np.ndarray) -> np.ndarray:
            pixels = self.pixels[rows[places]].astype(np.float32) / np.float32(self.largest)
            changed = [change_image(x, how, u) for x, u in zip(pixels, draws.uniform[places], strict=True)]
            return (np.stack(changed) - self._mean) / self._std

        places = np.arange(len(rows))[own]
        images, labels = make(places), self.labels[rows[places]]
        if not how.soft:
            return {"images": images, "labels": labels}
        partner, share = draws.partner[own], draws.share[own].astype(np.float32)
        if how.mixup:
            part = share[:, None, None, None]
            images = part * images + (1 - part) * make(partner)
        soft = soften(labels, self.labels[rows[partner]], share, how.smoothing, classes)
        return {"images": images, "labels": labels, "soft_labels": soft}

    def _batch(self, rows: np.ndarray) -> Batch:
        pixels = self.pixels[rows].astype(np.float32) / np.float32(self.largest)
        return {"images": (pixels - self._mean) / self._std, "labels": self.labels[rows]}


def load_digits(seed: int = 0, augment: Augmentation = Augmentation()) -> ImageData:  # noqa: B008  # frozen
    """The 1797 digits of 8x8 pixels that are bundled; `seed` draws the splits."""
    tensors = load_file(Path(__file__).parent / "bundled" / "digits.safetensors")
    return ImageData("digits", tensors["images"], tensors["labels"], seed, augment=augment)


@dataclass(frozen=True)
class Preparation:
    """How a picture becomes a model's pixels: resized, cropped about its middle, then (x / 255 - mean) / std.

    mean, std: one number or one a channel. resize: (height, width) in pixels, the length of the shorter side, or None:
    as it is. resample: the number of one of Pillow's filters, 2 bilinear. crop: (height, width), black where the
    picture is smaller, or None.
    """

    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    resize: tuple[int, int] | int | None = None
    resample: int = 2
    crop: tuple[int, int] | None = None


def read_preparation(spec: ModelSpec, given: Mapping[str, object] | None) -> Preparation:
    """The preparation that a checkpoint's `meta["images"]` says; None: 0.5 and 0.5. Without a `resize`, pictures become
    the model's size. Raises DataError where a value is none."""
    side = (spec.image_size, spec.image_size)
    if given is None:
        return Preparation(resize=side)
    resample = given.get("resample", 2)
    if not isinstance(resample, int) or isinstance(resample, bool) or not 0 <= resample <= 5:
        raise DataError(
            f"the model's pictures have the resample {shorten(resample)}: give the number of a filter, 0 to 5"
        )
    return Preparation(
        mean=read_scales("mean", given.get("mean"), spec.channels),
        std=read_scales("std", given.get("std"), spec.channels),
        resize=read_sides("resize", given.get("resize", side)),
        resample=resample,
        crop=read_pair("crop", given.get("crop")),
    )


def read_scales(key: str, values: object, channels: int) -> tuple[float, ...]:
    """Means or deviations of pixels, one or one a channel. Raises DataError where they are none."""
    if isinstance(values, (list, tuple)) and len(values) in (1, channels):
        numbers = all(is_number(v) and abs(v) < MOST for v in values)
        if numbers and (key != "std" or all(v > 0 for v in values)):
            return tuple(values)
    raise DataError(f"the model's pixel {key} is {shorten(values)}: give one number or one per channel")


def read_sides(key: str, value: object) -> tuple[int, int] | int | None:
    """Height and width in pixels, the length of the shorter side, or None. Raises DataError where it is none of
    these."""
    return value if is_length(value) else read_pair(key, value)


def read_pair(key: str, value: object) -> tuple[int, int] | None:
    """Height and width in pixels, or None. Raises DataError where it is neither."""
    if value is None:
        return None
    if isinstance(value, (list, tuple)) and len(value) == 2 and is_length(value[0]) and is_length(value[1]):
        return value[0], value[1]
    raise DataError(f"the model's pictures have the {key} {shorten(value)}: give height and width")


def is_length(value: object) -> TypeGuard[int]:
    """Whether a value is a number of pixels that a side may have."""
    return type(value) is int and 0 < value <= LONGEST


def load_folder(
    path: Path,
    spec: ModelSpec,
    *,
    names: Sequence[str] | None = None,
    scaling: Mapping[str, object] | None = None,
    seed: int = 0,
    augment: Augmentation = Augmentation(),  # noqa: B008  # frozen
) -> ImageData:
    """DIR/<class name>/, with pictures in it or in folders below it, as torchvision's ImageFolder finds them; what is
    hidden is passed over and said on stderr.

    names: the class names of a trained model; None: the folders', sorted. scaling: a checkpoint's `meta["images"]`, see
    `read_preparation`.

    Raises:
        DataError: no pictures, fewer than two classes, a class without picture, an unknown class, a picture that cannot
        be
            read or has another size than the model takes.
        MissingExtra: without pillow.
    """
    if spec.channels not in MODES:
        raise DataError(f"the model has {spec.channels} channels: pictures have 1 or 3")
    how = read_preparation(spec, scaling)
    every = list_files(path, PICTURES)
    files = [file for file in every if file.parent != path]
    places = [file.relative_to(path).parts[0] for file in files]
    kinds = sorted(set(places))
    if len(files) < len(SPLITS) or len(kinds) < 2:
        raise DataError(
            f"{path} has {len(files)} pictures in {len(kinds)} folders: give a folder per class, two at least"
        )
    if {kind.lower() for kind in kinds} <= {*SPLIT_NAMES}:
        raise DataError(f"{path} has the folders {', '.join(kinds)}, which are splits, not classes: give one of them")
    if len(files) < len(every):
        sys.stderr.write(f"{path}: not read: {len(every) - len(files)} picture(s) in no class's folder\n")
    empty = sorted({p.name for p in path.iterdir() if p.is_dir() and p.name[0] != "."} - {*kinds})
    if empty and names is None:
        raise DataError(f"{path / empty[0]} holds no picture ({', '.join(PICTURES)}): give it some, or remove it")
    if names is not None and (strange := sorted(set(kinds) - set(names))):
        raise DataError(f"{path} has the class {strange[0]!r}; the model knows {join_names(names)}")
    classes = kinds if names is None else list(names)
    images = np.stack([read_picture(file, spec, how) for file in files])
    labels = np.array([classes.index(kind) for kind in places])
    return ImageData(
        str(path), images, labels, seed, names=classes, largest=255, mean=how.mean, std=how.std, augment=augment
    )


def read_picture(file: Path, spec: ModelSpec, how: Preparation) -> np.ndarray:
    """A picture's pixels, (C, S, S) uint8, upright as its EXIF orientation says. Raises DataError naming the file where
    it cannot be read, or has too many pixels."""
    image, ops = (need(f"PIL.{name}", "images", "a folder of pictures") for name in ("Image", "ImageOps"))
    try:
        with open_regular(file) as raw, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, and of the pixels that Pillow still reads
            stored = image.open(raw, formats=FORMATS)
            if stored.mode[0] in "IF":  # 16 or 32 bits a pixel, which convert would cut off at 255
                raise ValueError(f"its pixels are of mode {stored.mode}, and known are those of 8 bits")
            pixels = fit_picture(ops.exif_transpose(stored).convert(MODES[spec.channels]), how)
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads to
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file} cannot be read as a picture ({reason}): repair or remove it") from None
    if pixels.size != (spec.image_size, spec.image_size):
        size = f"{pixels.width} x {pixels.height}"
        raise DataError(f"{file} has {size} pixels, and the model takes {spec.image_size} x {spec.image_size}")
    return np.asarray(pixels).reshape(spec.image_size, spec.image_size, spec.channels).transpose(2, 0, 1)


def fit_picture(stored: Image, how: Preparation) -> Image:
    """A picture resized and cropped. Raises ValueError where that makes more than `PIXELS` pixels."""
    size = how.resize
    if isinstance(size, int):  # the longer side keeps the ratio, rounded down as transformers does
        longer = int(size * max(stored.size) / min(stored.size))
        size = (longer, size) if stored.width <= stored.height else (size, longer)
    if size is not None:
        if size[0] * size[1] > PIXELS:
            raise ValueError(f"it would be resized to {size[1]} x {size[0]} pixels")
        stored = stored.resize((size[1], size[0]), how.resample)
    if how.crop is not None:
        height, width = how.crop
        left, top = (stored.width - width) // 2, (stored.height - height) // 2
        stored = stored.crop((left, top, left + width, top + height))
    return stored
