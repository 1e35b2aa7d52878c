"""What the published code does, site by site and number by number: its lists of statistics, its simulator, its
figures."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import qtx_ref.backend
import qtx_torch.backend
from parity_tests.subjects import small_models
from qtx.jobs.study import Study
from qtx.measure.outliers import measure_outliers
from qtx.measure.published import list_published, make_column
from qtx.recipes.named import recipe
from qtx.recipes.sites import paper_sites
from qtx.runs.reading import make_run
from qtx_ref.presets import attention, preset
from qtx_ref.quant import observers, quantizer
from qtx_ref.spec import ObserverKind, ObserverSpec, QuantSpec
from qtx_torch.quant import observers as torch_observers
from qtx_torch.quant import quantizer as torch_quantizer

BACKENDS = {"ref": qtx_ref.backend.Model, "torch": qtx_torch.backend.Model}


def published_kurtosis(value, where, unit):
    """The mean over units of m4 / (s^4 + 1e-6) of one batch's tensor, by its definition."""
    rows = [x[keep[:, 0]] for x, keep in zip(value.astype(np.float64), where, strict=True)]
    rows = [row for x in rows for row in x] if unit == "token" else [x.ravel() for x in rows]
    return np.mean([np.mean((x - x.mean()) ** 4) / (np.var(x, ddof=1) ** 2 + 1e-6) for x in rows])


def published_list(spec):
    """The modules of `validate_clm.py` (ACT_KEYS) by the site of their output, with how it arrives there."""
    got = [("final.norm", "sequence")] if spec.final_norm else []
    last = "ffn.residual" if spec.pre_norm else "ffn.norm"  # what the module of a whole layer returns
    flat = "token" if spec.pre_norm else "sequence"
    parts = (
        (last, "sequence"),
        ("ffn.output", "token"),
        ("ffn.norm", flat),
        ("attn.output", "sequence"),
        ("attn.norm", "sequence"),
    )
    return got + [(f"layer.{i}.{part}", unit) for part, unit in parts for i in range(spec.layers)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["opt_plain", "opt_post_norm_projected"])
def test_average_kurtosis_is_over_the_published_list(name, backend):
    """Five modules of each layer: a post-norm layer's last norm counts as itself and as the layer."""
    small = small_models.build(name)
    model = BACKENDS[backend](small.spec, small.params, dtype="float64")
    tensors = model.record(small.batch)
    values = [published_kurtosis(*tensors[site], unit) for site, unit in published_list(small.spec)]
    got = measure_outliers(model, [small.batch])
    assert got.average_kurtosis == pytest.approx(np.mean(values), rel=1e-10)  # float64 sums in another order
    assert got.max_kurtosis == pytest.approx(max(values), rel=1e-10)


def test_the_published_list_by_family_and_norm_order():
    for name, per_layer, rest, twice in (("opt-125m", 5, 1, 0), ("opt-350m", 5, 0, 1), ("bert-base", 2, 0, 0)):
        spec = preset(name)
        listed = paper_sites(spec).kurtosis
        assert len(listed) == per_layer * spec.layers + rest
        assert sum(count == 2 for count in Counter(listed).values()) == twice * spec.layers
        assert set(listed) <= set(paper_sites(spec).inf_norm)


def test_published_figures_stand_beside_ours(tmp_path):
    """PUBLISHED.md's figures, by hand; a configuration that nobody published has none."""
    made = {
        "attention": "",
        "diverged": False,
        "float": {"perplexity": 5.0},
        "outliers": None,
        "trained": None,
        "recipes": {},
    }
    kinds = ("clipped:alpha=12.8", "vanilla", "gated")
    said = {"model.preset": "bert-base", "quant.recipes": ["paper-bert"]}
    study = Study(make_run(said, grids={"model.attention": kinds}), tmp_path / "s", resume=False)
    study.runs = {f"{kind}-seed0": made for kind in kinds}
    clipped, vanilla, gated = study.tabulate().splitlines()[2:5]
    assert "FP 4.5438, paper-bert 4.655, inf norm 47, kurtosis 72.19 [1]; FP 4.975 [2]" in clipped  # alpha / T = 0.025
    assert vanilla.rstrip("| ").endswith("FP 5.055 [2]") and gated.rstrip("| ").endswith("-")
    (figure,) = list_published("opt-125m", attention("gated:pi=0.25"))
    assert figure.text(("paper-opt",)) == "FP 15.5449, paper-opt 16.0132, inf norm 122.4, kurtosis 18.26"
    assert "16.0132" not in figure.text(("w8a8",))
    (trained,) = list_published("bert-base", attention("mlp:gate_hidden=16"), "train-w8a8")
    assert trained.text(()) == "as trained 5.301"
    assert list_published("bert-base", attention("mlp")) == list_published("bert-base", attention("mlp:gate_hidden=16"))
    assert list_published("paper-opt-125m", attention("gated:pi=0.25")) == [figure]
    assert not list_published("bert-tiny", attention("vanilla")) and not list_published("opt-125m", attention("gated"))


def test_another_shape_of_the_family_has_its_figures_with_a_name():
    """PUBLISHED.md's, by hand; of a model of vit nothing is published."""
    small = replace(preset("opt-tiny"), layers=1)
    models = [(replace(small, attention=attention(name)), None) for name in ("vanilla", "gated:pi=0.25", "softmax1")]
    cells, sources = make_column(None, models, ("w8a8",))
    assert cells[0] == "opt-125m: kurtosis 1778 [1]; opt-125m: FP 16, w8a8 63.4 [2]" and cells[2] == "-"
    assert cells[1] == "opt-125m: FP 15.5449, inf norm 122.4, kurtosis 18.26 [3]" and len(sources) == 3
    trained = (replace(preset("bert-tiny"), attention=attention("clipped:gamma=-0.025")), "train-w8a8")
    assert make_column(None, [trained], ())[0] == ["bert-base: as trained 4.994 [1]"]
    assert make_column(None, [(preset("vit-tiny"), None)], ()) == (["-"], [])


SIMULATED = {  # the published `SymmetricUniformQuantizer`, by hand: 8 bits, signed where a value is negative
    "mixed": ([-0.25, 0.5, 1.0], 1 / 127, -128, 127),
    "one negative": ([-0.001, 0.7, 1.2], 1.2 / 127, -128, 127),
    "none negative": ([0.0, 0.7, 1.2], 1.2 / 255, 0, 255),
    "far negative": ([-2.0, 0.7, 1.2], 2.0 / 127, -128, 127),
}


@pytest.mark.parametrize("backend", ["ref", "torch"])
@pytest.mark.parametrize("name", SIMULATED)
def test_a_weights_quantizer_is_the_simulators(name, backend):
    """The same scale and the same values, beyond the range too, although the codes here begin at 0."""
    values, step, first, last = SIMULATED[name]
    spec = recipe("paper-bert", preset("bert-base")).quant("layer.0.attn.norm.weight")
    x = np.array(values, np.float32)
    probes = np.concatenate([x, np.linspace(-3, 3, 999, dtype=np.float32)])
    if backend == "ref":
        scale, zero = quantizer.scale_zero(x.min(), x.max(), spec)
        got, _ = quantizer.fake_quantize(probes, scale, zero, spec)
    else:
        scale, zero = torch_quantizer.scale_zero(torch.tensor(x.min()), torch.tensor(x.max()), spec)
        got, _ = torch_quantizer.fake_quantize(torch.tensor(probes), scale, zero, spec)
        scale, got = scale.numpy(), got.numpy()
    want_scale = np.float32(np.abs(x).max()) / np.float32(last)
    assert scale == want_scale and want_scale == pytest.approx(step, rel=1e-7)
    np.testing.assert_array_equal(got, np.clip(np.rint(probes / want_scale), first, last) * want_scale)


@pytest.mark.parametrize("backend", ["ref", "torch"])
def test_running_ranges_are_the_published_codes_numbers(backend):
    """`(1 - momentum) * x + momentum * old`, a Python number times a float32 tensor of no axes, as torch computes
    it."""
    batches = np.random.default_rng(5).standard_t(2, size=(40, 6, 7)).astype(np.float32)
    momentum, low, high = 0.9, None, None
    for x in map(torch.tensor, batches):
        ends = x.min(), x.max()
        low = ends[0] if low is None else (1 - momentum) * ends[0] + momentum * low
        high = ends[1] if high is None else (1 - momentum) * ends[1] + momentum * high
    spec = QuantSpec(observer=ObserverSpec(ObserverKind.RUNNING, momentum))
    observer = (observers if backend == "ref" else torch_observers).Observer(spec)
    for x in batches:
        observer.update(x if backend == "ref" else torch.tensor(x))
    assert [float(np.ravel(end)[0]) for end in observer.range()] == [float(low), float(high)]


def test_what_differs_from_the_simulator_is_named_in_the_recipe():
    for family, shape in (("bert", "bert-base"), ("opt", "opt-125m")):
        sources = " ".join(rule.source for rule in recipe(f"paper-{family}", preset(shape)).rules)
        assert "padded positions enter ranges there" in sources
        assert ("float64 there" in sources) == (family == "opt")
