"""The files that qtx writes and reads: checkpoints, artifacts, vectors."""
