"""Bounds of integer products: hand-worked sums at the edge, and every combination of codes of small ones."""

from __future__ import annotations

from dataclasses import replace
from itertools import product as combinations

import numpy as np
import pytest

from qtx.audit import certificate_bounds as bounds
from qtx.audit.certificate_bounds import TARGETS, Operand, Product, check_sums
from qtx.audit.certificate_cures import Tally, list_cures
from qtx.audit.certificate_overflow import check_overflow, check_shift
from qtx_ref.integer.products import matmul, matmul_pairs16
from qtx_ref.spec import QTX, Overflow, QuantSpec

WRAP = replace(QTX.matmul, overflow=Overflow.WRAP)
AVX2, ZERO = TARGETS["avx2"], np.zeros((), np.int64)


def weights(*rows: list[int], low: int = 0, high: int = 255, **more: object) -> Product:
    """Unsigned activations from low to high times int8 weights."""
    right = Operand(-128, 127, ZERO, np.array(rows, np.int32))
    return Product("p", Operand(low, high, ZERO), right, len(rows), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "low", "high", "worst"),
    [
        (([127], [2]), 0, 254, 254 * 129),  # 32766
        (([127], [2]), 0, 255, 255 * 129),  # 32895
        (([64], [64]), 0, 255, 32640),
        (([64], [65]), 0, 255, 32895),
        (([-64], [-64]), 0, 255, -32640),
        (([-128], [-128]), 0, 128, -32768),  # the last that int16 holds
        (([-128], [-128]), 0, 129, -33024),
        (([127], [-128]), 0, 255, -32640),  # only one of them at a time
        (([127], [5], [127]), 0, 255, 255 * 132),  # the third has no neighbour
        (([5], [127], [5], [127]), 0, 248, 248 * 132),
    ],
)
def test_a_pair_just_can_and_just_cannot(rows: tuple[list[int], ...], low: int, high: int, worst: int) -> None:
    verdict = check_sums(weights(*rows, low=low, high=high), AVX2)
    assert verdict.worst == worst
    assert verdict.holds == (-32768 <= worst <= 32767) == (verdict.witness is None)
    if verdict.witness is not None:
        assert verdict.witness.exact == worst and verdict.witness.computed == (32767 if worst > 0 else -32768)


def test_signed_activations_are_moved_to_u8() -> None:
    """As oneDNN does: -128 becomes 0, 127 becomes 255, whatever the zero point."""
    one = replace(weights([64], [65]), left=Operand(-128, 127, ZERO))
    verdict = check_sums(one, AVX2)
    assert verdict.worst == 32895 and verdict.witness is not None
    assert verdict.witness.left.tolist() == [127, 127]


def test_unsigned_weights_are_moved_to_s8() -> None:
    one = replace(weights([255], [130]), right=Operand(0, 255, np.int64(128), np.array([[255], [130]])))
    assert check_sums(one, AVX2).worst == 255 * (127 + 2)


def test_activations_times_activations_reach_both_ends() -> None:
    scores = Product("s", Operand(0, 255, ZERO), Operand(-128, 127, ZERO), 32)
    assert check_sums(scores, AVX2).worst == -65280
    assert check_sums(replace(scores, right=Operand(-64, 63, ZERO)), AVX2).worst == -32640
    assert check_sums(replace(scores, depth=1), AVX2).worst == -32640  # no neighbour


def test_16_bit_codes_are_no_bytes() -> None:
    with pytest.raises(ValueError, match="beyond a byte"):
        check_sums(replace(weights([1]), left=Operand(-32768, 32767, ZERO)), AVX2)


# --- every combination ------------------------------------------------------------------------------------------------


def saturates(x: tuple[int, ...], w: tuple[int, ...], run: int) -> bool:
    """Whether a step of the sum leaves int16, in Python's integers."""
    x, w = (*x, 0)[: len(x) + len(x) % 2], (*w, 0)[: len(w) + len(w) % 2]
    total = 0
    for place, k in enumerate(range(0, len(x), 2)):
        pair = x[k] * w[k] + x[k + 1] * w[k + 1]
        if not -32768 <= pair <= 32767:
            return True
        total = pair if place % run == 0 else total + pair
        if not -32768 <= total <= 32767:
            return True
    return False


def draw(rng: np.random.Generator, run: int) -> tuple[Product, bounds.Target]:
    """A product so near to the edge that either verdict is likely: activations of three codes, weights of one size."""
    low = int(rng.choice([0, 120, 252, 253]))
    middle = 32768 / (2 * run * (low + 2)) if low else 64 / run
    shape = (int(rng.integers(2 * run, 2 * run + 3)), int(rng.integers(1, 3)))
    codes = np.clip(np.rint(rng.choice([-1, 1], shape) * middle * rng.uniform(0.8, 1.1, shape)), -128, 127)
    codes[:, 0] = np.abs(codes[:, 0]) * rng.choice([-1, 1])
    right = Operand(-128, 127, ZERO, codes.astype(np.int32))
    return Product("p", Operand(low, low + 2, ZERO), right, len(codes)), replace(AVX2, run=run)


def agree(run: int, cases: int) -> list[bool]:
    """Each verdict, after all codes of the row were tried; a witness must do what it says."""
    rng, verdicts = np.random.default_rng(run), []
    for _ in range(cases):
        one, target = draw(rng, run)
        assert one.right.codes is not None
        verdict = check_sums(one, target)
        codes = range(one.left.low, one.left.high + 1)
        columns = [tuple(map(int, column)) for column in one.right.codes.T]
        found = any(saturates(x, w, run) for x in combinations(codes, repeat=len(one.right.codes)) for w in columns)
        assert verdict.holds != found
        if (witness := verdict.witness) is not None:
            x, w = tuple(map(int, witness.left)), tuple(map(int, witness.right))
            assert saturates(x, w, run) and w == columns[witness.column or 0]
            assert witness.exact == sum(a * b for a, b in zip(x, w, strict=True)) != witness.computed
        verdicts.append(verdict.holds)
    return verdicts


@pytest.mark.parametrize(("run", "cases"), [(1, 150), (2, 60), (3, 8)])
def test_every_code_of_small_products(run: int, cases: int) -> None:
    verdicts = agree(run, cases)
    assert any(verdicts) and not all(verdicts)


def test_a_bound_that_forgets_negative_sums_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bounds.reach
    monkeypatch.setattr(
        bounds, "reach", lambda terms, run: [one for one in whole(terms, run) if one[0] >= 0] or [(0, (0, 2, 0))]
    )
    with pytest.raises(AssertionError):
        agree(1, 150)


def test_a_bound_of_pairs_that_are_no_neighbours_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bounds.reach
    monkeypatch.setattr(bounds, "reach", lambda terms, run: whole(np.roll(terms, 1, axis=0), run))
    with pytest.raises(AssertionError):
        agree(1, 150)


def test_all_codes_of_activations_times_activations() -> None:
    for low, high, b_low, b_high in [(0, 255, -64, 64), (0, 255, -65, 10), (250, 255, -66, 1), (100, 128, -128, -127)]:
        verdict = check_sums(Product("s", Operand(low, high, ZERO), Operand(b_low, b_high, ZERO), 2), AVX2)
        a = sorted({low, high, (low + high) // 2})
        b = sorted({b_low, b_high, (b_low + b_high) // 2})
        found = any(saturates(x, w, 1) for x in combinations(a, repeat=2) for w in combinations(b, repeat=2))
        assert verdict.holds != found


# --- accumulators -----------------------------------------------------------------------------------------------------


def test_every_accumulator_of_small_products() -> None:
    """With zero points known and not, and a bias that leaves room for all of the sum, or all but 1."""
    rng, verdicts = np.random.default_rng(0), []
    for case in range(200):
        codes = rng.integers(0, 256, (3, 2))
        zeros = rng.integers(0, 256, 2)
        left_zero = None if case % 3 == 0 else int(rng.integers(0, 4))
        upward = bool(case % 2)

        def sums(
            column: int, codes: np.ndarray = codes, zeros: np.ndarray = zeros, known: int | None = left_zero
        ) -> list[int]:
            points = range(4) if known is None else [known]
            return [
                sum((a - z) * (int(w) - int(zeros[column])) for a, w in zip(x, codes[:, column], strict=True))
                for z in points
                for x in combinations(range(4), repeat=3)
            ]

        reach = [(max if upward else min)(sums(column)) for column in (0, 1)]
        edge = 2**31 - 1 if upward else -(2**31)
        bias = np.array([edge - one for one in reach], np.int64)
        bias[rng.integers(2)] += int(rng.integers(-1, 2))
        if np.any(bias > 2**31 - 1) or np.any(bias < -(2**31)):
            continue
        left = Operand(0, 3, None if left_zero is None else np.int64(left_zero))
        one = Product("p", left, Operand(0, 255, zeros, codes), 3, bias)
        verdict = check_overflow(one)
        far = [s + int(bias[column]) for column in (0, 1) for s in sums(column)]
        assert verdict.holds == (min(far) >= -(2**31) and max(far) <= 2**31 - 1)
        assert verdict.worst in (max(far), min(far))
        if (witness := verdict.witness) is not None:
            column = witness.column or 0
            exact = int(bias[column]) + sum(
                (int(a) - witness.left_zero) * (int(w) - witness.right_zero)
                for a, w in zip(witness.left, witness.right, strict=True)
            )
            assert exact == witness.exact == verdict.worst and witness.right.tolist() == codes[:, column].tolist()
            given = witness.left[None].astype(np.uint8), witness.right[:, None].astype(np.uint8)
            points = np.int32(witness.left_zero), np.int32(witness.right_zero)
            acc = matmul(*given, QuantSpec(8), QuantSpec(8), *points, bias[[column]], rule=WRAP)
            assert acc.item() == witness.computed == np.int64(exact).astype(np.int32)
            with pytest.raises(ValueError, match="beyond int32"):
                matmul(*given, QuantSpec(8), QuantSpec(8), *points, bias[[column]])
        verdicts.append(verdict.holds)
    assert verdicts.count(False) > 20 and verdicts.count(True) > 20


def test_a_bias_that_int32_does_not_hold() -> None:
    verdict = check_overflow(weights([-1], bias=np.array([2**31])))
    assert not verdict.holds and verdict.note == "the bias alone"
    assert check_overflow(weights([-1], bias=np.array([2**31]), accumulator=64)).holds


def test_a_sum_of_unknown_length_is_proved_to_a_length() -> None:
    verdict = check_overflow(Product("s", Operand(0, 255, ZERO), Operand(0, 255, ZERO), None))
    assert verdict.holds and verdict.note == "to 33,025 terms"  # (2^31 - 1) // 255^2
    assert check_overflow(Product("s", Operand(0, 255, ZERO), Operand(0, 255, ZERO), 33025)).holds
    assert not check_overflow(Product("s", Operand(0, 255, ZERO), Operand(0, 255, ZERO), 33026)).holds


def test_a_left_shift_just_leaves_int32() -> None:
    """255 * 127 = 32385; shifted by 16 it is 2122383360, by 17 beyond 2^31."""
    for shift, holds in ((-3, True), (16, True), (17, False)):
        one = weights([127], shift=np.int64(shift))
        verdict = check_shift(one, check_overflow(one))
        assert verdict is not None and verdict.holds == holds
        assert verdict.worst == 32385 << max(shift, 0)
    assert verdict.witness is not None and verdict.witness.exact == 32385 and verdict.witness.computed is None
    assert [cure.name for cure in list_cures(one, check_overflow(one), verdict)] == ["result scale x 2"]


def test_the_column_that_leaves_int32_by_its_own_shift() -> None:
    one = weights([127, 1, 3], shift=np.array([2, 2, 23]))
    verdict = check_shift(one, check_overflow(one))
    assert verdict is not None and verdict.witness is not None
    assert verdict.witness.column == 2 and verdict.worst == 765 << 23


# --- cures and data ---------------------------------------------------------------------------------------------------


def test_cures_cure() -> None:
    rng = np.random.default_rng(1)
    one = weights(*rng.integers(-128, 128, (32, 12)).tolist(), right_scale=rng.uniform(0.5, 2, 12))
    cures = {cure.name: cure for cure in list_pair_cures(one)}
    assert cures["u8 x u8"].error == 0 < cures["scale"].error < cures["7 bits"].error < 0.02
    for name in ("scale", "7 bits"):
        assert cures[name].operand is not None
        assert check_sums(replace(one, right=cures[name].operand), AVX2).holds
    assert list_pair_cures(weights([64], [64])) == []


def list_pair_cures(one: Product) -> list:
    return list_cures(one, check_overflow(one), None)


def test_the_error_of_a_cure_by_hand() -> None:
    """Codes 127 and 101 to 7 bits: 63.5 rounds to even, 64, clamped to 63, and 50.5 to 50: 126 and 100."""
    cure = {cure.name: cure for cure in list_pair_cures(weights([127], [101]))}["7 bits"]
    assert cure.error == pytest.approx(np.sqrt(2 / (127**2 + 101**2)), rel=1e-12)


@pytest.mark.parametrize("heads", [1, 3])
def test_data_are_counted_as_the_emulator_saturates(heads: int) -> None:
    rng = np.random.default_rng(heads)
    a = rng.integers(120, 256, (heads, 7, 5)).astype(np.uint8)
    b = rng.integers(-128, 128, (heads, 5, 4)).astype(np.int8)
    one = weights(*b.transpose(1, 0, 2).reshape(5, -1).tolist(), low=0)
    cures, tally = list_pair_cures(one), Tally()
    tally.see(one, cures, a, np.int32(3), b, np.int32(0))
    pairs = wrong = 0
    for head, row, column in np.ndindex(heads, 7, 4):
        x, w = a[head, row].astype(int), b[head, :, column].astype(int)
        steps = [int(x[k : k + 2] @ w[k : k + 2]) for k in (0, 2, 4)]
        pairs += sum(not -32768 <= step <= 32767 for step in steps)
        wrong += int(matmul_pairs16(a[head, row][None], b[head, :, [column]].T)[0, 0] != x @ w)
    assert (tally.pairs, tally.saturated, tally.results, tally.wrong) == (heads * 84, pairs, heads * 28, wrong)
    assert wrong > 0
    exact, coarse = (a.astype(float) - 3) @ b, (a.astype(float) - 3) @ (2 * np.clip(np.rint(b / 2), -64, 63))
    error = np.sqrt(np.square(coarse - exact).sum() / np.square(exact).sum())
    seven = next(cure for cure in cures if cure.name == "7 bits")
    assert tally.error(seven) == pytest.approx(error, rel=1e-5)  # float32 products
