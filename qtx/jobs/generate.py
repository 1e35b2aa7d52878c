"""What `qtx generate` does: a text gone on with, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qtx_ref.random import stream
from qtx_ref.spec import SpecError, check_generation

from ..data.tokenizing import encode_prompt, open_tokenizer
from ..engines.machine import Machine
from ..files.artifact import Artifact
from ..files.checkpoint import Checkpoint
from .opening import need_head, open_model
from .training import Text

TOKENS = 40
HOTTEST = 1e100  # temperature at which every token is as likely as any other, and nothing overflows


@dataclass(frozen=True)
class GenerateRequest:
    """A causal model's file, the text to go on from, and how its next tokens are chosen."""

    model: Path  # a checkpoint, or an artifact
    prompt: str
    tokens: int = TOKENS  # new ones
    temperature: float = 0.0  # from 0, the likeliest token, to HOTTEST
    seed: int = 0  # of the choices
    recipe: str | None = None  # of a checkpoint: float, or one to calibrate and apply; None: its own
    data: str | None = None  # None: the model's own
    tokenizer: Path | None = None
    machine: Machine = Machine()


@dataclass(frozen=True)
class Generated:
    """The prompt's tokens and the new ones, how many of them are the prompt's, and all in words."""

    tokens: list[int]
    prompt_tokens: int
    text: str


def generate(request: GenerateRequest) -> Generated:
    """Goes on with a text, with cached keys and values, in float, under a recipe or in integers.

    Raises:
        SpecError: the model is not causal, the text would outgrow it, the prompt has no token or is no UTF-8, or a
            temperature beyond its ends.
        DataError, FileError, MissingExtra: see `evaluate`.
    """

    def check(stored: Checkpoint | Artifact) -> None:
        check_generation(stored.spec, {}, request.tokens + 1)
        need_head(request.model, stored.spec)

    if not 0 <= request.temperature <= HOTTEST:
        raise SpecError(f"temperature is {request.temperature}: give a number from 0 to {HOTTEST:g}")
    if request.tokens < 1:
        raise SpecError(f"tokens is {request.tokens}: give at least 1")
    try:
        request.prompt.encode()
    except UnicodeEncodeError:  # what a shell gives of bytes that are none
        raise SpecError(f"prompt {request.prompt!r} is no UTF-8: give text") from None
    request.machine.check()
    opened = open_model(
        request.model, request.machine, request.data, request.tokenizer, recipe_name=request.recipe, check=check
    )
    if not isinstance(opened.data, Text):
        raise SpecError(f"{request.model} has images for data: give it text with --data")
    tokenizer, _, _ = open_tokenizer(opened.data.tokenizer_json, "a prompt")
    start = np.array([encode_prompt(tokenizer, request.prompt)], np.int64)  # (1, T)
    if start.size == 0:
        raise SpecError(f"prompt {request.prompt!r} has no token: give some text")
    rng = stream(request.seed, "generate")

    def choose(logits: np.ndarray) -> np.ndarray:  # (B, V) -> (B,); Gumbel: argmax of logits / t + noise is a sample
        noise = rng.gumbel(size=logits.shape) * request.temperature
        return (logits + noise).argmax(axis=-1)

    tokens = opened.model.generate(start, request.tokens, choose)[0].tolist()
    return Generated(tokens, start.size, tokenizer.decode(tokens))
