"""Published figures of published configurations, to stand beside ours: facts with their source, checked against it.

A configuration is a shape of `qtx_ref.presets` with an attention; its data and its length of training are the source's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qtx_ref.presets import attention, preset
from qtx_ref.spec import AttentionSpec, ModelSpec

README = "expected output in the README of the code of arXiv 2306.12929"
QUOTED = "arXiv 2402.12102, quoting arXiv 2306.12929"
HE = "arXiv 2405.19279, int8 weights and activations"
BLOG = "blog 2025, masked LM on Wiki-40b and BookCorpus, 128 tokens"


@dataclass(frozen=True)
class Published:
    """What a source gives for one configuration; None where it says nothing. Perplexities are of its own data."""

    model: str  # the preset
    attention: str  # as `qtx_ref.presets.attention` reads it
    source: str
    train_quant: str | None = None  # the recipe under which it was trained; its perplexity is then as trained
    perplexity: float | None = None
    recipe: str | None = None  # of `quantized`
    quantized: float | None = None  # perplexity under that recipe
    max_inf_norm: float | None = None
    average_kurtosis: float | None = None

    def text(self, recipes: Sequence[str]) -> str:
        """The figures in a table's cell, digits as published; the quantized one where its recipe is among `recipes`."""
        parts = [("as trained" if self.train_quant else "FP", self.perplexity)]
        parts += [(str(self.recipe), self.quantized if self.recipe in recipes else None)]
        parts += [("inf norm", self.max_inf_norm), ("kurtosis", self.average_kurtosis)]
        return ", ".join(f"{name} {value:g}" for name, value in parts if value is not None)


FIGURES = (
    Published(
        "bert-base",
        "clipped:gamma=-0.025",
        README,
        perplexity=4.5438,
        recipe="paper-bert",
        quantized=4.6550,
        max_inf_norm=47.0,
        average_kurtosis=72.19,
    ),
    Published(
        "opt-125m",
        "gated:pi=0.25",
        README,
        perplexity=15.5449,
        recipe="paper-opt",
        quantized=16.0132,
        max_inf_norm=122.4,
        average_kurtosis=18.26,
    ),
    Published("opt-125m", "vanilla", QUOTED, recipe="paper-opt", quantized=21.18, average_kurtosis=1778.0),
    Published("opt-125m", "vanilla", HE, perplexity=16.00, recipe="w8a8", quantized=63.4),
    Published("bert-base", "vanilla", BLOG, perplexity=5.055),
    Published("bert-base", "vanilla", BLOG, train_quant="train-w8a8", perplexity=542.705),
    Published("bert-base", "clipped:gamma=-0.025", BLOG, perplexity=4.975),
    Published("bert-base", "clipped:gamma=-0.025", BLOG, train_quant="train-w8a8", perplexity=4.994),
    Published("bert-base", "mlp:gate_hidden=16", BLOG, perplexity=5.004),
    Published("bert-base", "mlp:gate_hidden=16", BLOG, train_quant="train-w8a8", perplexity=5.301),
)


def list_published(model: str, kind: AttentionSpec, train_quant: str | None = None) -> list[Published]:
    """The figures of a preset with an attention, trained in float or under the recipe `train_quant`.

    Attentions are equal where they compute the same: alpha by the gamma it sets, the MLP gate by its hidden units.
    """
    spec, released = preset(model), model.removeprefix("paper-")
    return [
        figure
        for figure in FIGURES
        if (figure.model, figure.train_quant) == (released, train_quant)
        and fit_attention(spec, attention(figure.attention)) == fit_attention(spec, kind)
    ]


def list_related(spec: ModelSpec, train_quant: str | None = None) -> list[Published]:
    """The figures of every published shape of a model's family with its attention, trained so; see
    `list_published`."""
    shapes = dict.fromkeys(figure.model for figure in FIGURES if preset(figure.model).family is spec.family)
    return [figure for name in shapes for figure in list_published(name, spec.attention, train_quant)]


def make_column(
    model: str | None, rows: Sequence[tuple[ModelSpec, str | None]], recipes: Sequence[str]
) -> tuple[list[str], list[str]]:
    """The cells of a table's column, one for each (model, recipe of its training), and the sources that they number;
    no source where nothing is published of any row. `model`: the preset whose shape all rows have; where they have
    none's, figures of their family stand there with the model that they are of."""
    published = [
        list_related(spec, train_quant) if model is None else list_published(model, spec.attention, train_quant)
        for spec, train_quant in rows
    ]
    sources = list(dict.fromkeys(figure.source for figures in published for figure in figures))

    def describe(figure: Published) -> str:
        whose = f"{figure.model}: " if model is None else ""
        return f"{whose}{figure.text(recipes)} [{1 + sources.index(figure.source)}]"

    cells = ["; ".join(map(describe, figures)) or "-" for figures in published]
    return cells, [f"[{number}] {source}" for number, source in enumerate(sources, 1)]


def fit_attention(spec: ModelSpec, kind: AttentionSpec) -> tuple[AttentionSpec, int]:
    """An attention as a model of that shape has it, and the hidden units of its gate."""
    made = replace(spec, attention=kind)
    return replace(made.attention, gate_hidden=None), made.gate_hidden
