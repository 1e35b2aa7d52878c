"""A recipe while it is assembled: its rules by their roles. Remedies change a role, whatever else a recipe has.

`Parts.recipe` sets them in the order in which a `Recipe` reads its rules, where the last that matches a site decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qtx_ref.spec import (
    FloatFormat,
    ObserverKind,
    ObserverSpec,
    Quant,
    QuantSpec,
    Recipe,
    Rewrite,
    Rule,
    SpecError,
    Transform,
)

TABLES = ("embed.token.weight", "embed.type.weight", "embed.position.weight")
OPERANDS = ("*.input", "*.lhs", "*.rhs")
MSE_GRID = ObserverSpec(kind=ObserverKind.MSE_GRID, candidates=100, margin=0.5)  # of the published simulator
MX_BLOCK = 32
MX_TEXT = "OCP microscaling formats 1.0: blocks of 32 along the summed axis, a power of two each"
FLOATS = {
    "fp8-e4m3": FloatFormat.E4M3,
    "fp8-e5m2": FloatFormat.E5M2,
    "mxfp8": FloatFormat.E4M3,
    "mxfp8-e5m2": FloatFormat.E5M2,
    "mxfp4": FloatFormat.E2M1,
}


@dataclass(frozen=True)
class Parts:
    """`activations` and `weights` decide for all of theirs; `special` for activations that differ at some sites;
    `floats` for what stays in float, over all of these. The rest is as in `Recipe`."""

    name: str
    activations: Rule
    weights: Rule
    special: tuple[Rule, ...] = ()
    floats: tuple[Rule, ...] = ()
    batches: int = 16
    transforms: tuple[Transform, ...] = ()
    rewrite: Rewrite | None = None

    def recipe(self) -> Recipe:
        """The rules in order: activations, special ones, weights, floats."""
        rules = (self.activations, *self.special, self.weights, *self.floats)
        return Recipe(self.name, rules, self.batches, transforms=self.transforms, rewrite=self.rewrite)

    def change_activations(self, change: Callable[[QuantSpec], Quant], source: str) -> Parts:
        """With every quantizer of activations changed, the special ones too."""
        special = tuple(change_rule(rule, change, source) for rule in self.special)
        return replace(self, activations=change_rule(self.activations, change, source), special=special)

    def change_weights(self, change: Callable[[QuantSpec], Quant], source: str) -> Parts:
        """With the quantizer of weights changed."""
        return replace(self, weights=change_rule(self.weights, change, source))

    def add_special(self, rule: Rule) -> Parts:
        """With other activations at the rule's sites, whatever was said of them before."""
        return replace(self, special=(*self.special, rule))

    def add_floats(self, rule: Rule) -> Parts:
        """With more that stays in float."""
        return replace(self, floats=(*self.floats, rule))


def change_rule(rule: Rule, change: Callable[[QuantSpec], Quant], source: str) -> Rule:
    """A rule with its quantizer changed; one that leaves its sites in float as it is.

    Raises:
        SpecError: it has a small float, of which remedies know nothing.
    """
    if rule.quant is None:
        return rule
    if not isinstance(rule.quant, QuantSpec):
        raise SpecError(
            f"a remedy cannot change the small floats of {', '.join(rule.sites)}: take a recipe of integers"
        )
    return replace(rule, quant=change(rule.quant), source=source)
