"""Groups of channels and wide channels in integers: sums worked out group by group, codes as simulated."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from parity_tests.subjects import integer_models, rules, small_models
from parity_tests.tests.conftest import tensors
from qtx.recipes.named import recipe, resolve_integers
from qtx_ref.backend import IntegerModel, Model
from qtx_ref.integer import groups
from qtx_ref.integer.groups import channel_multiplier, reach
from qtx_ref.integer.lifting import real
from qtx_ref.integer.lowering import lower
from qtx_ref.integer.model import Integer, code_dtype
from qtx_ref.profiles import profile
from qtx_ref.quant import affine, quantizer
from qtx_ref.random import stream
from qtx_ref.spec import QTX, WIDE_ZERO, Granularity, QuantSpec, SpecError
from qtx_torch.backend import IntegerModel as TorchModel
from qtx_torch.integer import execution
from qtx_torch.integer import groups as torch_groups
from qtx_torch.integer import proof as proving

I32, I64, F32 = np.int32, np.int64, np.float32
WIDE = QuantSpec(granularity=Granularity.GROUP, wide=2)


def test_a_sum_by_hand(call):
    """3 of scale 1 times 1, -2 of scale 1/2 times 4, 5 of scale 1/4 times -2: 3 - 4 - 2.5 = -3.5."""
    m, x, w = I32([2**24, 2**23, 2**22]), I32([[3, -2, 5]]), I32([[1], [4], [-2]])
    for shift, want in ((20, -56), (23, -7), (24, -3), (25, -2)):  # in units of 2^(shift - 24), half up
        assert call("integer.groups.product", x, w, m, I64(shift), rules.ADD_UP).tolist() == [[want]]
    assert call("integer.groups.product", x, w, m, I64(24), rules.ADD_AWAY).tolist() == [[-4]]
    assert call("integer.groups.join", x, m, I64(23), rules.ADD_UP).tolist() == [[6, -2, 3]]  # 2.5 goes up
    assert channel_multiplier(np.float64([1, 0.5, 0.25])).tolist() == m.tolist()


@pytest.mark.parametrize("bits", [(8, 8), (16, 8), (16, 16)])
def test_the_sum_is_that_of_an_accumulator_per_group(call, bits):
    """In Python's integers: each group's own sum, times its multiplier."""
    rng = stream(0, "groups", *bits)
    x = rng.integers(-(2 ** bits[0]), 2 ** bits[0] + 1, (5, 12)).astype(I32)
    w = rng.integers(-(2 ** bits[1]), 2 ** bits[1] + 1, (12, 4)).astype(I32)
    group = np.array([0, 2, 1, 0, 1, 2, 2, 1, 0, 0, 1, 2])
    m = np.array([2**24, 12345, 777], I32)
    total = sum(int(m[g]) * (x[:, group == g].astype(object) @ w[group == g].astype(object)) for g in range(3))
    want = (total + 2**15) // 2**16
    for integers in (False, True):
        got = call("integer.groups.product", x, w, m[group], I64(16), rules.ADD_UP, *bits, integers)
        assert got.tolist() == want.tolist()


def test_a_sum_beyond_62_bits_is_refused(call):
    x, w = np.full((1, 9), 2**16, I32), np.full((9, 1), 2**16, I32)
    with pytest.raises(ValueError, match="value .* is outside"):
        call("integer.groups.product", x, w, np.full(9, 2**27, I32), I64(0), rules.ADD_UP)


def test_wide_channels_have_their_own_codes(call):
    """Of ranges 1, 8 and 2, 8 is wide: scale 8 / 32767, codes about 32768; the others share [-1, 2] in 8 bits."""
    low, high = F32([[-1, -8, -1]]), F32([[1, 4, 2]])
    one = replace(WIDE, wide=1)
    scale, zero = call("quant.affine.scale_zero", low, high, one)
    assert zero.tolist() == [[85, WIDE_ZERO, 85]]
    assert scale.tolist() == [[F32(3) / F32(255), F32(8) / F32(32767), F32(3) / F32(255)]]
    x = F32([[-1, -8, 2], [9, 9, 9], [-9, -9, -9]])
    codes = call("quant.affine.quantize", x, scale, zero, one)
    assert codes.tolist() == [[0, 1, 255], [255, 65535, 255], [0, 0, 0]]
    value, inside = call("quant.affine.fake_quantize", x, scale, zero, one)
    assert inside.tolist() == [[True, True, True], [False] * 3, [False] * 3]
    assert value[0, 1] == F32(8) / F32(32767) * -32767
    assert [int(r) for r in reach(one, zero).ravel()] == [170, 32768, 170]


def test_groups_that_do_not_fit_are_refused(call):
    low, high = -np.ones((1, 4), F32), np.ones((1, 4), F32)
    with pytest.raises(ValueError, match="wide 4 of 4 channels"):
        call("quant.affine.scale_zero", low, high, replace(WIDE, wide=4))
    for fields in ({"wide": 2, "groups": 2}, {"wide": 0}, {"wide": 2, "bits": 16}, {"wide": 2, "dynamic": True}, {}):
        with pytest.raises(SpecError, match="quantizer (wide|groups)"):
            QuantSpec(granularity=Granularity.GROUP, **{"bits": 8, **fields})
    with pytest.raises(SpecError, match="quantizer wide"):
        QuantSpec(wide=2)


def test_a_group_that_was_silent_has_a_fine_scale(call):
    """Only all of its channels together: a silent one among others has their scale."""
    spec, none = QuantSpec(granularity=Granularity.GROUP, groups=2), np.zeros((1, 4), bool)
    low, high = F32([[0, 0, 0, -1]]), F32([[0, 0, 0, 1.55]])
    scale, _ = call("quant.quantizer.static_scale", low, high, none, spec)
    assert scale.tolist() == [[2.0**-8, 2.0**-8, F32(0.01), F32(0.01)]]


@pytest.mark.parametrize("name", ["w8a8-peg4p", "w8a8-out3", "w8a8-channel-peg8"])
@pytest.mark.parametrize("kind", ["bert_gate_linear", "opt_plain", "vit_gate_mlp"])
def test_integers_are_near_their_simulation(kind, name):
    """At each site the codes of what integers stand for are those of fake quantization, of the same numbers; and the
    output is nearer to fake quantization's than that is to the float model's."""
    model = small_models.build(kind)
    quants = resolve_integers(recipe(name, model.spec), model.spec)
    plain = Model(model.spec, model.params)
    ranges = plain.calibrate([model.batch], quants)
    constants = lower(model.spec, model.params, quants, ranges)
    nx = Integer(constants, quants, QTX)
    for site, quant in quants.items():
        if quant.granularity is Granularity.GROUP:
            shape = (3, 5, constants[f"{site}.scale"].size)
            x = (stream(0, "codes", site).standard_normal(shape) * ranges[site].high.max()).astype(F32)
            want = quantizer.quantize(x, ranges[site].scale, ranges[site].zero_point, quant)
            assert np.array_equal(nx.quantize(site, quant, x).value, want), site
    truth = plain.forward(model.batch)
    plain.bind(quants, ranges)
    fake, integers = plain.forward(model.batch), real(IntegerModel(model.spec, constants, quants, QTX).run(model.batch))
    rows = model.batch.get("mask", np.ones(truth.shape[:-1], bool))
    lost, moved = (np.square((a - b)[rows]).mean() for a, b in ((fake, truth), (integers, fake)))
    assert moved < 0.9 * lost


def test_one_outlier_channel_leaves_the_others_their_steps():
    """A bias of 60 in one channel of a residual sum: what the others lose in w8a8, in groups, and beside a wide one."""
    model = small_models.build("bert_plain")
    site, params, error = "layer.0.ffn.residual", {name: x.copy() for name, x in model.params.items()}, {}
    params["layer.0.ffn.output.bias"][3] = 60
    plain = Model(model.spec, params)
    truth = plain.record(model.batch, [site])[site][0]
    others = np.arange(truth.shape[-1]) != 3
    for name in ("w16a8", "w16a8-peg8p", "w16a8-out1", "w16a16"):
        quants = resolve_integers(recipe(name, model.spec), model.spec)
        constants, seen = lower(model.spec, params, quants, plain.calibrate([model.batch], quants)), {}
        IntegerModel(model.spec, constants, quants, QTX).run(model.batch, seen.__setitem__)
        scale, zero = constants[f"{site}.scale"], constants[f"{site}.zero_point"]
        lost = scale * (seen[site] - zero) - truth
        error[name] = np.square(lost[..., others][model.batch["mask"]]).mean()
    assert error["w16a16"] < error["w16a8-peg8p"] < error["w16a8"] / 5
    assert error["w16a8-out1"] < error["w16a8"] / 5


@pytest.mark.parametrize(
    ("site", "quant", "reason"),
    [
        ("layer.0.ffn.hidden", WIDE, "has a table or polynomial of narrow codes"),
        ("layer.0.attn.query", WIDE, "takes codes of one width"),
        ("layer.0.ffn.output.weight", QuantSpec(granularity=Granularity.GROUP, groups=4), "each a scale of its own"),
        ("layer.0.attn.probs", QuantSpec(granularity=Granularity.CHANNEL), "its last axis is the keys"),
        ("layer.0.attn.norm", QuantSpec(granularity=Granularity.BLOCK, block=4, dynamic=True), "scale per block"),
    ],
)
def test_what_has_no_integers_is_refused_with_its_site(site, quant, reason):
    low = integer_models.small("bert_plain")
    quants = {**low.quants, site: quant}
    static = {name: one for name, one in quants.items() if not one.dynamic and not name.endswith("probs")}
    ranges = {**low.ranges, **Model(low.spec, low.params).calibrate([low.batch], static)}
    with pytest.raises(SpecError, match=f"site {site.removesuffix('hidden')}.* cannot run in integers: .*{reason}"):
        lower(low.spec, low.params, quants, ranges)


def test_products_in_saturating_pairs_refuse_groups():
    with pytest.raises(SpecError, match="saturates in pairs"):
        integer_models.small("bert_plain", "w8a8-peg4p", "onnxruntime-avx2")
    assert profile("onnxruntime-avx2").matmul.products != QTX.matmul.products


def test_a_multiplier_that_is_off_is_caught():
    """A group's multiplier that is a thousandth off moves codes of what reads it."""
    low = integer_models.small("bert_plain", "w8a8-peg4p")
    want = integer_models.record_run(low.model(IntegerModel), low.batch)
    for name in ("layer.0.attn.query", "layer.0.attn.norm", "layer.0.attn.scores"):
        constants = dict(low.constants)
        multiplier = constants[f"{name}.channel_multiplier"]
        constants[f"{name}.channel_multiplier"] = multiplier - multiplier // 1000 * (multiplier == multiplier.max())
        got = integer_models.record_run(replace(low, constants=constants).model(IntegerModel), low.batch)
        assert any(not verdict.ok for verdict in integer_models.same(got, want)), name


SPECS = {
    "neighbours": QuantSpec(granularity=Granularity.GROUP, groups=4),
    "permuted": QuantSpec(granularity=Granularity.GROUP, groups=2, permute=True, signed=True),
    "small groups": QuantSpec(granularity=Granularity.GROUP, groups=16),
    "wide": QuantSpec(granularity=Granularity.GROUP, wide=3),
    "16 bits": QuantSpec(16, symmetric=True, granularity=Granularity.GROUP, groups=2, permute=True),
    "channels": QuantSpec(granularity=Granularity.CHANNEL),
}


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("weights", [QuantSpec(symmetric=True), QuantSpec(granularity=Granularity.CHANNEL)])
def test_groups_taken_apart_are_the_same_sum(kind, weights):
    """Each group's own product, added by multipliers, as compiled models have it: the reference's accumulators."""
    rng, spec = stream(0, "apart", kind), SPECS[kind]
    low = -rng.exponential(size=(1, 64)).astype(F32)
    high = rng.exponential(size=(1, 64)).astype(F32) * np.where(rng.random(64) < 0.1, 50, 1).astype(F32)
    scale, zero = affine.scale_zero(low, high, spec)
    unit, ends = scale.ravel().astype(np.float64), [np.ravel(end) for end in affine.code_limits(zero, spec)]
    ends = [np.broadcast_to(end, 64) for end in ends]
    x = rng.integers(ends[0], ends[1] + 1, (5, 7, 64)).astype(code_dtype(spec))
    x[0, 0], x[0, 1] = ends
    w = rng.integers(weights.code_min, weights.code_max + 1, (64, 24)).astype(code_dtype(weights))
    w_zero = rng.integers(0, 256, 24).astype(I32) if not weights.symmetric else np.zeros((), I32)
    m, shift, bias = channel_multiplier(unit), I64(30), rng.integers(-999, 999, 24).astype(I32)
    factors = x - zero.astype(I32).ravel(), w.astype(I32) - w_zero
    want = groups.product(*factors, m, shift, QTX.add, groups.bits_below(spec), groups.bits_below(weights)) + bias
    given = (w, weights, spec, w_zero, zero.ravel(), m, shift, bias)
    ready = torch_groups.prepare(*tensors(given))
    assert bool(ready.parts) == (kind not in ("small groups", "channels"))
    got = torch_groups.multiply(torch.from_numpy(x), ready)
    assert got.dtype == torch.int32
    assert np.array_equal(got.numpy(), want)


def test_channels_of_16_bits_by_weights_of_16_bits_are_exact():
    """Products of 2^55, which float64 does not hold, in Python's integers."""
    rng, spec, weights = stream(0, "channels"), QuantSpec(16, granularity=Granularity.CHANNEL), QuantSpec(16, True)
    x, zero = (rng.integers(spec.code_min, spec.code_max + 1, shape).astype(I32) for shape in ((5, 24), 24))
    w, m = rng.integers(-32767, 32768, (24, 4)).astype(I32), rng.integers(2**23, 2**24, 24).astype(I32)
    want = ((x - zero).astype(object) * m) @ w.astype(object)
    ready = torch_groups.prepare(*tensors((w, weights, spec, None, zero, m, I64(0), np.zeros(4, I64))))
    assert torch_groups.multiply(torch.from_numpy(x), ready).tolist() == want.tolist()


@pytest.mark.parametrize("kind", ["bert_gate_linear", "opt_post_norm_projected", "vit_gate_mlp"])
@pytest.mark.parametrize("name", ["w8a8-peg4p", "w8a8-out3", "w4a8-channel-peg8", "channels along sums"])
def test_what_compiled_models_are_traced_from_gives_the_same_codes(kind, name):
    """With groups of three channels and more taken apart; the graphs themselves: `parity_tests.long.compiled`."""
    low = integer_models.small(kind, name)
    model = low.model(TorchModel)
    with torch.no_grad(), mock.patch.object(torch_groups, "SMALLEST", 3):
        proof = proving.Proof(low.spec, model.constants, model.quants, model.profile)
        model.net(proof, execution.smallest_batch(low.spec, model.device))
        nx = proving.Ready(model.constants, proof.prepared, model.quants, model.profile)
        out = model.read_output(model.net(nx, model.accept(low.batch)))
    want = low.model(IntegerModel).run(low.batch)
    assert np.array_equal(out.value, want.value) and out.value.dtype == want.value.dtype
    ready = [one for one in proof.prepared.values() if isinstance(one, torch_groups.Grouped)]
    assert any(one.parts for one in ready) == (name != "channels along sums")


def test_a_sum_that_could_leave_its_accumulator_is_not_compiled():
    low = integer_models.small("bert_plain", "w8a8-peg4p")
    for site in ("layer.0.attn.query", "layer.0.attn.scores"):
        shift = low.constants[f"{site}.channel_shift"]
        changed = replace(low, constants={**low.constants, f"{site}.channel_shift": shift - 3}).model(TorchModel)
        proof = proving.Proof(low.spec, changed.constants, changed.quants, changed.profile)
        with pytest.raises(SpecError, match=f"{site} cannot be compiled: its sum over groups may reach"):
            changed.net(proof, execution.smallest_batch(low.spec, changed.device))


def test_channels_that_are_not_in_groups_are_not_compiled():
    """Their sums would be those of each group's first channel."""
    spec = QuantSpec(granularity=Granularity.GROUP, groups=2)
    zero, m = torch.full((64,), 7, dtype=torch.int32), torch.full((64,), 2**24, dtype=torch.int32)
    w, weights, shift = torch.ones(64, 3, dtype=torch.int8), QuantSpec(symmetric=True), torch.tensor(20)
    torch_groups.prepare(w, weights, spec, None, zero, m, shift)
    for given in ((zero + (torch.arange(64) == 40), m), (zero, m - (torch.arange(64) == 40).int())):
        with pytest.raises(ValueError, match="channels of a group differ in multiplier or zero point"):
            torch_groups.prepare(w, weights, spec, None, *given, shift)
