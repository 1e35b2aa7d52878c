"""Pictures: which are found and under which class, as torchvision's ImageFolder, and which pixels a model gets of them,
as transformers' ViTImageProcessor makes them."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest

from qtx.data import SPLITS, DataError, load
from qtx.data.images import load_folder, read_picture, read_preparation
from qtx.files.container import CheckpointError
from qtx.hub.preprocessor import read_preprocessor, write_preprocessor
from qtx_ref.spec import Family, Head, ModelSpec

image = pytest.importorskip("PIL.Image", reason="the extra images is not installed")

VIT = ModelSpec(Family.VIT, 1, 8, 1, 8, Head.CLASSIFY, classes=4, image_size=12, patch_size=4, channels=3)
SIZE = {"size": {"height": 12, "width": 12}}
CROP = {"do_center_crop": True, "crop_size": {"height": 12, "width": 12}}
UPRIGHT = {  # EXIF 2.3, tag 274: where row 0 and column 0 of what is stored are to be seen
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels[::-1].transpose(1, 0, 2),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}


def draw_picture(height, width, seed=0):
    """A picture of which each pixel is another."""
    return image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def fill(path, count=12, size=(7, 9)):
    """As many pictures in two classes, each different."""
    for i in range(count):
        (path / ("cat", "dog")[i % 2]).mkdir(exist_ok=True, parents=True)
        draw_picture(*size, i).save(path / ("cat", "dog")[i % 2] / f"{i:02}.png")
    return path


def pixels_of(path, given, spec=VIT):
    """What a model gets of a picture, as floats, under a preprocessor_config.json."""
    meta = read_preprocessor(path, given, spec)
    how = read_preparation(spec, meta)
    raw = read_picture(path, spec, how).astype(np.float32) / np.float32(255)
    mean, std = (np.array(value, np.float32)[:, None, None] for value in (how.mean, how.std))
    return (raw - mean) / std, meta


@pytest.mark.parametrize(
    "given",
    [
        SIZE,
        *({**SIZE, "resample": number} for number in range(6)),
        {**SIZE, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        {**SIZE, "do_normalize": False},
        {**SIZE, "do_rescale": False, "do_normalize": False},
        {**SIZE, "rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        {"size": {"height": 17, "width": 14}, **CROP},
        {"size": {"shortest_edge": 13}, "resample": 3, **CROP},
        {"size": {"height": 8, "width": 15}, **CROP},
        {"do_resize": False, **CROP},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(40, 31), (9, 23)])
def test_pixels_are_those_of_transformers(tmp_path, given, shape):
    """Also through what export writes. 4e-6: rescaling and normalising are rounded in another order, to float32."""
    transformers = pytest.importorskip("transformers", reason="its pictures are the expected values")
    path = tmp_path / "a.png"
    draw_picture(*shape).save(path)
    theirs = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil(**given)
    wanted = theirs(image.open(path), return_tensors="np")["pixel_values"][0]
    got, meta = pixels_of(path, given)
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=4e-6 * max(1, scale))
    again, _ = pixels_of(path, write_preprocessor(VIT, meta))
    np.testing.assert_allclose(again, got, rtol=0, atol=4e-6 * max(1, scale))


def test_a_picture_of_another_size_is_refused_where_nothing_resizes_it(tmp_path):
    path = tmp_path / "a.png"
    draw_picture(12, 13).save(path)
    with pytest.raises(DataError, match="a.png has 13 x 12 pixels, and the model takes 12 x 12"):
        pixels_of(path, {"do_resize": False})
    with pytest.raises(CheckpointError, match="crop_size is 11, which makes other pictures"):
        pixels_of(path, {"do_resize": False, "do_center_crop": True, "crop_size": 11})


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tiff"])
def test_pictures_are_upright(tmp_path, orientation, ending):
    path = tmp_path / f"a.{ending}"
    drawn = draw_picture(12, 12)
    exif = image.Exif()
    exif[0x0112] = orientation
    drawn.save(path, exif=exif)
    plain = np.asarray(image.open(path).convert("RGB")) if ending == "jpg" else np.asarray(drawn)  # a jpg has lost some
    got = read_picture(path, VIT, read_preparation(VIT, None))
    assert np.array_equal(got.transpose(1, 2, 0), UPRIGHT[orientation](plain))


def test_pictures_are_found_as_torchvision_finds_them(tmp_path, capsys):
    """ImageFolder: a class is a folder, its pictures lie anywhere below it, links are followed; hidden ones are no
    class."""
    fill(tmp_path / "set")
    deep = tmp_path / "set/cat/2024/june"
    deep.mkdir(parents=True)
    draw_picture(5, 5, 100).save(deep / "deep.jpg")
    (tmp_path / "elsewhere").mkdir()
    draw_picture(5, 5, 101).save(tmp_path / "elsewhere/linked.PNG")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set/dog/more")
    os.symlink(tmp_path / "set", tmp_path / "set/dog/circle")
    for hidden in ("set/.ipynb_checkpoints", "set/cat/.thumbnails"):
        (tmp_path / hidden).mkdir()
        draw_picture(5, 5, 102).save(tmp_path / hidden / "a.png")
    data = load(str(tmp_path / "set"), VIT)
    said = capsys.readouterr().err
    assert data.names == ("cat", "dog")
    labels = np.concatenate([data.labels_of(split) for split in SPLITS])
    assert np.bincount(labels).tolist() == [7, 7]
    assert said.count("\n") == 1 and "not read: 2 hidden files or folders, .ipynb_checkpoints first" in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "bird").mkdir(), "bird holds no picture"),
        (
            lambda path: [(path / old).rename(path / new) for old, new in (("cat", "train"), ("dog", "val"))],
            "has the folders train, val, which are splits, not classes",
        ),
        (
            lambda path: os.mkfifo(path / "cat/pipe.png"),
            r"pipe.png cannot be read as a picture \(it is a pipe, not a reg",
        ),
        (
            lambda path: os.symlink("/dev/zero", path / "cat/zero.png"),
            r"zero.png cannot be read as a picture \(it is a device",
        ),
        (
            lambda path: os.symlink("nowhere", path / "cat/lost.png"),
            "lost.png cannot be read as a picture .*No such file",
        ),
        (
            lambda path: (path / "cat/a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            "a.png cannot be read as a picture",
        ),
    ],
)
def test_folders_that_cannot_be_used_are_named(tmp_path, change, message):
    change(fill(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        load_folder(tmp_path, VIT)
    assert "\n" not in str(caught.value)


def test_pictures_in_no_class_are_said(tmp_path, capsys):
    fill(tmp_path)
    draw_picture(5, 5, 100).save(tmp_path / "loose.png")
    assert sum(len(load_folder(tmp_path, VIT).hashes(split)) for split in SPLITS) == 12
    assert "not read: 1 picture(s) in no class's folder" in capsys.readouterr().err


def test_a_picture_of_too_many_pixels_takes_no_memory(tmp_path, recwarn):
    """60,000 x 60,000 pixels are 10 GB as RGB; the file is some kilobytes of a PNG's header and nothing."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    fill(tmp_path)
    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    content = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (tmp_path / "cat/large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(DataError, match="large.png cannot be read as a picture .*3600000000 pixels") as caught:
        load_folder(tmp_path, VIT)
    assert "\n" not in str(caught.value) and not recwarn.list


def test_a_long_picture_is_not_resized_to_gigabytes(tmp_path):
    draw_picture(2, 20_000).save(tmp_path / "long.png")
    how = read_preparation(VIT, {"mean": [0.5], "std": [0.5], "resize": 12_000, "resample": 2, "crop": [12, 12]})
    with pytest.raises(DataError, match="it would be resized to 120000000 x 12000 pixels"):
        read_picture(tmp_path / "long.png", VIT, how)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": [1e40], "std": [1.0]}, "pixel mean is"),
        ({"mean": [0.5], "std": [0.0]}, "pixel std is"),
        ({"mean": [0.5], "std": [1.0], "resize": 2**40}, "have the resize"),
        ({"mean": [0.5], "std": [1.0], "resize": [1, 2, 3]}, "have the resize"),
        ({"mean": [0.5], "std": [1.0], "crop": 4}, "have the crop 4"),
        ({"mean": [0.5], "std": [1.0], "resample": True}, "have the resample True"),
    ],
)
def test_damaged_metadata_are_named(given, message):
    with pytest.raises(DataError, match=message):
        read_preparation(VIT, given)
    assert read_preparation(replace(VIT, channels=1), {"mean": [0.5], "std": [0.25]}).resize == (
        12,
        12,
    )  # as files of old
