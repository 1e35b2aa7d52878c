"""`python -m qtx.engines.worker ENGINE`: runs the paths of one engine, for `qtx.engines.paths`."""

from __future__ import annotations

import sys
import warnings
from typing import Any

from .paths import load_engine
from .process import Tell, Values, serve


def main() -> None:
    """Answers calls until stdin ends."""
    warnings.simplefilter("ignore")  # of packages about themselves
    engine = load_engine(sys.argv[1])
    paths = {(path.name, path.op): path for path in engine.PATHS}

    def do(task: dict[str, Any], values: Values, tell: Tell) -> tuple[None, Values]:
        return None, dict(engine.run(paths[task["path"], task["op"]], values))

    serve(do)


if __name__ == "__main__":
    main()
