"""Every differentiable op of the reference: the equation, the forward and its vector-Jacobian product, side by side.

Ops take and return `Var`. Norms, softmax, means and losses sum in float64 and round once at the end, matmuls stay in
the input's dtype. Letters: B batch, T tokens, D width, H heads, K = D / H, V classes.

Arrays: float32 or float64, computed and returned in the dtype of x, and in the shape of x where nothing else is said.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from .tape import V, Var, node, unbroadcast

__all__ = [
    "add",
    "clip_stretch",
    "concat",
    "cross_entropy",
    "divide",
    "embedding",
    "gelu",
    "hadamard",
    "layer_norm",
    "linear",
    "matmul",
    "mean",
    "merge_heads",
    "mul",
    "patches",
    "relu",
    "reshape",
    "scale",
    "select",
    "sigmoid",
    "soft_cross_entropy",
    "softmax",
    "split_heads",
    "spread_heads",
    "swap_last",
    "tanh",
    "token",
    "total",
]

BLOCK = 2**14  # elements that stay in the cache as float64: fresh memory costs more than what is computed in it

# --- arithmetic -------------------------------------------------------------------------------------------------------


def linear(x: Var, weight: Var, bias: Var | None = None) -> Var:
    """y = x W^T + b: x (..., I), W (O, I), b (O,) -> (..., O).

    Or one matrix per head: x (..., H I), W (H, O, I), b (H, O) -> (..., H O), head h reading and writing its own slice.
    dx = g W, dW = g^T x, db = sum g.
    """
    w = weight.value
    heads = w.shape[0] if w.ndim == 3 else 1

    def split(v: np.ndarray) -> np.ndarray:  # (..., H n) -> (H, N, n)
        return v.reshape(math.prod(v.shape[:-1]), heads, v.shape[-1] // heads).swapaxes(0, 1)

    def merge(v: np.ndarray) -> np.ndarray:  # (H, N, n) -> (..., H n)
        return v.swapaxes(0, 1).reshape(*x.shape[:-1], heads * v.shape[-1])

    w3 = w.reshape(heads, *w.shape[-2:])  # (H, O, I)
    y = merge(split(x.value) @ w3.swapaxes(1, 2))
    edges = [
        (x, lambda g: merge(split(g) @ w3)),
        (weight, lambda g: (split(g).swapaxes(1, 2) @ split(x.value)).reshape(w.shape)),
    ]
    if bias is not None:
        y += bias.value.reshape(-1)
        edges.append((bias, lambda g: split(g).sum(axis=1, dtype=np.float64).reshape(bias.shape)))
    return node(y, *edges)


def matmul(a: Var, b: Var) -> Var:
    """y = a b over the last two axes, (..., M, I) and (..., I, N) -> (..., M, N); leading axes agree. da = g b^T, db =
    a^T g."""
    return node(
        a.value @ b.value,
        (a, lambda g: g @ np.swapaxes(b.value, -1, -2)),
        (b, lambda g: np.swapaxes(a.value, -1, -2) @ g),
    )


def add(a: Var, b: Var) -> Var:
    """y = a + b, broadcast. da = g, db = g."""
    return node(a.value + b.value, (a, lambda g: unbroadcast(g, a.shape)), (b, lambda g: unbroadcast(g, b.shape)))


def mul(a: Var, b: Var) -> Var:
    """y = a b, broadcast. da = g b, db = g a."""
    return node(
        a.value * b.value,
        (a, lambda g: unbroadcast(g * b.value, a.shape)),
        (b, lambda g: unbroadcast(g * a.value, b.shape)),
    )


def scale(x: Var, factor: float) -> Var:
    """y = factor x, the factor rounded to x's dtype first. dx = factor g."""
    f = x.value.dtype.type(factor)
    return node(x.value * f, (x, lambda g: g * f))


def select(where: np.ndarray, a: Var, b: Var) -> Var:
    """y = a where `where` (boolean, broadcast) is true, else b; a and b of one shape. da = g there, db = g
    elsewhere."""
    return node(
        np.where(where, a.value, b.value), (a, lambda g: np.where(where, g, 0)), (b, lambda g: np.where(where, 0, g))
    )


def divide(x: Var, divisor: np.ndarray) -> Var:
    """y = x / d, x (..., I), d (I,). dx = g / d."""
    d = divisor.astype(x.value.dtype)
    return node(x.value / d, (x, lambda g: g / d))


def hadamard(x: Var, block: int) -> Var:
    """y = x R, R block-diagonal of H_n / sqrt(n) with n = `block`, a power of two that divides the last axis.

    H_1 = 1, H_2n = [[H_n, H_n], [H_n, -H_n]] (Sylvester). R is symmetric and its own inverse: dx = g R. Computed by
    log2 n rounds of sums and differences (Fino and Algazi 1976), in one order, then times 1 / sqrt(n): the same bits
    everywhere.
    """

    def rotate(v: np.ndarray) -> np.ndarray:
        shape, dtype = v.shape, v.dtype
        half = 1
        while half < block:
            v = v.reshape(-1, 2, half)  # (pairs, 2, half)
            v = np.stack([v[:, 0] + v[:, 1], v[:, 0] - v[:, 1]], axis=1)
            half *= 2
        return v.reshape(shape) * dtype.type(block**-0.5)

    return node(rotate(x.value), (x, rotate))


def mean(x: Var, axis: int, where: np.ndarray | None = None) -> Var:
    """y = sum x / n over one axis, kept, of the n elements where `where` (boolean, broadcast) is true; 0 where n = 0.
    dx = g / n there."""
    keep = np.ones(x.shape, bool) if where is None else np.broadcast_to(where, x.shape)
    n = np.maximum(keep.sum(axis=axis, keepdims=True), 1)
    y = (x.value.sum(axis=axis, where=keep, dtype=np.float64, keepdims=True) / n).astype(x.value.dtype)
    return node(y, (x, lambda g: (g / n) * keep))


def total(x: Var) -> Var:
    """The sum of all elements, (), in float64. dx = g."""
    return node(x.value.sum(dtype=np.float64), (x, lambda g: np.broadcast_to(g, x.shape)))


# --- nonlinear --------------------------------------------------------------------------------------------------------


def layer_norm(x: Var, weight: Var, bias: Var, eps: float) -> Var:
    """y = (x - mean) / sqrt(var + eps) * w + b over the last axis of x (..., D), var biased (Ba et al. 2016); w and b
    (D,).

    With n = (x - mean) / sigma and u = g w: dx = (u - mean(u) - n mean(u n)) / sigma.
    """
    n = x.value.astype(np.float64)
    n -= n.mean(axis=-1, keepdims=True)
    sigma = np.sqrt((n * n).mean(axis=-1, keepdims=True) + eps)
    n /= sigma
    y = n * weight.value
    y += bias.value
    y = y.astype(x.value.dtype)

    def dx(g: np.ndarray) -> np.ndarray:
        u = g.astype(np.float64) * weight.value
        return (u - u.mean(axis=-1, keepdims=True) - n * (u * n).mean(axis=-1, keepdims=True)) / sigma

    return node(
        y, (x, dx), (weight, lambda g: unbroadcast(g * n, weight.shape)), (bias, lambda g: unbroadcast(g, bias.shape))
    )


def softmax(x: Var, mask: np.ndarray | None = None, sink: Var | None = None) -> Var:
    """p_i = exp(x_i - m) / (sum_j exp(x_j - m) + exp(s - m)) over the last axis, m the largest exponent.

    mask, boolean and broadcast, is true where a key may be attended to. Masked keys get 0 whatever their score, NaN and
    infinities too, and so does a row without keys: its sum is empty, and 0 / 0 is read as 0 (attending to nothing adds
    nothing). A row is NaN, masked keys too, where it may attend to NaN or infinity, or to -infinity alone.
    sink s, broadcast to (..., 1), takes probability that no key receives: 0 for softmax1, learned for a sink per head.
    dx = p (g - sum_j g_j p_j), ds = -(1 - sum p) sum_j g_j p_j.
    """
    p = x.value.astype(np.float64)
    keep = np.broadcast_to(True if mask is None else mask, x.shape)
    np.copyto(p, -np.inf, where=~keep)
    top = p.max(axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(keep.any(axis=-1, keepdims=True), top, 0.0) if sink is None else np.maximum(top, sink.value)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        p -= top
        np.exp(p, out=p)
        rest = 0.0 if sink is None else np.exp(sink.value - top)
        denominator = p.sum(axis=-1, keepdims=True) + rest
        p /= np.where(denominator == 0, 1.0, denominator)

    def inner(g: np.ndarray) -> np.ndarray:
        return (g * p).sum(axis=-1, keepdims=True)

    edges = [(x, lambda g: p * (g - inner(g)))]
    if sink is not None:
        left = rest / denominator  # the sink's share, 1 - sum p
        edges.append((sink, lambda g: unbroadcast(-left * inner(g), sink.shape)))
    return node(p.astype(x.value.dtype), *edges)


def clip_stretch(p: Var, gamma: np.ndarray | float, zeta: float) -> Var:
    """y = clip((zeta - gamma) p + gamma, 0, 1) (Bondarenko et al. 2023, eq. 4). dp = g (zeta - gamma) inside [0, 1].

    gamma is a number or broadcasts against p (one per row). At the ends themselves the gradient passes.
    """
    dtype = p.value.dtype
    low = np.asarray(gamma, dtype)
    span = np.asarray(zeta - np.asarray(gamma, np.float64), dtype)
    stretched = span * p.value + low
    inside = (stretched >= 0) & (stretched <= 1)
    return node(np.clip(stretched, 0, 1).astype(dtype), (p, lambda g: np.where(inside, g * span, 0)))


def gelu(x: Var) -> Var:
    """y = x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel 2016). dx = g (Phi(x) + x phi(x))."""
    y = np.empty(x.shape, x.value.dtype)
    values, results = x.value.reshape(-1), y.reshape(-1)
    for start in range(0, y.size, BLOCK):
        v = values[start : start + BLOCK].astype(np.float64)
        results[start : start + BLOCK] = v * special.ndtr(v)

    def dx(g: np.ndarray) -> np.ndarray:
        v = x.value.astype(np.float64)
        pdf = np.exp(-0.5 * v * v) / np.sqrt(2 * np.pi)
        return g * (special.ndtr(v) + v * pdf)

    return node(y, (x, dx))


def relu(x: Var) -> Var:
    """y = max(x, 0). dx = g where x > 0."""
    return node(np.maximum(x.value, 0), (x, lambda g: np.where(x.value > 0, g, 0)))


def sigmoid(x: Var) -> Var:
    """y = 1 / (1 + exp(-x)). dx = g y (1 - y)."""
    y = special.expit(x.value)
    return node(y, (x, lambda g: g * y * (1 - y)))


def tanh(x: Var) -> Var:
    """y = tanh(x). dx = g (1 - y^2)."""
    y = np.tanh(x.value)
    return node(y, (x, lambda g: g * (1 - y * y)))


def cross_entropy(logits: Var, targets: np.ndarray, count: int | None = None) -> Var:
    """sum over targets >= 0 of -log softmax(logits)[target], divided by `count`, their number unless given; float64.
    Targets < 0 do not count.

    logits (..., V), targets (...) integers. dlogits = g (softmax - onehot) / count. Raises ValueError where the count
    is 0.
    """
    flat = logits.value.reshape(-1, logits.shape[-1]).astype(np.float64)
    flat_targets = targets.reshape(-1)
    rows = np.flatnonzero(flat_targets >= 0)
    count = rows.size if count is None else count
    if count == 0:
        raise ValueError("cross entropy has no target: every target is negative")
    picked, labels = flat[rows], flat_targets[rows]
    log_p = picked - special.logsumexp(picked, axis=-1, keepdims=True)
    loss = -log_p[np.arange(rows.size), labels].sum() / count

    def dlogits(g: np.ndarray) -> np.ndarray:
        d = np.exp(log_p)
        d[np.arange(rows.size), labels] -= 1
        out = np.zeros_like(flat)
        out[rows] = d * (g / count)
        return out.reshape(logits.shape)

    return node(np.asarray(loss), (logits, dlogits))


def soft_cross_entropy(logits: Var, weights: np.ndarray, count: int | None = None) -> Var:
    """sum over rows of -sum_v weights[v] log softmax(logits)[v], divided by `count`, the rows unless given; float64.

    logits (B, V), weights (B, V) floats: labels that were smoothed (Szegedy et al. 2016, section 7) or mixed (Zhang et
    al. 2018). dlogits = g (softmax sum(weights) - weights) / count. Raises ValueError where the count is 0.
    """
    x, w = logits.value.astype(np.float64), weights.astype(np.float64)
    count = len(x) if count is None else count
    if count == 0:
        raise ValueError("cross entropy has no target: the batch is empty")
    log_p = x - special.logsumexp(x, axis=-1, keepdims=True)
    loss = -(w * log_p).sum() / count
    return node(np.asarray(loss), (logits, lambda g: (np.exp(log_p) * w.sum(-1, keepdims=True) - w) * (g / count)))


# --- wiring: moves values, changes none -------------------------------------------------------------------------------


def embedding(table: Var, index: np.ndarray) -> Var:
    """y[...] = table[index[...]], (V, D) -> (..., D). dtable adds g up by row."""

    def dtable(g: np.ndarray) -> np.ndarray:
        out = np.zeros(table.shape, np.float64)
        np.add.at(out, index.reshape(-1), g.reshape(-1, g.shape[-1]))
        return out

    return node(table.value[index], (table, dtable))


def split_heads(x: V, heads: int) -> V:
    """(B, T, D) -> (B, H, T, K)."""

    def move(v: np.ndarray) -> np.ndarray:
        parts = min(heads, v.shape[-1])  # a scale per token has one channel, whatever the heads
        return v.reshape(*v.shape[:2], parts, -1).transpose(0, 2, 1, 3)

    return x.arrange(move, edges=[(x, lambda g: g.transpose(0, 2, 1, 3).reshape(x.shape))])


def merge_heads(x: V) -> V:
    """(B, H, T, K) -> (B, T, H K)."""
    b, h, t, k = x.shape

    def move(v: np.ndarray) -> np.ndarray:
        return v.transpose(0, 2, 1, 3).reshape(v.shape[0], v.shape[2], -1)

    return x.arrange(move, edges=[(x, lambda g: g.reshape(b, t, h, k).transpose(0, 2, 1, 3))])


def spread_heads(x: V, width: int) -> V:
    """(..., H) -> (..., H K): each head's value K times. dx sums each group of K."""

    def move(v: np.ndarray) -> np.ndarray:
        return np.repeat(v, width, axis=-1) if v.shape[-1] == x.shape[-1] else v  # a scale per token stays one

    return x.arrange(move, edges=[(x, lambda g: g.reshape(*x.shape, width).sum(axis=-1))])


def swap_last(x: Var) -> Var:
    """(..., M, N) -> (..., N, M)."""
    return node(np.swapaxes(x.value, -1, -2), (x, lambda g: np.swapaxes(g, -1, -2)))


def reshape(x: Var, shape: tuple[int, ...]) -> Var:
    """(...) -> shape, row by row."""
    return node(x.value.reshape(shape), (x, lambda g: g.reshape(x.shape)))


def concat(parts: list[V], axis: int) -> V:
    """Joins along one axis; the gradient is cut at the same places."""
    cuts = np.cumsum([p.shape[axis] for p in parts])[:-1]
    edges = [(p, lambda g, i=i: np.split(g, cuts, axis=axis)[i]) for i, p in enumerate(parts)]
    return parts[0].arrange(lambda *v: np.concatenate(v, axis=axis), *parts[1:], edges=edges)


def token(x: V, position: int) -> V:
    """(B, T, D) -> (B, D): one token of every sequence."""

    def dx(g: np.ndarray) -> np.ndarray:
        out = np.zeros(x.shape, g.dtype)
        out[:, position] = g
        return out

    return x.arrange(lambda v: v[:, position], edges=[(x, dx)])


def patches(image: np.ndarray, size: int) -> np.ndarray:
    """(B, C, S, S) -> (B, N, C size size), row by row; a patch's values in the order of a convolution's weight."""
    b, c, s, _ = image.shape
    n = s // size
    cut = image.reshape(b, c, n, size, n, size).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(cut).reshape(b, n * n, c * size * size)
