"""Models and their attention."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from .base import Name, Spec, refuse

__all__ = ["Activation", "AttentionSpec", "Family", "Gate", "Head", "ModelSpec", "Softmax", "Start"]


class Family(Name):
    """The architectures whose wiring `models` has."""

    BERT = "bert"
    OPT = "opt"
    VIT = "vit"


class Head(Name):
    """What a model makes of its last hidden states."""

    NONE = "none"  # the encoder's last hidden states
    MLM = "mlm"  # BERT: transform, GELU, norm, decoder tied to the token embedding
    CAUSAL = "causal"  # OPT: decoder tied to the token embedding
    CLASSIFY = "classify"  # BERT: tanh pooler and classifier on [CLS]; ViT: classifier on CLS


class Activation(Name):
    """The nonlinear function between the two linears of the FFN."""

    GELU = "gelu"  # x Phi(x), the erf form
    RELU = "relu"


class Start(Name):
    """How first values are drawn; `models.initial` has the distributions."""

    OWN = "own"  # as the model's own paper says
    PUBLISHED = "published"  # as the code of Bondarenko et al. 2023 leaves them, which replaces attention after drawing


class Softmax(Name):
    """From the scores of a row, over the keys it may attend to, to its probabilities."""

    PLAIN = "softmax"
    CLIPPED = "clipped"  # clip((zeta - gamma) softmax(x) + gamma, 0, 1); Bondarenko et al. 2023, eq. 4
    CLIPPED_ROW = "clipped_row"  # the same, gamma = -alpha / keys the row may attend to; Liao and Monz 2024
    PLUS_ONE = "softmax1"  # exp(x_i) / (1 + sum_j exp(x_j)): a sink whose logit is 0
    SINK = "sink"  # exp(x_i) / (exp(s_h) + sum_j exp(x_j)), s_h learned per head


class Gate(Name):
    """What the sigmoid is taken of by which each head's result is multiplied (Bondarenko et al. 2023, section 4.2)."""

    NONE = "none"
    HEAD = "head"  # one logit per head, no input
    HEAD_CONDITIONAL = "head_conditional"  # one logit per head and sequence: the mean over its unpadded tokens
    LINEAR = "linear"  # per token and head, linear on the head's slice of the attention's input
    MLP = "mlp"  # per token and head, K -> gate_hidden -> ReLU -> 1
    ALL_FEATURES = "all_features"  # per token and head, linear on all D features
    ELEMENTWISE = "elementwise"  # per token and feature, D x D without bias (Qwen)


@dataclass(frozen=True)
class AttentionSpec(Spec):
    """How probabilities are made from scores, and how the attention's output is gated.

    `alpha` with `CLIPPED` stands for gamma = -alpha / T and is replaced by that gamma when a `ModelSpec`, which knows
    the configured length T, takes the spec. With `CLIPPED_ROW` it stays: each row has its own length.
    """

    softmax: Softmax = Softmax.PLAIN
    gamma: float = 0.0  # lower stretch of the clipped softmax, <= 0
    zeta: float = 1.0  # upper stretch, >= 1
    alpha: float | None = None
    gate: Gate = Gate.NONE
    gate_hidden: int | None = None  # hidden units of the MLP gate; None: K/4, at least 1
    pi: float | None = None  # opening probability of a new LINEAR gate: its bias starts at logit(pi); None: bias 0
    rescaled: bool = False  # the gate is multiplied by 1 / pi: for one added to a trained model (paper, appendix B.6)

    def check(self) -> None:
        if self.gamma > 0:
            refuse("attention gamma", self.gamma, "clipped softmax needs gamma <= 0, for example -0.025")
        if self.zeta < 1:
            refuse("attention zeta", self.zeta, "clipped softmax needs zeta >= 1")
        clips = self.softmax in (Softmax.CLIPPED, Softmax.CLIPPED_ROW)
        if not clips and (self.gamma != 0 or self.zeta != 1 or self.alpha is not None):
            refuse("attention softmax", str(self.softmax), "gamma, zeta and alpha belong to clipped or clipped_row")
        if self.alpha is not None and self.alpha < 0:
            refuse("attention alpha", self.alpha, "alpha sets gamma = -alpha / T and must be a number >= 0")
        if self.alpha is not None and self.gamma != 0:
            refuse("attention alpha", self.alpha, "give gamma or alpha, not both")
        if self.softmax is Softmax.CLIPPED_ROW and self.alpha is None:
            refuse("attention softmax", "clipped_row", "it needs alpha (gamma = -alpha / keys of the row)")
        if self.gate_hidden is not None and self.gate is not Gate.MLP:
            refuse("attention gate_hidden", self.gate_hidden, "only the mlp gate has hidden units")
        if self.gate_hidden is not None and self.gate_hidden < 1:
            refuse("attention gate_hidden", self.gate_hidden, "give at least 1")
        if self.pi is not None and self.gate is not Gate.LINEAR:
            refuse("attention pi", self.pi, "an opening probability belongs to the linear gate")
        if self.rescaled and self.pi is None:
            refuse("attention rescaled", True, "the factor 1 / pi needs pi")
        if self.pi is not None and not 0 < self.pi < 1:
            refuse("attention pi", self.pi, "give a probability between 0 and 1, both excluded")

    def with_length(self, length: int) -> AttentionSpec:
        """The same with `CLIPPED`'s alpha turned into gamma = -alpha / length."""
        if self.softmax is not Softmax.CLIPPED or self.alpha is None:
            return self
        return dataclasses.replace(self, gamma=-self.alpha / length, alpha=None)

    @property
    def smooth(self) -> bool:
        """Whether the attention has a derivative everywhere (no clip, no ReLU)."""
        return self.softmax not in (Softmax.CLIPPED, Softmax.CLIPPED_ROW) and self.gate is not Gate.MLP


@dataclass(frozen=True)
class ModelSpec(Spec):
    """The shape of a model. Letters in comments are those of the design: D width, H heads, F hidden, V vocab, T
    length."""

    family: Family
    layers: int
    width: int  # D
    heads: int  # H; K = D / H
    hidden: int  # F
    head: Head
    attention: AttentionSpec = AttentionSpec()
    activation: Activation = Activation.GELU
    pre_norm: bool = False
    final_norm: bool = False
    norm_eps: float = 1e-5
    dropout: float = 0.0  # probability, after embeddings, attention output and FFN output
    attention_dropout: float = 0.0  # probability, on the attention probabilities
    init_std: float = 0.02
    start: Start = Start.OWN  # how first values are drawn: own, or published
    init_output_scaled: bool = False  # attention and FFN output weights drawn with std / sqrt(2 layers)
    vocab: int = 0  # V; text only
    length: int = 0  # T, the longest text; images: derived
    types: int = 0  # token types; BERT
    position_offset: int = 0  # rows of the position table in front of position 0; OPT has 2
    embed_width: int | None = None  # width of the token embedding where it differs from D (opt-350m)
    classes: int = 0
    image_size: int = 0  # pixels per side
    patch_size: int = 0  # pixels per side
    channels: int = 0
    patch_norm: bool = False  # LayerNorm after the patch embedding

    def check(self) -> None:
        for key in ("layers", "width", "heads", "hidden"):
            if getattr(self, key) < 1:
                refuse(f"model {key}", getattr(self, key), "give a whole number, at least 1")
        if self.width % self.heads:
            refuse("model heads", self.heads, f"it must divide the width {self.width}")
        for key in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, key) < 1:
                refuse(f"model {key}", getattr(self, key), "give a probability in [0, 1)")
        if self.init_output_scaled and self.start is Start.PUBLISHED:
            refuse("model init_output_scaled", True, "start = published draws no weight scaled: give false")
        if not self.norm_eps > 0:
            refuse("model norm_eps", self.norm_eps, "give a number > 0")
        if self.final_norm and self.family is Family.BERT:
            refuse("model final_norm", True, "bert has no norm after its last block: leave it out")
        if math.copysign(1, self.init_std) < 0:
            refuse("model init_std", self.init_std, "give a number >= 0")
        least = 1 if self.family is Family.BERT else 0
        if self.types < least:
            refuse("model types", self.types, f"{self.family} takes {least} or more")
        if self.position_offset < 0 or (self.position_offset and self.family is not Family.OPT):
            refuse("model position_offset", self.position_offset, "opt takes 0 or more, another family 0")
        if self.embed_width is not None and (self.embed_width < 1 or self.family is not Family.OPT):
            refuse("model embed_width", self.embed_width, "opt takes 1 or more, another family none")
        if self.family is Family.VIT:
            for key in ("image_size", "patch_size", "channels"):
                if getattr(self, key) < 1:
                    refuse(f"model {key}", getattr(self, key), "an image model needs at least 1")
            if self.image_size % self.patch_size:
                refuse("model patch_size", self.patch_size, f"it must divide the image size {self.image_size}")
            object.__setattr__(self, "length", (self.image_size // self.patch_size) ** 2 + 1)
        else:
            for key in ("vocab", "length"):
                if getattr(self, key) < 1:
                    refuse(f"model {key}", getattr(self, key), "a text model needs at least 1")
        heads = {
            Family.BERT: (Head.NONE, Head.MLM, Head.CLASSIFY),
            Family.OPT: (Head.NONE, Head.CAUSAL),
            Family.VIT: (Head.NONE, Head.CLASSIFY),
        }[self.family]
        if self.head not in heads:
            refuse("model head", str(self.head), f"{self.family} takes one of {', '.join(map(str, heads))}")
        if self.head is Head.CLASSIFY and self.classes < 2:
            refuse("model classes", self.classes, "a classifier needs at least 2")
        if self.causal and self.attention.gate is Gate.HEAD_CONDITIONAL:
            refuse(
                "attention gate", "head_conditional", "it averages over tokens, so a causal model would see its future"
            )
        object.__setattr__(self, "attention", self.attention.with_length(self.length))

    @property
    def causal(self) -> bool:
        """Whether a token attends to none after it."""
        return self.family is Family.OPT

    @property
    def head_width(self) -> int:
        """K."""
        return self.width // self.heads

    @property
    def gate_hidden(self) -> int:
        """Hidden units m of the MLP gate, K/4 unless said otherwise."""
        return self.attention.gate_hidden or max(1, self.head_width // 4)

    @property
    def smooth(self) -> bool:
        """Whether the model has a derivative everywhere."""
        return self.activation is Activation.GELU and self.attention.smooth
