"""Augmented images: what each change makes of known pixels, that rows do not depend on which are made, that both
backends train on soft labels alike."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

import qtx_ref.backend
from qtx.data import DataError, DataSpec, Source, load
from qtx.data.augmenting import change_image, crop_image, soften
from qtx.data.spec import Augmentation
from qtx.engines.backend import MissingExtra, backend
from qtx_ref.models.initial import init_params
from qtx_ref.spec import Family, Head, ModelSpec, OptimSpec, SpecError

VIT = ModelSpec(Family.VIT, 1, 8, 1, 8, Head.CLASSIFY, classes=10, image_size=8, patch_size=2, channels=1)
OPT = ModelSpec(Family.OPT, 1, 8, 1, 8, Head.CAUSAL, vocab=2048, length=32)
ALL = Augmentation(crop=0.5, flip=0.5, brightness=0.2, contrast=0.2, saturation=0.2, mixup=0.8, smoothing=0.1)
RAMP = np.arange(48, dtype=np.float32).reshape(3, 4, 4) / 48
NOTHING = np.full(8, 0.5)  # draws that change nothing but what a flip of probability 1 does


def digits(**how):
    return load(DataSpec(sources=(Source("digits"),), augment=Augmentation(**how)), VIT)


def test_a_crop_of_all_is_the_image_and_one_of_a_quarter_its_bilinear_middle():
    assert np.array_equal(crop_image(RAMP, 1.0, 0.3, 0.5, 0.2, 0.9), RAMP)
    got = crop_image(RAMP, 0.25, 0.0, 0.5, 0.5, 0.5)  # the middle 2 x 2 pixels, rows and columns 1 and 2
    # places 0.75, 1.25, 1.75, 2.25 of a ramp of 1/48 a column and 4/48 a row
    places = np.array([0.75, 1.25, 1.75, 2.25])
    expected = (16 * np.arange(3)[:, None, None] + 4 * places[:, None] + places) / 48
    assert np.allclose(got, expected, rtol=0, atol=1e-6)  # float32 sums of numbers below 1


def test_a_flip_and_factors_by_hand():
    assert np.array_equal(change_image(RAMP, Augmentation(flip=1.0), NOTHING), RAMP[:, :, ::-1])
    draws = NOTHING.copy()
    draws[5:] = 1.0  # the largest factors
    image = np.array([0.2, 0.4, 0.6], np.float32)[:, None, None] * np.ones((1, 2, 2), np.float32)
    grey = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6
    expected = {
        "brightness": [0.3, 0.6, 0.9],
        "contrast": [grey + 1.5 * (x - grey) for x in (0.2, 0.4, 0.6)],
        "saturation": [grey + 1.5 * (x - grey) for x in (0.2, 0.4, 0.6)],
    }
    for name, values in expected.items():
        got = change_image(image, Augmentation(**{name: 0.5}), draws)
        assert np.allclose(got[:, 0, 0], values, rtol=0, atol=1e-6), name  # float32
    assert change_image(image, Augmentation(brightness=1.0), draws).max() == 1  # cut off


def test_soft_labels_by_hand():
    got = soften(np.array([0, 2]), np.array([1, 2]), np.array([0.75, 0.5]), 0.2, 4)
    assert np.allclose(got, [[0.65, 0.25, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]], rtol=0, atol=1e-7)  # float32


def test_rows_are_slices_and_steps_differ():
    data = load(DataSpec(augment=ALL), VIT)
    run = list(islice(data.train_batches(VIT, 12, 3), 4))
    assert run[0]["soft_labels"].shape == (12, 10) and run[0]["images"].dtype == np.float32
    assert np.allclose(run[0]["soft_labels"].sum(1), 1, rtol=0, atol=1e-6)  # float32
    for part in (slice(0, 4), slice(5, 12)):
        own = next(data.train_batches(VIT, 12, 3, start=2, rows=part))
        for key, value in run[2].items():
            assert np.array_equal(own[key], value[part]), key
    assert not np.array_equal(run[0]["images"], next(data.train_batches(VIT, 12, 4))["images"])
    plain = load("digits", VIT)
    splits = [read.split_batches("evaluation", VIT, 16, 0) for read in (data, plain)]
    for one, two in zip(*splits, strict=True):
        assert one.keys() == two.keys() and np.array_equal(one["images"], two["images"])


def test_what_is_drawn_has_its_rates():
    flips = next(digits(flip=0.5).train_batches(VIT, 1000, 0))["images"]
    plain = next(load("digits", VIT).train_batches(VIT, 1000, 0))["images"]
    changed = (flips != plain).any((1, 2, 3)).mean()
    assert abs(changed - 0.5) < 5 * 0.5 / 1000**0.5  # 5 standard deviations
    share = next(digits(mixup=0.2).train_batches(VIT, 1000, 0))["soft_labels"].max(1)
    assert share.min() >= 0.5 and share.max() == 1 and 0.7 < share.mean() < 1


def test_settings_are_kept_and_others_are_refused():
    data = load(DataSpec(augment=ALL), VIT)
    about = data.describe()
    assert DataSpec.of(about).augment == ALL and "settings" not in load("digits", VIT).describe()
    with pytest.raises(DataError, match="augment belongs to images"):
        load(DataSpec(augment=ALL), OPT)
    with pytest.raises(DataError, match="window is 16: it belongs to running text"):
        load(DataSpec(window=16), VIT)
    with pytest.raises(SpecError, match="augment crop is 1.5"):
        Augmentation(crop=1.5)


@pytest.mark.parametrize("name", ["ref", "torch"])
def test_training_lowers_the_loss_of_soft_labels_as_the_reference_does(name):
    try:
        module = backend(name)
    except MissingExtra:
        pytest.skip("needs torch")
    data, params = load(DataSpec(augment=replace(ALL, crop=0.8)), VIT), init_params(VIT, 0)
    batch = next(data.train_batches(VIT, 32, 0))
    model = module.Model(VIT, params)
    trainer = module.Trainer(model, OptimSpec(lr=1e-2, warmup=0, steps=100))
    losses = [trainer.step(batch)[0] for _ in range(8)]
    log_p = qtx_ref.backend.Model(VIT, params).forward(batch).astype(np.float64)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    expected = -(batch["soft_labels"] * log_p).sum(1).mean()
    assert losses[0] == pytest.approx(expected, rel=1e-6)  # float32 logits, float64 sums
    assert losses[-1] < losses[0]
    with pytest.raises(SpecError, match="soft_labels are float32 of shape"):
        model.forward({**batch, "soft_labels": batch["soft_labels"][:, :3]})
