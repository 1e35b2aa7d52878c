"""The files that qtx writes and reads back. Each is sealed with a sha256 over all that it holds, which reading
compares.

formats: what kinds there are, how one is known by its first bytes, what may be replaced, `FileError`.
writing: a file as a whole or not at all; what killed processes left; room on the disk. locks: who may write in a
folder. container: safetensors and JSON with their seal. In it: checkpoint, artifact (artifact_check: what one must
hold), vectors, and results, the JSON of `qtx study` and `qtx ptq`.
"""
