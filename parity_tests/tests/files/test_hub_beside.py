"""The files beside config.json and the tensors: what they say is honoured or refused by name, and written again."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parity_tests.tests.hub_folder import config, make_folder, refused
from parity_tests.tests.hub_models import BERT_SIZE, OPT_SIZE, make, transformers
from parity_tests.tests.shell import call, good
from qtx.data.tokenizing import read_bundled_tokenizer
from qtx.files.checkpoint import load_checkpoint, save_checkpoint
from qtx.files.formats import FileError
from qtx.hub import import_model
from qtx.hub.export import export_model
from qtx.hub.tokenizer import check_tokenizer
from qtx.jobs.starts import open_origin
from qtx_ref.spec import Family, Head, ModelSpec

tokenizers = pytest.importorskip("tokenizers", reason="the extra text is not installed")


@pytest.fixture
def folder(tmp_path, request):
    return make_folder(tmp_path / "model", getattr(request, "param", "bert"))


@pytest.mark.parametrize("folder", ["classify"], indirect=True)
def test_a_classifier_is_one_of_classes(folder):
    for kind in ("multi_label_classification", "regression", "other", 1):
        config(folder, problem_type=kind)
        refused(folder, f"config.json: problem_type is {kind!r}: only 'single_label_classification' is supported")
    for kind in (None, "single_label_classification"):
        config(folder, problem_type=kind)
        assert import_model(folder).spec.head is Head.CLASSIFY
    config(folder, id2label={"0": "a", "1": "b", "2": "9" * 5000})
    refused(folder, "config.json: id2label has a name of 5000 characters: give at most 200")
    config(folder, id2label={"9" * 5000: "a", "1": "b", "2": "c"})
    assert "names" not in import_model(folder).meta["data"]


def test_settings_that_would_be_guessed(folder):
    config(folder, problem_type="regression")  # of no head, which has no scores
    import_model(folder)
    config(folder, tie_word_embeddings="no")
    refused(folder, "config.json: tie_word_embeddings is 'no': it must be true or false")


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": 10**100},
        {"vocab_size": 10**30},
        {"num_hidden_layers": 10**12},
        {"max_position_embeddings": 2**62},
        {"intermediate_size": 10**4000},
        {"num_attention_heads": 10**18, "hidden_size": 10**18},
    ],
)
def test_sizes_beyond_any_memory(folder, values):
    config(folder, **values)
    refused(folder)


@pytest.mark.parametrize("folder", ["vit"], indirect=True)
def test_pictures_beyond_any_memory(folder):
    for values in ({"image_size": 10**9}, {"num_channels": 10**18}, {"image_size": 10**18, "patch_size": 10**17}):
        config(folder, **({"image_size": 4, "patch_size": 2, "num_channels": 2} | values))
        refused(folder)


# --- tokenizers -------------------------------------------------------------------------------------------------------


def put_tokenizer(folder, **settings):
    """The bundled tokenizer and a tokenizer_config.json."""
    (folder / "tokenizer.json").write_text(read_bundled_tokenizer())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_lower_case": False}, "do_lower_case is False and tokenizer.json says True"),
        ({"strip_accents": False}, "strip_accents is False and tokenizer.json says True"),
        ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars is False and tokenizer.json says True"),
        ({"padding_side": "left"}, "padding_side is 'left': only right"),
        ({"truncation_side": "left"}, "truncation_side is 'left': only right"),
        ({"model_max_length": "long"}, "model_max_length is 'long': give a whole number"),
        ({"model_max_length": 2}, "model_max_length is 2"),
        ({"cls_token": "<s>"}, "cls_token is '<s>': only [CLS] or <s> is supported"),
        ({"mask_token": {"content": "man"}}, "mask_token is 'man'"),
        ({"tokenizer_class": 3}, "tokenizer_class is 3"),
        (
            {"added_tokens_decoder": {"7": {"content": "[CLS]"}}},
            "added token '[CLS]' has the id 7, in tokenizer.json 2",
        ),
        ({"added_tokens_decoder": {"9" * 5000: {"content": "[CLS]"}}}, "added token '[CLS]' has the id '9999"),
        ({"added_tokens_decoder": []}, "added_tokens_decoder must be an object"),
    ],
)
def test_settings_of_a_tokenizer_that_are_not_its_own(folder, settings, message):
    put_tokenizer(folder, **settings)
    refused(folder, "tokenizer_config.json", message)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("special_tokens_map.json", '{"sep_token": "man"}', "sep_token is 'man'"),
        ("added_tokens.json", '{"[NEW]": 2048}', "the added token '[NEW]' has the id 2048, in tokenizer.json none"),
        ("generation_config.json", "[1]", "holds list"),
        ("tokenizer_config.json", "{", "is not JSON"),
        ("vocab.txt", None, "is not UTF-8"),
        ("tokenizer.json", '{"model": {"vocab": {"a": 2147483648}}}', "gives 'a' the id 2147483648"),
        ("tokenizer.json", '{"model": 1}', "its vocabulary is damaged"),
    ],
)
def test_files_beside_that_are_damaged(folder, name, text, message):
    put_tokenizer(folder)
    (folder / name).write_bytes(b"\xff" if text is None else text.encode())
    refused(folder, name, message)


def test_settings_that_agree_are_no_matter(folder):
    put_tokenizer(folder, do_lower_case=True, strip_accents=None, model_max_length=10**30, cls_token="[CLS]")
    (folder / "added_tokens.json").write_text('{"[CLS]": 2}')
    assert "length" not in import_model(folder).meta["data"]
    put_tokenizer(folder, tokenizer_class="PreTrainedTokenizerFast", do_lower_case=False)  # which that class ignores
    import_model(folder)
    put_tokenizer(folder, model_max_length=16)
    assert import_model(folder).meta["data"]["length"] == 16


def test_what_transformers_makes_of_letters_is_what_is_imported(tmp_path):
    """BertTokenizer makes its normalizer of tokenizer_config.json; a tokenizer.json that says otherwise gives other
    ids."""
    made = {}
    for lower in (True, False):
        make("bert mlm", folder := tmp_path / str(lower))
        put_tokenizer(folder, do_lower_case=lower, tokenizer_class="BertTokenizer")
        made[lower] = transformers.AutoTokenizer.from_pretrained(folder)("The Man").input_ids[1:-1]
    ours = tokenizers.Tokenizer.from_str(read_bundled_tokenizer()).encode("The Man").ids
    assert made[True] == ours and made[False] != ours
    assert "tokenizer" in import_model(tmp_path / "True").meta
    refused(tmp_path / "False", "do_lower_case is False")


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}


@pytest.fixture
def theirs(tmp_path):
    """A BERT and its tokenizer as transformers saves them, with files of older versions beside."""
    folder = tmp_path / "theirs"
    size = BERT_SIZE | {"vocab_size": 2048, "max_position_embeddings": 32}
    transformers.BertForMaskedLM(transformers.BertConfig(**size)).save_pretrained(folder)
    put_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder, model_max_length=24, do_lower_case=True)
    tokenizer.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text('{"cls_token":   "[CLS]"}')
    (folder / "added_tokens.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"max_length": 12}\n\n')
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    return folder


def test_what_was_imported_is_exported_byte_for_byte(theirs, tmp_path):
    good("import", theirs, "--out", tmp_path / "m.safetensors")
    good("export", tmp_path / "m.safetensors", "--out", tmp_path / "out")
    assert read_all(tmp_path / "out") == read_all(theirs) and len(read_all(theirs)) == 7
    one, two = (transformers.AutoTokenizer.from_pretrained(path) for path in (theirs, tmp_path / "out"))
    assert two.model_max_length == one.model_max_length == 24
    assert two("The caf\u00e9 Man").input_ids == one("The caf\u00e9 Man").input_ids


def test_a_descendant_keeps_its_tokenizer_s_settings(theirs, tmp_path):
    """Trained on, it has another configuration and no generation; its tokenizer is used as before."""
    checkpoint = import_model(theirs)
    save_checkpoint(tmp_path / "m.safetensors", checkpoint)
    origin = open_origin(tmp_path / "m.safetensors")
    changed = replace(checkpoint, meta={"tokenizer": checkpoint.meta["tokenizer"], **origin.describe()})
    save_checkpoint(tmp_path / "n.safetensors", changed)
    export_model(tmp_path, load_checkpoint(tmp_path / "n.safetensors"), tmp_path / "out")
    before, after = read_all(theirs), read_all(tmp_path / "out")
    assert after.keys() == before.keys() - {"generation_config.json"}
    assert {name for name in after if after[name] != before[name]} == {"config.json"}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 24


def test_files_of_a_hostile_checkpoint_are_written_nowhere_else(theirs, tmp_path):
    checkpoint = import_model(theirs)
    checkpoint.meta["files"] |= {"../outside.json": "{}", "run.py": "pass"}
    export_model(tmp_path, checkpoint, tmp_path / "out")
    assert read_all(tmp_path / "out").keys() == read_all(theirs).keys() and not (tmp_path / "outside.json").exists()


@pytest.mark.parametrize("folder", ["vit"], indirect=True)
def test_how_pictures_are_made_goes_out_again(folder, tmp_path):
    text = '{"size": {"shortest_edge": 9},\n "resample": 3, "do_center_crop": true, "crop_size": 4, '
    text += '"image_mean": [0, 0.1]}'
    (folder / "preprocessor_config.json").write_text(text)
    checkpoint = import_model(folder)
    export_model(tmp_path, checkpoint, tmp_path / "out")
    assert (tmp_path / "out/preprocessor_config.json").read_text() == text
    del checkpoint.meta["files"]
    export_model(tmp_path, checkpoint, tmp_path / "again")
    assert import_model(tmp_path / "again").meta["images"] == checkpoint.meta["images"]


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def opt(tmp_path):
    """An OPT with the tokenizer's template of OPT, </s> before a text, and padding and truncation left in it."""
    words = ["<s>", "<pad>", "</s>", "<unk>", *"abcdefghijklmnopqrs"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 2)])
    tokenizer.enable_padding(length=8, pad_id=1, pad_token="<pad>")
    tokenizer.enable_truncation(3)
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**OPT_SIZE, init_std=0.5)).eval()
    model.save_pretrained(tmp_path / "opt")
    tokenizer.save(str(tmp_path / "opt/tokenizer.json"))
    return tmp_path / "opt", model


def test_a_prompt_is_what_transformers_makes_of_it(opt, tmp_path):
    folder, model = opt
    good("import", folder, "--out", tmp_path / "m.safetensors")
    (tmp_path / "text.txt").write_text("\n\n".join("a b c d e f g h i j k l m n o p"[i % 9 :] for i in range(300)))
    got = tmp_path / "said.json"
    for prompt in ("a b c d e", "a"):  # longer and shorter than what the file would cut and fill
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        ids = theirs(prompt, padding=False, truncation=False, return_tensors="pt").input_ids
        good(
            "generate",
            tmp_path / "m.safetensors",
            "--prompt",
            prompt,
            "--tokens",
            3,
            "--data",
            tmp_path / "text.txt",
            "--backend",
            "ref",
            "--json",
            got,
        )
        said = json.loads(got.read_bytes())
        assert said["prompt_tokens"] == ids.shape[1] == 1 + len(prompt.split())
        wanted = ids
        for _ in range(3):
            with torch.no_grad():
                wanted = torch.cat([wanted, model(wanted).logits[:, -1:].argmax(-1)], 1)
        assert said["tokens"] == wanted[0].tolist()


def test_fine_tuning_needs_the_model_s_tokenizer(tmp_path):
    make("bert", tmp_path / "theirs")
    path = tmp_path / "m.safetensors"
    save_checkpoint(path, import_model(tmp_path / "theirs"))
    result = call("finetune", path, "--data", "books", "--steps", 1, "--out", tmp_path / "out")
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "found no tokenizer.json" in result.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tokenizer_class": "DistilBertTokenizerFast", "do_lower_case": False}, "do_lower_case"),
        ({"tokenizer_class": "ElectraTokenizer", "do_lower_case": False}, "do_lower_case"),
        ({"additional_special_tokens": ["<new>"]}, "additional_special_tokens has '<new>'"),
        ({"extra_special_tokens": {"image_token": "<new>"}}, "extra_special_tokens has '<new>'"),
        ({"unk_token": "[X]"}, r"unk_token has '\[X\]'"),
    ],
)
def test_settings_that_would_make_other_ids_are_refused(settings, said):
    words = json.dumps(
        {
            "model": {"type": "WordPiece", "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}},
            "normalizer": {"type": "BertNormalizer", "lowercase": True},
        }
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tokenizer.json").write_text(words)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        with pytest.raises(FileError, match=said):
            check_tokenizer(folder, ModelSpec(Family.BERT, 1, 8, 2, 16, Head.MLM, vocab=5, length=8), words)
