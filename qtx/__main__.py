"""`python -m qtx`, and what the installed `qtx` calls: the command line, which can be stopped while it is still
imported."""

from __future__ import annotations

from .signals import handle, leave


def main() -> None:
    """Runs the command line and exits. Until a command begins, SIGINT and SIGTERM end the process with 130 and 143."""
    with handle(leave):
        from .cli import main as run

        run(prog_name="qtx")


if __name__ == "__main__":
    main()
