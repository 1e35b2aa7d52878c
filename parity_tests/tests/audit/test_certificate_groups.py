"""The products of an artifact whose scales vary along a sum: one per group, which together are the accumulators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from parity_tests.subjects import integer_models
from parity_tests.subjects.integer_models import make_recipe
from qtx.audit.certificate import certify
from qtx.audit.certificate_artifact import read_artifact_products, run_artifact
from qtx.files.artifact import Artifact, save_artifact
from qtx_ref.model import IntegerModel
from qtx_ref.spec import Nonlinear


@pytest.mark.parametrize("recipe", ["w8a8-peg4p", "w8a8-out3"])
def test_the_groups_of_a_product_add_up_to_its_accumulators(recipe: str, tmp_path: Path) -> None:
    low = integer_models.small("bert_gate_linear", recipe)
    chosen = make_recipe(recipe, low.spec)
    artifact = Artifact(low.spec, chosen, low.profile, Nonlinear.TABLE, dict(low.constants), {})
    shown: dict[str, list[np.ndarray]] = {}
    run_artifact(artifact, low.batch, lambda name, *operands: shown.setdefault(name, list(operands)))
    seen: dict[str, np.ndarray] = {}
    IntegerModel(low.spec, low.constants, low.quants, low.profile).run(low.batch, seen.__setitem__)
    lines = {one.name: one for one in read_artifact_products(artifact)}
    assert lines.keys() == shown.keys()
    for site in ("layer.0.attn.query", "layer.1.ffn.output", "layer.0.attn.gate_logit", "layer.1.attn.scores"):
        multiplier = low.constants.get(f"{site}.channel_multiplier")
        assert (multiplier is None) == (recipe == "w8a8-out3" and site.endswith("scores"))
        if multiplier is None:
            continue
        names = [name for name in shown if name.startswith(f"{site}[")]
        values = np.sort(np.unique(multiplier))  # products come in the order of multipliers
        assert len(names) == len(values) > 1
        total = np.int64(0)
        for name, value in zip(names, values, strict=True):
            a, za, b, zb = (x.astype(np.int64) for x in shown[name])
            assert lines[name].depth == a.shape[-1]
            total = total + value * ((a - za) @ (b - zb))
        shift = int(low.constants[f"{site}.channel_shift"])
        acc = (total + (1 << shift >> 1)) >> shift
        bias = low.constants.get(f"{site}.bias")
        acc = acc if bias is None else acc + bias.reshape(len(b) if acc.ndim == 3 else 1, 1, -1)
        assert np.array_equal(np.sort(acc.ravel()), np.sort(seen[f"{site}.accumulator"].astype(np.int64).ravel())), site


def test_a_certificate_has_a_verdict_for_each_group(tmp_path: Path) -> None:
    low = integer_models.small("opt_plain", "w4a8-channel-peg2")
    path = tmp_path / "m.qtx"
    chosen = make_recipe("w4a8-channel-peg2", low.spec)
    save_artifact(path, Artifact(low.spec, chosen, low.profile, Nonlinear.TABLE, dict(low.constants), {}))
    lines = {line.name: line for line in certify(path, ("avx2", "vnni"), [low.batch]).lines}
    group = lines["layer.0.attn.query[1]"]
    assert (group.depth, group.accumulator, group.constant) == (8, 32, True)
    assert group.targets["avx2"].holds and group.tally is not None  # four bits never saturate a pair
