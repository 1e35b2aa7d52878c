"""What is done to training images: random crop, flip, colour, mixed pairs, smoothed labels.

Each row of a batch has draws of its own from the stream (seed, "augment", step), so that it is the same whichever rows
are made. Pixels are in [0, 1], with the channel first.
"""

from __future__ import annotations

import math

import numpy as np

from qtx_ref.random import stream

from .spec import Augmentation

RATIOS = (3 / 4, 4 / 3)  # of a crop's width to its height (Szegedy et al. 2015, section 6)
GREY = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]  # ITU-R BT.601
DRAWS = 8  # uniform numbers for each image


class Draws:
    """All that is drawn for one batch of `size` images."""

    def __init__(self, how: Augmentation, size: int, seed: int, step: int) -> None:
        rng = stream(seed, "augment", step)
        self.uniform = rng.random((size, DRAWS))
        self.partner = rng.permutation(size) if how.mixup else np.arange(size)  # with which each image is mixed
        self.share = rng.beta(how.mixup, how.mixup, size) if how.mixup else np.ones(size)  # its own (Zhang et al. 2018)


def change_image(image: np.ndarray, how: Augmentation, uniform: np.ndarray) -> np.ndarray:
    """An image (C, S, S) after crop, flip and colour, by its `DRAWS` uniform numbers."""
    if how.crop is not None:
        image = crop_image(image, how.crop, *uniform[:4])
    if uniform[4] < how.flip:
        image = image[:, :, ::-1]
    bright, contrast, saturation = (
        np.float32(1 + x * (2 * u - 1))
        for x, u in zip((how.brightness, how.contrast, how.saturation), uniform[5:8], strict=True)
    )
    if how.brightness:
        image = np.clip(image * bright, 0, 1)
    if how.contrast:
        mean = make_grey(image).mean()
        image = np.clip(mean + contrast * (image - mean), 0, 1)
    if how.saturation and len(image) == len(GREY):
        grey = make_grey(image)
        image = np.clip(grey + saturation * (image - grey), 0, 1)
    return image


def make_grey(image: np.ndarray) -> np.ndarray:
    """The brightness of each pixel, (1, S, S)."""
    return (image * GREY).sum(0, keepdims=True) if len(image) == len(GREY) else image.mean(0, keepdims=True)


def crop_image(image: np.ndarray, least: float, area: float, shape: float, left: float, top: float) -> np.ndarray:
    """A rectangle of an image with `least` to all of its area, made the whole image's size again, bilinear. The last
    four are uniform in [0, 1): how large, how wide for its height, and where."""
    size = image.shape[-1]
    low, high = map(math.log, RATIOS)
    ratio = math.exp(low + shape * (high - low))
    kept = (least + area * (1 - least)) * size * size
    width, height = (min(size, math.sqrt(kept * r)) for r in (ratio, 1 / ratio))
    for axis, begin, extent in ((1, top * (size - height), height), (2, left * (size - width), width)):
        place = np.clip(begin + (np.arange(size) + 0.5) * extent / size - 0.5, 0, size - 1)
        before = place.astype(np.int64)
        part = (place - before).astype(np.float32)
        part = part[:, None] if axis == 1 else part
        image = image.take(before, axis) * (1 - part) + image.take(np.minimum(before + 1, size - 1), axis) * part
    return image


def soften(labels: np.ndarray, others: np.ndarray, share: np.ndarray, smoothing: float, classes: int) -> np.ndarray:
    """Weights of the classes (B, classes) float32: of labels (B,) mixed with `others` by their own share, of which
    `smoothing` goes to all classes alike (Szegedy et al. 2016, section 7)."""
    weights = np.zeros((len(labels), classes))
    rows = np.arange(len(labels))
    weights[rows, labels] += share
    weights[rows, others] += 1 - share
    return ((1 - smoothing) * weights + smoothing / classes).astype(np.float32)
