"""preprocessor_config.json: how pictures become a ViT's pixels, to a checkpoint's `meta["images"]` and back.

transformers' ViTImageProcessor resizes, crops about the middle, multiplies by rescale_factor and normalises, each step
if its flag is set. Every key that changes pixels is honoured or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qtx_ref.spec import Family, ModelSpec, SpecError
from qtx_ref.spec.base import is_number

from ..data.images import LONGEST, MOST, is_length
from ..data.rows import shorten
from ..files.container import FileError
from .config import Settings

KINDS = ("ViTImageProcessor", "ViTImageProcessorFast", "ViTImageProcessorPil", "ViTFeatureExtractor")
# what names the class, or says how a call is answered, and changes no pixel
NAMES = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "_valid_processor_keys"),
    *("data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "image_seq_length"),
    *("do_convert_rgb", "pad_size", "default_to_square"),
}
USED = {
    *("do_resize", "size", "resample", "do_center_crop", "crop_size"),
    *("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"),
}
FILTERS = 6  # Pillow numbers its filters from 0


def read_preprocessor(path: Path, given: Mapping[str, object], spec: ModelSpec) -> dict[str, object]:
    """`meta["images"]` of a preprocessor_config.json: `mean` and `std` by channel of pixels in [0, 1], `resize`,
    `resample` and `crop` as in `qtx.data.images.Preparation`.

    Raises FileError naming the key, for a wrong value and for what is not done here.
    """
    try:
        return read_settings(given, spec)
    except SpecError as error:
        raise FileError(f"{path}: {error}") from None


def read_settings(given: Mapping[str, object], spec: ModelSpec) -> dict[str, object]:
    """The same; raises SpecError."""
    settings = Settings({key: value for key, value in given.items() if value is not None})
    for key in ("image_processor_type", "feature_extractor_type"):
        if (kind := settings.values.get(key, KINDS[0])) not in KINDS:
            raise SpecError(f"{key} is {shorten(kind)}: only {KINDS[0]}'s pictures are supported")
    for key, value in settings.values.items():
        if key not in NAMES | USED and value is not False:
            raise SpecError(f"{key} is {shorten(value)}: it is not supported")
    resize = None
    if settings.flag("do_resize", True):
        resize = read_size(settings, "size", {"height": 224, "width": 224}, shorter=True)
    crop = None
    if settings.flag("do_center_crop", False):
        if "crop_size" not in settings.values:
            raise SpecError("do_center_crop is true and there is no crop_size: give one")
        crop = read_size(settings, "crop_size", None, shorter=False)
    end, wanted = crop or resize, [spec.image_size] * 2
    if end is not None and end != wanted:
        key = "size" if crop is None else "crop_size"
        raise SpecError(
            f"{key} is {shorten(given.get(key))}, which makes other pictures than the model's {wanted[0]} x {wanted[1]}"
        )
    resample = settings.values.get("resample", 2)
    if type(resample) is not int or not 0 <= resample < FILTERS:
        raise SpecError(
            f"resample is {shorten(resample)}: give the number of one of Pillow's filters, 0 to {FILTERS - 1}"
        )
    return {**read_scales(settings, spec), "resize": resize, "resample": resample, "crop": crop}


def read_scales(settings: Settings, spec: ModelSpec) -> dict[str, list[float]]:
    """`mean` and `std` with which (x / 255 - mean) / std is what rescaling and normalising make of x in 0 to 255.

    Raises SpecError naming the key.
    """
    factor = settings.number("rescale_factor", 1 / 255) if settings.flag("do_rescale", True) else 1.0
    if not 1e-30 < factor < 1e3:
        raise SpecError(f"rescale_factor is {factor!r}: give a positive number, as 1 / 255")
    normalized = settings.flag("do_normalize", True)
    ratio = 1.0 if abs(factor * 255 - 1) < 1e-12 else factor * 255
    scales = {}
    for key, default in (("mean", 0.0), ("std", 1.0)):
        value = settings.values.get(f"image_{key}", 0.5) if normalized else default
        values = value if isinstance(value, list) else [value] * spec.channels
        fine = all(is_number(v) and abs(v) < MOST and (key == "mean" or v > 0) for v in values)
        if len(values) != spec.channels or not fine:
            raise SpecError(f"image_{key} is {shorten(value)}: give {spec.channels} numbers, one a channel")
        scales[key] = [float(v) / ratio for v in values]
    return scales


def read_size(settings: Settings, key: str, default: object, shorter: bool) -> list[int] | int:
    """[height, width] in pixels or, where `shorter` allows it, the length of the shorter side.

    Raises SpecError naming the key.
    """
    value = settings.values.get(key, default)
    if isinstance(value, dict):
        value = {name: length for name, length in value.items() if length is not None}
        if value.keys() == {"height", "width"}:
            lengths: list[object] = [value["height"], value["width"]]
        elif value.keys() == {"shortest_edge"} and shorter:
            lengths = [value["shortest_edge"]]
        else:
            raise SpecError(
                f"{key} is {shorten(value)}: only height and width{', or shortest_edge,' * shorter} are supported"
            )
    else:
        lengths = value if isinstance(value, list) else [value, value]
    sides = [length for length in lengths if is_length(length)]
    if len(sides) < len(lengths):
        raise SpecError(f"{key} is {shorten(value)}: give whole numbers of pixels, 1 to {LONGEST}")
    if len(sides) > 2 or not sides:
        raise SpecError(f"{key} is {shorten(value)}: give height and width")
    return sides if len(sides) == 2 else sides[0]


def write_preprocessor(spec: ModelSpec, images: Mapping[str, object] | None) -> dict[str, object] | None:
    """The preprocessor_config.json of `meta["images"]`; None for text, or where nothing says how pixels are made."""
    if spec.family is not Family.VIT or not images:
        return None
    resize, crop = images.get("resize", [spec.image_size] * 2), images.get("crop")
    made: dict[str, object] = {
        "image_processor_type": KINDS[0],
        "do_resize": resize is not None,
        "resample": images.get("resample", 2),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": images["mean"],
        "image_std": images["std"],
    }
    if resize is not None:
        made["size"] = name_sides(resize) if isinstance(resize, list) else {"shortest_edge": resize}
    if isinstance(crop, list):
        made |= {"do_center_crop": True, "crop_size": name_sides(crop)}
    return made


def name_sides(pair: list[int]) -> dict[str, int]:
    """[height, width] as transformers has them."""
    return dict(zip(("height", "width"), pair, strict=True))
