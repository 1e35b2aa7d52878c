"""Folders of a state that processes share: any number of them wrote it, one reads it; damage is refused."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity_tests.subjects import small_models
from qtx.disk import WriteError
from qtx.engines.machine import Machine
from qtx.files.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from qtx.files.container import FileError
from qtx.files.shares import (
    PLACES,
    begin_folder,
    find_folders,
    find_state,
    finish_folder,
    load_shares,
    name_folder,
    name_unfinished,
    remove_folders,
    seal_shard,
)
from qtx.jobs.saving import Saving, SharedSaving
from qtx.runs.spec import SavingSpec


def write(path, step, count=3):
    """What `count` processes leave; each has rows of every parameter, as torch writes them, the last ones fewer."""
    small = small_models.build("bert_plain")
    folder = name_folder(path, step)
    begin_folder(folder)
    for rank in range(count):
        parts, places = {}, {}
        for name, value in small.params.items():
            size = -(-len(value) // count)
            parts[name] = value[rank * size : (rank + 1) * size]
            places[name] = {"saved_offsets": [min(rank * size, len(value)), *[0] * (value.ndim - 1)]}
        name = f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"
        save_file(parts, name_unfinished(folder) / name, {PLACES: json.dumps(places)})
        seal_shard(folder, rank)
    history = {"history.loss": np.arange(float(step))}
    rest = Checkpoint(small.spec, {}, history, meta={"done": False})
    finish_folder(folder, rest)
    return small, folder, rest


def test_a_folder_is_the_checkpoint(tmp_path):
    small, folder, rest = write(tmp_path / "model.safetensors", 4)
    checkpoint = load_shares(folder)
    assert checkpoint.spec == small.spec and checkpoint.meta == rest.meta
    assert checkpoint.params.keys() == small.params.keys()
    assert all(np.array_equal(value, small.params[name]) for name, value in checkpoint.params.items())
    light = load_shares(folder, False, 1, 2)
    assert light.extra.keys() == {"history.loss"} and all(value.strides[0] == 0 for value in light.params.values())


def test_the_last_whole_state_is_found(tmp_path):
    path = tmp_path / "model.safetensors"
    assert find_state(path) is None
    small, folder, rest = write(path, 4)
    begin_folder(name_folder(path, 9))  # and killed
    assert find_state(path) == folder
    save_checkpoint(path, replace(rest, params=small.params))
    assert find_state(path) == path  # it is as far
    _, later, _ = write(path, 5)
    assert find_state(path) == later and [*find_folders(path)] == [4, 5]
    remove_folders(path, keep={4})
    assert {one.name for one in tmp_path.iterdir()} == {path.name, folder.name}


def test_who_opens_the_model_is_told_to_finish_the_run(tmp_path):
    _, folder, _ = write(tmp_path / "model.safetensors", 4)
    for given in (folder, tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(FileError, match="share its state: the last step makes it; go on with --resume"):
            load_checkpoint(given)


def test_one_process_keeps_what_several_left(tmp_path):
    """Numbered states count alike, as folders and as files, whoever goes on."""
    path = tmp_path / "model.safetensors"
    for step in (2, 4, 5):
        small, _, rest = write(path, step)
    saving = Saving(path, SavingSpec(every=2, keep=2))
    for step, left in {
        5: {"4.shares", "2.shares"},
        6: {"4.shares", "6.safetensors"},
        7: {"4.shares", "6.safetensors"},
    }.items():
        saving.write(replace(rest, params=small.params), step)
        names = {one.name for one in tmp_path.iterdir()} - {path.name}
        assert names == {f"model-00000{name}" for name in left}


def test_what_could_not_be_written_leaves_its_room(tmp_path):
    """A shard that the disk has no room for: the part that was written would take the room of the next state."""

    class Trainer:
        def save_shares(self, folder):
            (Path(folder) / "shard-00001.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    saving = SharedSaving(tmp_path / "model.safetensors", SavingSpec(), Machine(), Trainer())
    with pytest.raises(WriteError, match="No space left"):
        saving.write(Checkpoint(small_models.build("bert_plain").spec, {}, meta={"done": False}), 4)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("plant", "fault"),
    [
        (lambda shard: shard.unlink(), "is missing"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-1] + b"x"), "sha256 differs"),
        (lambda shard: (shard.parent / "rest.safetensors").unlink(), "no such file"),
        (lambda shard: save_file(load_file(shard), shard), "sha256 differs"),
    ],
)
def test_damage_is_refused(tmp_path, plant, fault):
    _, folder, _ = write(tmp_path / "model.safetensors", 4)
    plant(sorted(folder.glob("shard-*.safetensors"))[1])
    assert find_state(tmp_path / "model.safetensors") == folder  # and the run does not begin anew
    with pytest.raises(FileError, match=fault):
        load_shares(folder)
