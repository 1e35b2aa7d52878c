"""The published shapes in integers: every code and accumulator of every site, torch against the reference.

    python -m parity_tests.long.large_integer [--model vit-s16 ...] [--inputs 4] [--device cpu]

First values of the parameters, their vectors (biases, gains) moved a little; ranges from two short random batches; then
full-length random inputs one at a time, of texts every second one with padding, and for OPT some generated tokens. Each
site is held to the reference by the hash of its bytes, so that no run is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from parity_tests.subjects.integer_models import Batch, Lowered, lower_model
from qtx_ref.backend import IntegerModel as RefModel
from qtx_ref.models.initial import init_params
from qtx_ref.presets import attention, preset
from qtx_ref.random import stream
from qtx_ref.spec import Family, ModelSpec
from qtx_torch.backend import IntegerModel

ATTENTIONS = {"bert-base": "clipped", "opt-125m": "gated", "opt-350m": "sink", "vit-s16": "clipped_row+mlp"}
SHORT, GENERATED = 48, 4


def random_batch(spec: ModelSpec, length: int, *place: object) -> Batch:
    rng = stream(0, "large integer", *place)
    if spec.family is Family.VIT:
        return {"images": rng.normal(size=(1, spec.channels, spec.image_size, spec.image_size)).astype(np.float32)}
    tokens = rng.integers(0, spec.vocab, (1, length))
    return {"tokens": tokens, "types": rng.integers(0, max(spec.types, 1), tokens.shape), "mask": tokens >= 0}


def prepare(name: str) -> Lowered:
    spec = replace(preset(name), attention=attention(ATTENTIONS[name]))
    params = init_params(spec, 0)
    for key, value in params.items():
        if value.ndim == 1:
            value += stream(0, "large integer", key).normal(0, 0.05, value.shape).astype(np.float32)
    short = [random_batch(spec, SHORT, "calibration", i) for i in range(2)]
    return replace(lower_model(spec, params, short, short[0]), params={})


def digest(x: np.ndarray) -> str:
    return f"{x.dtype} {x.shape} {hashlib.sha256(np.ascontiguousarray(x)).hexdigest()}"


def find_difference(ref: RefModel, model: IntegerModel, batch: Batch) -> tuple[int, str]:
    """The number of tensors compared, and the first one that differs, or nothing."""
    want: list[tuple[str, str]] = []
    out = ref.run(batch, lambda site, x: want.append((site, digest(x))))
    want.append(("output", digest(out.value)))
    left, differing = iter(want), []

    def compare(site: str, x: np.ndarray) -> None:
        if not differing and next(left, None) != (site, digest(x)):
            differing.append(site)

    compare("output", model.run(batch, compare).value)
    if not differing and (missing := next(left, None)) is not None:
        differing.append(missing[0])
    return len(want), "".join(differing)


def compare_generated(ref: RefModel, model: IntegerModel, start: np.ndarray) -> tuple[int, str]:
    """The same of `GENERATED` tokens: their integers, and the text."""
    runs = []
    for each in (ref, model):
        digests: list[str] = []

        def greedy(scores: np.ndarray, kept: list[str] = digests) -> np.ndarray:
            kept.append(digest(scores))
            return scores.argmax(-1)

        text = digest(each.generate(start, GENERATED, greedy))
        runs.append([*digests, text])
    return len(runs[0]), "" if runs[0] == runs[1] else "generated"


def check(name: str, count: int, device: str) -> Iterator[tuple[str, int, str]]:
    """What was run, how many tensors were compared, the first that differs; progress is printed."""
    low = prepare(name)
    ref, model = low.model(RefModel), low.model(IntegerModel, device=device)
    for i in range(count):
        batch = random_batch(low.spec, low.spec.length, "input", i)
        padded = i % 2 == 1 and "mask" in batch
        if padded:
            batch["mask"][:, -low.spec.length // (i + 2) :] = False
        yield f"input {i}{', padded' if padded else ''}", *find_difference(ref, model, batch)
    if low.spec.family is Family.OPT:
        yield f"{GENERATED} tokens", *compare_generated(ref, model, random_batch(low.spec, 32, "start")["tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(ATTENTIONS), default=list(ATTENTIONS))
    parser.add_argument("--inputs", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows, failed = [], False
    for name in options.model:
        start = time.perf_counter()
        for what, tensors, differs in check(name, options.inputs, options.device):
            seconds = time.perf_counter() - start
            print(f"{name}: {what}: {tensors} tensors, {differs or 'all equal'}; {seconds:.0f} s", flush=True)
            rows.append((name, ATTENTIONS[name], what, str(tensors), differs or "none"))
            failed |= bool(differs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak memory {peak:.1f} GiB\n\n| model | attention | run | tensors | first that differs |")
    print("|---|---|---|---|---|")
    for row in rows:
        print("|", " | ".join(row), "|")
    sys.exit(failed)


if __name__ == "__main__":
    main()
