"""What `qtx import` and `qtx export` do: models from and to the folders of another library."""

from __future__ import annotations

from pathlib import Path

from qtx_ref.spec import SpecError

from ..files.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..files.container import FileError, check_writable
from ..hub import import_model
from ..hub.export import Written, export_model


def import_folder(folder: Path, out: Path) -> Checkpoint:
    """Writes the model of a Hugging Face folder as the checkpoint `out`, and returns it.

    Raises:
        SpecError: `out` has another name than a .safetensors, or a configuration that our models do not have.
        FileError: `out` exists or cannot be written, or a file of the folder is missing or cannot be read.
    """
    if out.suffix != ".safetensors":
        raise SpecError(f"--out {out}: give a name ending in .safetensors")
    if out.exists():
        raise FileError(f"{out} exists: choose another --out")
    check_writable(out)
    checkpoint = import_model(folder)
    save_checkpoint(out, checkpoint)
    return checkpoint


def export_checkpoint(path: Path, out: Path) -> Written:
    """Writes a checkpoint as the Hugging Face folder `out`; returns its files, and how they are named.

    Raises:
        SpecError: a model that transformers does not have.
        FileError: the checkpoint cannot be read, or `out` is not empty or cannot be written.
    """
    return export_model(path, load_checkpoint(path), out)
