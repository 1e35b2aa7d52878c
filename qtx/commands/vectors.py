"""`qtx vectors`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qtx_ref.spec import SpecError

from ..engines.machine import Machine
from ..jobs.vectors import COUNT, CheckRequest, VectorsRequest, check_vectors, write_vectors
from .options import ARTIFACT, DATA, JSON, MACHINE, OUT, say, write_json


@click.command(name="vectors")
@ARTIFACT
@DATA
@click.option("--out", type=OUT, help="The .safetensors to write.")
@click.option("--check", type=click.Path(path_type=Path), help="Vectors to hold this model and backend to instead.")
@click.option("--count", type=click.IntRange(1), help=f"Sequences or images to write; default {COUNT}.")
@click.option("--strict", is_flag=True, help="Run in integer dtypes only.")
@MACHINE
@JSON
def vectors_command(
    model: Path,
    data: str | None,
    tokenizer: Path | None,
    out: Path | None,
    check: Path | None,
    count: int | None,
    strict: bool,
    machine: Machine,
    json_path: str | None,
) -> None:
    """Write golden vectors, or hold a backend to them.

    Inputs, the codes of every site in the order of the forward pass, accumulators and outputs, for porting to a device.
    --check runs the file's own inputs again; exit status 1 if anything differs.
    """
    if check is not None and out is None:
        if data or tokenizer or count:
            raise SpecError(f"--data, --tokenizer and --count belong to --out: {check} has its own inputs")
        compare(CheckRequest(model, check, strict, machine), json_path)
    elif out is not None and check is None:
        request = VectorsRequest(model, out, count or COUNT, strict, data, tokenizer, machine)
        names, inputs = write_vectors(request)
        say(f"{out}: {len(names)} tensors of {inputs} inputs", json_path)
        write_json(json_path, {"vectors": str(out), "tensors": names})
    else:
        raise SpecError("give --out FILE to write vectors, or --check FILE to compare with them")


def compare(request: CheckRequest, json_path: str | None) -> None:
    """Runs the vectors' inputs again. Exit status 1 if anything differs; the first in forward order is named."""
    count, wrong = check_vectors(request)
    say(f"{count} tensors, {len(wrong)} differ" + (f", first {wrong[0]}" if wrong else ""), json_path)
    write_json(json_path, {"tensors": count, "differ": wrong})
    if wrong:
        sys.exit(1)
