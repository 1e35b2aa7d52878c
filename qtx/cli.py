"""The command line. Every error that a user can mend is one line on stderr and exit status 1.

`qtx parity` exits with 2 and 3 instead, and a command line that does not parse with 2, as click has it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from typing import Any

import click

from qtx_ref.spec import read_processes

from . import __version__
from .commands.analyze import analyze_command
from .commands.audit import audit_command
from .commands.cost import cost_command
from .commands.diff import diff_command
from .commands.evaluate import evaluate_command
from .commands.finetune import finetune_command
from .commands.generate import generate_command
from .commands.hub import export_command, import_command
from .commands.parity import parity_command
from .commands.ptq import ptq_command
from .commands.quantize import quantize_command
from .commands.recipes import recipes_command
from .commands.runs import runs_command
from .commands.show import show_command
from .commands.study import study_command
from .commands.train import train_command
from .commands.vectors import vectors_command
from .jobs.run import MENDABLE
from .signals import Interrupted, exit_status, give_way, handle, interrupt

DISTRIBUTED = ("train",)  # commands that several processes run together
GIVE_WAY_SECONDS = 5.0  # to the first of several processes, which mostly has the same error to say
RESUMED = ("finetune", "ptq", "study", "train")  # commands that have --resume


@contextmanager
def be_silent() -> Iterator[None]:
    """Nothing is printed: of several processes the first one speaks. An error that comes out of it is."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


class Commands(click.Group):
    """Turns mendable errors into one line; SIGINT and SIGTERM end every command with 130 and 143."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that was named. Raises ClickException where several processes have one that they cannot share."""
        name, command, rest = super().resolve_command(ctx, args)
        count = read_processes()[1]
        if count > 1 and name not in DISTRIBUTED:
            raise click.ClickException(f"torchrun started {count} processes, and only qtx train divides its work")
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command that was named. Raises ClickException for what a user can mend, click's Exit for a
        signal."""
        rank, _ = read_processes()
        try:
            with handle(interrupt), be_silent() if rank else nullcontext():
                return super().invoke(ctx)
        except Interrupted as stop:
            if rank == 0:
                click.echo(f"\n{stop}; the same command with --resume goes on", err=True)
            ctx.exit(exit_status(stop))
        except KeyboardInterrupt as stop:
            resumes = ctx.invoked_subcommand in RESUMED
            click.echo("\nstopped" + ("; the same command with --resume goes on" if resumes else ""), err=True)
            ctx.exit(exit_status(stop))
        except BrokenPipeError:  # whoever read the output has enough
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # nothing is left to flush at exit
            ctx.exit(1)
        except (*MENDABLE, click.ClickException) as error:
            if rank and not isinstance(error, ConnectionError):
                give_way(GIVE_WAY_SECONDS)
            if isinstance(error, click.ClickException):
                raise
            raise click.ClickException(" ".join(str(error).split())) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Quantized transformers: train without outliers, quantize, and prove what the integers mean."""


for command in (
    study_command,
    train_command,
    evaluate_command,
    generate_command,
    runs_command,
    recipes_command,
    analyze_command,
    quantize_command,
    ptq_command,
    cost_command,
    parity_command,
    audit_command,
    show_command,
    diff_command,
    vectors_command,
    import_command,
    export_command,
    finetune_command,
):
    main.add_command(command)
