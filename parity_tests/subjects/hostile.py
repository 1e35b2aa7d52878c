"""A folder of files, and commands that read them, as hostile users may have them: models, files of other programs,
places, values of options, command lines drawn at random."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from qtx.cli import main as qtx
from qtx_ref.spec import Family, Head, ModelSpec

from .mutations import pick

VIT = ModelSpec(
    Family.VIT,
    1,
    16,
    2,
    32,
    Head.CLASSIFY,
    pre_norm=True,
    final_norm=True,
    classes=10,
    image_size=8,
    patch_size=4,
    channels=1,
)
OPT = ModelSpec(Family.OPT, 1, 16, 2, 32, Head.CAUSAL, vocab=2048, length=24)
BERT = ModelSpec(Family.BERT, 1, 16, 2, 32, Head.MLM, vocab=2048, length=24, types=2)
PTQ = ("ptq", "vit.safetensors", "--recipes", "w8a8", "--sequences", 4, "--calibration", 1, "--out", "ptq", "--resume")
STUDY = (
    "study",
    "--model",
    "vit-tiny",
    "--steps",
    1,
    "--batch",
    1,
    "--attention",
    "vanilla",
    "--out",
    "study",
    "--resume",
)
TUNE = ("finetune", "bert.safetensors", "--steps", 1, "--batch", 2, "--out", "tuned")
FILES: dict[str, tuple[tuple[Any, ...], ...]] = {  # of each mutated file, the commands that read it
    "vit.safetensors": (
        ("evaluate", "vit.safetensors", "--batches", 1),
        ("analyze", "vit.safetensors", "--batches", 1),
        ("quantize", "vit.safetensors", "--out", "new.qtx"),
        ("export", "vit.safetensors", "--out", "new"),
    ),
    "opt.safetensors": (("generate", "opt.safetensors", "--prompt", "It was", "--tokens", 2),),
    "bert.safetensors": (("export", "bert.safetensors", "--out", "new"), (*TUNE, "--data", "set.csv")),
    "ranges.safetensors": (
        ("evaluate", "ranges.safetensors", "--batches", 1),
        ("quantize", "ranges.safetensors", "--out", "new.qtx"),
    ),
    "vit.qtx": (
        ("show", "vit.qtx"),
        ("evaluate", "vit.qtx", "--batches", 1),
        ("diff", "vit.qtx", "other.qtx"),
        ("vectors", "vit.qtx", "--out", "new.safetensors", "--count", 1),
    ),
    "vectors.safetensors": (("vectors", "vit.qtx", "--check", "vectors.safetensors"),),
    "ptq/ptq.json": (PTQ, PTQ, PTQ),
    "study/study.json": (STUDY, STUDY),
    "recipe.json": (
        ("evaluate", "vit.safetensors", "--batches", 1, "--recipe", "recipe.json"),
        ("quantize", "vit.safetensors", "--recipe", "recipe.json", "--out", "new.qtx"),
    ),
    "hub/config.json": (("import", "hub", "--out", "new.safetensors"),),
    "hub/tokenizer.json": (("import", "hub", "--out", "new.safetensors"),),
    "hub/model.safetensors": (("import", "hub", "--out", "new.safetensors"),),
    "set.csv": ((*TUNE, "--data", "set.csv"),),
    "set.jsonl": ((*TUNE, "--data", "set.jsonl"),),
}
PIPE = "pipe"  # a file without an end, as a device is
RESULTS = ("ptq/ptq.json", "ptq/ptq.png", "study/study.json", "study/curves.png")  # which their commands write anew
FOREIGN = {  # files of other programs
    "user.json": b'{"model": {"type": "BPE"}}\n',
    "user.png": b"\x89PNG\r\n\x1a\n and so on",
    "user.txt": b"a text of mine\n" * 40,
    "user.qtx": b"mine",
    "user.safetensors": None,  # made by save_file
    "folder/model.safetensors": b"mine too",
    "folder/ptq.json": b'{"mine": 1}',
    "folder/w8a8.safetensors": b"mine as well",
    "folder/analysis.json": b"[1, 2]",
    "folder/depth.png": b"\x89PNG\r\n\x1a\n mine",
    "folder/cost.json": b"{}",
    "folder/study.json": b'{"runs": 5}',
}


def with_backend(command: tuple[Any, ...]) -> tuple[Any, ...]:
    """The command in the reference, where it computes."""
    return command if command[0] in ("export", "show", "diff", "import", "recipes") else (*command, "--backend", "ref")


PLACES = (
    *FOREIGN,
    *FILES,
    "link.json",
    "dangling.json",
    "folder",
    "ptq",
    "study",
    "hub",
    "nowhere",
    "nowhere/a/b.safetensors",
    "new",
    "new.json",
    "new.qtx",
    "new.safetensors",
    PIPE,
    ".",
    "",
    "user.txt/below",
    "a" * 300,
    "-",
)
OUTSIDE = ("..", "/", "/dev/null", "/dev/zero", "/dev/stdout", "/proc/self")  # read alone: this may run as root
WRITTEN = ("out", "json_path", "junit_path")  # options that name what a command writes
WHOLE = ("0", "1", "2", "-1", "70000", "9999999999", str(10**25), "x", "", "1.5", "nan", "١")
REAL = ("0", "1e-3", "-1", "nan", "inf", "-inf", "1e-400", "1e400", "x", "", "0.5", "1e308")
WORDS = (
    "w8a8",
    "w4a8",
    "w8a8-peg4p",
    "linear-w8a8-hadamard",
    "mxfp8",
    "fp8-e4m3",
    "paper-vit",
    "float",
    "train-w8a8",
    "lsq-w8a8",
    "w99a1",
    "recipe.json",
    "user.json",
    "vit-tiny",
    "opt-tiny",
    "vanilla",
    "clipped:gamma=nan",
    "gated:pi=2",
    "clipped+gated",
    "qtx",
    "onnx",
    "digits",
    "books",
    "*",
    "",
    ",",
    "w8a8,w8a8",
    "é",
    "a" * 2000,
    "It was",
    "hf",
    "no-such-case",
)
BACKENDS, DEVICES = (*["ref"] * 30, "torch", "jax", ""), (*["cpu"] * 9, "cuda", "mps", "")
DTYPES = (*["float32"] * 4, *["float64"] * 4, "bfloat16", "int8", "")
SHORT = {"steps": "1", "batch": "1", "batches": "1", "rounds": "1", "sequences": "2", "calibration": "1", "tokens": "2"}
SLOW = ("parity", "cost")  # which begin a table of cases or other processes where they are not refused
LONG = ("steps", "rounds", "batches", "epochs", "tokens", "count")  # of which many are work, not a fault
SOUND = (
    *dict.fromkeys(command for commands in FILES.values() for command in commands),
    ("train", "--model", "vit-tiny", "--steps", 1, "--batch", 1, "--out", "new"),
    ("recipes", "w8a8", "--model", "vit-tiny"),
    ("parity", "--only", "no-such-case"),
)


def make_command(rng: np.random.Generator) -> tuple[str, ...]:
    """A command that would work with one option more, or one of options drawn freely."""
    return spoil_command(rng) if rng.random() < 0.5 else draw_command(rng)


def spoil_command(rng: np.random.Generator) -> tuple[str, ...]:
    """A command that works, and one option more; the last of two counts."""
    arguments = list(with_backend(pick(SOUND, rng)))
    options = [each for each in qtx.commands[arguments[0]].params if isinstance(each, click.Option)]
    option = pick(options, rng)
    arguments.append(option.opts[0])
    if not option.is_flag:
        value = value_of(option, rng)
        arguments.append("1" if option.name in LONG and value in WHOLE and int_of(value) > 9 else value)
    return tuple(map(str, arguments))


def int_of(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def draw_command(rng: np.random.Generator) -> tuple[str, ...]:
    """A command with options of its own, most of them with values of their kind."""
    name = pick(sorted(set(qtx.commands) - set(SLOW)) + list(SLOW), rng)
    command, arguments = qtx.commands[name], [name]
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            if rng.random() < 0.95:
                models = ("vit.safetensors", "opt.safetensors", "ranges.safetensors", "vit.qtx", "hub")
                arguments.append(pick(models if rng.random() < 0.7 else PLACES + OUTSIDE, rng))
        elif parameter.name in SHORT:
            arguments += [parameter.opts[0], SHORT[parameter.name] if rng.random() < 0.8 else pick(WHOLE[3:], rng)]
        elif parameter.name == "backend_name":
            arguments += ["--backend", pick(BACKENDS, rng)]
        elif parameter.name == "engines":
            arguments += ["--engines", "none"]
        elif rng.random() < (0.7 if parameter.required else 0.25) and parameter.name != "epochs":
            arguments.append(parameter.opts[0])
            if not parameter.is_flag:
                arguments.append(value_of(parameter, rng))
    if name in SLOW:
        arguments += ["--device", pick(DEVICES[2:], rng)] if name == "cost" else ["--only", "no-such-case"]
    if name in ("train", "study") and "--model" not in arguments:
        arguments += ["--model", "vit-tiny"]
    if name == "study" and "--attention" not in arguments:
        arguments += ["--attention", "vanilla"]
    if rng.random() < 0.03:
        arguments.append(pick(("--nonsense", "more", "--", "-h", "--json"), rng))
    return tuple(arguments)


def value_of(parameter: click.Option, rng: np.random.Generator) -> str:
    """A value of the option's kind, or of another."""
    places = PLACES if parameter.name in WRITTEN else PLACES + OUTSIDE
    if rng.random() < 0.1:
        return pick(places + WORDS + WHOLE + REAL, rng)
    if parameter.name in ("device", "dtype"):
        return pick(DEVICES if parameter.name == "device" else DTYPES, rng)
    if isinstance(parameter.type, click.Choice):
        return pick((*parameter.type.choices, "x"), rng)
    if isinstance(parameter.type, click.types.IntParamType):
        return pick(WHOLE, rng)
    if isinstance(parameter.type, click.Path) or parameter.name in ("json_path", "data"):
        return pick(places, rng)
    if parameter.type.name in ("float", "float range", "number"):
        return pick(REAL, rng)
    return pick(WORDS, rng)
