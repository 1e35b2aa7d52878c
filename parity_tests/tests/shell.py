"""Commands as a user types them, in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from qtx.cli import main

REF = ("--backend", "ref")
TRAIN = ["train", "--backend", "ref", "--model", "vit-tiny", "--batch", "8", "--steps", "8"]
STUDY = ["study", *TRAIN[1:-1], "4", "--attention", "vanilla,gated"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def good(*arguments: object) -> Result:
    """A command that must succeed."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result
