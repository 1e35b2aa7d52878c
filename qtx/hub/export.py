"""Models out, as the folder that Hugging Face's transformers loads."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.spec import Family, ModelSpec, SpecError

from ..data.corpus import SAME_AS
from ..files.checkpoint import Checkpoint
from ..files.container import CheckpointError, check_writable, write_beside
from . import APART
from .config import check_expressible, label_names, read_config, write_config, write_labels
from .files import (
    CONFIG,
    DTYPES,
    FLOATS,
    PREPROCESSOR,
    TOKENIZER,
    WEIGHTS,
    fits,
    write_bytes,
)
from .names import full_name, names, their_shapes


@dataclass(frozen=True)
class Written:
    """What `export_model` wrote: file names, dtypes, and whether names and configuration are those of an import."""

    files: list[str]
    dtypes: list[str]
    as_imported: bool


def export_model(path: Path, checkpoint: Checkpoint, out: Path) -> Written:
    """Writes the folder that transformers loads: config.json, model.safetensors and, where they are known, tokenizer.json
    and preprocessor_config.json. `path` names the checkpoint in errors.

    A model whose structure is as it was imported gets its configuration and tensor names again, and its dtypes where they
    still hold every value; another gets today's names, and a configuration of its spec.

    Raises:
        SpecError: transformers has no such model, or it is quantized.
        CheckpointError: `out` is not an empty folder, or the model diverged.
    """
    spec, meta = checkpoint.spec, checkpoint.meta
    if "diverged_at" in meta:
        raise CheckpointError(f"{path}: training diverged at step {meta['diverged_at']}; no model is left to export")
    if checkpoint.recipe is not None:
        origin = meta.get("quantized_from", "the float checkpoint that it was made from")
        raise SpecError(
            f"{path} has quantizers (recipe {checkpoint.recipe.name}), which transformers lacks: export {origin}"
        )
    check_expressible(spec)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"--out {out} exists and is not an empty folder: choose another")
    check_writable(out / WEIGHTS)
    hub = imported(checkpoint)
    if hub:
        config, tensors = as_imported(checkpoint, hub)
    else:
        plain, shape = names(spec), their_shapes(spec)
        tensors = {full_name(spec, plain[k]): (v.reshape(shape[k]), dtype_of(v)) for k, v in checkpoint.params.items()}
        config = write_config(spec, common_dtype(checkpoint), special_ids(meta.get("tokenizer")), labels(checkpoint))
    content = {WEIGHTS: write_bytes(tensors), CONFIG: to_json(config)}
    if meta.get("tokenizer"):
        content[TOKENIZER] = meta["tokenizer"].encode()
    if images := hub.get("preprocessor") or preprocessor(spec, meta.get("images")):
        content[PREPROCESSOR] = to_json(images)
    for name, data in content.items():
        write_beside(out / name, data)
    return Written(sorted(content), sorted({FLOATS[d] for _, d in tensors.values() if d in FLOATS}), bool(hub))


def imported(checkpoint: Checkpoint) -> dict[str, Any]:
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
    loose = {"dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.02, "init_output_scaled": False}  # of training
    sound = sound and replace(same, **loose) == replace(spec, **loose)
    return hub if sound else {}


def as_imported(
    checkpoint: Checkpoint, hub: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, str]]]:
    """Their configuration, and their tensors under their names; in their dtypes if these hold every value exactly, else
    as they are."""
    shape = their_shapes(checkpoint.spec)
    values = {name: checkpoint.params[ours].reshape(shape[ours]) for ours, name in hub["names"].items()}
    values |= {name: checkpoint.params[ours].reshape(shape[ours]) for name, ours in hub["tied"].items()}
    values |= {k.removeprefix(APART): v for k, v in checkpoint.extra.items() if k.startswith(APART)}
    dtypes, config, classes = hub["dtypes"], hub["config"], labels(checkpoint)
    if classes and classes != label_names(config):  # trained for others since
        config = config | write_labels(classes)
    if all(dtypes.get(name) in DTYPES and fits(value, dtypes[name]) for name, value in values.items()):
        return config, {name: (value, dtypes[name]) for name, value in values.items()}
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": common_dtype(checkpoint)}
    return config, {name: (value, dtype_of(value)) for name, value in values.items()}


def labels(checkpoint: Checkpoint) -> list[str] | None:
    """The classes' names, one each, where the checkpoint's data have names."""
    found = checkpoint.meta.get("data", {}).get("names")
    fits_all = (
        isinstance(found, list) and len(found) == checkpoint.spec.classes and all(isinstance(n, str) for n in found)
    )
    return found if fits_all else None


def common_dtype(checkpoint: Checkpoint) -> str:
    return str(np.result_type(*checkpoint.params.values()))


def dtype_of(value: np.ndarray) -> str:
    return next(name for name, dtype in DTYPES.items() if dtype == str(value.dtype))


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def special_ids(tokenizer: str | None) -> dict[str, int | None]:
    """Ids of pad, cls and sep among a tokenizer's added tokens; None where there is none."""
    try:
        ids = {token["content"]: token["id"] for token in json.loads(tokenizer or "{}").get("added_tokens", [])}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError("metadata is damaged: meta.tokenizer is no tokenizer.json") from None
    return {name: next((ids[word] for word in words if word in ids), None) for name, words in SAME_AS.items()}


def preprocessor(spec: ModelSpec, images: dict[str, list[float]] | None) -> dict[str, Any] | None:
    """What turns pictures into the model's input, where the checkpoint says how its pixels were normalised."""
    if spec.family is not Family.VIT or not images:
        return None
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": spec.image_size, "width": spec.image_size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images["mean"],
        "image_std": images["std"],
    }
