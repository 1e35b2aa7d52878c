"""The files that say how a tokenizer is used, beside tokenizer.json: what they add to it is honoured, or refused by
name where tokenizer.json says otherwise. They are kept, and written again as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from qtx_ref.spec import Family, ModelSpec

from ..data.labelled import LENGTH
from ..data.rows import shorten
from ..data.splits import DataError
from ..data.tokenizing import SAME_AS, read_vocabulary
from ..files.container import FileError
from .files import ADDED, SPECIALS, TOKENIZER, TOKENIZER_CONFIG, read_json

# of a tokenizer whose class is BERT's or GPT-2's, transformers makes the normalizer and the pre-tokenizer anew from
# these
NORMALIZER = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def check_tokenizer(folder: Path, spec: ModelSpec, tokenizer_json: str) -> int | None:
    """Compares tokenizer_config.json, special_tokens_map.json and added_tokens.json with tokenizer.json.

    Returns model_max_length where it is less than texts have by default. Raises FileError naming file, key and value
    where transformers would make other ids of a text than tokenizer.json does, or where a value is none.
    """
    content, config = read_json(folder / TOKENIZER), read_optional(folder / TOKENIZER_CONFIG)
    path = folder / TOKENIZER_CONFIG

    def refuse(key: str, why: str) -> NoReturn:
        raise FileError(f"{path}: {key} is {shorten(config.get(key))}: {why}")

    kind = config.get("tokenizer_class") or ""
    if not isinstance(kind, str):
        refuse("tokenizer_class", "it must be a text")
    if spec.family is Family.BERT:
        # these take tokenizer.json as it is; the others set its normalizer anew
        if not kind.startswith(("PreTrainedTokenizer", "TokenizersBackend")):
            check_normalizer(path, config, content)
        for key in ("padding_side", "truncation_side"):
            if config.get(key, "right") != "right":
                refuse(key, "only right is supported")
    elif not kind or kind.startswith("GPT2Tokenizer"):
        for part in iterate_parts(content.get("pre_tokenizer")):
            prefix = part.get("add_prefix_space") if part.get("type") == "ByteLevel" else None
            if prefix is not None and config.get("add_prefix_space", prefix) != prefix:
                refuse("add_prefix_space", f"{TOKENIZER} says {prefix}; make the two agree")
        begins = begins_with_special(content)
        if config.get("add_bos_token") not in (None, begins):
            refuse("add_bos_token", f"{TOKENIZER} puts {'a' if begins else 'no'} special token first; make them agree")
    try:
        words = read_vocabulary(tokenizer_json)
    except DataError as error:
        raise FileError(f"{folder / TOKENIZER}: {error}") from None
    check_specials(path, config, words, spec)
    check_specials(folder / SPECIALS, read_optional(folder / SPECIALS), words, spec)
    for name, given in ((path, config), (folder / SPECIALS, read_optional(folder / SPECIALS))):
        check_known(name, given, set(words.values()))
    check_added(folder, config, words)
    longest = config.get("model_max_length", config.get("max_len"))
    if longest is None:
        return None
    if isinstance(longest, bool) or not isinstance(longest, (int, float)) or not longest >= 3:
        refuse("model_max_length", "give a whole number of tokens, at least 3")
    return int(longest) if longest < LENGTH else None


def check_normalizer(path: Path, config: Mapping[str, object], content: Mapping[str, object]) -> None:
    """Raises FileError where BERT's settings of letters are not those of tokenizer.json's normalizer."""
    given = dict(config)
    if given.get("tokenizer_class"):
        given.setdefault("do_lower_case", True)  # as that class does
    for part in iterate_parts(content.get("normalizer")):
        for key, name in NORMALIZER.items() if part.get("type") == "BertNormalizer" else ():
            own = part.get("lowercase") if name == "strip_accents" and part.get(name) is None else part.get(name)
            if given.get(key) not in (None, own):
                raise FileError(
                    f"{path}: {key} is {shorten(given[key])} and {TOKENIZER} says {own!r}: make the two agree"
                )


def iterate_parts(step: object) -> Iterator[Mapping[str, object]]:
    """A step of a tokenizer.json, or the steps of a sequence of them."""
    if isinstance(step, dict):
        yield step
        for key in ("normalizers", "pretokenizers", "processors"):
            for part in step.get(key) or [] if isinstance(step.get(key), list) else []:
                yield from iterate_parts(part)


def begins_with_special(content: Mapping[str, object]) -> bool:
    """Whether a tokenizer.json puts a special token before a text."""
    for part in iterate_parts(content.get("post_processor")):
        if part.get("type") in ("BertProcessing", "RobertaProcessing"):
            return True
        single = part.get("single")
        if part.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            return isinstance(single[0], dict) and "SpecialToken" in single[0]
    return False


def check_specials(path: Path, given: Mapping[str, object], words: Mapping[int, str], spec: ModelSpec) -> None:
    """Raises FileError where a BERT's special token is another than the one that is used here."""
    if spec.family is not Family.BERT:
        return
    known = set(words.values())
    for name, same in SAME_AS.items():
        token = given.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        own = next((word for word in same if word in known), None)
        if token is not None and token != own:
            raise FileError(f"{path}: {name}_token is {shorten(token)}: only {' or '.join(same)} is supported")


def check_known(path: Path, given: Mapping[str, object], known: set[str]) -> None:
    """Raises FileError for an unknown token or a further special token that tokenizer.json does not have: transformers
    would add it."""
    for key in ("unk_token", "additional_special_tokens", "extra_special_tokens"):
        value = given.get(key)
        several = list(value.values()) if isinstance(value, dict) and "content" not in value else value
        for token in several if isinstance(several, list) else [several]:
            text = token.get("content") if isinstance(token, dict) else token
            if text is not None and text not in known:
                raise FileError(
                    f"{path}: {key} has {shorten(text)}, which {TOKENIZER} lacks: add it there, or leave it out"
                )


def check_added(folder: Path, config: Mapping[str, object], words: Mapping[int, str]) -> None:
    """Raises FileError for an added token that tokenizer.json does not have under the same id."""
    decoder, added = config.get("added_tokens_decoder"), read_optional(folder / ADDED)
    pairs: list[tuple[str, object, object]] = [(ADDED, token, number) for token, number in added.items()]
    if decoder is not None and not isinstance(decoder, dict):
        raise FileError(f"{folder / TOKENIZER_CONFIG}: added_tokens_decoder must be an object")
    for number, token in (decoder or {}).items():
        content = token.get("content") if isinstance(token, dict) else token
        pairs.append((TOKENIZER_CONFIG, content, int(number) if number.isdecimal() and len(number) < 19 else number))
    for name, token, number in pairs:
        if not isinstance(number, int) or words.get(number) != token:
            own = next((place for place, word in words.items() if word == token), "none")
            raise FileError(
                f"{folder / name}: the added token {shorten(token)} has the id {shorten(number)}, in {TOKENIZER} {own}"
                ": make the two agree"
            )


def read_optional(path: Path) -> dict[str, object]:
    """A JSON object; empty where there is no such file. Raises FileError as `read_json`."""
    return read_json(path) if path.exists() else {}
