"""Folders of small models, to be damaged by tests, and the one line by which they are refused."""

import json
import tracemalloc
from dataclasses import replace

import pytest
from safetensors.numpy import load_file, save_file

from parity_tests.subjects.small_models import BERT, OPT, VIT
from qtx.files.checkpoint import Checkpoint
from qtx.files.container import CheckpointError
from qtx.hub import import_model
from qtx.hub.export import export_model
from qtx_ref.models.initial import init_params
from qtx_ref.spec import Head

SPECS = {
    "bert": BERT,
    "classify": replace(BERT, head=Head.CLASSIFY, classes=3),
    "opt": OPT,
    "vit": replace(VIT, patch_norm=False),
}
WORD = "bert.embeddings.word_embeddings.weight"
NORM = "bert.encoder.layer.1.output.LayerNorm.weight"


def make_folder(path, name="bert"):
    """A model as transformers writes it; 42 tensors of BERT: 5 of embeddings, 16 a layer, 5 of the head."""
    spec = SPECS[name]
    export_model(path, Checkpoint(spec, init_params(spec, 0)), path)
    return path


def refused(folder, *parts, memory=4_000_000):
    """The error's one line, which has all of `parts`. `memory` in bytes bounds all that Python and NumPy allocated."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            import_model(folder)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and len(message) < 1000, message
    for part in parts:
        assert part in message, message
    assert peak < memory, peak


def tensors(folder, change):
    """The file with its tensors changed by `change(tensors)`."""
    got = load_file(folder / "model.safetensors")
    change(got)
    save_file(got, folder / "model.safetensors", {"format": "pt"})


def config(folder, **values):
    got = json.loads((folder / "config.json").read_bytes()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in got.items() if v is not ...}))


def header(folder, change):
    """The file with its header changed by `change(header)`, as text or as an object; the tensors' bytes stay."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    got = json.loads(raw[8 : 8 + size])
    text = change(got) or json.dumps(got)
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + raw[8 + size :])
