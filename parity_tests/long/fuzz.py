"""Hostile files and commands: `python -m parity_tests.long.fuzz --files 3000 --commands 1000 --flips 200 --seed 0`.

Each case is a command in this process, in a folder that also holds files of other programs. A case fails by a
traceback, by taking longer than a limit, or by changing a file that it was not asked to write. A flipped bit fails by
going unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.testing import CliRunner
from safetensors.numpy import save_file

from parity_tests.subjects import hostile, mutations
from parity_tests.subjects.mutations import pick
from qtx.cli import main as qtx
from qtx.data.splits import digest
from qtx.data.tokenizing import read_bundled_tokenizer
from qtx.files.checkpoint import Checkpoint, save_checkpoint
from qtx_ref.models.initial import init_params

LIMIT = 180  # seconds of a case, on a machine that does much else
MEMORY = 8 * 2**30  # bytes that the script may address: a case that asks for more fails


class TooLong(BaseException):
    """A case has reached the limit."""


@dataclass
class Tally:
    """What happened: cases by group and how they ended, and the failures in words."""

    counts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    longest: float = 0.0

    def fail(self, kind: str, case: str, detail: str = "") -> None:
        self.counts[kind] += 1
        self.failures.append(f"{kind}: {case}\n{detail}")


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TooLong in whatever runs longer. Not more than one at a time."""

    def stop(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def make_folder(folder: Path) -> None:
    """Models, results, data and files of other programs: what the cases read and may not harm."""
    os.chdir(folder)
    tokenizer = read_bundled_tokenizer()
    text = {"tokenizer": tokenizer, "data": {"kind": "text", "tokenizer_sha256": digest(tokenizer.encode())}}
    for name, spec, meta in (("vit", hostile.VIT, {}), ("opt", hostile.OPT, text), ("bert", hostile.BERT, text)):
        save_checkpoint(Path(f"{name}.safetensors"), Checkpoint(spec, init_params(spec, 0), meta=meta))
    words = np.array(["the", "cat", "sat", "on", "a", "mat", "and", "saw", "some", "rain", "fall", "there"])
    rng = np.random.default_rng(0)
    split = ["train"] * 8 + ["calibration"] * 4 + ["evaluation"] * 4
    rows = [(" ".join(rng.choice(words, 9)), "yn"[i % 2], split[i]) for i in range(16)]
    Path("set.csv").write_text("text,label,split\n" + "".join(",".join(row) + "\n" for row in rows))
    lines = ('{"text": "%s", "label": "%s", "split": "%s"}\n' % row for row in rows)  # noqa: UP031
    Path("set.jsonl").write_text("".join(lines))
    for command in (
        ("export", "bert.safetensors", "--out", "hub"),
        ("quantize", "vit.safetensors", "--out", "vit.qtx", "--backend", "ref"),
        ("quantize", "vit.safetensors", "--out", "other.qtx", "--recipe", "w4a8", "--backend", "ref"),
        ("quantize", "vit.safetensors", "--out", "ranges.safetensors", "--backend", "ref"),
        ("vectors", "vit.qtx", "--out", "vectors.safetensors", "--count", 1, "--backend", "ref"),
        (*hostile.PTQ, "--backend", "ref"),
        (*hostile.STUDY, "--backend", "ref"),
        ("recipes", "w8a8-p99.9", "--model", "vit-tiny", "--json", "recipe.json"),
    ):
        result = run_command(command)
        assert result.exit_code == 0, (command, result.output)
    for name, content in hostile.FOREIGN.items():
        Path(name).parent.mkdir(exist_ok=True)
        if content is None:
            save_file({"a": np.zeros(3, np.float32)}, name, {"format": "pt"})
        else:
            Path(name).write_bytes(content)
    Path("link.json").symlink_to("user.json")
    Path("dangling.json").symlink_to("nowhere.json")


def run_command(arguments: tuple[Any, ...]) -> Any:
    return CliRunner().invoke(qtx, [str(argument) for argument in arguments])


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and link by its content."""
    return {str(path.relative_to(folder)): describe(path) for path in folder.rglob("*") if not is_folder(path)}


def is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def describe(path: Path) -> str:
    """A file by its hash, a link by where it leads."""
    if path.is_symlink():
        return f"-> {os.readlink(path)}"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "pipe"


def restore(folder: Path, whole: Path, changed: set[str]) -> None:
    """Takes away what a case left, and puts back what it changed."""
    known = snapshot_names(whole)
    for path in sorted(folder.rglob("*"), reverse=True):
        name = str(path.relative_to(folder))
        if name not in known:
            shutil.rmtree(path) if is_folder(path) else path.unlink()
    for name in changed:
        if name == hostile.PIPE:
            (folder / name).unlink(missing_ok=True)
            os.mkfifo(folder / name)
        elif (whole / name).exists() or (whole / name).is_symlink():
            (folder / name).unlink(missing_ok=True)
            shutil.copy2(whole / name, folder / name, follow_symlinks=False)


def snapshot_names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def run_case(
    tally: Tally, folder: Path, group: str, arguments: tuple[Any, ...], case: str, free: tuple[str, ...]
) -> Any:
    """Runs a command; what it did wrong goes into the tally. free: files that it may write when it succeeds."""
    before, began = snapshot(folder), time.perf_counter()
    result = None
    try:
        with time_limit(LIMIT), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = run_command(arguments)
    except TooLong:
        tally.fail("hangs", case)
    tally.longest = max(tally.longest, time.perf_counter() - began)
    if result is not None:
        tally.counts[f"{group}: exit {result.exit_code}"] += 1
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            tally.fail("tracebacks", case, "".join(traceback.format_exception(result.exception)[-4:]))
        elif result.exit_code == 1 and len(errors := error_lines(result.output)) > 1:
            tally.fail("refused in several lines", case, "\n".join(errors))
    after = snapshot(folder)
    changed = {name for name, content in before.items() if after.get(name) != content}
    refused = result is None or (result.exit_code not in (0, 130) and error_lines(result.output))
    allowed = set() if refused else set(free)
    if lost := sorted(changed - allowed):
        tally.fail("files replaced", case, ", ".join(lost))
    return result, changed


def error_lines(output: str) -> list[str]:
    """The lines of an error, from where it begins."""
    _, error, text = output.partition("Error: ")
    return text.strip().splitlines() if error else []


def change_file(path: Path, rng: np.random.Generator) -> None:
    """A change of the file's kind."""
    kinds = {".json": mutations.change_json_file, ".csv": mutations.change_rows, ".jsonl": mutations.change_rows}
    kinds.get(path.suffix, mutations.change_tensors)(path, rng)


def fuzz_files(tally: Tally, folder: Path, whole: Path, count: int, rng: np.random.Generator) -> None:
    """Mutated files, each read by a command."""
    names = list(hostile.FILES)
    for i in range(count):
        name, seed = names[i % len(names)], int(rng.integers(2**62))
        own = np.random.default_rng(seed)
        change_file(folder / name, own)
        command = hostile.with_backend(pick(hostile.FILES[name], own))
        _, changed = run_case(
            tally, folder, "files", command, f"{name}, seed {seed}: {write(command)}", hostile.RESULTS
        )
        restore(folder, whole, changed | {name})


def write(command: tuple[Any, ...]) -> str:
    return " ".join(map(str, command))[:300]


def flip_bits(tally: Tally, folder: Path, whole: Path, count: int, rng: np.random.Generator) -> None:
    """One bit of a checkpoint or an artifact, which its command must refuse."""
    readers = {"vit.safetensors": ("evaluate", "vit.safetensors", "--batches", 1), "vit.qtx": ("show", "vit.qtx")}
    for i in range(count):
        name, seed = list(readers)[i % 2], int(rng.integers(2**62))
        path = folder / name
        path.write_bytes(mutations.flip_bit(path.read_bytes(), np.random.default_rng(seed)))
        command = hostile.with_backend(readers[name])
        result, changed = run_case(tally, folder, "flips", command, f"flip of {name}, seed {seed}", ())
        if result is None or result.exit_code == 0:
            tally.fail("flips unnoticed", f"{name}, seed {seed}")
        restore(folder, whole, changed | {name})


def fuzz_commands(tally: Tally, folder: Path, whole: Path, count: int, rng: np.random.Generator) -> None:
    """Command lines as nobody should type them."""
    for _ in range(count):
        command = hostile.make_command(rng)
        asked = tuple(
            str(Path(text) / name) for text in command for name in (".", "ptq.json", "study.json", "curves.png")
        )
        free = tuple(name for name in (*hostile.RESULTS, "recipe.json") if name in asked or name in hostile.RESULTS)
        _, changed = run_case(tally, folder, "commands", command, write(command), free)
        restore(folder, whole, changed)


@click.command()
@click.option("--files", default=3000, show_default=True, help="Mutated files.")
@click.option("--commands", default=1000, show_default=True, help="Command lines.")
@click.option("--flips", default=200, show_default=True, help="Bits flipped in a checkpoint and an artifact.")
@click.option("--seed", default=0, show_default=True)
def main(files: int, commands: int, flips: int, seed: int) -> None:
    """Counts tracebacks, hangs, files replaced and flips unnoticed. Exit status 1 if there is one."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    tally = fuzz(files, commands, flips, seed)
    for failure in tally.failures:
        click.echo(failure)
    for name, count in sorted(tally.counts.items()):
        click.echo(f"{name}: {count}")
    click.echo(f"longest case {tally.longest:.1f} s; {len(tally.failures)} failures")
    sys.exit(bool(tally.failures))


def fuzz(files: int, commands: int, flips: int, seed: int) -> Tally:
    """Runs so many cases of each group, in a folder of its own."""
    tally, here = Tally(), Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        whole, folder = Path(name).resolve() / "whole", Path(name).resolve() / "folder"
        whole.mkdir()
        try:
            make_folder(whole)
            shutil.copytree(whole, folder, symlinks=True)
            for place in (whole, folder):
                os.mkfifo(place / hostile.PIPE)
            os.chdir(folder)
            for i, (run, count) in enumerate(((fuzz_files, files), (fuzz_commands, commands), (flip_bits, flips))):
                run(tally, folder, whole, count, np.random.default_rng([seed, i]))
        finally:
            os.chdir(here)
    return tally


if __name__ == "__main__":
    main()
