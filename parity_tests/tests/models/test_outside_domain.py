"""Where inputs leave the domain of the arithmetic, the two backends give one answer: a value, or an error and its
words."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch

import qtx_torch.attention
import qtx_torch.backend
import qtx_torch.ops
import qtx_torch.quant.observers
import qtx_torch.quant.quantizer
import qtx_torch.stats
from parity_tests.subjects.integer_models import lower_model
from parity_tests.tests.models.answers import INF, NAN, answer, same, tensors, wider
from qtx_ref import attention, backend, ops
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.spec import (
    AttentionSpec,
    Softmax,
    SpecError,
)
from qtx_ref.tape import const

SIZE = {"layers": 1, "width": 16, "heads": 2, "hidden": 32}
TEXT = replace(preset("bert-tiny"), **SIZE, vocab=50, length=8)
CAUSAL = replace(preset("opt-tiny"), **SIZE, vocab=50, length=8)
IMAGES = replace(preset("vit-tiny"), **SIZE, image_size=8, patch_size=4)
WRONG_MASK = "give booleans, or an additive mask of 0 (attend) and -10000 or below"
BOTH = (backend, qtx_torch.backend)


# --- batches ----------------------------------------------------------------------------------------------------------


def text() -> dict[str, np.ndarray]:
    mask = np.ones((2, 8), bool)
    mask[0, 5:] = False
    tokens = np.arange(10, 26).reshape(2, 8)
    return {"tokens": tokens, "types": tokens % 2, "mask": mask, "targets": np.where(tokens % 3 == 0, tokens, -1)}


def pictures() -> dict[str, np.ndarray]:
    shape = (2, IMAGES.channels, 8, 8)
    return {"images": np.arange(np.prod(shape)).reshape(shape) % 7, "labels": np.array([1, 0])}


def additive(dtype: str, low: float = -10000) -> np.ndarray:
    return np.where(text()["mask"], 0, low).astype(dtype)


TOKENS = text()["tokens"]


# key, its value, and the error; none: the answer of the plain batch, to the bit
TEXT_CASES = {
    **{f"tokens {kind}": ("tokens", TOKENS.astype(kind), "") for kind in ("i1", "u1", "i4", "u4", "u8", ">i8", ">u2")},
    "tokens strided": ("tokens", wider(TOKENS), ""),
    "tokens transposed": ("tokens", np.asfortranarray(TOKENS), ""),
    "tokens float32": ("tokens", TOKENS.astype("f4"), "tokens are float32: give whole numbers, such as int64"),
    "tokens bool": ("tokens", TOKENS > 15, "tokens are bool: give whole numbers, such as int64"),
    "tokens negative": ("tokens", np.where(TOKENS == 25, -1, TOKENS), "tokens hold -1: give 0 to 49"),
    "tokens beyond": ("tokens", np.where(TOKENS == 25, 50, TOKENS), "tokens hold 50: give 0 to 49"),
    "tokens huge": ("tokens", np.full((2, 8), 2**63, "u8"), f"tokens hold {2**63}: give 0 to 49"),
    "tokens 0-d": ("tokens", np.array(3), "tokens have shape (): give (sequences, tokens), one or more of each"),
    "tokens 1-d": ("tokens", TOKENS[0], "tokens have shape (8,): give (sequences, tokens), one or more of each"),
    "tokens none": ("tokens", TOKENS[:, :0], "tokens have shape (2, 0): give (sequences, tokens), one or more of each"),
    "no sequence": ("tokens", TOKENS[:0], "tokens have shape (0, 8): give (sequences, tokens), one or more of each"),
    "tokens long": ("tokens", np.tile(TOKENS, 2), "tokens have shape (2, 16): the model's length is 8; cut the text"),
    "types u1": ("types", (TOKENS % 2).astype("u1"), ""),
    "types negative": ("types", TOKENS % 2 - 1, "types hold -1: give 0 to 1"),
    "types beyond": ("types", TOKENS % 3, "types hold 2: give 0 to 1"),
    "types 1-d": ("types", TOKENS[0] % 2, "types have shape (8,): give (2, 8)"),
    **{f"mask {kind}": ("mask", additive(kind), "") for kind in ("f2", "f4", "f8", "i2", "i4", "i8", ">f4")},
    "mask -inf": ("mask", additive("f2", -INF), ""),
    "mask strided": ("mask", wider(text()["mask"]), ""),
    "mask uint8": ("mask", text()["mask"].astype("u1"), f"attention mask is uint8: {WRONG_MASK}"),
    "mask uint8 zeros": ("mask", np.zeros((2, 8), "u1"), f"attention mask is uint8: {WRONG_MASK}"),
    "mask int64": ("mask", text()["mask"].astype("i8"), f"attention mask holds 1: {WRONG_MASK}"),
    "mask int8": ("mask", additive("i1", -20), f"attention mask holds -20: {WRONG_MASK}"),
    "mask -5000.1": ("mask", additive("f4", -5000.1), f"attention mask holds -5000.10009765625: {WRONG_MASK}"),
    "mask NaN": ("mask", additive("f8", NAN), f"attention mask holds nan: {WRONG_MASK}"),
    "mask inf": ("mask", additive("f8", INF), f"attention mask holds inf: {WRONG_MASK}"),
    "mask 1-d": ("mask", text()["mask"][0], "mask has shape (8,) beside tokens (2, 8): give one value per token"),
    "mask short": (
        "mask",
        text()["mask"][:, 1:],
        "mask has shape (2, 7) beside tokens (2, 8): give one value per token",
    ),
    "targets i4": ("targets", text()["targets"].astype("i4"), ""),
    "targets beyond": ("targets", TOKENS + 30, "targets hold 55: give at most 49"),
    "targets float": ("targets", TOKENS / 1, "targets are float64: give whole numbers, such as int64"),
    "targets none": ("targets", TOKENS * 0 - 7, "cross entropy has no target: every target is negative"),
    "another key": ("words", np.array(["a", "b"]), ""),
}


IMAGE_CASES = {
    **{f"images {kind}": ("images", pictures()["images"].astype(kind), "") for kind in ("f2", "f4", "f8", "u1", ">i4")},
    "images strided": ("images", wider(pictures()["images"]), ""),
    "images longdouble": ("images", pictures()["images"].astype(np.longdouble), ""),
    "images complex": ("images", pictures()["images"] * 1j, "images are complex128: give numbers"),
    "images 3-d": (
        "images",
        pictures()["images"][0],
        "images have shape (1, 8, 8): give (images, 1, 8, 8), one or more",
    ),
    "no image": (
        "images",
        pictures()["images"][:0],
        "images have shape (0, 1, 8, 8): give (images, 1, 8, 8), one or more",
    ),
    "labels u1": ("labels", np.array([1, 0], "u1"), ""),
    "labels beyond": ("labels", np.array([1, 10]), "labels hold 10: give at most 9"),
    "labels 0-d": ("labels", np.array(1), "labels have shape (): give (2,)"),
}


CASES = [(TEXT, text, case) for case in TEXT_CASES] + [(IMAGES, pictures, case) for case in IMAGE_CASES]


@pytest.mark.parametrize(("spec", "make", "name"), CASES, ids=[name for _, _, name in CASES])
def test_a_batch_is_read_or_refused_alike(spec, make, name):
    key, value, error = {**TEXT_CASES, **IMAGE_CASES}[name]
    for module in BOTH:
        model = module.Model(spec, init_params(spec, 0))
        want = answer(model.evaluate, make())
        got = answer(model.evaluate, make() | {key: value})
        if error:
            assert isinstance(got, str) and got.partition(": ")[2] == error, module
            assert got.partition(": ")[0] == ("ValueError" if "attention" in error or "cross" in error else "SpecError")
        else:
            same(got, want)


@pytest.mark.parametrize("key", ["tokens", "types", "mask", "images"])
def test_a_missing_key_is_named(key):
    spec, batch = (IMAGES, pictures()) if key == "images" else (TEXT, text())
    del batch[key]
    for module in BOTH:
        with pytest.raises(SpecError, match=f"batch has no {key}: {spec.family} takes "):
            module.Model(spec, init_params(spec, 0)).forward(batch)


def test_pictures_that_are_no_numbers_are_seen_in_the_result():
    batch = pictures() | {"images": pictures()["images"].astype("f4")}
    batch["images"][0, 0, 2, 2] = NAN
    for module in BOTH:
        assert np.isnan(module.Model(IMAGES, init_params(IMAGES, 0)).forward(batch)).any(axis=1).tolist() == [
            True,
            False,
        ]


@pytest.fixture(scope="module")
def integers():
    """A model in integers of each backend, and its batch."""
    made = lower_model(IMAGES, init_params(IMAGES, 0), [pictures()], pictures())
    return [made.model(module.IntegerModel) for module in BOTH], pictures()


@pytest.mark.parametrize("name", [name for name in IMAGE_CASES if "label" not in name])
def test_integers_read_and_refuse_as_floats_do(integers, name):
    (models, batch), (key, value, error) = integers, IMAGE_CASES[name]
    for model in models:
        got = answer(model.run, batch | {key: value})
        same(got, f"SpecError: {error}" if error else answer(model.run, batch))


@pytest.mark.parametrize("odd", [NAN, INF, -INF])
def test_integers_of_what_is_no_number(integers, odd):
    models, batch = integers
    images = batch["images"].astype("f4")
    images[1, 0, 3, 3] = odd
    one, other = (answer(model.run, {"images": images}) for model in models)
    same(one, other)
    assert isinstance(one, str) == bool(np.isnan(odd))


@pytest.mark.parametrize(
    ("chosen", "error"),
    [
        (np.array([-1]), "tokens hold -1: give 0 to 49"),
        (np.array([50]), "tokens hold 50: give 0 to 49"),
        (np.array([1.0]), "tokens are float64: give whole numbers, such as int64"),
        (np.array([[1]]), "tokens have shape (1, 1, 1): give (sequences, tokens), one or more of each"),
        (np.array([7], "u1"), ""),
        ([7], ""),
    ],
)
def test_what_is_chosen_is_checked_as_what_is_given(chosen, error):
    start = np.array([[3, 4]], "u1")
    low = lower_model(CAUSAL, init_params(CAUSAL, 0), [text()], text())
    for module in BOTH:
        for model in (module.Model(CAUSAL, init_params(CAUSAL, 0)), low.model(module.IntegerModel)):
            got = answer(model.generate, start, 3, lambda logits: chosen)
            same(got, f"SpecError: {error}" if error else np.array([[3, 4, 7, 7, 7]]))


def test_marks_are_booleans_of_the_batch():
    for module, mark in product(BOTH, (np.ones((2, 8), "u1"), np.ones(8, bool), np.ones((2, 8)))):
        model = module.Model(TEXT, init_params(TEXT, 0))
        with pytest.raises(SpecError, match="mark end is .* give booleans of shape"):
            model.attention(text(), {"end": mark}, ["embed.norm"])


# --- attention --------------------------------------------------------------------------------------------------------


ONE = np.log(np.float64([[1, 2, 1]]))  # scores (1, 3)
ALL = np.array([[True, True, True]])
PART = np.array([[True, True, False]])


@pytest.mark.parametrize("odd", [NAN, INF, -INF])
def test_a_masked_score_never_enters(odd):
    scores = ONE.copy()
    scores[0, 2] = odd
    for dtype in ("f4", "f8"):
        x = scores.astype(dtype)
        for got in (
            ops.softmax(const(x), PART).value,
            qtx_torch.ops.softmax(torch.tensor(x), torch.tensor(PART)).numpy(),
        ):
            np.testing.assert_allclose(got, [[1 / 3, 2 / 3, 0]], rtol=3e-7)  # float32


@pytest.mark.parametrize("kind", [Softmax.PLAIN, Softmax.CLIPPED, Softmax.PLUS_ONE])
@pytest.mark.parametrize("odd", [NAN, INF, -INF])
def test_no_variant_of_the_softmax_sees_a_masked_score(kind, odd):
    spec = AttentionSpec(softmax=kind, gamma=-0.1, zeta=1.1) if kind is Softmax.CLIPPED else AttentionSpec(softmax=kind)
    scores = np.broadcast_to(ONE, (1, 1, 1, 3)).copy()
    want = attention.probabilities(const(scores), PART[None, None], spec).value
    scores[..., 2] = odd
    np.testing.assert_array_equal(attention.probabilities(const(scores), PART[None, None], spec).value, want)
    got = qtx_torch.attention.probabilities(torch.tensor(scores), torch.tensor(PART[None, None]), spec).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-15)  # float64


@pytest.mark.parametrize("odd", [[0, NAN, 1], [0, INF, 1], [-INF, -INF, NAN], [INF, -INF, 0]])
def test_a_row_that_attends_to_what_is_no_number_is_none(odd):
    x = np.float32([odd])
    mask = PART if np.isnan(odd[2]) else ALL
    assert np.isnan(ops.softmax(const(x), mask).value).all()
    assert torch.softmax(torch.tensor(x).masked_fill(~torch.tensor(mask), -torch.inf), -1).isnan().all()
    assert qtx_torch.ops.softmax(torch.tensor(x), torch.tensor(mask)).isnan().all()


MASKS = [np.array([0, -10000, -(10**9)])] + [np.array([0, -1, -20000]), np.array([1, 0, 1]), np.array([0, 0, 0])]
DTYPES = ("?", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1)])
def test_masks_of_every_dtype(dtype, shape):
    for values in MASKS:
        with np.errstate(over="ignore"):
            mask = values.astype(dtype).reshape(shape)
        same(answer(qtx_torch.attention.boolean_mask, tensors(mask)), answer(attention.boolean_mask, mask))
    for mask in (np.zeros((0,), dtype), np.zeros((), dtype)):
        same(answer(qtx_torch.attention.boolean_mask, tensors(mask)), answer(attention.boolean_mask, mask))
