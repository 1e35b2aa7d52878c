"""What `qtx import` and `qtx export` do: models from and to the folders of another library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qtx_ref.spec import SpecError

from ..files.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ..files.container import FileError, check_writable
from ..graphs.export import EXTERNAL, Exported, export_artifact
from ..graphs.export_check import EngineCheck, check_export
from ..graphs.export_run import list_engines
from ..hub import import_model
from ..hub.export import Written, export_model
from ..progress import Progress


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


def export_graph(path: Path, out: Path, form: str, *, external_above: int = EXTERNAL, expose: bool = False) -> Exported:
    """Writes an artifact as the ONNX file `out`; returns its files, operators and sites.

    Raises:
        SpecError: a form that is not known, another name than a .onnx, or a site that cannot be exported, by its name.
        FileError: the artifact cannot be read, or `out` exists or cannot be written.
        MissingExtra: without onnx.
    """
    return export_artifact(path, out, form, external_above=external_above, expose=expose)


def check_graph(path: Path, file: Path) -> Iterator[EngineCheck]:
    """The ONNX file of an artifact in every engine, one after another. Raises as `check_export`."""
    with Progress("check", len(list_engines())) as bar:
        for result in check_export(path, file):
            bar.advance(note=result.engine)
            yield result
