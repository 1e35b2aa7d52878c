"""Hugging Face models in: BERT, OPT and ViT from a folder of config.json, safetensors and tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.models.initial import shapes
from qtx_ref.spec import Family, Head, ModelSpec, SpecError
from qtx_ref.spec.base import is_number

from ..data.splits import digest
from ..files.checkpoint import Checkpoint
from ..files.container import CheckpointError
from ..progress import Progress
from .config import family_of, find_head, label_names, read_config
from .files import (
    CONFIG,
    FLOATS,
    INTEGERS,
    PREPROCESSOR,
    TOKENIZER,
    Stored,
    find_tensors,
    listed,
    read_json,
    read_tensor,
)
from .names import (
    BUFFERS,
    HEADS,
    PREFIX,
    names,
    plain_name,
    their_shapes,
    tied,
    unused,
)

APART = "hub."  # of tensors that are kept and not used


def import_model(folder: Path) -> Checkpoint:
    """The model of a folder, as a checkpoint that nothing has been trained on.

    Parameters become float32 (float64 stays). `meta["hub"]` has the configuration, their name of each parameter of ours,
    their copies of tied parameters and the dtype of each of their tensors; `extra` holds what our model does not use, each
    tensor under `hub.<their name>`.

    Raises:
        CheckpointError: whatever is wrong with the folder or its files, in one line.
    """
    stored = find_tensors(folder)
    config = read_json(folder / CONFIG)
    try:
        family = family_of(config)
        plain = by_plain_name(folder, family, stored)
        prefixed = any(name.startswith("model.") for name in stored)
        head = find_head(family, config, plain, prefixed)
        spec = read_config(config, head)
    except SpecError as error:
        raise CheckpointError(f"{folder / CONFIG}: {error}") from None
    if spec.layers > len(stored):  # before as many names are made
        raise CheckpointError(
            f"{folder / CONFIG}: num_hidden_layers is {spec.layers}, and there are {len(stored)} tensors"
        )
    mapped, copies, rest = assign(folder, spec, plain, config.get("tie_word_embeddings", True))
    check_stored(spec, stored, mapped, copies, rest)
    with Progress("import", len(stored)) as bar:

        def read(name: str) -> np.ndarray:
            bar.advance()
            return read_tensor(name, stored[name])

        params = {ours: read(mapped[ours]).reshape(shape) for ours, shape in shapes(spec).items()}
        for name, ours in copies.items():
            if not np.array_equal(read(name).reshape(-1), params[ours].reshape(-1)):
                raise CheckpointError(
                    f"{stored[name].path}: tensor {name} differs from {mapped[ours]}, to which a model here ties it"
                )
        extra = {APART + name: read(name) for name in rest}
    hub = {
        "config": config,
        "names": mapped,
        "tied": copies,
        "dtypes": {name: found.dtype for name, found in stored.items()},
    }
    meta = {"hub": hub, **about_data(folder, spec, hub)}
    if spec.head is Head.CLASSIFY and (classes := label_names(config)):
        meta["data"]["names"] = classes
    return Checkpoint(spec, params, extra, meta=meta)


def by_plain_name(folder: Path, family: Family, stored: dict[str, Stored]) -> dict[str, str]:
    """The file's name of each tensor by its plain name."""
    plain: dict[str, str] = {}
    for name in stored:
        if (twin := plain.setdefault(plain_name(family, name), name)) != name:
            raise CheckpointError(f"{folder} holds {twin} and {name}, which are one parameter")
    bias = "cls.predictions.decoder.bias"
    if family is Family.BERT and bias in plain and "cls.predictions.bias" not in plain:
        plain["cls.predictions.bias"] = plain.pop(bias)  # one parameter under two names, and either may be written
    return plain


def assign(
    folder: Path, spec: ModelSpec, plain: dict[str, str], ties: Any
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Every tensor's use: file's names of our parameters, copies with our parameter, and those that stay apart.

    ties: tie_word_embeddings of the configuration; where it is false, transformers has a decoder of its own, which must be
    in the file. Raises CheckpointError with the unknown and the missing ones.
    """
    wanted, copies, known = names(spec), tied(spec), unused(spec)
    needed = [*wanted.values(), *(name for name in copies if ties is False and name.endswith(".weight"))]
    prefix = next((p for p in (PREFIX[spec.family], "decoder.") if any(n.startswith(p) for n in plain.values())), "")
    missing = [("" if name.startswith(HEADS) else prefix) + name for name in needed if name not in plain]
    place = {*wanted.values(), *copies, *known}
    unknown = [name for key, name in plain.items() if key not in place]
    faults = [
        f"{listed(found, 'tensor')} {word}" for found, word in ((missing, "missing"), (unknown, "unknown")) if found
    ]
    if faults:
        model = f"a {spec.family} of {spec.layers} layers, head {spec.head}"
        raise CheckpointError(f"{folder}: {' and '.join(faults)}, for {model}")
    return (
        {ours: plain[name] for ours, name in wanted.items()},
        {plain[name]: ours for name, ours in copies.items() if name in plain},
        [plain[name] for name in known if name in plain],
    )


def check_stored(
    spec: ModelSpec, stored: dict[str, Stored], mapped: dict[str, str], copies: dict[str, str], rest: list[str]
) -> None:
    """Raises CheckpointError for the first tensor of another shape or kind of dtype; nothing has been read yet."""
    expected, apart = their_shapes(spec), unused(spec)
    allowed = {name: [expected[ours]] for ours, name in mapped.items()}
    allowed |= {name: [expected[ours]] for name, ours in copies.items()}
    allowed |= {name: apart[plain_name(spec.family, name)] for name in rest}
    for name, choices in allowed.items():
        found = stored[name]
        if found.shape not in choices:
            raise CheckpointError(
                f"{found.path}: tensor {name} has shape {found.shape}; config.json makes it {choices[0]}"
            )
        kinds = INTEGERS if name.endswith(BUFFERS) else FLOATS
        if found.dtype not in kinds:
            raise CheckpointError(f"{found.path}: tensor {name} is {found.dtype}; expected one of {', '.join(kinds)}")


def about_data(folder: Path, spec: ModelSpec, hub: dict[str, Any]) -> dict[str, Any]:
    """What belongs to the data: a tokenizer, or the mean and deviation by which pixels in [0, 1] are normalised."""
    if spec.family is not Family.VIT:
        if not (folder / TOKENIZER).exists():
            return {"data": {"kind": "text"}}
        read_json(folder / TOKENIZER)
        text = (folder / TOKENIZER).read_bytes().decode()
        return {"tokenizer": text, "data": {"kind": "text", "tokenizer_sha256": digest(text.encode())}}
    if not (folder / PREPROCESSOR).exists():
        return {"data": {"kind": "images"}}
    hub["preprocessor"] = read_json(folder / PREPROCESSOR)
    return {"images": normalisation(folder / PREPROCESSOR, hub["preprocessor"], spec), "data": {"kind": "images"}}


def normalisation(path: Path, given: dict[str, Any], spec: ModelSpec) -> dict[str, list[float]]:
    """Mean and deviation by channel. Raises CheckpointError where they are not numbers, or pixels are not in [0, 1]."""
    factor = given.get("rescale_factor", 1 / 255)
    if given.get("do_rescale", True) is not True or not is_number(factor) or abs(factor * 255 - 1) > 1e-3:
        raise CheckpointError(f"{path}: rescale_factor is {factor!r}: only pixels divided by 255 are supported")
    found = {}
    for key, default in (("mean", 0.0), ("std", 1.0)):
        value = given.get(f"image_{key}", 0.5) if given.get("do_normalize", True) else default
        values = value if isinstance(value, list) else [value] * spec.channels
        if len(values) != spec.channels or not all(is_number(v) and (key == "mean" or v > 0) for v in values):
            raise CheckpointError(f"{path}: image_{key} is {value!r}: give {spec.channels} numbers, one a channel")
        found[key] = [float(v) for v in values]
    return found


def pooler(checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray] | None:
    """Weight (D, D) and bias (D,), float, of the trained pooler that came with a BERT without classifier, if one did."""
    d = checkpoint.spec.width
    weight, bias = (
        next(
            (v for k, v in checkpoint.extra.items() if k.startswith(APART) and k.endswith(f"pooler.dense.{kind}")), None
        )
        for kind in ("weight", "bias")
    )
    if weight is None or bias is None or weight.shape != (d, d) or bias.shape != (d,):
        return None
    return weight, bias
