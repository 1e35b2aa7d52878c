"""The pytest files. Not installed."""
