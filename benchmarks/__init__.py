"""Time and memory, each against a named alternative in the same run: `python -m benchmarks`, or one file alone."""
