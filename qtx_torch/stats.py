"""Outlier statistics of one batch's tensor, and of its attention, in float64.

A batch holds sequences: the real tokens of one, times the channels, are its elements. A unit is a sequence, or a token
of (B, T, C). What is given per unit and per channel can be pooled over batches, so that a data set takes one pass. The
published "max inf norm" is the largest, over a list of sites, of the mean of `inf_norm` over units (Bondarenko et al.
2023, section 5, and the code behind it).

Channels are the last axis of (B, T, C) and (B, C), and the heads of (B, H, T, n), whose last axis is keys or a head's
own channels. `where`, true at elements that count, is (B, T, 1) for the first and (B or 1, 1, T, n or 1) for the last.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from qtx_ref.spec import (
    BINS,
    DROPPED,
    MOMENTS,
    SIGMAS,
    STATISTICS,
    check_where,
)

CHUNK = 2**18  # elements that a thread takes at a time
BLOCK = 2**16  # of these, in float64 twice: they stay in its cache


def _rows(x: Tensor, where: Tensor | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The elements that count: values (R, N), each row's place in x, and its sequence; all at once, or where heads have
    a mask, a sequence at a time.

    A row is a token's channels, or one head's pairs; its place counts the tokens, or the heads, of all sequences.
    """
    per = x.shape[1] if x.ndim > 2 else 1  # rows of a sequence
    flat = x.flatten(2).flatten(0, 1) if x.ndim == 4 else x.reshape(-1, x.shape[-1])  # (B per, N)
    place = torch.arange(len(flat), device=x.device)
    if x.ndim == 4 and where is not None and not where.all():
        keep = where.expand(len(where), 1, *x.shape[2:]).flatten(1)  # (B or 1, T n)
        for kept, part in zip(keep, place.chunk(len(keep)), strict=True):
            pairs = kept.nonzero()[:, 0]
            if len(pairs):
                yield flat[part[0] : part[-1] + 1].index_select(1, pairs), part, part // per
        return
    if x.ndim < 4 and where is not None:
        place = where.expand(*x.shape[:-1], 1).flatten().nonzero()[:, 0]
        flat = flat if len(place) == len(flat) else flat.index_select(0, place)
    if len(place):
        yield flat, place, place // per


@cache
def _workers() -> ThreadPoolExecutor:
    """As many threads as torch computes with, each of which computes alone: chunks are too small to be shared by op."""
    count = torch.get_num_threads()
    started = threading.Barrier(count)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # the first look at it in a thread takes what stands for all
        started.wait()

    pool = ThreadPoolExecutor(count, initializer=begin)
    list(pool.map(lambda _: None, range(count)))
    torch.set_num_threads(count)  # of all other threads, as before
    return pool


@cache
def _held(device: torch.device, thread: int) -> Tensor:
    return torch.empty((2, 2 * BLOCK), dtype=torch.float64, device=device)


def _buffers(shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    """Two float64 tensors to write into. Held from call to call, by thread: fresh pages cost more than what is written
    to them."""
    size = shape.numel()
    held = _held(device, threading.get_ident())
    held = held if size <= held.shape[1] else torch.empty((2, size), dtype=torch.float64, device=device)
    return tuple(half[:size].view(shape) for half in held)


class Memo:
    """A result made once for a value that comes several times in a row, as one tensor that several linears take in.

    The value is told by identity, and held until another comes, so that no new one can pass for it."""

    def __init__(self, make: Callable[..., Any]) -> None:
        """make: called with the value and what else `get` is given, which belongs to the value."""
        self.make = make
        self.value: Any = None
        self.result: Any = None

    def get(self, value: Any, *rest: Any) -> Any:
        """make(value, *rest), or what it gave for this value just before."""
        if value is not self.value:
            self.value, self.result = value, self.make(value, *rest)
        return self.result


def add_axes(x: Tensor, axes: int) -> Tensor:
    """x with so many axes or more: a number is a vector of one, and a vector one row."""
    return x.reshape((1,) * (axes - x.ndim) + tuple(x.shape))


def check_places(x: Tensor, where: Tensor | None) -> None:
    """Raises ValueError where a mask is not boolean or not of x's places: one for all channels, or all heads."""
    if where is not None:
        places = (len(x), 1, *x.shape[2:]) if x.ndim == 4 else (*x.shape[:-1], 1)
        check_where(where.dtype == torch.bool, tuple(where.shape), places)


def central_moments(values: Tensor) -> Tensor:
    """Count, mean, and sums of the second, third and fourth powers of the deviations from it, of each row of (U, N):
    (U, 5) float64; zeros without elements."""
    if not values.shape[1]:
        return torch.zeros((len(values), 5), dtype=torch.float64, device=values.device)
    wide = values.double()
    low, high = wide.aminmax(dim=1)
    mean = torch.where(low == high, low, wide.mean(dim=1))  # of equal numbers the mean is that number, without rounding
    deviation = wide - mean[:, None]
    square = deviation * deviation
    powers = [torch.linalg.vecdot(*pair) for pair in ((deviation, deviation), (square, deviation), (square, square))]
    return torch.stack([torch.full_like(mean, values.shape[1]), mean, *powers], dim=1)


def kurtosis_published(moments: Tensor) -> Tensor:
    """m4 / (s^4 + 1e-6) with the unbiased deviation s, of moments (..., 5), as in the published code; a normal variable
    has about 3."""
    n, _, second, _, fourth = moments.unbind(dim=-1)
    return fourth / n / ((second / (n - 1).clamp(min=1)) ** 2 + 1e-6)


def kurtosis(moments: Tensor) -> Tensor:
    """m4 / m2^2, of moments (..., 5): the textbook definition (Pearson), 3 for a normal variable; 0 where all are
    equal, NaN where one is not finite."""
    n, _, second, _, fourth = moments.unbind(dim=-1)
    return torch.where(second != 0, n * fourth / second**2, 0.0)


def magnitude_bins(x: Tensor) -> Tensor:
    """The bin of each |x|, int32 below BINS: the first bits of its float32 pattern, the sign apart."""
    bits = x.float().contiguous().view(torch.int32)
    return torch.bitwise_right_shift(bits, DROPPED).bitwise_and_(BINS - 1)


def top_share(energy: Tensor, fraction: float) -> float:
    """Share of the energy in the `fraction` of channels that have most, at least one channel; 0 without energy."""
    count = max(1, round(fraction * energy.numel()))
    whole = float(energy.sum())
    return float(energy.sort().values[-count:].sum()) / whole if whole else 0.0


def moments(x: Tensor, where: Tensor | None = None, names: tuple[str, ...] = MOMENTS) -> dict[str, Tensor]:
    """Of the rows of x (..., I) that count: their number (), and in float64 their sum (I,), the largest magnitude (I,)
    and x^T x (I, I), the Gram matrix."""
    x = add_axes(x, 1)
    check_places(x, where)
    keep = torch.ones((*x.shape[:-1], 1), dtype=torch.bool, device=x.device)
    keep = keep if where is None else where.expand(keep.shape)
    rows = x.reshape(keep.numel(), x.shape[-1])[keep.reshape(-1)].double()
    make = {
        "count": lambda: torch.tensor(len(rows)),
        "sum": lambda: rows.sum(dim=0),
        "absmax": lambda: rows.abs().amax(dim=0) if len(rows) else rows.sum(dim=0),
        "gram": lambda: rows.T @ rows,
    }
    return {name: make[name]() for name in names}


def describe(
    x: Tensor, where: Tensor | None = None, unit: str = "sequence", names: tuple[str, ...] = STATISTICS
) -> dict[str, Tensor]:
    """The statistics of `names` for one tensor.

    Per unit that has elements, (U,): `inf_norm` (the largest |x|), `lowest`, `highest`, both kurtoses, and `moments`
    (U, 5): count, mean, and sums of the second, third and fourth powers of the deviations from the mean. Per channel:
    `energy`, the sum of squares, and `beyond_channels`, elements farther than SIGMAS biased deviations from the mean of
    their own sequence. `beyond_tokens`: those by token, (B, T) of (B, T, C), and by sequence, (B, 1), of other tensors.
    `histogram` (BINS,): the number of |x| in each bin.
    """
    x = add_axes(x, 2)
    check_places(x, where)
    if x.ndim == 4 and where is not None:
        where = where[(None,) * (4 - where.ndim)]
    heads = x.shape[1] if x.ndim == 4 else 0
    names = tuple(names)
    parts = [(row[1], _summary(*row, heads, unit, names)) for row in (_rows(x, where) if x.numel() else ())]

    def join(name: str, *shape: int) -> Tensor:
        empty = torch.zeros((0, *shape), dtype=torch.float64, device=x.device)
        return torch.cat([empty, *(part[name] for _, part in parts)])

    def total(name: str, size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return sum((part[name] for _, part in parts), torch.zeros(size, dtype=dtype, device=x.device))

    def by_token() -> Tensor:
        count = torch.zeros(x.shape[:-1] if not heads else x.shape[:2], dtype=torch.int64, device=x.device)
        for place, part in parts:
            count.view(-1)[place] = part["beyond_rows"]
        return count if x.ndim == 3 else count.reshape(len(x), -1).sum(dim=1, keepdim=True)

    channels = heads or x.shape[-1]
    make = {
        "inf_norm": lambda: torch.maximum(-join("lowest"), join("highest")),
        "lowest": lambda: join("lowest"),
        "highest": lambda: join("highest"),
        "moments": lambda: join("moments", 5),
        "kurtosis": lambda: kurtosis(join("moments", 5)),
        "kurtosis_published": lambda: kurtosis_published(join("moments", 5)),
        "energy": lambda: total("energy", channels, torch.float64),
        "histogram": lambda: total("histogram", BINS),
        "beyond_channels": lambda: total("beyond_channels", channels),
        "beyond_tokens": by_token,
    }
    return {name: make[name]() for name in names}


def _summary(
    values: Tensor, place: Tensor, owner: Tensor, heads: int, unit: str, names: tuple[str, ...]
) -> dict[str, Tensor]:
    """The parts that `describe` joins, of rows as `_rows` gives them.

    Three looks at the values: for their ends, for the sums that the means take, and for all that float64 takes, block
    by block in the cache: there the sums of powers are by row, and those of a sequence are made of its rows'.
    """
    _, owner, tokens = torch.unique_consecutive(owner, return_inverse=True, return_counts=True)
    length = values.shape[1]
    size = tokens * length  # elements of each sequence

    def gather(by_row: Tensor) -> Tensor:
        return by_row.new_zeros(len(size)).index_add_(0, owner, by_row)

    low, high = values.amin(dim=1).double(), values.amax(dim=1).double()
    results = {"lowest": low, "highest": high}
    if unit == "sequence":
        pairs = zip(results.items(), ("amin", "amax"), strict=True)
        ends = {
            k: low.new_zeros(len(size)).scatter_reduce_(0, owner, v, how, include_self=False) for (k, v), how in pairs
        }
        results |= ends
    outliers = "beyond_channels" in names or "beyond_tokens" in names
    spread = "moments" in names or "kurtosis" in names or "kurtosis_published" in names
    threads = 1 if values.is_cuda else torch.get_num_threads()
    apply = map if threads == 1 else _workers().map
    rows, block = -(-len(values) // threads), len(values)  # of a piece, and of a block of it
    if not values.is_cuda:
        rows, block = (max(1, min(rows, limit // length)) for limit in (CHUNK, BLOCK))
    centre = None
    if outliers or spread:
        sums = torch.cat(list(apply(lambda part: part.double().sum(dim=1), values.split(block))))
        mean = gather(sums) / size
        if unit == "sequence":  # of equal numbers the mean is that number, without rounding
            mean = torch.where(results["lowest"] == results["highest"], results["lowest"], mean)
            centre = mean[owner]
        else:
            centre = torch.where(low == high, low, sums / length)
    centres = repeat(None) if centre is None else centre.split(rows)
    pieces = zip(values.split(rows), place.split(rows), centres, strict=False)
    wanted = "histogram" in names, "energy" in names
    counts, energies, powers = zip(*apply(lambda piece: _sums(*piece, block, heads, *wanted), pieces), strict=True)
    results |= {"histogram": sum(counts), "energy": sum(energies)}
    if centre is None:
        return results
    powers = torch.cat(powers, dim=1)
    if unit == "token":
        results["moments"] = torch.stack([torch.full_like(centre, length), centre, *powers], dim=1)
        second = gather(powers[0] + length * (centre - mean[owner]).square())
    else:
        by_unit = [gather(power) for power in powers]
        results["moments"] = torch.stack([size, mean, *by_unit], dim=1)
        second = by_unit[0]
    if outliers:
        limit, centre = (SIGMAS**2 * second / size)[owner], mean[owner]
        far = (torch.maximum(high - centre, centre - low).square() > limit).nonzero()[:, 0]
        beyond = (values[far].double() - centre[far, None]).square() > limit[far, None]
        count = beyond.sum(dim=1)
        results["beyond_rows"] = torch.zeros_like(place).index_copy_(0, far, count)
        by_head = place.new_zeros(heads or length)
        results["beyond_channels"] = by_head.index_add_(0, place[far] % heads, count) if heads else beyond.sum(dim=0)
    return results


def _sums(
    values: Tensor, place: Tensor, centre: Tensor | None, rows: int, heads: int, histogram: bool, energy: bool
) -> tuple[Tensor | int, Tensor | int, Tensor | None]:
    """Of values (R, N), so many rows at a time: the histogram, the energy by channel, and the sums of the second, third
    and fourth powers of the deviations from each row's centre (3, R)."""
    counts = torch.bincount(magnitude_bins(values).flatten(), minlength=BINS) if histogram else 0
    if not energy and centre is None:
        return counts, 0, None
    powers = None if centre is None else torch.empty((3, len(values)), dtype=torch.float64, device=values.device)
    total = torch.zeros(heads or values.shape[1], dtype=torch.float64, device=values.device)
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        block = values[part]
        wide, square = _buffers(block.shape, block.device)
        wide.copy_(block)
        if energy:
            by_row = torch.mul(wide, wide, out=square).sum(dim=1 if heads else 0)
            total = total.index_add_(0, place[part] % heads, by_row) if heads else total.add_(by_row)
        if powers is not None:
            torch.mul(wide.sub_(centre[part, None]), wide, out=square)
            torch.sum(square, dim=1, out=powers[0, part])
            torch.sum(wide.mul_(square), dim=1, out=powers[1, part])
            torch.sum(square.mul_(square), dim=1, out=powers[2, part])
    return counts, total, powers


def attention(probs: Tensor, where: Tensor, marks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums over the queries that have keys, by head, (H,) each; `queries` and `choices` are their numbers.

    probs (B, H, Tq, Tk); where broadcasts to it and is true at allowed pairs; each of marks (B, Tk) is true at marked
    keys. `mass.<mark>`: the probability given to the marked keys; `even.<mark>`: the share of the allowed keys that
    they are. `entropy` in nats, of the row scaled to sum 1 (clipping leaves less; a row of zeros has 0); `relative`:
    divided by its largest value, the logarithm of the number of keys, over the `choices`, queries with more than one
    key. `kept`: the probability given to all keys, of which clipping and sinks leave less than 1.
    """
    check_places(probs, where)
    keep = where.expand(len(probs), 1, *probs.shape[2:])
    keys = keep.sum(dim=-1)  # (B, 1, Tq)
    p = probs.double().masked_fill(~keep, 0)
    whole = p.sum(dim=-1, keepdim=True)
    entropy = torch.special.entr(p / whole.masked_fill(whole == 0, 1)).sum(dim=-1)  # (B, H, Tq)
    largest = keys.double().clamp(min=1).log()
    sums = {
        "queries": (keys > 0).sum().expand(probs.shape[1]),
        "choices": (keys > 1).sum().expand(probs.shape[1]),
        "entropy": entropy.sum(dim=(0, 2)),
        "kept": whole.sum(dim=(0, 2, 3)),
        "relative": (entropy / largest.masked_fill(keys < 2, math.inf)).sum(dim=(0, 2)),
    }
    for mark, marked in marks.items():
        chosen = marked[:, None, :, None].double()  # (B, 1, Tk, 1)
        sums[f"mass.{mark}"] = (p @ chosen).sum(dim=(0, 2, 3))
        share = (keep.double() @ chosen)[..., 0] / keys.clamp(min=1)  # (B, 1, Tq)
        sums[f"even.{mark}"] = share.sum().expand(probs.shape[1])
    return sums


def updates(context: Tensor, weight: Tensor, residual: Tensor, where: Tensor | None, heads: int) -> dict[str, Tensor]:
    """How large each head's part of the attention's output is against what it is added to, summed over real tokens.

    context (B, T, D), what enters the output projection, heads side by side; weight (D, D) of that projection; residual
    (B, T, D); where (B, T, 1). `update` (H,): the L2 norm of a head's part over that of the residual, NaN where a
    token's is not finite; `tokens`: how many.
    """
    check_places(context, where)
    rows = slice(None) if where is None else where.expand(*context.shape[:2], 1).flatten().nonzero()[:, 0]
    c, r = (x.double().flatten(0, 1)[rows] for x in (context, residual))  # (N, D)
    parts = weight.double().unflatten(1, (heads, -1)).transpose(0, 1)  # (D, H K) -> (H, D, K)
    triangle = torch.linalg.qr(parts, mode="r").R  # |W c| = |R c|, with R (H, K, K)
    sizes = (c.unflatten(1, (heads, -1)).transpose(0, 1) @ triangle.mT).norm(dim=-1)  # (H, N)
    against = r.norm(dim=-1)
    relative = torch.where(against != 0, sizes / against, 0.0)
    relative = torch.where(relative.isfinite(), relative, math.nan)
    return {"update": relative.sum(dim=1), "tokens": torch.tensor(len(c), device=c.device).expand(heads)}


def sizes(x: Tensor, where: Tensor | None, marks: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """L2 norms of the heads' parts of a tensor, summed over real tokens, by head, (H,) each: as the figures of
    Bondarenko et al. 2023 (section 3) show values and their products with probabilities.

    x (B, T, D), heads side by side; where (B, T, 1); each of marks (B, T) is true at marked tokens. `<mark>`: of the
    marked tokens, `count.<mark>`: how many they are; `all`: of all tokens.
    """
    norms = torch.linalg.vector_norm(x.double().unflatten(-1, (heads, -1)), dim=-1)  # (B, T, H)
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    real = real if where is None else where.expand(*x.shape[:2], 1).squeeze(-1)
    sums = {}
    for name, marked in {"all": real, **marks}.items():
        chosen = (real & marked.expand(real.shape)).double()
        sums[name] = torch.einsum("bth,bt->h", norms, chosen)
        sums[f"count.{name}"] = chosen.sum().long().expand(heads)
    return sums


def openings(gate: Tensor, where: Tensor | None, heads: int) -> dict[str, Tensor]:
    """How far gates are open: their probabilities summed by head, (H,), and how many they are.

    gate: (H,) of a head, (B, 1, H) of a sequence, (B, T, H) of a token, or (B, T, D) of a feature, whose mean over the
    head's own is taken. where (B, T, 1), true at real tokens, or None.
    """
    wide = gate.double().unflatten(-1, (heads, -1)).mean(dim=-1).reshape(-1, heads)  # (..., H)
    if where is not None:
        wide = wide[where.expand(*gate.shape[:-1], 1).flatten()]
    return {"gate": wide.sum(dim=0), "gates": torch.tensor(len(wide), device=gate.device).expand(heads)}
