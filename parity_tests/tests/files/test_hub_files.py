"""Folders that are no model, damaged or hostile: one line that names the file and the fault, and nothing allocated that
the file does not hold."""

import json
import pickle

import pytest
from safetensors.numpy import load_file, save_file

from parity_tests.tests.hub_folder import NORM, WORD, header, make_folder, refused


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "model")


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 4000, -1])
def test_truncated(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, "model.safetensors is", "damaged")


@pytest.mark.parametrize("length", [2**60, 2**64 - 1, 2**31])
def test_a_header_longer_than_its_file(folder, length):
    path = folder / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(folder, f"its header alone would have {length}")


def grow(got):
    got[WORD]["data_offsets"][1] += 2**40


def shift(got):
    got[WORD]["data_offsets"] = [2**62, 2**62 + 1472]


def widen(got):
    got[WORD]["shape"] = [2**40, 2**20]


def overflow(got):
    got[WORD]["shape"] = [2**63, 2]


def overlap(got):
    got[WORD]["data_offsets"] = got[NORM]["data_offsets"]


def strange(got):
    got[WORD]["dtype"] = "F4096"


def negative(got):
    got[WORD]["shape"] = [-23, -16]


def no_header(got):
    return "[" * 100_000


def no_object(got):
    return "[]"


def twice(got):
    text = json.dumps(got)
    return text[:-1] + f', "{WORD}": {json.dumps(got[WORD])}' + "}"


@pytest.mark.parametrize(
    "change", [grow, shift, widen, overflow, overlap, strange, negative, no_header, no_object, twice]
)
def test_a_header_that_lies(folder, change):
    header(folder, change)
    refused(folder, "damaged" if change is not twice else "twice")


def test_two_hundred_thousand_unknown_tensors(folder):
    many = ", ".join(f'"x{i}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}' for i in range(200_000))
    header(folder, lambda got: json.dumps(got)[:-1] + f", {many}}}")
    size = (folder / "model.safetensors").stat().st_size
    refused(folder, "names about 200043 tensors", "at most 20000", memory=2 * size)


def test_bytes_behind_the_last_tensor(folder):
    with open(folder / "model.safetensors", "ab") as file:
        file.write(bytes(100))
    refused(folder, "damaged")


# --- the folder -------------------------------------------------------------------------------------------------------


class Trap:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt"])
def test_pickles(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    refused(tmp_path, name, "pickle", "save_pretrained")
    refused(tmp_path / name, "pickle", "save_pretrained")


def test_folders_without_a_model(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds neither model.safetensors nor model.safetensors.index.json")
    refused(tmp_path / "nothing", "is no folder")
    (folder / "config.json").unlink()
    refused(folder, "config.json is missing")


def shards(folder, where):
    """The model as two shards, with an index changed by `where(weight_map)`."""
    got = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(got)
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({name: got[name] for name in part}, folder / file)
    index = {name: file for file, part in parts.items() for name in part}
    where(index)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (lambda index: index.update({NORM: "c.safetensors"}), "1 shard (c.safetensors) missing"),
        (lambda index: index.update({NORM: "../model/a.safetensors"}), "name a .safetensors file beside it"),
        (lambda index: index.update({NORM: 5}), "is said to be in 5"),
        (lambda index: index.update({max(index): min(index.values())}), "which the index does not say"),
        (lambda index: index.update({"more": "a.safetensors"}), "1 tensor (more) of the index in no shard"),
        (lambda index: index.pop(NORM), "which the index does not say"),
        (lambda index: index.clear(), "weight_map must be an object"),
    ],
)
def test_indexes(folder, where, message):
    shards(folder, where)
    refused(folder, message)


def test_a_tokenizer_that_is_none(folder):
    (folder / "tokenizer.json").write_text("words")
    refused(folder, "tokenizer.json is not JSON")
