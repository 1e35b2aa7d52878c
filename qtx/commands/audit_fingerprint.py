"""`qtx audit fingerprint`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qtx_ref.spec import SpecError

from ..audit.fingerprint.boxes import ARGUMENTS, CODES, choose_path, load_function, open_path
from ..audit.fingerprint.finding import find_rules
from ..audit.fingerprint.report import as_json, list_sources, make_profile, tell
from ..files.container import check_writable
from ..files.formats import PROFILE
from ..files.profiles import write_profile
from ..progress import Progress
from .options import JSON, OUT, say, split_list, write_json
from .parity import Verdicts

USUAL = 40  # calls of a search at most, as they were seen


@click.command(name="fingerprint", cls=Verdicts)
@click.option("--engine", "engine", metavar="PATH", help="A path of an engine, such as onnxruntime-all.")
@click.option("--callable", "target", metavar="MODULE:FUNCTION", help="A Python function; see below.")
@click.option("--op", type=click.Choice(list(ARGUMENTS)), help="Default: the path's only one; of a function quantize.")
@click.option("--codes", help="Dtypes of codes to ask for, such as uint8,int8; default: those that the box takes.")
@click.option("--cpu", help="A CPU that the engine is to imitate: avx2, or one of qemu-user's.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the fresh inputs.")
@click.option("--out", type=OUT, help="The profile to write, PROFILE.json.")
@JSON
def fingerprint_command(
    engine: str | None,
    target: str | None,
    op: str | None,
    codes: str | None,
    cpu: str | None,
    seed: int,
    out: Path | None,
    json_path: str | None,
) -> None:
    """Find the rules of a black box: of each axis its value, with the inputs that decided it.

    A function takes arrays and gives one: quantize f(x, scale, zero_point), dequantize f(code, scale, zero_point),
    fake_quantize f(x, scale, zero_point, code_min, code_max), linear f(x_codes, x_scale, x_zero, w_codes, w_scale,
    y_scale, y_zero, bias), x (1, K), w (N, K), bias (N,) or None. A zero point has the dtype of the codes. What it does
    not take, it raises for. Exit status 1 where no combination of rules explains an answer.
    """
    if (engine is None) == (target is None):
        raise SpecError("give --engine PATH or --callable MODULE:FUNCTION, one of them")
    if out is not None:
        check_writable(out, PROFILE)
    if engine is not None:
        path = choose_path(engine, op)
        function, name, of, op = open_path(path, cpu), path.name, path.engine, path.op
        taken = tuple(one for one in CODES[op] if one in path.codes)
    else:
        assert target is not None
        if cpu is not None:
            raise SpecError(f"--cpu {cpu} belongs to --engine: a function runs where it runs")
        op = op or "quantize"
        function, name, of, taken = load_function(target, op), target, "a function", CODES[op]
    asked = taken if codes is None else split_list(codes)
    if not asked or not set(asked) <= set(taken):
        raise SpecError(f"--codes {codes}: {op} of {name} has {', '.join(taken) or 'none that can be asked for'}")
    with Progress("fingerprint", USUAL) as bar:
        found, observed = find_rules(function, op, asked, seed, lambda kind: bar.advance(note=kind))
        bar.total = bar.done
    say(tell(found, observed, name), json_path)
    if out is not None and found.unexplained is None:
        write_profile(out, make_profile(found, of, name), list_sources(found))
        say(f"{out}: the profile that reproduces it", json_path)
    write_json(json_path, as_json(found, observed, name))
    if found.unexplained is not None:
        sys.exit(1)
