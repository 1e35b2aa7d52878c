"""Models out, as the folder that Hugging Face's transformers loads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.spec import Family, Head, SpecError

from ..data.tokenizing import SAME_AS
from ..files.checkpoint import Checkpoint
from ..files.container import FileError, check_writable, write_beside
from . import APART
from .config import check_expressible, read_config, read_labels, write_config, write_labels
from .files import (
    BESIDE,
    CONFIG,
    DTYPES,
    FLOATS,
    GENERATION,
    PREPROCESSOR,
    TOKENIZER,
    WEIGHTS,
    fits,
    write_bytes,
)
from .names import lengthen_name, list_shapes, name_parameters
from .preprocessor import write_preprocessor


@dataclass(frozen=True)
class Written:
    """What `export_model` wrote: file names, dtypes, and whether names and configuration are those of an import."""

    files: list[str]
    dtypes: list[str]
    as_imported: bool


def export_model(path: Path, checkpoint: Checkpoint, out: Path) -> Written:
    """Writes the folder that transformers loads: config.json, model.safetensors and, where they are known,
    tokenizer.json, preprocessor_config.json and the other files of `BESIDE`. `path` names the checkpoint in errors.

    A model whose structure is as it was imported gets its configuration and tensor names again, and its dtypes where
    they still hold every value; another gets today's names, and a configuration of its spec.

    Raises:
        SpecError: transformers has no such model, or it is quantized.
        FileError: `out` is not an empty folder, or the model diverged.
    """
    spec, meta = checkpoint.spec, checkpoint.meta
    if "diverged_at" in meta:
        raise FileError(f"{path}: training diverged at step {meta['diverged_at']}; no model is left to export")
    if checkpoint.recipe is not None:
        origin = meta.get("quantized_from", "the float checkpoint that it was made from")
        raise SpecError(
            f"{path} has quantizers (recipe {checkpoint.recipe.name}), which transformers lacks: export {origin}"
        )
    check_expressible(spec)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"--out {out} exists and is not an empty folder: choose another")
    check_writable(out / WEIGHTS)
    hub = find_import(checkpoint)
    if hub:
        config, tensors = restore_import(checkpoint, hub)
    else:
        plain, shape = name_parameters(spec), list_shapes(spec)
        tensors = {
            lengthen_name(spec, plain[k]): (v.reshape(shape[k]), name_dtype(v)) for k, v in checkpoint.params.items()
        }
        config = write_config(
            spec, find_common_dtype(checkpoint), find_special_ids(meta.get("tokenizer")), find_labels(checkpoint)
        )
    content = {WEIGHTS: write_bytes(tensors), CONFIG: encode_json(config), **collect_beside(checkpoint, hub, config)}
    for name, data in content.items():
        write_beside(out / name, data)
    return Written(sorted(content), sorted({FLOATS[d] for _, d in tensors.values() if d in FLOATS}), bool(hub))


def find_import(checkpoint: Checkpoint) -> dict[str, Any]:
    """`meta["hub"]` of a model that still is what its configuration says; else nothing."""
    hub, spec = checkpoint.meta.get("hub"), checkpoint.spec
    if not isinstance(hub, dict):
        return {}
    try:
        same = read_config(hub["config"], spec.head)
        theirs = [*hub["names"].values(), *hub["tied"]]
        sound = len({*theirs}) == len(theirs) and all(isinstance(hub["dtypes"][name], str) for name in theirs)
        sound = sound and {*hub["tied"].values()} <= {*hub["names"]} == {*checkpoint.params}
    except (SpecError, KeyError, TypeError, AttributeError):
        return {}
    # of training
    loose: dict[str, Any] = {
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "init_std": 0.02,
        "init_output_scaled": False,
    }
    sound = sound and replace(same, **loose) == replace(spec, **loose)
    return hub if sound else {}


def restore_import(
    checkpoint: Checkpoint, hub: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, str]]]:
    """Their configuration, and their tensors under their names; in their dtypes if these hold every value exactly, else
    as they are."""
    shape = list_shapes(checkpoint.spec)
    values = {name: checkpoint.params[ours].reshape(shape[ours]) for ours, name in hub["names"].items()}
    values |= {name: checkpoint.params[ours].reshape(shape[ours]) for name, ours in hub["tied"].items()}
    values |= {k.removeprefix(APART): v for k, v in checkpoint.extra.items() if k.startswith(APART)}
    dtypes, config, classes = hub["dtypes"], hub["config"], find_labels(checkpoint)
    if classes and classes != read_labels(config):  # trained for others since
        config = config | write_labels(classes)
    if all(dtypes.get(name) in DTYPES and fits(value, dtypes[name]) for name, value in values.items()):
        return config, {name: (value, dtypes[name]) for name, value in values.items()}
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {
        "dtype": find_common_dtype(checkpoint)
    }
    return config, {name: (value, name_dtype(value)) for name, value in values.items()}


def find_labels(checkpoint: Checkpoint) -> list[str] | None:
    """The classes' names, one each, where the checkpoint's data have names."""
    classes = checkpoint.meta.get("data", {}).get("names")
    fits_all = (
        isinstance(classes, list)
        and len(classes) == checkpoint.spec.classes
        and all(isinstance(n, str) for n in classes)
    )
    return classes if fits_all else None


def find_common_dtype(checkpoint: Checkpoint) -> str:
    """The dtype, in NumPy's words, that holds every parameter."""
    return str(np.result_type(*checkpoint.params.values()))


def name_dtype(value: np.ndarray) -> str:
    """An array's dtype in the words of safetensors."""
    return next(name for name, dtype in DTYPES.items() if dtype == str(value.dtype))


def encode_json(value: object) -> bytes:
    """A JSON value as the text of a file."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def find_special_ids(tokenizer: str | None) -> dict[str, int | None]:
    """Ids of pad, cls and sep among a tokenizer's added tokens; None where there is none.

    Raises FileError where the text is no tokenizer.json.
    """
    try:
        ids = {token["content"]: token["id"] for token in json.loads(tokenizer or "{}").get("added_tokens", [])}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise FileError("metadata is damaged: meta.tokenizer is no tokenizer.json") from None
    return {name: next((ids[word] for word in words if word in ids), None) for name, words in SAME_AS.items()}


def collect_beside(checkpoint: Checkpoint, hub: Mapping[str, Any], config: Mapping[str, object]) -> dict[str, bytes]:
    """The files beside the tensors, by name: as they were imported where nothing that they say has changed since.

    hub: of a model that still is what its configuration says, else empty. config: what is exported.
    """
    spec, meta = checkpoint.spec, checkpoint.meta
    kept = {name: meta["files"][name] for name in BESIDE if name in meta.get("files", {})}
    content: dict[str, bytes] = {}
    if meta.get("tokenizer"):
        content[TOKENIZER] = meta["tokenizer"].encode()
    images = hub.get("preprocessor") or write_preprocessor(spec, meta.get("images"))  # the first of imports of old
    if images:
        content[PREPROCESSOR] = encode_json(images)
    stays = {
        CONFIG: bool(hub) and CONFIG in kept and json.loads(kept[CONFIG]) == config,
        PREPROCESSOR: spec.family is Family.VIT,
        GENERATION: bool(hub) or spec.head is Head.CAUSAL,
    }
    words = spec.family is not Family.VIT  # the rest are a tokenizer's
    return content | {name: text.encode() for name, text in kept.items() if stays.get(name, words)}
