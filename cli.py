"""`python cli.py ...` from a checkout does what the installed `qtx ...` does."""

from qtx.__main__ import main

if __name__ == "__main__":
    main()
