"""Every setting of the published commands beside its key here: `python -m parity_tests.long.published_settings`
prints docs/published-settings.md. A test holds each key to the runs that come with qtx, and each value to theirs.

Facts of the code of Bondarenko et al. 2023 (scripts/*.sh, run_mlm.py, run_clm.py, model_configs/, accelerate_configs/),
of the 2025 post, and, where no code is published, assumptions that say so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

INTRODUCTION = """# Every published setting and its key

Printed by `python -m parity_tests.long.published_settings`; a test compares the last column with the runs that come
with qtx (`qtx runs NAME` prints one, `--set KEY=VALUE` changes it). Where a setting comes from: *command*, the script;
*code*, `run_mlm.py` or `run_clm.py`; *config*, the model's configuration or the launcher's; *default*, that of the
library called; *post*, the 2025 blog post; *text*, the paper; *assumed*, no source at hand says it. A setting without a
key needs none, and the last column says why.
"""


SIXTEEN = "evaluation batches have 16 texts, and the loss is the mean over targets, not of batches' means"
NO_HISTOGRAMS = "no histograms while training; `qtx analyze` draws them"


@dataclass(frozen=True)
class Setting:
    """One setting of a command. key: None where there is nothing to set. value: of the run; None: not compared."""

    name: str
    published: str
    source: str
    key: str | None = None
    value: Any = None
    note: str = ""

    def row(self) -> str:
        """As a line of a table."""
        value = "" if self.value is None else f"`{json.dumps(self.value)}`"
        ours = ": ".join(part for part in (value, self.note) if part)
        name = f"`{self.name}`" if self.name.startswith("--") else self.name
        return f"| {name} | {self.published} | {self.source} | {f'`{self.key}`' if self.key else '-'} | {ours} |"


def command(name: str, published: str, key: str | None = None, value: Any = None, note: str = "") -> Setting:
    """A flag of the script."""
    return Setting(name, published, "command", key, value, note)


def code(name: str, published: str, key: str | None = None, value: Any = None, note: str = "") -> Setting:
    """What the training program has without a flag."""
    return Setting(name, published, "code", key, value, note)


def config(name: str, published: str, key: str | None = None, value: Any = None, note: str = "") -> Setting:
    """What the configuration of the model or of the launcher has."""
    return Setting(name, published, "config", key, value, note)


RUN_BY_CODE = (  # the same in every script
    command("--seed", "1000", "seed", 1000, "other random numbers all the same"),
    command("--dataset_setup", "bookcorpus_and_wiki", "data.sources", None, "BookCorpus and Wiki-40b English, joined"),
    command("--preprocessing_num_workers", "4", note="all cores tokenize"),
    command("--data_cache_dir", "~/.hf_data", note="the cache of qtx and that of `datasets`"),
    command("--model_cache_dir", "~/.hf_cache", note="no model is fetched"),
    command("--with_tracking --report_to", "tensorboard", "log.tensorboard", True),
    command("--output_dir", "output", note="`--out`"),
    command("--lr_scheduler_type", "linear", "optim.schedule", "linear"),
    command("--max_grad_norm", "1.0", "optim.clip_norm", 1.0),
    Setting("norm of the gradient", "2", "default", note="the only one"),
    Setting("first rate", "0, then t / warm-up", "default", "optim.first_rate_zero", True, "of transformers' schedule"),
    Setting("AdamW beta1", "0.9", "default", "optim.beta1", 0.9),
    Setting("AdamW eps", "1e-8", "default", "optim.eps", 1e-8),
    code(
        "start", "attention replaced after drawing", "model.start", "published", "`parity_tests.long.published_start`"
    ),
    code("biases", "not decayed", note="nowhere are they"),
    code("gate of one parameter per head", "decays: a tensor named alpha", "optim.decay_head_gates", True),
    code("order", "every window once per epoch, shuffled", "data.order", "permutation"),
    code(
        "packing", "documents joined, cut into windows", "data.packing", "stream", "theirs drops the rest of each 1,000"
    ),
    code("special tokens", "of each document", "data.begin", "document"),
    code("checkpoints kept", "1", "saving.keep", 1),
    code("validation", "after each epoch", "evaluation.every", None, "in steps"),
    code("batches of a validation", "all (BERT), at most 1,025 (OPT)", "evaluation.batches"),
    config("mixed_precision", "fp16", "machine.dtype", "float16"),
    code("a step that overflows", "skipped; the schedule waits", note="skipped; the schedule goes on"),
    config("use_cpu", "false", "machine.device", "cuda"),
    config("num_processes", "1", note="`torchrun` starts several; they share the batch"),
)


def bert(batch: int) -> tuple[Setting, ...]:
    """bert_base_*.sh, with its batch."""
    return (
        command("--model_type, --config_name", "bert, bert-base-uncased", "model.preset", "bert-base"),
        config("num_hidden_layers", "12", "model.layers", 12),
        config("hidden_size", "768", "model.width", 768),
        config("num_attention_heads", "12", "model.heads", 12),
        config("intermediate_size", "3072", "model.hidden", 3072),
        config("positions", "512", "model.length", 512),
        config("vocabulary", "30522", "model.vocab", 30522),
        config("dropout", "0.1", "model.dropout", 0.1),
        config("dropout of attention", "0.1", "model.attention_dropout", 0.1),
        config("initializer_range", "0.02", "model.init_std", 0.02),
        config("layer_norm_eps", "1e-12", "model.norm_eps", 1e-12),
        config("hidden_act", "gelu", "model.activation", "gelu"),
        command("--tokenizer_name", "bert-base-uncased", "data.tokenizer", None, "its tokenizer.json"),
        command("--max_seq_length", "128", "data.window", 128, "by which alpha divides too"),
        command("--mlm_probability", "0.15", "data.mask_rate", 0.15, "of them 80 % [MASK], 10 % another, 10 % as is"),
        command("--learning_rate", "0.0001", "optim.lr", 1e-4),
        command("--max_train_steps", "1000000", "optim.steps", 1_000_000),
        command("--num_warmup_steps", "10000", "optim.warmup", 10_000),
        command("--per_device_train_batch_size", str(batch), "data.batch", batch),
        command("--per_device_eval_batch_size", "256", note=SIXTEEN),
        command("--gradient_accumulation_steps", "1", "step.accumulate", 1),
        command("--weight_decay", "0.01", "optim.weight_decay", 0.01),
        Setting("AdamW beta2", "0.999", "default", "optim.beta2", 0.999),
        code("LayerNorm.weight", "not decayed", "optim.decay_norm_gains", False),
        command("--checkpointing_steps", "100000", "saving.every", 100_000),
        command("--tb_scalar_log_interval", "2000", "log.every", 2000, "steps between lines"),
        command("--tb_hist_log_interval", "100000", note=NO_HISTOGRAMS),
        command("--extra_tb_stats", "set", note="read by run_clm.py alone"),
        command("--attn_softmax (vanilla)", "vanilla", "model.attention", "vanilla"),
        command("--attn_softmax (clipped)", "clipped(-.025:1)", "model.attention", None, "`clipped:gamma=-0.025`"),
        command("--attn_gate_type --attn_gate_mlp (gated)", "conditional_per_token", "model.attention", None, "`mlp`"),
    )


def opt(
    size: str,
    sizes: tuple[int, int, int, int],
    length: int,
    batch: tuple[int, int],
    steps: int,
    saving: int,
    gains: bool,
) -> tuple[Setting, ...]:
    """opt_SIZE_*.sh: layers, width, heads, hidden; positions; batch and accumulation; steps."""
    yaml = "opt-12L12H" if size == "125m" else f"opt-{size}"
    same_width = sizes[1] == 768
    gated = {
        "125m": ("--attn_gate_init 0.25", "`gated:pi=0.25`"),
        "350m": ("--attn_gate_init 0.25", "`gated:pi=0.25`"),
        "1.3b": ("--attn_gate_linear_all_features", "`all_features`"),
    }[size]
    return (
        command("--model_type, --config_path", f"opt, model_configs/{yaml}.yaml", "model.preset", f"paper-opt-{size}"),
        config("num_hidden_layers", str(sizes[0]), "model.layers", sizes[0]),
        config("hidden_size", str(sizes[1]), "model.width", sizes[1]),
        config("num_attention_heads", str(sizes[2]), "model.heads", sizes[2]),
        config("ffn_dim", str(sizes[3]), "model.hidden", sizes[3]),
        config("max_position_embeddings", str(length), "model.length", length),
        config("init_std", "0.006", "model.init_std", 0.006, "the second FFN matrix too"),
        config("dropout", "0.1", "model.dropout", 0.1),
        Setting("attention_dropout", "0", "default", "model.attention_dropout", 0.0),
        Setting("word_embed_proj_dim", "768", "default", "model.embed_width", None if same_width else 768),
        Setting("do_layer_norm_before", "true", "default", "model.pre_norm", True),
        Setting("final layer norm", "yes", "default", "model.final_norm", True),
        Setting("activation_function", "relu", "default", "model.activation", "relu"),
        Setting("vocab_size", "50272", "default", "model.vocab", 50272, "the tokenizer has 50,265"),
        command("--tokenizer_name", "facebook/opt-350m", "data.tokenizer", None, "its tokenizer.json"),
        command("--block_size", "512", "data.window", 512, "by which alpha divides, whatever the positions"),
        command("--max_seq_length", "2048", note="read by nothing there"),
        command("--pad_to_max_length", "set", note="read by nothing there"),
        command("--learning_rate", "0.0004", "optim.lr", 4e-4),
        command("--max_train_steps", str(steps), "optim.steps", steps),
        command("--num_warmup_steps", "2000", "optim.warmup", 2000),
        Setting("--final_lr_fraction", "0", "default", note="the schedule ends at 0"),
        command(
            "--per_device_train_batch_size", str(batch[0]), "data.batch", batch[0] * batch[1], "all parts together"
        ),
        command("--per_device_eval_batch_size", str(batch[0]), note=SIXTEEN),
        command("--gradient_accumulation_steps", str(batch[1]), "step.accumulate", batch[1]),
        command("--weight_decay", "0.1", "optim.weight_decay", 0.1),
        command("--wd_LN_gamma", "set" if gains else "not set", "optim.decay_norm_gains", gains),
        code("AdamW beta2", "0.95", "optim.beta2", 0.95),
        command("--checkpointing_steps", str(saving), "saving.every", saving),
        *(
            (
                command("--extra_tb_stats", "set", "log.sites", None, "their inf norm and kurtosis"),
                command("--tb_scalar_log_interval", "2000", "log.every", 2000, "steps between lines"),
                command("--tb_hist_log_interval", "10000", note=NO_HISTOGRAMS),
            )
            if size == "125m"
            else ()
        ),
        command("--attn_softmax (vanilla)", "vanilla", "model.attention", "vanilla"),
        *(
            (command("--alpha (clipped)", "12", "model.attention", None, "`clipped:alpha=12`"),)
            if size == "125m"
            else ()
        ),
        command(f"--attn_gate_type {gated[0]} (gated)", "conditional_per_token", "model.attention", None, gated[1]),
    )


def assumed(name: str, published: str, key: str | None = None, value: Any = None, note: str = "") -> Setting:
    """What no source at hand says."""
    return Setting(name, published, "assumed", key, value, note)


VIT = (
    Setting("model", "ViT-S/16, LayerNorm after the patches", "text", "model.preset", "vit-s16"),
    Setting("patch norm", "yes", "text", "model.patch_norm", True),
    Setting("data", "ImageNet-1K, 224 x 224", "text", "data.sources", None, "a folder of images"),
    Setting("image size", "224", "text", "model.image_size", 224),
    assumed("start", "timm's", "model.start", "own", "truncated normal, std 0.02"),
    assumed("batch", "512", "data.batch", 512),
    assumed("epochs", "300 of 1,281,167 images", "optim.steps", 750_600),
    assumed("schedule", "cosine", "optim.schedule", "cosine", "to 0"),
    assumed("peak rate", "1e-3", "optim.lr", 1e-3),
    assumed("warm-up", "20 epochs", "optim.warmup", 50_040),
    assumed("weight decay", "0.03", "optim.weight_decay", 0.03),
    assumed("norm gains", "not decayed", "optim.decay_norm_gains", False),
    assumed("clipping", "none", "optim.clip_norm", 0.0),
    Setting("random crop", "yes", "text", "data.augment.crop", 0.08, "the least share of the area is assumed"),
    Setting("horizontal flip", "yes", "text", "data.augment.flip", 0.5, "the probability is assumed"),
    Setting("colour", "yes", "text", "data.augment.brightness", 0.4, "the size is assumed"),
    Setting("colour", "yes", "text", "data.augment.contrast", 0.4, "the size is assumed"),
    Setting("colour", "yes", "text", "data.augment.saturation", 0.4, "the size is assumed"),
    Setting("mixup", "yes", "text", "data.augment.mixup", 0.8, "its alpha is assumed"),
    Setting("label smoothing", "yes", "text", "data.augment.smoothing", 0.1, "the size is assumed"),
    assumed("RandAugment, CutMix, stochastic depth", "on", note="not here"),
    assumed("order", "every image once per epoch, shuffled", "data.order", "permutation"),
    assumed("precision", "float32", "machine.dtype", "float32"),
)

# what the post says, over what its code took from the published one
POST = (
    "--dataset_setup",
    "--learning_rate",
    "--lr_scheduler_type",
    "--max_grad_norm",
    "--max_seq_length",
    "--max_train_steps",
    "--mlm_probability",
    "--model_type, --config_name",
    "--num_warmup_steps",
    "--per_device_train_batch_size",
    "--weight_decay",
    "mixed_precision",
)


def blog() -> tuple[Setting, ...]:
    """The post's runs: it says the settings in `POST`; all else is assumed to be as in bert_base_*.sh."""
    rows = []
    for one in (*bert(128), *RUN_BY_CODE):
        if "(" in one.name or one.key in ("log.every", "log.sites") or one.key is None:
            continue  # the attentions stand below; the rest has no meaning here
        source = "post" if one.name in POST else "assumed"
        rows.append(Setting(one.name.replace("--", ""), one.published, source, one.key, one.value, one.note))
    return (
        *rows,
        Setting("softmax", "vanilla, clipped", "post", "model.attention", None, "`vanilla`, `clipped:gamma=-0.025`"),
        Setting("gate", "MLP of 16 hidden units", "post", "model.attention", None, "`mlp:gate_hidden=16`"),
        Setting("forward pass", "float, W8A8 per token", "post", "quant.train", None, "without, `w8a8`"),
        Setting("inf norm", "of the input of layer 5, each step", "post", "log.sites", ["layer.4.ffn.norm"]),
    )


RUNS: dict[str, tuple[Setting, ...]] = {
    "paper-bert-base": (*bert(256), *RUN_BY_CODE),
    "paper-opt-125m": (*opt("125m", (12, 768, 12, 3072), 512, (48, 4), 125_000, 10_000, True), *RUN_BY_CODE),
    "paper-opt-350m": (*opt("350m", (24, 1024, 16, 4096), 1024, (24, 11), 100_000, 1000, False), *RUN_BY_CODE),
    "paper-opt-1.3b": (*opt("1.3b", (24, 2048, 32, 8192), 1024, (14, 18), 100_000, 1000, False), *RUN_BY_CODE),
    "paper-vit-s16": VIT,
    "blog-bert-base": blog(),
}
# the README's commands for quantized models: the recipes say whence each of their rules comes
VALIDATION = """## Validation in 8 bits

| setting | BERT | OPT | here |
|---|---|---|---|
| `--quantize` | set | set | `--recipe paper-bert`, `--recipe paper-opt` |
| `--n_bits`, `--n_bits_act` | 8, 8 (default) | 8, 8 (default) | of the recipe |
| `--quant_setup` | all (default; its MLM head stays in float) | fp32_head | of the recipe |
| `--qmethod_acts` | asymmetric_uniform (default) | asymmetric_uniform | of the recipe |
| `--ranges_acts` | running_minmax (default) | running_minmax | of the recipe |
| `--percentile` | none (default) | 99.999 | of the recipe |
| `--est_num_batches`, `--per_device_eval_batch_size` | 16 of 32 | 4 of 1 | `--calibration`, batches of 16 |
| `--seed` | 2000 | 2000 | calibration has seed 0 everywhere |
| `--max_seq_length`, `--block_size` | 128 | 512 | `data.window` |
| `--mlm_probability` | 0.15 | | `data.mask_rate` |
| `--dataset_setup` | bookcorpus_and_wiki | bookcorpus_and_wiki | of the checkpoint |
"""


def write_page() -> str:
    """docs/published-settings.md."""
    parts = [INTRODUCTION]
    for name, settings in RUNS.items():
        head = "| setting | published | where | key | here |\n|---|---|---|---|---|"
        parts.append("\n".join([f"## `{name}`\n", head, *(one.row() for one in settings)]) + "\n")
    return "\n".join([*parts, VALIDATION])


if __name__ == "__main__":
    print(write_page(), end="")
