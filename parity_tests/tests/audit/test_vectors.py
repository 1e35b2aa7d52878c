"""Families of vectors are what they are called, and the same from the same seed."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from qtx.audit.vectors import DRAWN, SHARES, Batch, count_batches, draw, draw_batches, take_codes

OPS = {op: ("e4m3", "e5m2", "e2m1") if op in ("cast", "mx") else ("int8", "uint8") for op in DRAWN}


def drawn(op: str, family: str, dtype: str = "int8", count: int = 30, size: int = 64) -> list[Batch]:
    return [draw(op, family, dtype, number, size, 0) for number in range(count)]


@pytest.mark.parametrize("op", OPS)
def test_the_same_seed_draws_the_same_bits_and_another_does_not(op: str) -> None:
    first, again, other = (list(draw_batches(op, OPS[op], 3000, seed)) for seed in (1, 1, 2))
    assert [batch.family for batch in first] == [batch.family for batch in other]
    moved = 0
    for a, b, c in zip(first, again, other, strict=True):
        for name, value in a.values.items():
            np.testing.assert_array_equal(value, b.values[name])
            moved += isinstance(value, np.ndarray) and not np.array_equal(value, c.values[name], equal_nan=False)
    assert moved > len(first) / 2


@pytest.mark.parametrize("op", OPS)
def test_counts_are_what_is_asked_for(op: str) -> None:
    asked = 200_000
    batches = count_batches(op, OPS[op], asked)
    assert set(batches) == set(DRAWN[op]) and min(batches.values()) >= len(OPS[op])
    total = sum(batch.count for batch in draw_batches(op, OPS[op], asked))
    assert 0.9 * asked < total < 1.3 * asked
    assert set(SHARES) >= set(batches)


def test_near_ties_are_within_an_ulp_and_exact_ties_are_exact() -> None:
    near = exact = 0
    for batch in drawn("quantize", "near ties"):
        x, scale = batch.values["x"].astype(np.float64), np.float64(batch.values["scale"])
        tie = (np.floor(x / scale) + 0.5) * scale
        ulp = np.spacing(np.abs(batch.values["x"])).astype(np.float64)
        assert (np.abs(x - tie) <= 2 * ulp).all()
        near += int((np.abs(x - tie) > 0).sum())
    for batch in drawn("quantize", "exact ties"):
        for x in batch.values["x"].tolist():
            assert (Fraction(x) / Fraction(float(batch.values["scale"]))).denominator == 2
        assert int(batch.values["zero_point"]) % 2 == 1
        exact += batch.count
    assert near and exact


def test_exact_ties_of_a_linear_layer_are_exact_and_near_ties_near() -> None:
    for family, most in (("exact ties", 0.0), ("near ties", 1e-6)):
        for batch in drawn("linear", family, "uint8"):
            v = batch.values
            total = (v["x"].astype(np.int64) - int(v["x_zero"])) @ v["w"].astype(np.int64)
            level = total * np.float64(v["x_scale"]) * np.float64(v["w_scale"]) / np.float64(v["y_scale"])
            away = np.abs(level - np.floor(level) - 0.5)
            assert (away <= most * np.maximum(np.abs(level), 1)).all()


def test_powers_of_two_have_two_beside_each() -> None:
    x = drawn("quantize", "powers of two")[0].values["x"]
    for exponent in (-149, -126, 0, 127):
        power = np.float32(2.0**exponent)
        for want in (power, np.nextafter(power, np.float32(np.inf)), np.nextafter(power, np.float32(0)), -power):
            assert want in x
    accumulators = [
        (b.values["x"].astype(np.int64) - int(b.values["x_zero"])) @ b.values["w"].astype(np.int64)
        for b in drawn("linear", "powers of two", "int8", 1)
    ]
    for exponent in range(21):
        assert {2**exponent - 1, 2**exponent, 2**exponent + 1} <= set(np.concatenate(accumulators).ravel().tolist())


def test_what_is_beyond_lies_around_the_widths_of_integers() -> None:
    for batch in drawn("quantize", "beyond"):
        exponent = np.log2(np.abs(batch.values["x"].astype(np.float64)) / np.float64(batch.values["scale"]))
        assert (np.min(np.abs(exponent[:, None] - [31, 32, 63, 64]), axis=1) < 1e-6).all()


def test_special_values_are_there() -> None:
    assert all(np.isnan(b.values["x"]).any() and np.isfinite(b.values["x"]).any() for b in drawn("quantize", "nan"))
    assert {-np.inf, np.inf} <= set(np.concatenate([b.values["x"] for b in drawn("cast", "infinity", "e5m2")]).tolist())
    for batch in drawn("quantize", "subnormal scales"):
        assert 0 < batch.values["scale"] < 2.0**-126
    assert any(
        np.any((b.values["x"] != 0) & (np.abs(b.values["x"]) < 2.0**-126)) for b in drawn("cast", "subnormals", "e4m3")
    )
    for op in OPS:
        dtype = OPS[op][0]
        assert op == "mx" or drawn(op, "empty", dtype, 1)[0].count == 0
        assert drawn(op, "one", dtype, 1)[0].count == (32 if op == "mx" else 1)
    assert not drawn("quantize", "strided")[0].values["x"].flags.c_contiguous
    assert drawn("quantize", "float16")[0].values["x"].dtype == np.float16
    bits = drawn("quantize", "bfloat16")[0].values["x"].view(np.uint32)
    assert not (bits & 0xFFFF).any()


def test_codes_beyond_a_quantizer_are_only_dequantized() -> None:
    assert take_codes("quantize", ("int8", "int32")) == ["int8"]
    assert take_codes("dequantize", ("int8", "int32")) == ["int8", "int32"]
