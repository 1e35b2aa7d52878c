"""The tables of docs/studies/effect: what runs were while they trained, what `qtx analyze` and `qtx ptq` say then.

python tools/effect collect FOLDER --json FILE [--skip PATTERN ...] [--chains]    keep the figures of a folder
python tools/effect show FILE [--step N] [--picture FILE.png]                     print them as tables

FOLDER holds what there is of: study.json and ROW/log.jsonl (the OUT of `qtx study`), ROW/ptq.json (an OUT of
`qtx ptq`), ROW.analyze.json and ROW.ptq.json (their --json), ROW.sensitivity.json (that of `qtx ptq --sensitivity`).
ROW-seedN and ROW-N are one row of several seeds.
--chains: of ROW/model.safetensors, a model on `backcopy`, what its heads do with [BOS], and its peaks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from effect_figures import collect
from effect_tables import BITS, TABLES, tabulate_curves

from qtx.report.sinks import draw_growth


def draw(found: dict[str, dict], path: Path) -> None:
    """Draws every curve, of recipes those in integers."""
    runs = {}
    for name, curves in ((name, parts["curves"]) for name, parts in found.items() if parts.get("curves")):
        kept = [key for key in curves[-1]["evaluation"] if not any(key.startswith(f"{bits}.") for bits in BITS)]
        runs[name] = {key: [(line["step"], line["evaluation"][key]) for line in curves] for key in kept}
    draw_growth(path, runs, path.stem)


def main() -> None:
    """Keeps figures, or prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    keep = verbs.add_parser("collect")
    keep.add_argument("folder", type=Path)
    keep.add_argument("--json", type=Path, required=True)
    keep.add_argument("--skip", nargs="*", default=[])
    keep.add_argument("--chains", action="store_true")
    show = verbs.add_parser("show")
    show.add_argument("file", type=Path)
    show.add_argument("--step", type=int, help="print what runs were at this one")
    show.add_argument("--picture", type=Path)
    given = parser.parse_args()
    if given.verb == "collect":
        found = collect(given.folder, given.skip, chains=given.chains)
        text = json.dumps(found, separators=(",", ":"), sort_keys=False).replace("},{", "},\n{").replace('},"', '},\n"')
        given.json.write_text(text + "\n", encoding="utf-8")
        return
    found = json.loads(given.file.read_text(encoding="utf-8"))
    parts = [part for part in TABLES if any(part in each for each in found.values())]
    if given.step is not None:
        print(tabulate_curves(found, given.step))
    else:
        print("\n\n".join(table(found) for part in parts for table in TABLES[part]))
    if given.picture:
        draw(found, given.picture)


if __name__ == "__main__":
    main()
