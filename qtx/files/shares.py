"""The state of a run whose processes share its parameters: a folder of safetensors files in place of one.

`model-000020.shares/` holds what step 20 left: `shard-*.safetensors`, one of each process, as torch's Hugging Face
storage writes them, beside each its sha256 as `sha256sum` would, and `rest.safetensors`: header, curves, and what else
is no share, with the sha256 of all shards. A folder is written under another name and renamed; `rest.safetensors` comes
last. Nothing is ever unpickled. Any number of processes reads it, and one process without torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from qtx_ref.models.initial import shapes

from ..disk import UNDER_WAY, sync_folder
from .checkpoint import Checkpoint, check_shapes, put_together, read_spec, take_apart
from .container import FileError, check_seal, open_sealed, sha_of, write_sealed
from .formats import CHECKPOINT, SHARES, JsonObject

SUFFIX = ".shares"  # of the folder
REST = "rest.safetensors"
PLACES = "DCP_SHARDING_INFO"  # torch's metadata of a shard: where in the whole each tensor begins
NAME = re.compile(r"(.+)-([0-9]{6,})\.shares")


def name_folder(path: Path, step: int) -> Path:
    """Where the state of a run at `path` stands after a step."""
    return path.with_name(f"{path.stem}-{step:06}{SUFFIX}")


def name_unfinished(folder: Path) -> Path:
    """Where it stands while it is written."""
    return folder.with_name(f".{folder.name}{UNDER_WAY}")


def find_folders(path: Path) -> dict[int, Path]:
    """The states of a run at `path`, by step, the first one first. All were whole when they got their name."""
    found = {}
    for folder in path.parent.glob(f"{path.stem}-*.shares"):
        if (match := NAME.fullmatch(folder.name)) and match[1] == path.stem and folder.is_dir():
            found[int(match[2])] = folder
    return dict(sorted(found.items()))


def begin_folder(folder: Path) -> None:
    """An empty folder to write into."""
    unfinished = name_unfinished(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)


def seal_shard(folder: Path, rank: int) -> None:
    """Puts the sha256 of a process's shard beside it: a process may hold no share of anything, and then has none."""
    for shard in name_unfinished(folder).glob(f"shard-{rank + 1:05}-*.safetensors"):
        with open(shard.with_suffix(".sha256"), "w") as file:
            file.write(f"{sha_of(shard)}  {shard.name}\n")
            file.flush()
            os.fsync(file.fileno())


def finish_folder(folder: Path, checkpoint: Checkpoint) -> None:
    """The folder, which is new, has all shards and their sha256: adds the rest, a checkpoint without parameters, and
    gives it its name."""
    unfinished = name_unfinished(folder)
    header, tensors = take_apart(folder, checkpoint)
    lines = (file.read_text().split() for file in sorted(unfinished.glob("*.sha256")))
    sums = {name: sha for sha, name in lines}
    write_sealed(unfinished / REST, {**header, "format": SHARES, "shards": sums}, tensors)
    sync_folder(unfinished)
    unfinished.rename(folder)
    sync_folder(folder.parent)


def find_state(path: Path) -> Path | None:
    """What a run at `path` has left: the file, or the last folder where that is further; None without either."""
    step, folder = max(find_folders(path).items(), default=(0, None))
    if not path.exists() or folder is None:
        return path if path.exists() else folder
    with open_sealed(path, CHECKPOINT) as (_, file):
        return path if file.get_slice("history.loss").get_shape()[0] >= step else folder


def remove_folders(path: Path, *, keep: Collection[int] = ()) -> None:
    """Removes all states of a run at `path` but those of these steps, and what a kill left of others."""
    for step, folder in find_folders(path).items():
        if step not in keep:
            folder.rename(unfinished := name_unfinished(folder))  # at no moment it seems whole
            shutil.rmtree(unfinished, ignore_errors=True)
    for unfinished in path.parent.glob(f".{path.stem}-*.shares{UNDER_WAY}"):
        shutil.rmtree(unfinished, ignore_errors=True)


def load_shares(folder: Path, whole: bool = True, rank: int = 0, count: int = 1) -> Checkpoint:
    """Reads a folder that `finish_folder` made; without `whole`, all but the parameters and AdamW's averages.

    Each of `count` processes compares the sha256 of as many shards.

    Raises FileError: missing parts, tensors that are not of the model, NaN, anything changed since.
    """
    with open_sealed(folder / REST, SHARES) as (header, file):
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        check_seal(folder / REST, header, file.metadata()["qtx"], tensors)
    shards = header.pop("shards")
    for name, sha in list(shards.items())[rank::count]:
        check_shard(folder, name, sha)
    spec = read_spec(folder, header)
    if whole:
        for name in shards:
            add_shard(folder / name, shapes(spec), tensors)
        check_shapes(folder, spec, {name: value.shape for name, value in tensors.items()})
        return put_together(folder, spec, header, tensors)
    blank = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes(spec).items()}
    return put_together(folder, spec, header, {**blank, **tensors})


def check_shard(folder: Path, name: str, sha: str) -> None:
    """Raises FileError where a shard is missing or not as it was written."""
    path = folder / name
    if path.parent != folder or not path.is_file():
        raise FileError(f"{path} is missing: {folder} is not whole")
    if sha_of(path) != sha:
        raise FileError(f"{path}: its content is not what was written (sha256 differs); take an earlier state")


def add_shard(path: Path, sizes: Mapping[str, tuple[int, ...]], tensors: dict[str, np.ndarray]) -> None:
    """Puts the parts that a shard holds into whole tensors, of these sizes by parameter. Raises FileError."""
    try:
        with safe_open(path, framework="np") as file:
            places: Mapping[str, JsonObject] = json.loads((file.metadata() or {})[PLACES])
            for name in file.keys():  # noqa: SIM118  # no dict
                part = file.get_tensor(name)
                size = sizes.get(name.removeprefix("optim.m.").removeprefix("optim.v."), part.shape)
                starts = places[name]["saved_offsets"]
                place = tuple(slice(at, at + length) for at, length in zip(starts, part.shape, strict=True))
                if name not in tensors:
                    tensors[name] = np.zeros(size, part.dtype)
                tensors[name][place] = part
    except (SafetensorError, OSError, TypeError, ValueError, KeyError) as error:
        raise FileError(f"{path}: damaged, or no shard ({error})") from None
