"""All benchmarks: `python -m benchmarks`, or `make bench`.

Each group answers one question in a process of its own; what it measured is kept in benchmarks/results as soon as it is
done, row by row while it runs. Ctrl-C loses nothing; `--resume` goes on with the groups that are not done.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from qtx.progress import Progress
from qtx.signals import exit_status, handle, interrupt

from .groups import GROUPS, Group
from .harness import ROOT, Row, header, read_processor, write_json
from .report import PAGE, RESULTS, draw_results, fill_page, format_results, format_row, read_file, read_results

FOUND = {group.name: group for group in GROUPS}
Groups = click.Choice(list(FOUND))


def name_place(device: str, isa: str | None) -> str:
    """What a file of results is called: the device, and of a CPU the widest instructions for bytes that it may use."""
    if device != "cpu":
        return device.partition(":")[0]
    flags = read_processor()[1]
    if isa is None and any(flag.startswith("amx") for flag in flags):
        return "cpu-amx"
    return "cpu-vnni" if isa is None and any("vnni" in flag for flag in flags) else "cpu-avx2"


def read(path: Path) -> dict[str, Any]:
    """What a run has measured so far."""
    return read_file(path) if path.exists() else {"groups": {}, "unfinished": {}}


def run_group(group: Group, device: str, quick: bool, path: Path) -> bool:
    """Runs a group here; whether nothing in it failed. The file has each row as soon as it is there."""
    # a file in which an earlier run of this group is done keeps that until this one is
    found: dict[str, Any] = {"header": header(device), "rows": [], "skipped": [], "failed": None}

    def keep(part: str) -> None:
        results = read(path)
        results["unfinished"].pop(group.name, None)
        results[part][group.name] = found
        write_json(path, results)

    try:
        for row in group.find()(device, quick):
            if isinstance(row, Row):
                found["rows"].append(asdict(row))
                print(format_row(row), flush=True)
            else:
                found["skipped"].append(asdict(row))
                print(f"{row.name}: skipped, {row.why}", flush=True)
            keep("unfinished")
    except Exception as error:  # whatever it is, the other groups are wanted
        found["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        print(f"{group.name}: failed: {found['failed']}", flush=True)
    keep("unfinished" if found["failed"] else "groups")
    return found["failed"] is None


@click.group(invoke_without_command=True, help=__doc__)
@click.option("--device", default="cpu", show_default=True)
@click.option("--only", "names", multiple=True, type=Groups, help="A group; may be given again.")
@click.option("--quick", is_flag=True, help="The smallest rows, two rounds, kept under runs/bench.")
@click.option("--threads", type=click.IntRange(1), help="Instead of each group's own number.")
@click.option("--avx2", is_flag=True, help="As on a CPU without VNNI.")
@click.option("--resume", is_flag=True, help="Only the groups that were stopped or failed.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON, instead of benchmarks/results/DEVICE.json.")
@click.pass_context
def main(
    context: click.Context,
    device: str,
    names: tuple[str, ...],
    quick: bool,
    threads: int | None,
    avx2: bool,
    resume: bool,
    out: Path | None,
) -> None:
    if context.invoked_subcommand is not None:
        return
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"device is {device!r} but torch finds no CUDA device; use --device cpu")
    if not any(device.partition(":")[0] in group.devices for group in GROUPS):
        raise SystemExit(f"device is {device!r}: no group is for it; use cpu or cuda")
    isa = "AVX2" if avx2 else os.environ.get("ONEDNN_MAX_CPU_ISA")
    path = out or (Path("runs/bench") if quick else RESULTS) / f"{name_place(device, isa)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = device.partition(":")[0]
    chosen = [group for group in GROUPS if kind in group.devices and (not names or group.name in names)]
    if left := set(names) - {group.name for group in chosen}:
        raise SystemExit(f"{', '.join(sorted(left))}: not for device {device!r}")
    results = read(path)
    if resume:
        chosen = [group for group in chosen if group.name in results["unfinished"]]
    results["unfinished"] |= {group.name: None for group in chosen}
    write_json(path, results)
    failed = []
    with Progress("benchmarks", len(chosen)) as bar, handle(interrupt):
        for group in chosen:
            bar.draw(group.name)
            command = [sys.executable, "-m", "benchmarks", "group", group.name, "--device", device]
            command += ["--out", str(path.resolve()), *(["--quick"] if quick else [])]
            environment = os.environ | {"OMP_NUM_THREADS": str(threads or group.threads)}
            if isa is not None:
                environment["ONEDNN_MAX_CPU_ISA"] = isa
            try:
                # what libraries say of themselves on stderr is shown only where something fails
                done = subprocess.run(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)
            except KeyboardInterrupt as stop:
                click.echo(f"\nstopped in {group.name}; what is done is in {path}; go on with --resume", err=True)
                sys.exit(exit_status(stop))
            if done.returncode:
                failed.append(group.name)
                sys.stderr.write(done.stderr[-2000:])
            bar.advance(note=group.name)
    print(f"{path}: {len(chosen) - len(failed)} groups done" + (f", failed: {', '.join(failed)}" if failed else ""))
    sys.exit(bool(failed))


@main.command(hidden=True)
@click.argument("name", type=Groups)
@click.option("--device", required=True)
@click.option("--quick", is_flag=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def group(name: str, device: str, quick: bool, out: Path) -> None:
    """One group, in this process."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    try:
        sys.exit(not run_group(FOUND[name], device, quick, out))
    except KeyboardInterrupt:
        sys.exit(130)


@main.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
def show(files: tuple[Path, ...]) -> None:
    """Prints the tables of FILES, or of all results."""
    for path in files or sorted(RESULTS.glob("*.json")):
        print(format_results(read_file(path)), end="\n\n")


@main.command()
def page() -> None:
    """Writes the tables of docs/speed.md anew, and draws all results beside them."""
    found = read_results()
    PAGE.write_text(fill_page(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    for place, results in found.items():
        for drawn in draw_results(results, RESULTS / place):
            print(drawn.relative_to(ROOT))


if __name__ == "__main__":
    main()
