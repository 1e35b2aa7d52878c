"""Recipes are assembled by the roles of their rules; what remedies change does not depend on where a rule stands."""

from dataclasses import replace

import pytest

from qtx.recipes import remedies
from qtx.recipes.named import post_training
from qtx.recipes.parts import Parts
from qtx_ref.presets import preset
from qtx_ref.spec import (
    FloatFormat,
    FloatQuantSpec,
    Granularity,
    ObserverKind,
    QuantSpec,
    Rule,
    SpecError,
)

WIDE = Rule(("layer.0.ffn.norm", "embed.norm.weight"), QuantSpec(bits=16), "a test")  # names a weight too


def test_a_remedy_changes_a_role_whatever_its_sites_are_called():
    """`embed.norm.weight` among a special rule's sites makes it no rule of weights."""
    spec = preset("opt-tiny")
    made = remedies.apply(post_training(8, 8).add_special(WIDE), spec, ["p99.9", "channel", "peg4"]).recipe()
    special = made.quant("layer.0.ffn.norm")
    assert special.granularity is Granularity.GROUP and special.groups == 4  # of the rule for all activations
    wide = next(rule for rule in made.rules if rule.sites == WIDE.sites).quant
    assert (wide.bits, wide.observer.kind, wide.granularity) == (16, ObserverKind.PERCENTILE, Granularity.TENSOR)
    weight = made.quant("layer.0.ffn.hidden.weight")
    assert weight.granularity is Granularity.CHANNEL and weight.observer.kind is ObserverKind.CURRENT


def test_the_order_of_roles():
    """A later rule decides: special activations over all, weights over special ones, floats over everything."""
    quants = [QuantSpec(bits=bits) for bits in (4, 5, 6)]
    everything, special, weights = (Rule(("*",), quant, "a test") for quant in quants)
    base = Parts("mine", everything, replace(weights, sites=("*.weight",)))
    got = base.add_special(replace(special, sites=("a.*",))).add_floats(Rule(("a.b.weight",), None, "a test")).recipe()
    bits = {
        site: quant and quant.bits for site in ("b.c", "a.b", "a.c.weight", "a.b.weight") for quant in [got.quant(site)]
    }
    assert bits == {"b.c": 4, "a.b": 5, "a.c.weight": 6, "a.b.weight": None}


def test_remedies_know_nothing_of_small_floats():
    small = Rule(("*",), FloatQuantSpec(FloatFormat.E4M3), "a test")
    with pytest.raises(SpecError, match="cannot change the small floats of \\*"):
        remedies.apply(Parts("mine", small, small), preset("opt-tiny"), ["p99.9"])
