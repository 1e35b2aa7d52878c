"""FP8, FP4 and MX against hand-worked values, ml_dtypes and torch's casts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from parity_tests.sweep.quantizers import neighbours, powers_of_two
from qtx_ref.quant import formats
from qtx_ref.random import stream
from qtx_ref.spec import FloatFormat, SharedScale
from qtx_torch.quant import formats as torch_formats

ml_dtypes = pytest.importorskip("ml_dtypes")
F32 = np.float32
E4M3, E5M2, E2M1 = FloatFormat
OUTSIDE = {E4M3: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2, E2M1: ml_dtypes.float4_e2m1fn}
TORCH = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}


def inputs(kind: FloatFormat) -> np.ndarray:
    """Random bit patterns, every value, every tie, every power of two and their neighbours. No NaN."""
    known = np.sort(formats.values(kind)[np.isfinite(formats.values(kind))])
    rng = stream(0, "formats", kind)
    drawn = [
        rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(F32),
        (rng.standard_normal(100_000) * 20).astype(F32),
        neighbours(known),
        neighbours((known[1:] + known[:-1]) / 2),
        neighbours(powers_of_two()),
        F32([np.inf, -np.inf, 464, 465, 480, 57344, 61440, 65536]),
    ]
    x = np.concatenate(drawn)
    return x[~np.isnan(x)]


def codes(x: np.ndarray, kind: FloatFormat, saturate: bool) -> np.ndarray:
    """The reference's codes, which torch's equal."""
    got = formats.encode(x, kind, saturate)
    np.testing.assert_array_equal(torch_formats.encode(torch.from_numpy(x), kind, saturate).numpy(), got)
    return got


@pytest.mark.parametrize("kind", FloatFormat)
def test_every_code_has_the_value_of_ml_dtypes(kind):
    every = np.arange(16 if kind is E2M1 else 256, dtype=np.uint8)
    want = every.view(OUTSIDE[kind]).astype(F32)
    for got in (formats.decode(every, kind), torch_formats.decode(torch.from_numpy(every), kind).numpy()):
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(np.signbit(got[~np.isnan(got)]), np.signbit(want[~np.isnan(want)]))
    finite = np.isfinite(want)
    np.testing.assert_array_equal(codes(want[finite], kind, True), every[finite])
    assert formats.LAYOUTS[kind].maximum == torch_formats.LAYOUTS[kind].maximum == want[finite].max()


@pytest.mark.parametrize("kind", FloatFormat)
def test_encode_is_ml_dtypes_cast(kind):
    """ml_dtypes does not saturate FP8, and saturates FP4."""
    x = inputs(kind)
    with np.errstate(over="ignore"):
        want = x.astype(OUTSIDE[kind]).view(np.uint8)
    np.testing.assert_array_equal(codes(x, kind, False), want)


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_encode_is_torchs_cast(kind):
    """torch 2.13 on CPU saturates E4M3, infinity too, and gives E5M2 its infinity."""
    x = inputs(kind)
    saturates = torch.tensor(465.0).to(TORCH[E4M3]).float().item() == 448
    want = torch.from_numpy(x).to(TORCH[kind]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(codes(x, kind, kind is E4M3 and saturates), want)


def test_named_differences():
    """465, past the tie 464 between 448 and the 480 that E4M3 lacks: saturated 448, else NaN, as ml_dtypes has it.
    NaN in E5M2: torch's code 0x7F here, 0x7E in ml_dtypes."""
    x = F32([464, 465, np.nan])
    assert codes(x, E4M3, True).tolist() == [0x7E, 0x7E, 0x7F]
    assert (
        codes(x, E4M3, False).tolist()
        == x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8).tolist()
        == [0x7E, 0x7F, 0x7F]
    )
    assert (
        codes(x[2:], E5M2, False).tolist() == [0x7F] and torch.tensor(np.nan).to(TORCH[E5M2]).view(torch.uint8) == 0x7F
    )
    assert x[2:].astype(ml_dtypes.float8_e5m2).view(np.uint8).tolist() == [0x7E]


@pytest.mark.parametrize(
    "largest, floor, ceil, even, rceil",
    [  # exponent of the scale of an E2M1 block (emax 2): 4 = 2^2 fits whole; 7.9 saturates, is lifted, or rounds up
        (4.0, 0, 0, 0, 0),
        (6.0, 0, 1, 0, 0),  # the largest value itself
        (6.9, 0, 1, 0, 1),
        (7.0, 0, 1, 1, 1),  # halfway between 6 and 8 in one bit of mantissa
        (2.0**-127, -127, -127, -127, -127),
        (0.0, -127, -127, -127, -127),
    ],
)
def test_mx_scales_by_hand(largest, floor, ceil, even, rceil):
    x = F32([[largest, 0, -0.5 * largest, 0]])
    for rule, exponent in zip(SharedScale, (floor, ceil, even, rceil), strict=True):
        scale, _ = formats.mx_quantize(x, E2M1, rule, 4)
        assert scale.tolist() == [[exponent + 127]]


def test_mx_blocks():
    """OCP microscaling: 2^(floor(log2 absmax) - emax) and the elements' nearest codes, saturated."""
    x = F32([[1, 7.9, -0.24, 0.75, np.nan, 1, 1, 1]])
    scale, code = formats.mx_quantize(x, E2M1, block=4)
    assert scale.tolist() == [[127, 255]] and code.tolist() == [[2, 7, 8, 2, 0, 0, 0, 0]]
    want = [1, 6, -0.0, 1, np.nan, np.nan, np.nan, np.nan]
    np.testing.assert_array_equal(formats.mx_dequantize(scale, code, E2M1), [want])
    y, inside = formats.mx_fake_quantize(x, E2M1, block=4)
    np.testing.assert_array_equal(y, [want])
    assert inside[0, :4].tolist() == [True, False, True, True]
    with pytest.raises(ValueError, match="block 3 does not divide"):
        formats.mx_quantize(x, E2M1, block=3)
    with pytest.raises(ValueError, match="e2m1 has no NaN"):
        formats.encode(x, E2M1)


@pytest.mark.parametrize("kind", FloatFormat)
def test_mx_elements_are_the_outside_cast(kind):
    """Scaled by a power of two, cast by ml_dtypes after saturation."""
    x = (stream(0, "mx").standard_normal((64, 64)) * 30).astype(F32)
    scale, code = formats.mx_quantize(x, kind)
    assert (scale.view(ml_dtypes.float8_e8m0fnu).astype(F32) == 2.0 ** (scale.astype(float) - 127)).all()
    ratio = x.reshape(64, 2, 32) / 2.0 ** (scale.astype(F32)[..., None] - 127)
    limit = formats.LAYOUTS[kind].maximum
    want = np.clip(ratio, -limit, limit).astype(OUTSIDE[kind]).view(np.uint8).reshape(x.shape)
    np.testing.assert_array_equal(code, want)
