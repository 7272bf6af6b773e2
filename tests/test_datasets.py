"""Tests of datasets.py."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import datasets
from tests.conftest import picture, pixels, write_idx


def test_glyphs(tmp_path):
    first = data.load("glyphs", tmp_path)
    assert [len(s) for s in (first.train, first.val, first.test)] == [54_000, 6_000, 10_000]
    assert first.shape == (1, 28, 28) and first.classes == list("0123456789") and first.levels == 256
    again = data.load("glyphs", tmp_path, levels=2, limit=100)  # from the cache
    assert torch.equal(pixels(again.train), (pixels(first.train)[:100] > 127).byte())
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(42))
    images, labels, _, _ = datasets.make_glyphs()
    assert torch.equal(pixels(first.val), torch.from_numpy(images)[order[54_000:]])
    assert torch.equal(first.train.labels, torch.from_numpy(labels)[order[:54_000]])
    assert (torch.bincount(first.train.labels) > 5000).all()
    means = pixels(first.train).float().flatten(1)
    centres = torch.stack([means[first.train.labels == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(pixels(first.test).float().flatten(1), centres).argmin(1)
    assert (nearest == first.test.labels).float().mean() > 0.5  # the labels are those of the pictures


def test_mnist_is_read_split_and_resized(tmp_path):
    write_idx(tmp_path)
    mnist = data.load("mnist", tmp_path)
    assert [len(s) for s in (mnist.train, mnist.val, mnist.test)] == [45, 5, 20]
    assert mnist.classes == list("0123456789") and torch.equal(mnist.test.labels, torch.arange(20) % 10)
    assert len(data.load("mnist", tmp_path, limit=7).train) == 7
    small = data.load("mnist", tmp_path, image_size=(14, 21), transform="grayscale3")
    assert small.shape == (3, 14, 21) and torch.equal(pixels(small.val)[:, 0], pixels(small.val)[:, 2])
    assert [len(small.train), len(small.val)] == [45, 5]


def test_a_folder_of_classes_keeps_its_labels(tmp_path):
    stored = {}
    for i in range(30):
        stored[picture(tmp_path / "in" / "abc"[i % 3] / f"{i}.png", seed=i).tobytes()] = i % 3
    picture(tmp_path / "in" / "a" / ".thumbnails" / "0.png", seed=30)  # what is hidden is no image
    picture(tmp_path / "in" / "a" / "__MACOSX" / "0.png", seed=31)
    read = data.load(str(tmp_path / "in"), tmp_path)
    assert read.classes == ["a", "b", "c"] and read.shape == (1, 8, 10)
    assert [len(s) for s in (read.train, read.val, read.test)] == [24, 3, 3]
    found = [(image.numpy().tobytes(), label.item()) for s in (read.train, read.val, read.test)
             for image, label in zip(pixels(s), s.labels)]
    assert dict(found) == stored and len(found) == 30


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "Testing")])
def test_a_flat_folder_and_one_with_train_and_test(tmp_path, names):
    for i in range(20):
        picture(tmp_path / "flat" / f"{i}.jpg", mode="RGB", seed=i)
        picture(tmp_path / "two" / names[0] / f"{i}.png", seed=i)
    test = picture(tmp_path / "two" / names[1] / "x.png", seed=99)
    flat, two = data.load(str(tmp_path / "flat"), tmp_path), data.load(str(tmp_path / "two"), tmp_path)
    assert flat.classes == [] and flat.shape == (3, 8, 10) and len(flat.test) == 2
    assert [len(s) for s in (two.train, two.val, two.test)] == [18, 2, 1]
    assert np.array_equal(pixels(two.test)[0, 0].numpy(), test)


def test_a_changed_folder_is_noticed(tmp_path):
    for i in range(20):
        picture(tmp_path / "in" / f"{i:02d}.png", seed=i)
    before = data.load(str(tmp_path / "in"), tmp_path)
    assert torch.equal(pixels(before.train), pixels(data.load(str(tmp_path / "in"), tmp_path).train))
    picture(tmp_path / "in" / "20.png", seed=20)
    assert sum(len(s) for s in vars(data.load(str(tmp_path / "in"), tmp_path)).values()
               if isinstance(s, data.Split)) == 21
    changed = picture(tmp_path / "in" / "20.png", seed=21)
    os.utime(tmp_path / "in" / "20.png", ns=(1, 1))
    after = data.load(str(tmp_path / "in"), tmp_path)
    assert any(np.array_equal(image[0], changed) for s in (after.train, after.val, after.test)
               for image in pixels(s))


def test_a_cache_that_is_damaged_is_made_again(tmp_path):
    for i in range(20):
        picture(tmp_path / "in" / f"{i:02d}.png", seed=i)
    (tmp_path / "in" / "20.png").touch()
    before = pixels(data.load(str(tmp_path / "in"), tmp_path).train)
    for damaged in sorted((tmp_path / "cache").rglob("*.npy")):
        damaged.unlink() if damaged.name == "2.npy" else damaged.write_bytes(
            b"PK\x03\x04" if damaged.name == "0.npy" else damaged.read_bytes()[:100])
        assert torch.equal(before, pixels(data.load(str(tmp_path / "in"), tmp_path).train))


def test_unreadable_files_are_named_each_time(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / "in" / f"{i:02d}.png", seed=i)
    (tmp_path / "in" / "20.png").touch()
    for _ in range(2):
        data.load(str(tmp_path / "in"), tmp_path)
        said = capsys.readouterr().err
        assert "20.png" in said and "1 of 21" in said


def test_downloaded_archives_go_and_the_users_own_stay(tmp_path, monkeypatch):
    class Stub:
        filename, classes, targets, made = "cifar-10-python.tar.gz", ["a", "b"], [0, 1] * 20, 0

        def __init__(self, root, train, download):
            Stub.made += train
            (root / self.filename).write_text("archive")
            unpacked = root / "cifar-10-batches-py/data_batch_1"
            if not unpacked.exists():
                unpacked.parent.mkdir()
                unpacked.write_bytes(b"1")
            self.data = np.full((40, 32, 32, 3), len(unpacked.read_bytes()), np.uint8)
    monkeypatch.setattr(datasets.import_torchvision().datasets, "CIFAR10", Stub)
    (tmp_path / "backup.tar.gz").write_text("mine")
    for times, unpacked in enumerate((None, b"12"), 1):
        if unpacked:  # a file that changes is read anew
            (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(unpacked)
        for _ in range(2):  # the second time from the cache
            read = data.load("cifar10", tmp_path)
            assert read.shape == (3, 32, 32) and read.classes == ["a", "b"] and Stub.made == times
            assert (pixels(read.train) == times).all()
            assert {path.name for path in tmp_path.iterdir()} == {"backup.tar.gz", "cifar-10-batches-py",
                                                                  "cache"}


def test_grey_files_of_any_kind_are_one_channel(tmp_path):
    for i, mode in enumerate(("LA", "P", "L", "1")):
        image = Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).convert(mode)
        image.save(tmp_path / "x.png")
        assert datasets.to_array(tmp_path / "x.png", None).shape == (8, 8)
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="32 bits"):
        datasets.to_array(tmp_path / "x.tiff", None)


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
    sixteen = datasets.to_array(tmp_path / "in" / "05.png", None)
    assert np.array_equal(sixteen, np.random.default_rng(5).integers(0, 256, (8, 10)))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (datasets.to_array(tmp_path / "clear.png", None) == 255).all()  # white, not hidden red


def test_image_size_covers_and_crops_at_the_centre(tmp_path):
    wide = np.zeros((10, 40), np.uint8)
    wide[:, 15:25] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (datasets.to_array(tmp_path / "wide.png", (10, 10)) == 200).all()
    assert datasets.to_array(tmp_path / "wide.png", (12, 20)).shape == (12, 20)


def test_transforms(tmp_path):
    colour = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 10, 10]], np.uint8)[..., None, None]
    assert datasets.grayscale(colour, "grayscale").flatten().tolist() == [76, 150, 29, 10]  # ITU-R BT.601
    assert datasets.grayscale(colour, "grayscale3").shape == (4, 3, 1, 1)
    assert datasets.grayscale(colour[:, :1], "grayscale3").shape == (4, 3, 1, 1)
    for i in range(20):
        picture(tmp_path / "in" / f"{i}.png", mode="RGB", seed=i)
    read = {transform: pixels(data.load(str(tmp_path / "in"), tmp_path, transform=transform).train)
            for transform in ("none", "grayscale", "grayscale3")}
    luminance = torch.from_numpy(datasets.grayscale(read["none"].numpy(), "grayscale"))
    assert torch.equal(read["grayscale"], luminance)
    assert torch.equal(read["grayscale3"], luminance.expand(-1, 3, -1, -1))


def test_the_first_image_in_colour_turns_all_before_it_into_three_channels(tmp_path):
    stored = {picture(tmp_path / "in" / f"{i:04d}.png", size=(8, 8), seed=i).tobytes() for i in range(2100)}
    picture(tmp_path / "in" / "last.png", size=(8, 8), mode="RGB")
    read = data.load(str(tmp_path / "in"), tmp_path)
    everything = torch.cat([pixels(split) for split in (read.train, read.val, read.test)])
    grey = [image for image in everything.numpy() if (image == image[:1]).all()]
    assert everything.shape == (2101, 3, 8, 8) and {image[0].tobytes() for image in grey} == stored


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / "in" / f"{i}.png", seed=i)
    (tmp_path / "file").touch()  # where a folder would have to be
    a, b = data.load(str(tmp_path / "in"), tmp_path / "file"), data.load(str(tmp_path / "in"), tmp_path)
    assert "not cached" in capsys.readouterr().err
    assert torch.equal(pixels(a.train), pixels(b.train)) and a.about() == b.about()


def test_images_that_would_hurt_are_left_out(tmp_path, capsys):
    root = tmp_path / "in"
    for i in range(12):
        picture(root / f"{i}.png", seed=i)
    with open(root / "bomb.png", "wb") as file:  # a megabyte that unfolds to 400
        Image.new("1", (20_000, 20_000)).save(file)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "self").symlink_to(root)
    os.mkfifo(root / "pipe.png")
    os.rename(root / "3.png", os.fsencode(root) + b"/\xff\xfe.png")
    read = data.load(str(root), tmp_path)
    said = capsys.readouterr().err
    assert len(read.train) + len(read.val) + len(read.test) == 12
    assert all(name in said for name in ("bomb.png", "loop.png", "gone.jpg", "pipe.png", "4 of 16"))
    odd = os.fsencode(tmp_path) + b"/classes/\xff"
    os.makedirs(odd)
    shutil.copytree(root, tmp_path / "classes" / "b",
                    ignore=lambda *_: ["bomb.png", "loop.png", "gone.jpg", "self", "pipe.png"])
    os.link(root / "1.png", odd + b"/1.png")
    (tmp_path / "classes" / "b" / "up").symlink_to(tmp_path / "classes")
    read = data.load(str(tmp_path / "classes"), tmp_path)
    assert len(read.train) + len(read.val) + len(read.test) == 13
    json.dumps(read.classes).encode(), "".join(read.classes).encode()  # as text
