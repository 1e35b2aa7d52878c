"""torch against the reference on small models, fast: the whole table of cases is `qtx parity`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

import qtx_ref.backend as reference
from parity_tests.mirror.quant import REACH
from qtx_ref.models.initial import init_params, shapes
from qtx_ref.presets import PRESETS, attention
from qtx_ref.quant import affine as reference_affine
from qtx_ref.random import keep_mask as reference_keep_mask
from qtx_ref.spec import (
    Family,
    Granularity,
    ModelSpec,
    ObserverKind,
    ObserverSpec,
    OptimSpec,
    QuantSpec,
    SpecError,
)
from qtx_torch import backend
from qtx_torch.attention import make_mask
from qtx_torch.numerics import Float, Record
from qtx_torch.quant import affine
from qtx_torch.random import keep_mask
from qtx_torch.sites import swap_hooks

MODELS = ("bert-tiny", "opt-tiny", "vit-tiny")
VARIANTS = ("vanilla", "clipped", "clipped_row", "softmax1", "sink+all_features", "gated", "mlp", "elementwise+clipped")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a thousand elements gain nothing from a second thread, and lose much where it has to share its
    core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(name: str, variant: str = "vanilla", **changes) -> ModelSpec:
    text = {} if name == "vit-tiny" else {"vocab": 96}
    shape = {"layers": 2, "width": 32, "heads": 2, "hidden": 48} | text | changes
    return replace(PRESETS[name], attention=attention(variant), **shape)


def parameters(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Larger than the first values, so that attention is far from uniform."""
    return {name: value * 8 if value.ndim > 1 else value + 0.05 for name, value in init_params(spec, 1).items()}


def pair(spec: ModelSpec, dtype: str = "float32") -> tuple[reference.Model, backend.Model]:
    params = parameters(spec)
    return reference.Model(spec, params, dtype=dtype), backend.Model(spec, params, dtype=dtype)


def batch_of(spec: ModelSpec, seed: int = 0, padded: bool = True) -> dict[str, np.ndarray]:
    """Two sequences; padded: one ends early, the other begins late, so that a causal model has queries without keys."""
    rng = np.random.default_rng(seed)
    if spec.family is Family.VIT:
        images = rng.normal(size=(2, spec.channels, spec.image_size, spec.image_size)).astype(np.float32)
        return {"images": images, "labels": rng.integers(0, spec.classes, 2)}
    tokens, mask = rng.integers(5, spec.vocab, (2, 24)), np.ones((2, 24), bool)
    if padded:
        mask[0, 19:], mask[1, :3] = False, False
    batch = {"tokens": tokens, "mask": mask, "targets": np.where(mask, np.roll(tokens, -1, axis=1), -1)}
    return batch | ({"types": tokens % 2} if spec.family is Family.BERT else {})


def quantizers(model: reference.Model, batch: dict[str, np.ndarray]) -> dict[str, QuantSpec]:
    """Every result, every matmul operand and weight: static, with one dynamic granularity each among the operands."""
    got = {site: QuantSpec() for site in model.record(batch)}
    for i in range(model.spec.layers):
        attn = f"layer.{i}.attn"
        got[f"{attn}.query.input"] = QuantSpec(symmetric=True, dynamic=True, granularity=Granularity.TOKEN)
        got[f"{attn}.scores.lhs"] = QuantSpec(symmetric=True, dynamic=True, granularity=Granularity.TOKEN)
        got[f"{attn}.context.rhs"] = QuantSpec(symmetric=True, dynamic=True, granularity=Granularity.CHANNEL)
        got[f"{attn}.value.weight"] = QuantSpec(symmetric=True, granularity=Granularity.CHANNEL)
    got["layer.0.ffn.output"] = QuantSpec(observer=ObserverSpec(ObserverKind.RUNNING_PERCENTILE, percentile=99))
    got["layer.1.ffn.output"] = QuantSpec(observer=ObserverSpec(ObserverKind.MSE_GOLDEN))
    return got


def close(name: str, ours: np.ndarray, theirs: np.ndarray, bound: float) -> None:
    """Root mean square of the difference, relative to the reference's own."""
    error = np.sqrt(np.mean((ours - theirs) ** 2.0)) / max(np.sqrt(np.mean(theirs**2.0)), 1e-30)
    assert error <= bound, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_forward_loss_and_every_gradient(name: str, variant: str) -> None:
    # In float64 both sides round some hundred times at 1e-16; a wrong formula cannot hide at 1e-11. The key bias of a
    # softmax without sink shifts every score of a row alike: its gradient is 0 by theory and rounding by practice.
    spec = small(name, variant, dropout=0.1, attention_dropout=0.1)
    ref, our = pair(spec, "float64")
    batch = batch_of(spec)
    assert {key: value.shape for key, value in our.params().items()} == shapes(spec)
    close("logits", our.forward(batch), ref.forward(batch), 1e-12)
    expected, theirs = ref.gradients(batch, training=True, seed=7, step=3)
    loss, ours = our.gradients(batch, training=True, seed=7, step=3)
    assert loss == pytest.approx(expected, rel=1e-13)
    for key, value in theirs.items():
        if np.abs(value).max() > 1e-12:
            close(key, ours[key], value, 1e-11)
        else:
            assert np.abs(ours[key]).max() < 1e-12, key
    assert our.evaluate(batch) == pytest.approx(ref.evaluate(batch), rel=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_float32_stays_at_rounding(name: str) -> None:
    # 2^-24 per operation, some tens of them one after the other in two layers
    spec = small(name, "clipped+gated")
    ref, our = pair(spec)
    batch = batch_of(spec)
    close("logits", our.forward(batch), ref.forward(batch), 2e-6)
    assert our.gradients(batch)[0] == pytest.approx(ref.gradients(batch)[0], rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_fused_kernel_and_decomposition_agree(name: str, padded: bool) -> None:
    spec = small(name)
    model, batch = backend.Model(spec, parameters(spec)), batch_of(spec, padded=padded)
    plain = model.forward(batch)
    assert np.isfinite(plain).all()
    assert all(np.isfinite(grad).all() for grad in model.gradients(batch)[1].values())
    probs = "layer.0.attn.probs"
    with (
        torch.no_grad(),
        swap_hooks(model.net, {f"layer.{i}.attn.probs": Record(probs, print_nothing) for i in (0, 1)}),
    ):
        seen = model.forward(batch)
    close("logits", seen, plain, 2e-6)


def print_nothing(site: str, value: torch.Tensor, where: torch.Tensor | None) -> None:
    return None


def test_a_query_without_keys_gets_zeros_from_every_path() -> None:
    rows = torch.tensor([[False, False, True, True]])
    q, k, v = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).requires_grad_().unbind(0)
    spec = small("opt-tiny")
    attn = backend.Model(spec, parameters(spec)).net.layer[0].attn
    mask = make_mask(rows, 4, 4, causal=True, like=q)
    for kind in ("vanilla", "clipped", "clipped_row", "softmax1"):
        context = Float().attention(attn, q, k, v, mask, attention(kind).with_length(4), 0.0)
        assert (context[:, :2] == 0).all() and torch.isfinite(context).all(), kind
        (grad,) = torch.autograd.grad(context.square().sum(), q)
        assert (grad[:, :, :2] == 0).all() and torch.isfinite(grad).all(), kind


@pytest.mark.parametrize("name", MODELS)
def test_calibration_and_fake_quantization(name: str) -> None:
    spec = small(name, "clipped+gated", layers=2)
    ref, our = pair(spec)
    batches = [batch_of(spec, seed) for seed in (1, 2)]
    quants = quantizers(ref, batches[0])
    theirs, ours = ref.calibrate(batches, quants), our.calibrate(batches, quants)
    assert theirs.keys() == ours.keys()
    for site, known in theirs.items():
        got = ours[site]
        assert got.scale.dtype == np.float32 and got.zero_point.dtype == np.int32
        assert got.scale.shape == known.scale.shape
        # the observers were fed float tensors that differ by rounding, relative to their largest entry
        np.testing.assert_allclose(got.scale, known.scale, rtol=2e-5, err_msg=site)
        assert np.abs(got.zero_point - known.zero_point).max() <= 1, site
    ref.bind(quants, theirs, masked_scores=True)
    our.bind(quants, theirs, masked_scores=True)
    expected, got = ref.gradients(batches[0]), our.gradients(batches[0])
    assert got[0] == pytest.approx(expected[0], rel=0.05)  # free-running: codes flip near ties and compound
    our.bind({}, {})
    np.testing.assert_array_equal(our.forward(batches[0]), backend.Model(spec, parameters(spec)).forward(batches[0]))


@pytest.mark.parametrize("bits", [2, 8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("reach", REACH)
def test_the_same_tensor_gives_the_same_codes(bits: int, symmetric: bool, reach: str) -> None:
    spec = QuantSpec(bits=bits, symmetric=symmetric, dynamic=True, **REACH[reach])
    x = (np.random.default_rng(bits).standard_t(3, (3, 7, 16)) * 0.3).astype(np.float32)
    x[0, 0, :6] = np.float32([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])  # ties where the scale is a power of two
    where = np.arange(7)[None, :, None] < np.array([7, 5, 2])[:, None, None]
    low, high = reference_affine.ranges(x, spec, False, where)
    tx, twhere = torch.tensor(x), torch.tensor(where)
    tlow, thigh = affine.ranges(tx, spec, False, twhere)
    np.testing.assert_array_equal(tlow, low)
    np.testing.assert_array_equal(thigh, high)
    scale, zero = reference_affine.scale_zero(low, high, spec)
    tscale, tzero = affine.scale_zero(tlow, thigh, spec)
    np.testing.assert_array_equal(tscale, scale)
    np.testing.assert_array_equal(tzero, zero)
    np.testing.assert_array_equal(
        affine.quantize(tx, tscale, tzero, spec), reference_affine.quantize(x, scale, zero, spec)
    )
    for factor in (1, 3):  # the second goes beyond the range, so that codes saturate
        value, inside = reference_affine.fake_quantize(x * np.float32(factor), scale, zero, spec)
        tvalue, tinside = affine.fake_quantize(tx * factor, tscale, tzero, spec)
        np.testing.assert_array_equal(tvalue.numpy().view(np.int32), value.view(np.int32))
        np.testing.assert_array_equal(tinside, inside)


def test_learned_ranges() -> None:
    spec = small("opt-tiny")
    ref, our = pair(spec)
    batch = batch_of(spec)
    quants = {
        "final.norm": QuantSpec(bits=4, learned=True),
        "head.decoder.weight": QuantSpec(bits=4, learned=True, symmetric=True),
    }
    ranges = ref.calibrate([batch], quants)
    for model in (ref, our):
        model.bind(quants, ranges)
    (_, theirs), (_, ours) = ref.gradients(batch), our.gradients(batch)
    assert theirs.keys() == ours.keys() == our.trainable().keys()
    for key in ("final.norm.scale", "final.norm.zero_point", "head.decoder.weight.scale"):
        close(key, ours[key], theirs[key], 1e-3)  # the slope round(v) - v cancels to a few digits
    optim = OptimSpec(lr=1e-2, steps=5)
    for trainer in (reference.Trainer(ref, optim), backend.Trainer(our, optim)):
        for _ in range(3):
            trainer.step(batch)
    for site, known in ref.ranges().items():
        np.testing.assert_allclose(our.ranges()[site].scale, known.scale, rtol=1e-3)


def test_generation_with_and_without_cache() -> None:
    spec = small("opt-tiny", "clipped+gated")
    ref, our = pair(spec)
    prompt = batch_of(spec)["tokens"][:, :4]
    tokens = our.generate(prompt, 12, lambda logits: logits.argmax(axis=-1))
    np.testing.assert_array_equal(tokens, ref.generate(prompt, 12, lambda logits: logits.argmax(axis=-1)))
    whole = prompt
    for _ in range(12):
        logits = our.forward({"tokens": whole, "mask": np.ones(whole.shape, bool)})
        whole = np.concatenate([whole, logits[:, -1].argmax(axis=-1)[:, None]], axis=1)
    np.testing.assert_array_equal(tokens, whole)


def test_dropout_masks_are_the_references() -> None:
    for seed, step, shape in ((0, 0, (5,)), (2**40 + 3, 17, (3, 5, 7)), (1, 2**31, (2, 4, 9, 9))):
        ours = keep_mask(seed, step, "layer.0.attn.probs", shape, 0.3)
        np.testing.assert_array_equal(ours, reference_keep_mask(seed, step, "layer.0.attn.probs", shape, 0.3))
        part = keep_mask(seed, step, "layer.0.attn.probs", shape[1:], 0.3, first=math.prod(shape[1:]))
        if len(shape) > 1:  # row 1 alone
            np.testing.assert_array_equal(part, ours[1])


@pytest.mark.parametrize("name", MODELS)
def test_record_and_statistics(name: str) -> None:
    spec = small(name, "mlp")
    ref, our = pair(spec)
    batch = batch_of(spec)
    theirs, ours = ref.record(batch), our.record(batch)
    assert list(theirs) == list(ours)  # the same sites in the order of the forward pass
    for site, (value, where) in theirs.items():
        assert ours[site][0].shape == value.shape, site
        assert (where is None) == (ours[site][1] is None), site
        if where is not None:
            np.testing.assert_array_equal(ours[site][1], where, err_msg=site)
    units = {"layer.0.ffn.output": "token", "layer.1.attn.output": "sequence"}
    names = ("inf_norm", "kurtosis", "kurtosis_published", "moments", "lowest", "highest", "energy")
    got = our.statistics(batch, units, names)
    for site, known in ref.statistics(batch, units, names).items():
        for key, value in known.items():
            scale = np.abs(value).max(axis=0)  # moments that cancel are small beside others
            np.testing.assert_allclose(got[site][key] / scale, value / scale, atol=1e-4, err_msg=f"{site} {key}")
    length = spec.length if spec.family is Family.VIT else 24
    marks = {"first": np.arange(length)[None, :].repeat(2, axis=0) == 0}
    streams = [
        "embed.norm" if spec.family is Family.BERT else "embed.sum",
        *(f"layer.{i}.ffn.{'residual' if spec.pre_norm else 'norm'}" for i in range(spec.layers - 1)),
    ]
    for ours, theirs in zip(*(m.attention(batch, marks, streams) for m in (our, ref)), strict=True):
        for key, value in theirs.items():
            np.testing.assert_allclose(ours[key], value, rtol=1e-4, err_msg=key)


def test_resume_is_exact_and_a_checkpoint_moves_between_backends() -> None:
    spec = small("bert-tiny", "clipped", dropout=0.1)
    optim = OptimSpec(steps=8, warmup=2)
    batches = [batch_of(spec, seed) for seed in range(6)]
    straight = backend.Trainer(backend.Model(spec, parameters(spec)), optim, seed=3)
    losses = [straight.step(batch) for batch in batches]
    first = backend.Trainer(backend.Model(spec, parameters(spec)), optim, seed=3)
    for batch in batches[:3]:
        first.step(batch)
    for module, exact in ((backend, True), (reference, False)):
        resumed = module.Trainer(module.Model(spec, first.model.params()), optim, seed=3)
        resumed.load_state(first.state())
        again = [resumed.step(batch) for batch in batches[3:]]
        if exact:
            assert again == losses[3:]
            for known, got in (
                (straight.model.params(), resumed.model.params()),
                (straight.state(), resumed.state()),
            ):
                assert all(np.array_equal(value, got[key]) for key, value in known.items())
        else:
            np.testing.assert_allclose(again, losses[3:], rtol=1e-4)  # three steps of float32 noise through AdamW
            assert resumed.state().keys() == straight.state().keys()


def test_bfloat16_keeps_float32_parameters_and_trains() -> None:
    spec = small("bert-tiny", "clipped+gated")
    params, batch = parameters(spec), batch_of(spec)
    model, full = backend.Model(spec, params, dtype="bfloat16"), backend.Model(spec, params)
    close("logits", model.forward(batch), full.forward(batch), 0.05)  # 8 bits of mantissa
    trainer = backend.Trainer(model, OptimSpec(steps=20, lr=3e-3))
    losses = [trainer.step(batch)[0] for _ in range(8)]
    assert losses[-1] < losses[0]
    assert all(value.dtype == np.float32 for value in model.params().values())


def test_refusals_name_the_value() -> None:
    spec = small("opt-tiny")
    params = parameters(spec)
    with pytest.raises(SpecError, match="'tpu'"):
        backend.Model(spec, params, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(SpecError, match="'cuda' but torch finds no CUDA device; use --device cpu"):
            backend.Model(spec, params, device="cuda")
    with pytest.raises(SpecError, match="'int8'"):
        backend.Model(spec, params, dtype="int8")
    model = backend.Model(spec, params)
    with pytest.raises(SpecError, match="layer.9.attn.query"):
        model.bind({"layer.9.attn.query": QuantSpec(dynamic=True)}, {})
    with pytest.raises(SpecError, match="final.norm has a static quantizer but no range"):
        model.bind({"final.norm": QuantSpec()}, {})
    batch = batch_of(spec)
    batch["mask"] = np.where(batch["mask"], 0.0, -5.0)
    with pytest.raises(ValueError, match="-5.0"):
        model.forward(batch)
