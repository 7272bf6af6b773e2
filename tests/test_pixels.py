"""Tests of pixels.py."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import files
from cli import UserError
from pixels import Found, UntypedValues, grayscale, to_bytes
from tests.conftest import blob, everything, in_order, picture, pixels, save


def one(path, image_size=None, value_range=None):
    """The first image of a file"""
    return files.read_images(path, range(1), image_size, value_range, Found())[0]


def test_grey_files_of_any_kind_are_one_channel(tmp_path):
    for i, mode in enumerate(("LA", "P", "L", "1")):
        image = Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).convert(mode)
        image.save(tmp_path / "x.png")
        assert one(tmp_path / "x.png").shape == (8, 8)
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="float32"):
        one(tmp_path / "x.tiff")


def test_images_of_every_kind_in_one_folder(tmp_path, capsys):
    for i, (mode, suffix) in enumerate([("L", "png"), ("RGB", "png"), ("RGBA", "png"), ("P", "png"),
                                        ("CMYK", "jpg"),
                                        ("I;16", "png"), ("L", "jpeg"), ("RGB", "webp"), ("L", "bmp"),
                                        ("RGB", "tiff"), ("L", "png"), ("L", "png")]):
        picture(tmp_path / "in" / f"{i:02d}.{suffix}", mode=mode, seed=i)
    (tmp_path / "in" / "empty.png").touch()
    whole = (tmp_path / "in" / "06.jpeg").read_bytes()
    (tmp_path / "in" / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "in" / "notes.txt").write_text("no image")
    read = data.load(str(tmp_path / "in"), tmp_path)
    assert read.shape == (3, 8, 10) and len(read.train) + len(read.val) + len(read.test) == 12
    said = capsys.readouterr().err
    assert "empty.png" in said and "cut.jpg" in said and "2 of 14" in said
    sixteen = one(tmp_path / "in" / "05.png")
    assert np.array_equal(sixteen, np.random.default_rng(5).integers(0, 256, (8, 10)))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (one(tmp_path / "clear.png") == 255).all()  # white, not hidden red


def test_image_size_covers_and_crops_at_the_centre(tmp_path):
    wide = np.zeros((10, 40), np.uint8)
    wide[:, 15:25] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (one(tmp_path / "wide.png", (10, 10)) == 200).all()
    assert one(tmp_path / "wide.png", (12, 20)).shape == (12, 20)


def test_transforms(tmp_path):
    colour = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 10, 10]], np.uint8)[..., None, None]
    assert grayscale(colour, "grayscale").flatten().tolist() == [76, 150, 29, 10]  # ITU-R BT.601
    assert grayscale(colour, "grayscale3").shape == (4, 3, 1, 1)
    assert grayscale(colour[:, :1], "grayscale3").shape == (4, 3, 1, 1)
    for i in range(20):
        picture(tmp_path / "in" / f"{i}.png", mode="RGB", seed=i)
    read = {transform: pixels(data.load(str(tmp_path / "in"), tmp_path, transform=transform).train)
            for transform in ("none", "grayscale", "grayscale3")}
    luminance = torch.from_numpy(grayscale(read["none"].numpy(), "grayscale"))
    assert torch.equal(read["grayscale"], luminance)
    assert torch.equal(read["grayscale3"], luminance.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("levels", [2, 16])
def test_masks_of_0_and_1_are_refused_until_their_range_is_named(tmp_path, levels):
    masks = [(blob(8, 10, seed) > 0.5).astype(np.uint8) for seed in range(60)]
    for i, mask in enumerate(masks):
        save(tmp_path / "in" / f"{i}.png", mask)
    with pytest.raises(UserError, match=r"from 0 to 1; --value_range 0 1"):
        data.load(str(tmp_path / "in"), tmp_path, levels=levels)
    read = data.load(str(tmp_path / "in"), tmp_path, levels=levels, value_range=(0, 1))
    assert np.array_equal(everything(read), in_order(masks) * (levels - 1))
    inverted = data.load(str(tmp_path / "in"), tmp_path, levels=levels, value_range=(1, 0))
    assert np.array_equal(everything(inverted), in_order([1 - mask for mask in masks]) * (levels - 1))


@pytest.mark.parametrize("kind", ["16-bit PNG", "16-bit TIFF", "float TIFF", "float arrays"])
def test_a_value_range_gives_the_pixels_of_8_bit_files(tmp_path, capsys, kind):
    scenes = [blob(8, 10, seed) for seed in range(30)]
    for i, scene in enumerate(scenes):
        if kind == "float arrays":
            (tmp_path / "in").mkdir(exist_ok=True)
            np.save(tmp_path / "in" / f"{i}.npy", 4095 * scene)
        else:
            save(tmp_path / "in" / f"{i}.{kind[-4:].strip().lower()}",
                 (4095 * scene).astype(np.float32) if "float" in kind else (4095 * scene).astype(np.uint16))
    try:
        data.load(str(tmp_path / "in"), tmp_path)
        said = capsys.readouterr().err
        assert "of 0 to 65535, its values go from" in said
    except UserError as error:
        said = str(error)
    assert "--value_range" in said and ("float" in kind) == ("of 0 to" not in said)
    read = everything(data.load(str(tmp_path / "in"), tmp_path, value_range=(0, 4095)))
    expected = in_order([(255 * scene).round().astype(np.uint8) for scene in scenes])
    assert len(read) == 30 and abs(np.sort(read.astype(int).ravel()) - np.sort(expected.ravel())).max() <= 1
    assert len(np.unique(read)) > 200


def test_values_in_a_small_part_of_their_range_are_said(tmp_path, capsys):
    for i in range(20):
        save(tmp_path / "dark" / f"{i}.png", (31 * blob(8, 8, i)).astype(np.uint8))
        save(tmp_path / "bright" / f"{i}.png", (200 * blob(8, 8, i)).astype(np.uint8))
    data.load(str(tmp_path / "dark"), tmp_path)
    assert "of 0 to 255, its values go from" in capsys.readouterr().err
    data.load(str(tmp_path / "bright"), tmp_path)
    assert capsys.readouterr().err == ""
    for value_range in ((255, 0), (0, 256)):
        data.load(str(tmp_path / "bright"), tmp_path, value_range=value_range)
        assert capsys.readouterr().err == ""
    data.load(str(tmp_path / "bright"), tmp_path, value_range=(0, 4095))  # of 12 bits: these are nearly black
    assert "images of 8 bits use only a part of the value range, which ends at 4095" in \
        capsys.readouterr().err


def test_a_fourth_band_is_said(tmp_path, capsys):
    for i in range(20):
        bands = np.random.default_rng(i).integers(1, 255, (8, 8, 4)).astype(np.uint8)
        (tmp_path / "x").mkdir(exist_ok=True)
        Image.fromarray(bands, "RGBX").save(tmp_path / "x" / f"{i}.tif")
        save(tmp_path / "alpha" / f"{i}.png", bands)
    read = everything(data.load(str(tmp_path / "x"), tmp_path))
    assert read.shape == (20, 3, 8, 8) and "20 images have more bands" in capsys.readouterr().err
    assert read[0].tobytes() in {np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1).tobytes()
                                 for path in (tmp_path / "x").iterdir()}
    data.load(str(tmp_path / "alpha"), tmp_path)
    assert "20 images have transparent parts" in capsys.readouterr().err
    np.save(tmp_path / "bands.npy", np.arange(20 * 8 * 8 * 4).reshape(20, 8, 8, 4).astype(np.uint8))
    assert data.load(str(tmp_path / "bands.npy"), tmp_path).shape == (3, 8, 8)
    assert "20 images have more bands" in capsys.readouterr().err


def test_colour_of_16_bits_is_said_and_has_no_value_range(tmp_path, capsys):
    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum
    (tmp_path / "in").mkdir()
    scenes = np.random.default_rng(0).integers(0, 65536, (12, 9, 10, 3))
    for i, scene in enumerate(scenes):
        rows = b"".join(b"\0" + row.tobytes() for row in scene.astype(">u2"))
        (tmp_path / "in" / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(
            ">IIBBBBB", 10, 9, 16, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    read = everything(data.load(str(tmp_path / "in"), tmp_path))
    assert "12 images are in colour of 16 bits" in capsys.readouterr().err
    assert np.array_equal(read, in_order((scenes >> 8).astype(np.uint8).transpose(0, 3, 1, 2))[:, 0])
    with pytest.raises(UserError, match="--value_range needs .npy"):
        data.load(str(tmp_path / "in"), tmp_path, value_range=(0, 4095))


def test_types_of_arrays_and_where_black_and_white_are_plain(tmp_path, capsys):
    scenes = np.stack([blob(9, 12, i) for i in range(30)])
    expected = in_order((255 * scenes).round().astype(np.uint8))
    for name, array, value_range in [
            ("unit", scenes, None), ("float", (255 * scenes).round().astype(np.float32), None),
            ("int", (255 * scenes).round().astype(np.int64), None),
            ("fortran", np.asfortranarray(scenes), None), ("signed", 2 * scenes - 1, (-1, 1)),
            ("sixteen", (65535 * scenes).astype(np.uint16), (0, 65535))]:
        np.save(tmp_path / f"{name}.npy", array)
        read = everything(data.load(str(tmp_path / f"{name}.npy"), tmp_path, value_range=value_range))
        assert abs(np.sort(read.astype(int).ravel()) - np.sort(expected.ravel())).max() <= 1, name
    with pytest.raises(UserError, match="--value_range -1 0.99"):
        data.load(str(tmp_path / "signed.npy"), tmp_path)
    np.save(tmp_path / "bool.npy", scenes > 0.5)
    expected = everything(data.load(str(tmp_path / "bool.npy"), tmp_path, levels=2))
    capsys.readouterr()
    assert np.array_equal(everything(data.load(str(tmp_path / "bool.npy"), tmp_path, levels=2,
                                               value_range=(0, 1))), expected)
    assert "clipped" not in capsys.readouterr().err
    assert set(np.unique(everything(data.load(str(tmp_path / "bool.npy"), tmp_path, levels=2)))) == {0, 1}


def test_floats_beside_bytes_leave_these_as_they_are(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (20, 8, 8)).astype(np.uint8)
    np.savez(tmp_path / "in.npz", x_train=grey, x_test=(grey / 255).astype(np.float32)[:5])
    read = data.load(str(tmp_path / "in.npz"), tmp_path)
    assert np.array_equal(pixels(read.test)[:, 0], grey[:5])
    assert {image.tobytes() for image in pixels(read.train)[:, 0].numpy()} < {i.tobytes() for i in grey}


def test_floats_beside_bytes_in_a_folder_leave_these_as_they_are(tmp_path):
    stored = [picture(tmp_path / "in" / f"b{i}.png", size=(8, 8), seed=i) for i in range(20)]
    (tmp_path / "in" / "a.png").write_bytes(b"damaged")  # the first file says nothing about the others
    for i in range(5):
        np.save(tmp_path / "in" / f"a{i}.npy", stored[i] / 255)
    read = everything(data.load(str(tmp_path / "in"), tmp_path))
    assert len(read) == 25 and {image.tobytes() for image in read} == {image.tobytes() for image in stored}


def test_unsigned_floats_and_reduced_pages(tmp_path):
    values = np.arange(64, dtype=np.uint32).reshape(8, 8) * (2**32 // 64)
    Image.frombytes("I", (8, 8), values.tobytes()).save(tmp_path / "x.tif", tiffinfo={254: 1})
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))  # entries of the header
    content = (tmp_path / "x.tif").read_bytes()
    assert content.count(signed) == 1
    (tmp_path / "x.tif").write_bytes(content.replace(signed, unsigned))
    with Image.open(tmp_path / "x.tif") as image:
        assert image.tag_v2[339] == (1,) and image.tag_v2[254] == 1  # unsigned, and said to be a smaller copy
    found = one(tmp_path / "x.tif", value_range=(0, 2**32))
    assert abs(found.astype(int) - (values / 2**32 * 255).round()).max() <= 1
    (tmp_path / "x.pfm").write_bytes(b"Pf\n8 8\n-1.0\n" + (values / 2**32).astype("<f4").tobytes())
    assert len(np.unique(one(tmp_path / "x.pfm", value_range=(0, 1)))) == 64
    assert np.array_equal(to_bytes(np.arange(9, dtype=">u2") * 256, None, Found()), np.arange(9))


def test_values_of_another_scale_or_beyond_the_range_are_said(tmp_path, capsys):
    images = np.stack([255 * blob(9, 9, i) for i in range(40)])
    np.savez(tmp_path / "in.npz", x_train=images, x_test=images[:8] / 255)
    data.load(str(tmp_path / "in.npz"), tmp_path)
    assert "8 images have no value above 2 of 255" in capsys.readouterr().err
    np.save(tmp_path / "in.npy", images.astype(np.uint8))
    data.load(str(tmp_path / "in.npy"), tmp_path, value_range=(50, 200))
    assert "40 images have values beyond the value range" in capsys.readouterr().err
    data.load(str(tmp_path / "in.npy"), tmp_path, value_range=(255, 0))
    assert not capsys.readouterr().err
    data.load(str(tmp_path / "in.npy"), tmp_path, (8, 8), value_range=(255, 0))
    assert not capsys.readouterr().err
    data.load(str(tmp_path / "in.npy"), tmp_path, (9, 10), value_range=(255, 0))
    said = capsys.readouterr().err
    assert "40 images are smaller than the new size, and are enlarged" in said
    assert "40 images have another ratio of height to width than the new size; more than a twentieth" in said
    save(tmp_path / "12_bits.png", (4095 * blob(9, 9, 0)).astype(np.uint16))
    files.read_paths([tmp_path / "12_bits.png"], (1, 9, 18), "none", None, None)
    said = capsys.readouterr().err  # of a trained model nothing can be changed by options of train.py
    assert "of 0 to 65535, its values go from" in said and "65535 for white; if that is wrong, scale" in said
    assert "another ratio of height to width" in said and "--" not in said
    np.save(tmp_path / "floats.npy", images[:1])
    with pytest.raises(UserError, match="float64.*save it as uint8"):
        files.read_paths([tmp_path / "floats.npy"], (1, 9, 9), "none", None, None)
    files.read_paths([tmp_path / "floats.npy"], (1, 9, 9), "none", None, (0, 1))
    assert "1 images have values beyond" in capsys.readouterr().err


def test_tiffs_where_white_is_zero_or_bytes_are_signed(tmp_path):
    values = np.arange(81, dtype=np.uint16).reshape(9, 9) * 800
    save(tmp_path / "x.tif", values)
    content, entry = (tmp_path / "x.tif").read_bytes(), struct.pack("<HHI", 262, 3, 1)
    at = content.index(entry) + len(entry)
    (tmp_path / "x.tif").write_bytes(content[:at] + b"\0" + content[at + 1:])
    assert np.array_equal(one(tmp_path / "x.tif"), (65535 - values) >> 8)
    signed = np.arange(-40, 41, dtype=np.int8).reshape(9, 9)
    Image.fromarray(signed.view(np.uint8)).save(tmp_path / "y.tif", tiffinfo={339: 2})
    with pytest.raises(UntypedValues, match="int8"):
        one(tmp_path / "y.tif")
    assert np.array_equal(one(tmp_path / "y.tif", value_range=(-40, 215)), signed.astype(int) + 40)
