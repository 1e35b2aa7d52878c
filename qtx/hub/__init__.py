"""Hugging Face models in: BERT, OPT and ViT from a folder of config.json, safetensors and tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from qtx_ref.models.initial import shapes
from qtx_ref.spec import Family, Head, ModelSpec, SpecError

from ..data.splits import digest
from ..files.checkpoint import Checkpoint
from ..files.container import FileError
from ..progress import Progress
from .config import (
    check_problem,
    find_head,
    read_config,
    read_family,
    read_labels,
    read_ties,
)
from .files import (
    CONFIG,
    FLOATS,
    INTEGERS,
    PREPROCESSOR,
    TOKENIZER,
    Stored,
    find_tensors,
    join_count,
    read_beside,
    read_file,
    read_json,
    read_tensor,
)
from .names import (
    BUFFERS,
    HEADS,
    PREFIX,
    list_shapes,
    list_tied,
    list_unused,
    name_parameters,
    shorten_name,
)
from .preprocessor import read_preprocessor
from .tokenizer import check_tokenizer

APART = "hub."  # of tensors that are kept and not used


def import_model(folder: Path) -> Checkpoint:
    """The model of a folder, as a checkpoint that nothing has been trained on.

    Parameters become float32 (float64 stays). `meta["hub"]` has the configuration, their name of each parameter of
    ours, their copies of tied parameters and the dtype of each of their tensors, `meta["files"]` the text of each file
    of `BESIDE`; `extra` holds what our model does not use, each tensor under `hub.<their name>`.

    Raises:
        FileError: whatever is wrong with the folder or its files, in one line.
    """
    stored = find_tensors(folder)
    config = read_json(folder / CONFIG)
    try:
        family = read_family(config)
        plain = find_plain_names(folder, family, stored)
        prefixed = any(name.startswith("model.") for name in stored)
        head = find_head(family, config, plain, prefixed)
        check_problem(config, head)
        spec = read_config(config, head)
        ties = read_ties(config)
    except SpecError as error:
        raise FileError(f"{folder / CONFIG}: {error}") from None
    if spec.layers > len(stored):  # before as many names are made
        raise FileError(f"{folder / CONFIG}: num_hidden_layers is {spec.layers}, and there are {len(stored)} tensors")
    mapped, copies, rest = assign(folder, spec, plain, ties)
    check_stored(spec, stored, mapped, copies, rest)
    about = {"files": read_beside(folder), **describe_data(folder, spec)}
    with Progress("import", len(stored)) as bar:

        def read(name: str) -> np.ndarray:
            bar.advance()
            return read_tensor(name, stored[name])

        params = {ours: read(mapped[ours]).reshape(shape) for ours, shape in shapes(spec).items()}
        for name, ours in copies.items():
            if not np.array_equal(read(name).reshape(-1), params[ours].reshape(-1)):
                raise FileError(
                    f"{stored[name].path}: tensor {name} differs from {mapped[ours]}, to which a model here ties it"
                )
        extra = {APART + name: read(name) for name in rest}
    hub = {
        "config": config,
        "names": mapped,
        "tied": copies,
        "dtypes": {name: tensor.dtype for name, tensor in stored.items()},
    }
    meta = {"hub": hub, **about}
    if spec.head is Head.CLASSIFY and (classes := read_labels(config)):
        meta["data"]["names"] = classes
    return Checkpoint(spec, params, extra, meta=meta)


def find_plain_names(folder: Path, family: Family, stored: dict[str, Stored]) -> dict[str, str]:
    """The file's name of each tensor by its plain name. Raises FileError where two of them are one."""
    plain: dict[str, str] = {}
    for name in stored:
        if (twin := plain.setdefault(shorten_name(family, name), name)) != name:
            raise FileError(f"{folder} holds {twin} and {name}, which are one parameter")
    bias = "cls.predictions.decoder.bias"
    if family is Family.BERT and bias in plain and "cls.predictions.bias" not in plain:
        plain["cls.predictions.bias"] = plain.pop(bias)  # one parameter under two names, and either may be written
    return plain


def assign(
    folder: Path, spec: ModelSpec, plain: dict[str, str], ties: bool
) -> tuple[dict[str, str], dict[str, str], list[str]]:
    """Every tensor's use: file's names of our parameters, copies with our parameter, and those that stay apart.

    ties: tie_word_embeddings of the configuration; where it is False, transformers has a decoder of its own, which must
    be in the file. Raises FileError with the unknown and the missing ones.
    """
    wanted, copies, known = name_parameters(spec), list_tied(spec), list_unused(spec)
    needed = [*wanted.values(), *(name for name in copies if not ties and name.endswith(".weight"))]
    prefix = next((p for p in (PREFIX[spec.family], "decoder.") if any(n.startswith(p) for n in plain.values())), "")
    missing = [("" if name.startswith(HEADS) else prefix) + name for name in needed if name not in plain]
    place = {*wanted.values(), *copies, *known}
    unknown = [name for key, name in plain.items() if key not in place]
    faults = [
        f"{join_count(some, 'tensor')} {word}" for some, word in ((missing, "missing"), (unknown, "unknown")) if some
    ]
    if faults:
        model = f"a {spec.family} of {spec.layers} layers, head {spec.head}"
        raise FileError(f"{folder}: {' and '.join(faults)}, for {model}")
    return (
        {ours: plain[name] for ours, name in wanted.items()},
        {plain[name]: ours for name, ours in copies.items() if name in plain},
        [plain[name] for name in known if name in plain],
    )


def check_stored(
    spec: ModelSpec, stored: dict[str, Stored], mapped: dict[str, str], copies: dict[str, str], rest: list[str]
) -> None:
    """Raises FileError for the first tensor of another shape or kind of dtype; nothing has been read yet."""
    expected, apart = list_shapes(spec), list_unused(spec)
    allowed = {name: [expected[ours]] for ours, name in mapped.items()}
    allowed |= {name: [expected[ours]] for name, ours in copies.items()}
    allowed |= {name: apart[shorten_name(spec.family, name)] for name in rest}
    for name, choices in allowed.items():
        tensor = stored[name]
        if tensor.shape not in choices:
            raise FileError(f"{tensor.path}: tensor {name} has shape {tensor.shape}; config.json makes it {choices[0]}")
        kinds = INTEGERS if name.endswith(BUFFERS) else FLOATS
        if tensor.dtype not in kinds:
            raise FileError(f"{tensor.path}: tensor {name} is {tensor.dtype}; expected one of {', '.join(kinds)}")


def describe_data(folder: Path, spec: ModelSpec) -> dict[str, Any]:
    """What belongs to the data, as a checkpoint's `meta` has it: a tokenizer, or how pictures become pixels.

    Raises FileError for settings that are not those of a model here.
    """
    if spec.family is Family.VIT:
        images = {}
        if (folder / PREPROCESSOR).exists():
            images = {"images": read_preprocessor(folder / PREPROCESSOR, read_json(folder / PREPROCESSOR), spec)}
        return {**images, "data": {"kind": "images"}}
    if not (folder / TOKENIZER).exists():
        return {"data": {"kind": "text"}}
    read_json(folder / TOKENIZER)
    text = read_file(folder / TOKENIZER).decode()
    longest = check_tokenizer(folder, spec, text)
    data = {"kind": "text", "tokenizer_sha256": digest(text.encode())}
    return {"tokenizer": text, "data": data | ({} if longest is None else {"length": longest})}


def pooler(checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray] | None:
    """Weight (D, D) and bias (D,), float, of the trained pooler that came with a BERT without classifier, if one
    did."""
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
