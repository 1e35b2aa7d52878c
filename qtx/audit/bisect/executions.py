"""One execution of a quantized model: what is run, by whom, and its tensors by name in the order they are made.

Written MODEL@WORDS. WORDS, with commas between them, none of them needed:

    MODEL.qtx     ref or torch; integer or fake; profile=NAME|FILE
    MODEL.onnx    reference, disable, basic, extended, all (onnxruntime), or qtx_ref; profile=NAME|FILE; cpu=NAME
    MODEL.tflite  reference, optimized, xnnpack, or qtx_ref; profile=NAME|FILE

Tensors have the names of our sites where the file is ours, also where it is an exported one; else those of the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from qtx_ref.spec import SpecError

from ...files.artifact import SUFFIX
from .artifacts import ArtifactExecution
from .execution import Execution
from .onnx_files import OnnxExecution
from .tflite_files import TfliteExecution

__all__ = ["parse_execution"]


def parse_execution(text: str) -> Execution:
    """The execution of MODEL@WORDS. Raises SpecError for words that do not belong to the file, FileError for a file
    that cannot be read, MissingExtra."""
    name, _, rest = text.partition("@")
    path, words = Path(name), [word.strip() for word in rest.split(",") if word.strip()]
    kinds: dict[str, Any] = {SUFFIX: ArtifactExecution, ".onnx": OnnxExecution, ".tflite": TfliteExecution}
    if path.suffix not in kinds:
        raise SpecError(f"{name} is none of {', '.join(f'MODEL{suffix}' for suffix in kinds)}")
    return cast(Execution, kinds[path.suffix](path, words))
