"""The vocabulary of qtx: what a model, an attention, a quantizer, a recipe and an optimizer *are*, as data.

Standard library only; both backends read it and it does no arithmetic on tensors. Everything is frozen, checked when
it is made, and travels as JSON (`to_dict`, `from_dict`). A wrong value raises `SpecError`, one line that names the
value and what would be accepted.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class SpecError(ValueError):
    """A value that no model, quantizer or recipe can have. The message names it and the remedy."""


class Name(str, Enum):
    """An enum that prints and serializes as its value."""

    def __str__(self) -> str:
        return self.value


class Family(Name):
    BERT = "bert"
    OPT = "opt"
    VIT = "vit"


class Head(Name):
    NONE = "none"  # the encoder's last hidden states
    MLM = "mlm"  # BERT: transform, GELU, norm, decoder tied to the token embedding
    CAUSAL = "causal"  # OPT: decoder tied to the token embedding
    CLASSIFY = "classify"  # BERT: tanh pooler and classifier on [CLS]; ViT: classifier on CLS


class Activation(Name):
    GELU = "gelu"  # x Phi(x), the erf form
    RELU = "relu"


class Softmax(Name):
    PLAIN = "softmax"
    CLIPPED = "clipped"  # clip((zeta - gamma) softmax(x) + gamma, 0, 1); Bondarenko et al. 2023, eq. 4
    CLIPPED_ROW = "clipped_row"  # the same, gamma = -alpha / keys the row may attend to; Liao and Monz 2024
    PLUS_ONE = "softmax1"  # exp(x_i) / (1 + sum_j exp(x_j)): a sink whose logit is 0
    SINK = "sink"  # exp(x_i) / (exp(s_h) + sum_j exp(x_j)), s_h learned per head


class Gate(Name):
    NONE = "none"
    HEAD = "head"  # one logit per head, no input
    HEAD_CONDITIONAL = "head_conditional"  # one logit per head and sequence: the mean over its unpadded tokens
    LINEAR = "linear"  # per token and head, linear on the head's slice of the attention's input
    MLP = "mlp"  # per token and head, K -> gate_hidden -> ReLU -> 1
    ALL_FEATURES = "all_features"  # per token and head, linear on all D features
    ELEMENTWISE = "elementwise"  # per token and feature, D x D without bias (Qwen)


def _refuse(what: str, value: Any, remedy: str) -> None:
    raise SpecError(f"{what} is {value!r}: {remedy}")


def _number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )


@dataclass(frozen=True)
class AttentionSpec:
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

    def __post_init__(self) -> None:
        for key in ("gamma", "zeta"):
            if not _number(getattr(self, key)):
                _refuse(f"attention {key}", getattr(self, key), "give a finite number")
        if self.gamma > 0:
            _refuse("attention gamma", self.gamma, "clipped softmax needs gamma <= 0, for example -0.025")
        if self.zeta < 1:
            _refuse("attention zeta", self.zeta, "clipped softmax needs zeta >= 1")
        clips = self.softmax in (Softmax.CLIPPED, Softmax.CLIPPED_ROW)
        if not clips and (self.gamma != 0 or self.zeta != 1 or self.alpha is not None):
            _refuse("attention softmax", str(self.softmax), "gamma, zeta and alpha belong to clipped or clipped_row")
        if self.alpha is not None and (not _number(self.alpha) or self.alpha < 0):
            _refuse("attention alpha", self.alpha, "alpha sets gamma = -alpha / T and must be a number >= 0")
        if self.alpha is not None and self.gamma != 0:
            _refuse("attention alpha", self.alpha, "give gamma or alpha, not both")
        if self.softmax is Softmax.CLIPPED_ROW and self.alpha is None:
            _refuse("attention softmax", "clipped_row", "it needs alpha (gamma = -alpha / keys of the row)")
        if self.gate_hidden is not None and self.gate is not Gate.MLP:
            _refuse("attention gate_hidden", self.gate_hidden, "only the mlp gate has hidden units")
        if self.gate_hidden is not None and self.gate_hidden < 1:
            _refuse("attention gate_hidden", self.gate_hidden, "give at least 1")
        if self.pi is not None and self.gate is not Gate.LINEAR:
            _refuse("attention pi", self.pi, "an opening probability belongs to the linear gate")
        if self.rescaled and self.pi is None:
            _refuse("attention rescaled", True, "the factor 1 / pi needs pi")
        if self.pi is not None and not (_number(self.pi) and 0 < self.pi < 1):
            _refuse("attention pi", self.pi, "give a probability between 0 and 1, both excluded")

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
class ModelSpec:
    """The shape of a model. Letters in comments are those of the design: D width, H heads, F hidden, V vocab, T length."""

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

    def __post_init__(self) -> None:
        for key in ("layers", "width", "heads", "hidden"):
            value = getattr(self, key)
            if not isinstance(value, int) or value < 1:
                _refuse(f"model {key}", value, "give a whole number, at least 1")
        if self.width % self.heads:
            _refuse("model heads", self.heads, f"it must divide the width {self.width}")
        for key in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, key) < 1:
                _refuse(f"model {key}", getattr(self, key), "give a probability in [0, 1)")
        if not self.norm_eps > 0:
            _refuse("model norm_eps", self.norm_eps, "give a number > 0")
        if self.family is Family.VIT:
            for key in ("image_size", "patch_size", "channels"):
                if getattr(self, key) < 1:
                    _refuse(f"model {key}", getattr(self, key), "an image model needs at least 1")
            if self.image_size % self.patch_size:
                _refuse("model patch_size", self.patch_size, f"it must divide the image size {self.image_size}")
            object.__setattr__(self, "length", (self.image_size // self.patch_size) ** 2 + 1)
        else:
            for key in ("vocab", "length"):
                if getattr(self, key) < 1:
                    _refuse(f"model {key}", getattr(self, key), "a text model needs at least 1")
        heads = {
            Family.BERT: (Head.NONE, Head.MLM, Head.CLASSIFY),
            Family.OPT: (Head.NONE, Head.CAUSAL),
            Family.VIT: (Head.NONE, Head.CLASSIFY),
        }[self.family]
        if self.head not in heads:
            _refuse("model head", str(self.head), f"{self.family} takes one of {', '.join(map(str, heads))}")
        if self.head is Head.CLASSIFY and self.classes < 2:
            _refuse("model classes", self.classes, "a classifier needs at least 2")
        if self.causal and self.attention.gate is Gate.HEAD_CONDITIONAL:
            _refuse(
                "attention gate", "head_conditional", "it averages over tokens, so a causal model would see its future"
            )
        object.__setattr__(self, "attention", self.attention.with_length(self.length))

    @property
    def causal(self) -> bool:
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
        return self.activation is Activation.GELU and self.attention.smooth


class Granularity(Name):
    TENSOR = "tensor"  # one scale
    CHANNEL = "channel"  # one per channel: the last axis of an activation, the output axis of a weight
    TOKEN = "token"  # one per row: every axis but the last
    GROUP = "group"  # `groups` groups of channels (per-embedding-group, Bondarenko et al. 2021), each of one scale
    BLOCK = "block"  # one per `block` neighbours along the last axis


class ObserverKind(Name):
    CURRENT = "current"  # the last batch's minimum and maximum
    RUNNING = "running"  # momentum * old + (1 - momentum) * new minimum and maximum
    PERCENTILE = "percentile"  # two-sided, linear interpolation, over every value of all batches
    RUNNING_PERCENTILE = "running_percentile"  # each batch's two-sided percentile, with momentum
    MSE_GRID = "mse_grid"  # the range of least squared error among fractions of the extremes
    MSE_GOLDEN = "mse_golden"  # the same, the fraction in [0.01, 1] by golden section search


@dataclass(frozen=True)
class ObserverSpec:
    """How a static range is found from calibration batches."""

    kind: ObserverKind = ObserverKind.CURRENT
    momentum: float = 0.9  # weight of the old range, in [0, 1)
    percentile: float = 99.999  # in (50, 100]; the lower end is 100 minus it
    candidates: int = 100  # fractions i / candidates of the range tried by the grid
    margin: float = 0.0  # the grid's range reaches this far beyond the extremes; the published simulator has 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            _refuse("observer momentum", self.momentum, "give the weight of the old range, in [0, 1)")
        if not 50 < self.percentile <= 100:
            _refuse("observer percentile", self.percentile, "give a percentage in (50, 100]; the lower end mirrors it")
        if self.candidates < 2:
            _refuse("observer candidates", self.candidates, "give at least 2")
        if not _number(self.margin) or self.margin < 0:
            _refuse("observer margin", self.margin, "give a number >= 0")


@dataclass(frozen=True)
class QuantSpec:
    """A uniform quantizer: `real = scale * (code - zero_point)`.

    Codes of a symmetric quantizer are signed with zero point 0 and scale absmax / (2^(bits-1) - 1); those of an
    asymmetric one run from 0 to 2^bits - 1 with scale (high - low) / (2^bits - 1), where low <= 0 <= high. Quantizing
    divides by the scale (IEEE), rounds half to even, adds the zero point and clamps, in float32. That is profile `QTX`;
    another `Profile` may choose otherwise.
    """

    bits: int = 8
    symmetric: bool = False
    granularity: Granularity = Granularity.TENSOR
    dynamic: bool = False  # the range is taken from the tensor itself, each time
    observer: ObserverSpec = ObserverSpec()  # of a static range
    learned: bool = False  # scale (and zero point) trained, Esser et al. 2020; starts from the observed range
    narrow: bool = False  # the lowest code is not used: -127..127, 1..255
    groups: int | None = None  # of GROUP; it divides the number of channels
    permute: bool = False  # GROUP: channels are sorted by high - low before they are grouped
    block: int | None = None  # elements per block of BLOCK; it divides the last axis

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 2 <= self.bits <= 16:
            _refuse("quantizer bits", self.bits, "give a whole number from 2 to 16")
        if self.granularity in (Granularity.TOKEN, Granularity.BLOCK) and not self.dynamic:
            kind = str(self.granularity)
            _refuse("quantizer granularity", kind, f"a range per {kind} is dynamic; set dynamic")
        for key, owner in (("groups", Granularity.GROUP), ("block", Granularity.BLOCK)):
            value, needed = getattr(self, key), self.granularity is owner
            if needed and not (isinstance(value, int) and value >= 1):
                _refuse(f"quantizer {key}", value, f"granularity {owner} needs a whole number, at least 1")
            if not needed and value is not None:
                _refuse(f"quantizer {key}", value, f"it belongs to granularity {owner}")
        if self.permute and self.granularity is not Granularity.GROUP:
            _refuse("quantizer permute", True, "it belongs to granularity group")
        if self.learned and self.granularity is Granularity.GROUP:
            _refuse("quantizer learned", True, "the channels of a group share a scale, and learning would part them")
        if self.learned and self.dynamic:
            _refuse("quantizer learned", True, "a dynamic range cannot be learned; choose one")

    @property
    def code_min(self) -> int:
        return (-(2 ** (self.bits - 1)) if self.symmetric else 0) + self.narrow

    @property
    def code_max(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1


class Range(NamedTuple):
    """A static quantizer's state: arrays that broadcast against the tensor. `zero_point` has an integer dtype."""

    low: Any
    high: Any
    scale: Any
    zero_point: Any


@dataclass(frozen=True)
class Rule:
    """Sites that match one of `sites` (shell patterns) get `quant`; None leaves them in float."""

    sites: tuple[str, ...]
    quant: QuantSpec | None
    source: str  # where the choice comes from, or "assumed"


@dataclass(frozen=True)
class Recipe:
    """Which site is quantized, and how. The last rule that matches a site decides; a site without one stays in float.

    A static range is calibrated on `batches` batches; `quantize_while_calibrating` feeds each observer tensors that
    earlier sites have already quantized, as the published simulator does; `masked_scores` lets the scores of keys that
    the mask will remove enter the range of `scores` (only the paper's recipes do).
    """

    name: str
    rules: tuple[Rule, ...]
    batches: int = 16
    quantize_while_calibrating: bool = False
    masked_scores: bool = False

    def __post_init__(self) -> None:
        if self.batches < 1:
            _refuse("recipe batches", self.batches, "calibration needs at least 1")

    def quant(self, site: str) -> QuantSpec | None:
        """The quantizer of `site`, or None."""
        for rule in reversed(self.rules):
            if any(fnmatchcase(site, pattern) for pattern in rule.sites):
                return rule.quant
        return None


class Rounding(Name):
    """From a real number to an integer."""

    HALF_EVEN = "half_even"  # nearest, ties to even: IEEE 754, NumPy's rint
    HALF_AWAY = "half_away"  # nearest, ties away from zero: C's round
    HALF_UP = "half_up"  # floor(x + 1/2)
    TOWARD_ZERO = "toward_zero"
    FLOOR = "floor"
    STOCHASTIC = "stochastic"  # up with the probability of the fraction, by a Philox word per element


class Dtype(Name):
    """bfloat16 and float16 are emulated: each operation in float32, its result rounded to nearest even."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ScaleRule(Name):
    """Scale of a symmetric quantizer. An asymmetric one has (high - low) / (code_max - code_min)."""

    ABSMAX = "absmax"  # absmax / code_max: 127 for 8 bits
    ABSMAX_HALF = "absmax_half"  # absmax / ((2^bits - 1) / 2): 127.5 for 8 bits
    TWO_SIDED = "two_sided"  # max(|low| / |code_min|, high / code_max): 128 and 127 for 8 bits


class Nudging(Name):
    """Which real zero point is rounded to a code; the rounding moves the range so that 0 stays exact."""

    FROM_LOW = "from_low"  # code_min - low / scale
    CLOSER_END = "closer_end"  # that, or code_max - high / scale where |code_max| + |high / scale| is not larger


class NanPolicy(Name):
    RAISE = "raise"  # ValueError; fake quantization lets NaN through
    ZERO = "zero"  # the code of real 0
    CODE_MIN = "code_min"  # what x86's float-to-integer conversion ends in


class InfinityPolicy(Name):
    SATURATE = "saturate"
    RAISE = "raise"


class Requantization(Name):
    """From accumulator a to a real multiple M a, rounded to an integer. M = 2^shift * multiplier / 2^31."""

    FLOAT32 = "float32"  # float32(a) * float32(M), half to even
    FLOAT_HALF_AWAY = "float_half_away"  # the same product, ties away from zero
    FIXED_ONE = "fixed_one"  # 64-bit product, one rounding shift, half up: ruy, TFLite with single rounding
    FIXED_TWO = "fixed_two"  # rounding doubling high multiply, then rounding shift, half away: gemmlowp, TFLite
    HIGH_HALF_UP = "high_half_up"  # truncating doubling high multiply, then rounding shift, half up: XNNPACK rndnu


class Overflow(Name):
    """An accumulator that does not fit its width."""

    REPORT = "report"  # ValueError naming the value
    WRAP = "wrap"  # two's complement, as the hardware adds


@dataclass(frozen=True)
class Profile:
    """What an engine's numbers mean. No field has a default: engines differ in every one of them."""

    name: str
    version: int  # raised whenever a field changes
    rounding: Rounding  # of x / scale
    zero_point_before_rounding: bool  # round(x / scale + zero_point) instead of round(x / scale) + zero_point
    reciprocal: bool  # x * (1 / scale) instead of x / scale
    scale_rule: ScaleRule
    nudging: Nudging
    zero_point_rounding: Rounding
    scale_dtype: Dtype  # what a scale is stored in
    arithmetic: Dtype  # of every operation of quantizing and dequantizing
    nan: NanPolicy
    infinity: InfinityPolicy
    requantization: Requantization
    overflow: Overflow

    def __post_init__(self) -> None:
        if self.zero_point_rounding is Rounding.STOCHASTIC:
            _refuse("profile zero_point_rounding", "stochastic", "a zero point is rounded the same each time")
        if self.version < 1:
            _refuse("profile version", self.version, "give a whole number, at least 1")


QTX = Profile(
    name="qtx",
    version=1,
    rounding=Rounding.HALF_EVEN,
    zero_point_before_rounding=False,
    reciprocal=False,
    scale_rule=ScaleRule.ABSMAX,
    nudging=Nudging.FROM_LOW,
    zero_point_rounding=Rounding.HALF_EVEN,
    scale_dtype=Dtype.FLOAT32,
    arithmetic=Dtype.FLOAT32,
    nan=NanPolicy.RAISE,
    infinity=InfinityPolicy.SATURATE,
    requantization=Requantization.FIXED_ONE,
    overflow=Overflow.REPORT,
)


class FloatFormat(Name):
    """Small floats (OCP 8-bit floating point, 2023; OCP microscaling formats, 2023)."""

    E4M3 = "e4m3"  # 4 exponent bits, 3 of mantissa; largest 448, no infinity, one NaN per sign ("fn")
    E5M2 = "e5m2"  # IEEE style; largest 57344
    E2M1 = "e2m1"  # 0, 0.5, 1, 1.5, 2, 3, 4, 6; neither infinity nor NaN


class SharedScale(Name):
    """Exponent of an MX block's scale from its largest magnitude; emax is the element's largest exponent."""

    FLOOR = "floor"  # floor(log2(absmax)) - emax: the OCP text
    CEIL = "ceil"  # ceil(log2(absmax)) - emax
    EVEN = "even"  # absmax rounded to the element's mantissa first (ties up), then floor


class Schedule(Name):
    CONSTANT = "constant"
    LINEAR = "linear"  # to 0 at the last step
    COSINE = "cosine"  # half a cosine to 0 at the last step


@dataclass(frozen=True)
class OptimSpec:
    """AdamW (Loshchilov and Hutter 2019): decoupled decay, on matrices and tables only."""

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    decay_norm_gains: bool = False  # the paper's switch: norm gains decay too
    clip_norm: float = 1.0  # global gradient norm; 0 leaves gradients alone
    schedule: Schedule = Schedule.LINEAR
    warmup: int = 0  # steps from 0 to lr
    steps: int = 1  # steps of the whole schedule

    def __post_init__(self) -> None:
        for key in ("lr", "eps", "weight_decay", "clip_norm"):
            if not _number(getattr(self, key)) or getattr(self, key) < 0:
                _refuse(f"optimizer {key}", getattr(self, key), "give a number >= 0")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                _refuse(f"optimizer {key}", getattr(self, key), "give a number in [0, 1)")
        if self.steps < 1:
            _refuse("optimizer steps", self.steps, "give at least 1")
        if not 0 <= self.warmup <= self.steps:
            _refuse("optimizer warmup", self.warmup, f"give 0 to {self.steps}, the number of steps")


def decays(name: str, spec: OptimSpec) -> bool:
    """Whether AdamW decays the parameter: weights do, biases and sinks do not, norm gains by the spec's switch."""
    owner, _, kind = name.rpartition(".")
    if kind != "weight":
        return False
    return spec.decay_norm_gains if owner.endswith("norm") else True


def to_dict(spec: Any) -> Any:
    """A spec as plain JSON values."""
    if dataclasses.is_dataclass(spec):
        return {field.name: to_dict(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
    if isinstance(spec, Enum):
        return spec.value
    if isinstance(spec, tuple):
        return [to_dict(item) for item in spec]
    return spec


def from_dict(kind: Any, data: Any, where: str = "") -> Any:
    """The spec of type `kind` that `to_dict` wrote. Unknown keys, missing keys and wrong types raise `SpecError`."""
    where = where or getattr(kind, "__name__", str(kind))
    if dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            _refuse(where, data, "expected an object with keys")
        hints = typing.get_type_hints(kind)
        for key in data:
            if key not in hints:
                _refuse(f"unknown key in {where}", key, f"known keys are {', '.join(hints)}")
        required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]
        for key in required:
            if key not in data:
                _refuse(f"missing key in {where}", key, "add it")
        return kind(**{key: from_dict(hints[key], value, f"{where}.{key}") for key, value in data.items()})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None and type(None) in arguments:
            return None
        return from_dict(next(a for a in arguments if a is not type(None)), data, where)
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            _refuse(where, data, "expected a list")
        return tuple(from_dict(arguments[0], item, where) for item in data)
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(data)
        except ValueError:
            _refuse(where, data, f"known values are {', '.join(str(member) for member in kind)}")
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        _refuse(where, data, f"expected {kind.__name__}")
    return data
