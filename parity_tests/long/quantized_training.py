"""Twenty training steps quantized both ways, in both backends: `python -m parity_tests.long.quantized_training`.

Forced, every quantizer of torch is fed the reference's tensor and must give each code; free, both backends run on their
own and the loss of each step must agree within 2e-4, or within twice what torch's float32 run differs from its float64
run in the same steps: AdamW makes steps of full size from the smallest difference, so the rate decides how fast flipped
codes grow. The status is 1 where one does not. `qtx parity` has a slice of this.
"""

from __future__ import annotations

import argparse
import sys
import time

from parity_tests.mirror.gradients import FREE_ROWS, check_forced_steps, check_free_steps, measure_own_drift
from parity_tests.proof.case import Context
from parity_tests.proof.verdict import Verdict
from parity_tests.subjects.trained import PRESETS, STEPS


def worst(verdicts: list[Verdict], *measures: str) -> Verdict:
    """The verdict of the largest error among those of some measures."""
    return max((v for v in verdicts if v.measure in measures), key=lambda v: v.error)


def describe(name: str, recipe: str, steps: int, rows: int, rate: float, context: Context) -> bool:
    """Prints a preset's lines; whether all verdicts are good."""
    began = time.monotonic()
    forced = check_forced_steps(name, recipe, steps, rows, context)
    exact = [v for v in forced if v.measure == "exact"]
    chain = worst(forced, "relative rms")
    print(f"{name} {recipe}, {steps} steps, rate {rate:g} where free")
    print(f"  forced: {sum(v.ok for v in exact)} of {len(exact)} comparisons of codes, scales, words and masks equal")
    print(f"  forced: largest difference of an op's result {chain.error:.1e} relative RMS ({chain.what})")
    many = FREE_ROWS.get(name, 4)
    free = check_free_steps(name, recipe, steps, many, context, rate)
    own = worst(measure_own_drift(name, recipe, steps, many, context, rate), "own drift")
    loss = worst(free, "max relative")
    print(f"  free: largest difference of the loss {loss.error:.1e} relative ({loss.what}), at most {loss.tolerance:g}")
    print(f"  float32 from float64 torch, in the same steps: {own.error:.1e} ({own.what})")
    for measure, label in (("flip rate", "codes of gradient products"), ("changed values", "values of the forward")):
        rates = sorted((v for v in free if v.measure == measure), key=lambda v: -v.error)
        middle = rates[len(rates) // 2].error
        print(f"  free: {label} that differ in the last step: median {middle:.2%}; most:")
        for v in rates[:5]:
            print(f"    {v.error:8.2%}  {v.what}")
    bad = [v for v in forced + free if not v.ok and not (v in free and v.error <= 2 * own.error)]
    for v in bad[:10]:
        print(f"  DIFFERS {v.what}: {v.measure} {v.error:.3g}, at most {v.tolerance:g}")
    print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return not bad


def main() -> int:
    """Parses the command line and runs the presets."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.long.quantized_training", description=__doc__)
    parser.add_argument("--models", default=",".join(PRESETS), help="presets, with commas (default: %(default)s)")
    parser.add_argument("--recipe", default="w8a8+grad8", help="as --train-quant takes it (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="at most %(default)s")
    parser.add_argument("--rows", type=int, default=1, help="of each forced batch (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-4, help="of the free runs (default: %(default)s)")
    given = parser.parse_args()
    context = Context()
    good = [
        describe(name, given.recipe, min(given.steps, STEPS), given.rows, given.rate, context)
        for name in given.models.split(",")
    ]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
