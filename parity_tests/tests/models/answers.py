"""What a call answers, a value or an error and its words, of both backends side by side."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from qtx_ref.tape import Var

NAN, INF = np.nan, np.inf


def tensors(x: Any) -> Any:
    """Arrays as tensors of the same dtype and strides."""
    if isinstance(x, np.ndarray):
        if x.ndim > 1 and not x.flags.c_contiguous:
            return torch.tensor(np.ascontiguousarray(x.T)).mT if x.ndim == 2 else torch.tensor(x.copy())
        return torch.tensor(x.copy())
    return x


def plain(x: Any) -> Any:
    """A result as NumPy arrays, in whatever it comes."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, (tuple, list)):
        return [plain(value) for value in x]
    return np.asarray(x.value if isinstance(x, Var) else x.numpy() if isinstance(x, torch.Tensor) else x)


def answer(call: Callable[..., Any], *given: Any) -> Any:
    """What a call gives, or the error and its words."""
    try:
        return plain(call(*given))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def same(got: Any, want: Any) -> None:
    if isinstance(want, dict):
        assert list(got) == list(want)
        for key in want:
            same(got[key], want[key])
    elif isinstance(want, list):
        assert len(got) == len(want)
        for pair in zip(got, want, strict=True):
            same(*pair)
    elif isinstance(want, str) or isinstance(got, str):
        assert isinstance(got, str) and isinstance(want, str) and got == want
    else:
        assert got.shape == want.shape and (got.dtype.kind == "f") == (want.dtype.kind == "f")
        np.testing.assert_array_equal(got, want)


def wider(x: np.ndarray) -> np.ndarray:
    """The same numbers with steps between them, the last axis backwards in memory."""
    room = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    view = room[..., ::-2]
    view[...] = x
    return view
