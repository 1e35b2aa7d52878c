"""`qtx analyze` against SciPy and brute force on recorded tensors; streaming against one pass; both backends."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

import qtx_ref.backend
import qtx_torch.backend
from parity_tests.subjects import small_models
from parity_tests.tests.shell import good
from qtx.data import load
from qtx.data.tokenizing import read_vocabulary
from qtx.files.checkpoint import Checkpoint, save_checkpoint
from qtx.measure import analysis
from qtx.measure.heads import HeadStatistics, HeadSums
from qtx.measure.marks import Kinds, find_background, is_punctuation, read_word
from qtx.recipes.sites import layer_inputs, residual_stream, sites
from qtx_ref.models.initial import init_params
from qtx_ref.presets import preset
from qtx_ref.spec import Gate, Softmax

MODELS = ("bert_plain", "opt_clipped", "vit_gate_elementwise", "bert_classify")
BACKENDS = {"ref": qtx_ref.backend.Model, "torch": qtx_torch.backend.Model}
TIGHT = {"rtol": 1e-10, "atol": 1e-13}  # float64 sums in another order; the small ones cancel
TOKENIZER = json.dumps(
    {
        "model": {"vocab": {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, ".": 3, "word": 4, "##!": 5}},
        "added_tokens": [{"id": 6, "content": "[MASK]"}],
    }
)
SPECIALS = SimpleNamespace(pad=0, cls=1, sep=2, mask=6, ids=(0, 1, 2, 6))


def opened(name, backend, size=5, dtype="float32"):
    small = small_models.build(name, size)
    params = {key: value.copy() for key, value in small.params.items()}
    if "tokens" in small.batch:  # one element of one token, as trained models have
        params["embed.token.weight"][small.batch["tokens"][0, 1], 3] += 60
    else:
        params["embed.position.weight"][2, 3] += 60
    return BACKENDS[backend](small.spec, params, dtype=dtype), small.batch


def elements(value, where, i):
    """What counts of one sequence, (places, channels) float64, by the masks alone."""
    value = value.astype(np.float64)
    keep = np.ones(value.shape, bool) if where is None else np.broadcast_to(where, value.shape)
    if value.ndim == 4:  # its heads are its channels
        return np.stack([head[kept] for head, kept in zip(value[i], keep[i], strict=True)], axis=1)
    return value[i][keep[i]].reshape(-1, value.shape[-1])


def batch_rows(batch):
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(next(iter(batch.values()))))]


def summed(model, batches):
    units = dict.fromkeys(sites(model.spec).results, "sequence")
    sums = {site: analysis.SiteSums() for site in units}
    for batch in batches:
        for site, got in model.statistics(batch, units).items():
            sums[site].add(got)
    return sums


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_statistics_of_every_site_are_those_of_the_recorded_tensors(name, backend):
    model, batch = opened(name, backend)
    sums, some = summed(model, [batch]), 0
    for site, (value, where) in model.record(batch).items():
        parts = (
            [elements(value, where, i) for i in range(len(value))] if value.ndim > 1 else [value[None].astype(float)]
        )
        parts = [part for part in parts if part.size]
        flat, whole = np.concatenate([part.ravel() for part in parts]), np.concatenate(parts)
        found, close = sums[site].result(site), lambda got, want: np.testing.assert_allclose(got, want, **TIGHT)
        constant = [np.ptp(part) == 0 for part in parts]
        norms = [
            0.0 if flat_ else scipy_stats.kurtosis(p, axis=None, fisher=False)
            for p, flat_ in zip(parts, constant, strict=True)
        ]
        unbiased = [np.var(p, ddof=1) if p.size > 1 else 0.0 for p in parts]
        assert found.elements == flat.size
        assert (found.lowest, found.highest) == (flat.min(), flat.max())
        assert found.inf_norm_max == np.abs(flat).max()
        close(found.inf_norm, np.mean([np.abs(p).max() for p in parts]))
        close(found.rms, np.sqrt(np.mean(flat**2)))
        close(found.kurtosis, np.mean(norms))
        close(
            found.kurtosis_published,
            np.mean([np.mean((p - p.mean()) ** 4) / (v**2 + 1e-6) for p, v in zip(parts, unbiased, strict=True)]),
        )
        if np.ptp(flat):
            close(found.kurtosis_pooled, scipy_stats.kurtosis(flat, fisher=False))
        energy = np.sort((whole**2).sum(axis=0))[::-1]
        for share, got in ((0.01, found.top_energy), (0.001, found.top_energy_tenth)):
            close(got, energy[: max(1, round(share * len(energy)))].sum() / max(energy.sum(), 1e-300))
        far = np.concatenate([np.abs(p - p.mean()) > 6 * p.std() for p in parts])
        assert found.beyond_6_sigma == far.sum()
        assert found.beyond_channels == tuple(np.flatnonzero(far.any(axis=0)))
        close(sums[site].token_share, far.mean(axis=0))
        some += far.sum()
        for q, got in found.percentiles.items():
            want = np.percentile(np.abs(flat), float(q), method="inverted_cdf")
            assert abs(got - want) <= analysis.PERCENTILE_BOUND * want
    assert some  # there was something to count


@pytest.mark.parametrize("backend", BACKENDS)
def test_streaming_is_one_pass_over_all_and_keeps_its_size(backend):
    model, batch = opened("bert_plain", backend, dtype="float64")  # a float32 product depends on the size of the batch
    once, streamed = summed(model, [batch]), summed(model, batch_rows(batch))

    def size(sums):
        return sum(np.asarray(value).nbytes for value in vars(sums).values() if not isinstance(value, dict))

    for site, sums in once.items():
        if site == "embed.position":  # made once a batch, whatever its size
            continue
        one, many = sums.result(site), streamed[site].result(site)
        for key, value in vars(one).items():
            if isinstance(value, float):
                np.testing.assert_allclose(getattr(many, key), value, **TIGHT, err_msg=f"{site} {key}")
            else:
                assert getattr(many, key) == value, (site, key)
        assert size(sums) == size(streamed[site])
    longer = summed(model, batch_rows(batch) * 4)
    assert all(size(longer[site]) == size(streamed[site]) for site in longer)


def test_pooled_moments_are_those_of_all_numbers_and_a_fault_shows():
    rng = np.random.default_rng(0)
    parts = [rng.standard_t(3, size=n) * s + m for n, s, m in ((5, 1, 0), (300, 7, 40), (1, 1, -3), (64, 1e-3, 1e3))]

    def moments(x):
        return np.array([x.size, x.mean(), *(((x - x.mean()) ** k).sum() for k in (2, 3, 4))])

    got, want = analysis.pool_moments(np.stack([moments(x) for x in parts])), moments(np.concatenate(parts))
    np.testing.assert_allclose(got, want, rtol=1e-12)  # float64 sums in another order
    pairwise = analysis.pool_moments(
        np.stack([analysis.pool_moments(np.stack([moments(x) for x in half])) for half in (parts[:2], parts[2:])])
    )
    np.testing.assert_allclose(pairwise, want, rtol=1e-12)  # the same
    moved = np.stack([moments(x) * [1, 0, 1, 1, 1] for x in parts])  # the means forgotten
    assert abs(analysis.pool_moments(moved)[4] / want[4] - 1) > 0.1


@given(
    st.lists(st.floats(2.0**-100, 2.0**100, width=32), min_size=1, max_size=60), st.sampled_from(analysis.PERCENTILES)
)
def test_percentiles_stay_within_their_bound(values, q):
    x = np.array(values, np.float32)[None]
    histogram = qtx_ref.stats.describe(x, names=("histogram",))["histogram"]
    want = np.percentile(x.astype(np.float64), q, method="inverted_cdf")
    assert abs(analysis.percentile(histogram, q) - want) <= analysis.PERCENTILE_BOUND * want


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["bert_gate_linear", "opt_clipped", "vit_plain", "opt_post_norm_projected"])
def test_heads_are_those_of_the_recorded_tensors(name, backend):
    model, batch = opened(name, backend)
    spec, weights = model.spec, model.params()
    size = len(next(iter(batch.values())))
    marks = {"first": np.arange(spec.length)[None] == np.zeros((size, 1))}
    got = model.attention(batch, marks, layer_inputs(spec))
    gated = spec.attention.gate is not Gate.NONE
    names = ("probs", "output.input", "value", "context", *(["gate"] * gated))
    parts = [f"layer.{i}.attn.{part}" for i in range(spec.layers) for part in names]
    tensors = model.record(batch, [*layer_inputs(spec), *parts])  # all at once: a fused kernel rounds otherwise
    for layer, (part, stream) in enumerate(zip(got, layer_inputs(spec), strict=True)):
        names = (f"layer.{layer}.attn.probs", f"layer.{layer}.attn.output.input", stream)
        probs, where = tensors[names[0]]
        where = np.broadcast_to(where, (size, 1, *probs.shape[2:]))
        context, residual = (tensors[key][0].astype(np.float64) for key in names[1:])
        value, product = (tensors[f"layer.{layer}.attn.{key}"][0].astype(np.float64) for key in ("value", "context"))
        gate = tensors[f"layer.{layer}.attn.gate"][0].astype(np.float64) if gated else None  # (B, T, H): a linear gate
        weight = weights[f"layer.{layer}.attn.output.weight"].astype(np.float64)
        real = np.asarray(batch["mask"], bool) if "mask" in batch else np.ones(context.shape[:2], bool)
        for h in range(spec.heads):
            own = slice(h * spec.head_width, (h + 1) * spec.head_width)
            sizes, entropies, relative, mass = [], [], [], []
            for b, t in np.argwhere(real):
                update = weight[:, own] @ context[b, t, own]
                sizes.append(np.linalg.norm(update) / np.linalg.norm(residual[b, t]))
                row = probs[b, h, t, where[b, 0, t]].astype(np.float64)
                mass.append(row[0] if where[b, 0, t, 0] else 0)
                entropies.append(scipy_stats.entropy(row) if row.any() else 0)
                if len(row) > 1:
                    relative.append(entropies[-1] / np.log(len(row)))
            real_tokens = list(np.argwhere(real))
            for site, prefix in ((value, "value"), (product, "product")):
                norms = [np.linalg.norm(site[b, t, own]) for b, t in real_tokens]
                at_first = [norm for norm, (_, t) in zip(norms, real_tokens, strict=True) if t == 0]
                for key, want in (("all", norms), ("first", at_first)):
                    np.testing.assert_allclose(part[f"{prefix}.{key}"][h], np.sum(want), **TIGHT, err_msg=prefix)
                    assert part[f"{prefix}.count.{key}"][h] == len(want)
            if gate is not None:
                np.testing.assert_allclose(part["gate"][h], np.sum([gate[b, t, h] for b, t in real_tokens]), **TIGHT)
                assert part["gates"][h] == len(real_tokens)
            for key, want in (("update", sizes), ("entropy", entropies), ("relative", relative), ("mass.first", mass)):
                np.testing.assert_allclose(part[key][h], np.sum(want), **TIGHT, err_msg=key)
            assert (part["queries"][h], part["choices"][h], part["tokens"][h]) == (len(mass), len(relative), len(sizes))


def test_a_head_does_nothing_that_leaves_the_residual_as_it_is():
    """By its update alone; where its probability goes says by what means."""

    def head(update, marked=0.0, even=0.0, kept=1.0, gate=None):
        return HeadStatistics(0, 0, {}, marked, even, 0.0, 0.0, update, kept, gate)

    assert head(0.1, 0.6, 0.3).reason == "marked keys"
    assert head(0.1, 0.6, 0.3, gate=0.1).reason == "gate closed"
    assert head(0.1, 0.05, 0.01, kept=0.1).reason == "no probability"
    assert head(0.01, 0.59, 0.1).reason == head(0.01, 0.7, 0.36).reason == "small values"
    busy = (head(0.11, 0.9, 0.1), head(0.2, gate=0.05), head(0.2, kept=0.05))
    assert not any(one.idle or one.reason for one in busy)


def silence(params, spec, how):
    """Parameters under which every head does nothing, by the means that `how` names."""
    for i in range(spec.layers):
        if how == "gate closed":
            params[f"layer.{i}.attn.gate_logit.bias"][:] = -30
        if how == "small values":
            params[f"layer.{i}.attn.value.weight"][:] *= 1e-3
            params[f"layer.{i}.attn.value.bias"][:] = 0
    return params


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "how"),
    [("vit_plain", "no probability"), ("bert_gate_linear", "gate closed"), ("opt_plain", "small values")],
)
def test_a_silent_head_does_nothing_whatever_silences_it(name, how, backend):
    small = small_models.build(name)
    spec, params = small.spec, silence({key: x.copy() for key, x in small.params.items()}, small.spec, how)
    if how == "no probability":  # clip(1001 p - 1000, 0, 1) is 0 up to p = 0.999, and no query here has a single key
        spec = replace(spec, attention=replace(spec.attention, softmax=Softmax.CLIPPED, gamma=-1000.0))
    heads = HeadSums(spec)
    marks = {"last": np.arange(spec.length)[None] == np.full((3, 1), spec.length - 1)}
    heads.add(BACKENDS[backend](spec, params).attention(small.batch, marks, layer_inputs(spec)))
    assert [head.reason for head in heads.result()] == [how] * spec.layers * spec.heads


def test_kinds_of_tokens():
    kinds = Kinds(SPECIALS, TOKENIZER, causal=False)
    batch = {"tokens": np.array([[1, 4, 5, 6, 3, 2, 0], [4, 3, 7, 2, 0, 0, 0]]), "mask": np.arange(7) < [[6], [4]]}
    names = [[kinds.names[k] for k in row] for row in kinds.of(batch)]
    assert names[0][:6] == ["[CLS]", "other", "punctuation", "[MASK]", "punctuation", "[SEP]"]
    assert names[1][:4] == ["first", "punctuation", "other", "[SEP]"]  # 7 is not in the file
    marks = kinds.marks(batch)
    assert marks["punctuation"].sum() == 3 and marks["[CLS]"].sum() == 1 and marks["[SEP]"].sum() == 2
    causal = Kinds(SPECIALS, TOKENIZER, causal=True).marks(batch)
    assert np.argwhere(causal["first"]).tolist() == [[0, 0], [1, 0]] and "[CLS]" not in causal
    assert [kinds.word(i) for i in (3, 4, 7)] == [".", "word", "id 7"]
    assert read_vocabulary('{"model": {"vocab": [["<s>", 0.0], ["\u2581a", -1.5]]}}') == {0: "<s>", 1: "\u2581a"}
    assert read_word("\u2581a", False) == "a"
    assert read_word("\u0120\u00e2\u0122\u013e", True) == "\u201c"  # a space and three bytes of a quotation mark
    assert is_punctuation("\u201c") and not is_punctuation("a.") and not is_punctuation("")


def test_background_patches():
    image = np.zeros((1, 1, 4, 4))
    image[0, 0, :2, :2] = [[1, -1], [1, -1]]
    assert find_background(image, 2).tolist() == [[False, False, True, True, True]]


def test_the_residual_stream_and_its_inputs():
    specs = small_models.specs()
    post, pre = specs["bert_plain"], specs["opt_plain"]
    assert layer_inputs(post) == ("embed.norm", "layer.0.ffn.norm")
    assert layer_inputs(pre) == ("embed.sum", "layer.0.ffn.residual")
    assert set(residual_stream(post)) <= set(sites(post).results)
    assert residual_stream(pre)[-2:] == ("layer.1.attn.residual", "layer.1.ffn.residual")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An untrained model of each family, whose FFN has an outlier channel."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("bert-tiny", "opt-tiny", "vit-tiny"):
        spec = preset(name)
        params = init_params(spec, 0)
        params["layer.1.ffn.output.bias"][7] = 30
        data = load(None, spec)
        meta = {"data": data.describe()} | ({"tokenizer": data.tokenizer_json} if spec.vocab else {})
        save_checkpoint(folder / f"{name}.safetensors", Checkpoint(spec, params, meta=meta))
    return folder


@pytest.mark.parametrize("name", ["bert-tiny", "opt-tiny", "vit-tiny"])
def test_the_command_writes_tables_and_pictures(files, tmp_path, name):
    pytest.importorskip("matplotlib", reason="the extra report is not installed")
    done = good("analyze", files / f"{name}.safetensors", "--batches", 1, "--out", tmp_path, "--json", "-")
    result = json.loads(done.stdout)
    kept = json.loads((tmp_path / "analysis.json").read_text())
    assert (result.pop("format"), kept.pop("format"), len(kept.pop("sha256"))) == ("qtx-result", "qtx-analysis", 64)
    assert result == kept
    wanted = {"analysis.json", "depth.png", "channels.png", "histogram.png", "attention.png"}
    assert {path.name for path in tmp_path.iterdir()} == wanted | ({"patches.png"} if name == "vit-tiny" else set())
    assert result["channels"][0]["channel"] == 7
    assert max(result["growth"], key=lambda row: row["inf_norm"] * row["stream"])["site"].startswith("layer.")
    assert len(result["heads"]) == 16 and {
        "mass",
        "entropy",
        "update",
        "idle",
        "reason",
        "gate",
        "value",
        "product",
    } <= set(result["heads"][0])
    assert sum(kind["tokens"] for kind in result["kinds"]) == pytest.approx(1)
    assert sum(kind["outliers"] for kind in result["kinds"]) == pytest.approx(1)
    marks = {"bert-tiny": {"[CLS]", "[SEP]", "punctuation"}, "opt-tiny": {"first", "[SEP]", "punctuation"}}
    assert set(result["heads"][0]["mass"]) == marks.get(name, {"CLS", "background"})
    assert "channels that recur" in done.stderr and "does nothing" in done.stderr


def test_both_backends_say_the_same(files):
    results = []
    for backend in ("ref", "torch"):
        command = ("analyze", files / "vit-tiny.safetensors", "--batches", 2, "--backend", backend, "--json", "-")
        results.append(json.loads(good(*command).stdout))
    for ours, theirs in zip(results[0]["sites"], results[1]["sites"], strict=True):
        assert ours["site"] == theirs["site"]
        assert ours["inf_norm"] == pytest.approx(theirs["inf_norm"], rel=1e-4)  # two float32 forward passes
        assert ours["beyond_channels"] == theirs["beyond_channels"]


def test_masked_ranges_are_those_of_the_elements_that_count():
    """The fast way of torch's min-max against brute force, with NaN and infinity where nothing counts."""
    from qtx_torch.quant.affine import min_max

    rng = np.random.default_rng(1)
    for shape, mask in (((3, 5, 4), (3, 5, 1)), ((3, 2, 5, 5), (3, 1, 5, 5)), ((3, 2, 5, 4), (3, 1, 5, 1))):
        x, where = rng.normal(size=shape).astype(np.float32), rng.uniform(size=mask) < 0.5
        keep = np.broadcast_to(where, shape)
        x[~keep] = np.array([np.nan, np.inf, -np.inf], np.float32)[rng.integers(0, 3, (~keep).sum())]
        axes = tuple(range(len(shape)))
        for over in (axes, axes[:-1], axes[-1:]):
            low, high = (end.numpy() for end in min_max(torch.tensor(x), over, torch.tensor(where)))
            want_low = np.min(x, axis=over, keepdims=True, where=keep, initial=np.inf)
            want_high = np.max(x, axis=over, keepdims=True, where=keep, initial=-np.inf)
            empty = want_low > want_high
            np.testing.assert_array_equal(low, np.where(empty, 0, want_low))
            np.testing.assert_array_equal(high, np.where(empty, 0, want_high))
