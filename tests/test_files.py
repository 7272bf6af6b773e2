"""Tests of files.py."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import datasets
import files
import train
from cli import UserError
from tests.conftest import blob, everything, in_order, outcome, picture, pixels, save


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
    assert "million pixels; scale it down" in said
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


def test_every_format_of_pillow_is_read_and_the_rest_counted(tmp_path, capsys):
    kinds = [".png", ".jfif", ".jp2", ".tga", ".pcx", ".ico", ".sgi", ".dib", ".JPE"]
    kinds += [suffix for suffix in (".avif",) if suffix in files.suffixes()]
    for i, suffix in enumerate(kinds * 4):
        save(tmp_path / "in" / f"{i}{suffix}", (255 * blob(32, 32, i)).astype(np.uint8))
    for name in ("a.txt", "b.txt", "c.csv", "README", ".hidden", "Thumbs.db"):
        (tmp_path / "in" / name).write_text("no image")
    assert len(everything(data.load(str(tmp_path / "in"), tmp_path, image_size=(16, 16)))) == 4 * len(kinds)
    said = capsys.readouterr().err
    assert "2 .txt" in said and "1 .csv" in said and "1 no suffix" in said and "db" not in said


def test_pages_of_a_tiff_are_images_and_of_an_animation_only_the_first(tmp_path, capsys):
    stored = [(255 * blob(8, 10, seed)).astype(np.uint8) for seed in range(140)]
    images = [Image.fromarray(image) for image in stored]
    (tmp_path / "in").mkdir()
    for i in range(12):
        images[10 * i].save(tmp_path / "in" / f"{i}.tif", save_all=True,
                            append_images=images[10 * i + 1:10 * i + 10])
    read = data.load(str(tmp_path / "in"), tmp_path)
    assert np.array_equal(everything(read), in_order(stored[:120])) and capsys.readouterr().err == ""
    for i in range(2):
        images[120 + 10 * i].save(tmp_path / "in" / f"{i}.gif", save_all=True,
                                  append_images=images[121 + 10 * i:130 + 10 * i])
    assert len(everything(data.load(str(tmp_path / "in"), tmp_path))) == 122
    assert "2 images are of several frames" in capsys.readouterr().err


def test_links_are_followed_and_circles_are_not(tmp_path):
    ImageFolder = datasets.import_torchvision().datasets.ImageFolder
    for i in range(42):
        picture(tmp_path / ("elsewhere" if i >= 12 else "in/a") / f"{i}.png", seed=i)
    (tmp_path / "in" / "a" / "more").symlink_to(tmp_path / "elsewhere")
    assert len(ImageFolder(tmp_path / "in")) == 42
    (tmp_path / "in" / "a" / "up").symlink_to(tmp_path / "in" / "a")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    assert len(everything(data.load(str(tmp_path / "in"), tmp_path))) == 42


def test_three_grey_images_of_an_array_are_one_in_colour_and_it_is_said(tmp_path, capsys):
    array = np.random.default_rng(0).integers(0, 256, (3, 9, 10)).astype(np.uint8)
    np.save(tmp_path / "x.npy", array)
    read, *_ = files.read_paths([tmp_path / "x.npy"], (3, 9, 10), "none", None, None)
    assert np.array_equal(read[0], array) and "1 images are arrays of 3 or 4" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_said(tmp_path, capsys, monkeypatch):
    for i in range(12):
        picture(tmp_path / "in" / "a" / f"{i}.png", seed=i)
    picture(tmp_path / "in" / "b" / "locked" / "0.png", seed=20)
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", denied)
    assert data.load(str(tmp_path / "in"), tmp_path).classes == ["a"]
    assert "locked (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize("low, high", [("3", "3"), ("0", "1e-40"), ("-1e38", "1e38")])
def test_a_value_range_without_width_is_refused(tmp_path, capsys, low, high):
    picture(tmp_path / "in" / "0.png", seed=0)
    status, error = outcome(train.main, ["--dataset", tmp_path / "in", "--value_range", low, high], capsys)
    assert status == 2 and "--value_range" in error and "black and white" in error


@pytest.mark.parametrize("small, big, size", [
    ((4000, 3000), (3000, 4000), "64 64"), ((4000, 3000), (4000, 2000), "64 48"),
    ((30, 24), (30, 20), "30 24")])
def test_the_size_in_the_advice_is_one_that_can_be_learned(tmp_path, small, big, size):
    for i, (height, width) in enumerate([small, small, big]):
        save(tmp_path / "in" / f"{i}.jpg", np.zeros((height, width), np.uint8))
    with pytest.raises(UserError, match=f"--image_size {size}, for example"):
        data.load(str(tmp_path / "in"), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux")
def test_large_photos_are_decoded_and_read_in_bounded_memory(tmp_path):
    scene = (255 * blob(1024, 1024, 0)).astype(np.uint8)[..., None].repeat(3, 2)
    for i in range(300):
        save(tmp_path / "in" / f"{i}.jpg", np.roll(scene, i, 0))
    code = """
import re, threading, time, data
def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before, peak, done = own(), [0], []
def watch():
    while not done:
        peak[0] = max(peak[0], own())
        time.sleep(0.01)
thread = threading.Thread(target=watch)
thread.start()
read = data.load("in", ".")
decoded = peak[0] - before
for index in __import__("torch").arange(len(read.train)).split(8):
    read.train.batch(index)
done.append(1)
thread.join()
print(decoded, peak[0] - before)
"""
    where = {**os.environ, "PYTHONPATH": os.path.dirname(data.__file__)}
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True,
                         text=True, env=where).stdout
    assert max(map(float, out.split())) < 300, out


@pytest.mark.parametrize("pages", [1, 4])
def test_few_images_are_in_memory_beside_unreadable_files_and_stacks(tmp_path, monkeypatch, pages):
    for i in range(60):
        picture(tmp_path / "in" / f"{i:02}.png", seed=i)
    for i in range(3, 60, 4):  # the last of each block
        (tmp_path / "in" / f"{i:02}.png").write_bytes(b"not an image")
    if pages > 1:  # read after the pictures, this many pages at a time
        np.save(tmp_path / "in" / "stack.npy", np.random.default_rng(0).integers(
            0, 256, (40, 8, 10)).astype(np.uint8))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(files, "BYTES", pages * 4 * 10 * 8)
    waiting, flush = [], files.Writer.flush
    monkeypatch.setattr(files.Writer, "flush",
                        lambda writer: [waiting.append(len(writer.waiting)), flush(writer)])
    read = data.load(str(tmp_path / "in"), tmp_path)
    assert sum(map(len, (read.train, read.val, read.test))) == sum(waiting) == 45 + 40 * (pages > 1)
    assert max(waiting) <= 4 * pages


def medmnist(path, shape, n=(70, 10, 20), classes=3):
    generator, arrays = np.random.default_rng(1), {}
    for name, count in zip(("train", "val", "test"), n):
        arrays[f"{name}_images"] = generator.integers(0, 256, (count, *shape)).astype(np.uint8)
        arrays[f"{name}_labels"] = (np.arange(count) % classes)[:, None].astype(np.uint8)
    np.savez_compressed(path, **arrays)
    return arrays


@pytest.mark.parametrize("shape", [(28, 28), (64, 64, 3)])
def test_files_in_medmnists_layout(tmp_path, shape):
    arrays = medmnist(tmp_path / "pneumoniamnist.npz", shape)
    read = data.load(str(tmp_path / "pneumoniamnist.npz"), tmp_path)
    assert [len(part) for part in (read.train, read.val, read.test)] == [70, 10, 20]
    assert read.classes == ["0", "1", "2"] and read.shape == (shape[2] if shape[2:] else 1, *shape[:2])
    for name, part in (("val", read.val), ("test", read.test)):
        images = arrays[f"{name}_images"]
        assert np.array_equal(pixels(part), np.moveaxis(images, 3, 1) if shape[2:] else images[:, None])
        assert part.labels.tolist() == arrays[f"{name}_labels"][:, 0].tolist()


@pytest.mark.parametrize("shape, stored", [
    ((30, 9, 12), (1, 9, 12)), ((30, 9, 12, 1), (1, 9, 12)), ((30, 9, 12, 3), (3, 9, 12)),
    ((30, 3, 9, 12), (3, 9, 12)), ((30, 1, 9, 12), (1, 9, 12))])
@pytest.mark.parametrize("name", ["in.npy", "in.npz"])
def test_arrays_of_every_shape(tmp_path, shape, stored, name):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    np.save(tmp_path / name, array) if name == "in.npy" else np.savez(tmp_path / name, faces=array)
    read = data.load(str(tmp_path / name), tmp_path)
    images = array.reshape(30, 9, 12, -1).transpose(0, 3, 1, 2) if shape[1] == 9 else array
    assert read.shape == stored and read.classes == []
    assert np.array_equal(everything(read), np.array(sorted(images, key=lambda image: image.tobytes())))


@pytest.mark.parametrize("arrays, message", [
    ({"x_train": np.zeros((20, 3, 9, 3), np.uint8)}, "both the second and the last"),
    ({"x": np.zeros((20, 100), np.uint8)}, "20x100; images are N x height x width"),
    ({"x": np.zeros((20, 9, 9, 7), np.uint8)}, "with 1, 3 or 4 channels"),
    ({"x": np.array([{"a": 1}] * 20)}, "holds Python objects"),
    ({"x": np.zeros((20, 9, 9)), "y": np.array(["a", None] * 10)}, "holds Python objects"),
    ({"x": np.zeros((20, 9, 9), np.uint8), "y": np.array(3)}, "20 images, but 1 labels"),
    ({"x": np.zeros((64, 64, 3), np.uint8)}, "64x64x3; .*of one image, N is 1"),
    ({"x": np.full((20, 9, 9), "a")}, "not numbers"),
    ({"faces": np.zeros((20, 9, 9)), "ages": np.zeros(20)}, "its keys are faces, ages"),
    ({"x": np.zeros((20, 9, 9), np.uint8), "y": np.zeros(19, int)}, "20 images, but 19 labels"),
    ({"x": np.full((20, 9, 9), np.nan)}, "no value in it is finite"),
    ({"x": np.zeros((0, 9, 9), np.uint8)}, "no training images"),
    ({"x": np.zeros((20, 0, 9), np.uint8)}, "20x0x9"),
    ({"x": np.zeros((20, 9, 9), np.uint8), "X": np.zeros((5, 9, 9), np.uint8)}, "upper and lower case"),
    ({"x_train": np.eye(9, dtype=np.uint8)[None].repeat(20, 0), "x_test": np.zeros((5, 8, 8), np.uint8)},
     "differ in size")])
def test_arrays_that_cannot_be_used(tmp_path, arrays, message):
    np.savez(tmp_path / "in.npz", **arrays)
    with pytest.raises(UserError, match=message):
        data.load(str(tmp_path / "in.npz"), tmp_path)


def test_an_array_file_without_bytes_is_said(tmp_path):
    (tmp_path / "in.npy").touch()
    with pytest.raises(UserError, match="in.npy: it is empty, or its end is missing"):
        data.load(str(tmp_path / "in.npy"), tmp_path)


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("labels, classes", [
    (np.arange(30) % 3, ["0", "1", "2"]), ((np.arange(30) % 3)[:, None], ["0", "1", "2"]),
    (np.eye(3)[np.arange(30) % 3], ["0", "1", "2"]),
    (np.array(["cat", "dog", "eel"] * 10), ["cat", "dog", "eel"]),
    (np.array([1.0, 5.0, 7.0] * 10), ["1", "5", "7"]), (np.float16([1, 5, 7] * 10), ["1", "5", "7"]),
    (np.array([2, 9, 10] * 10), ["2", "9", "10"]),
    (np.linspace(0, 1, 30), []),
    (np.random.default_rng(0).integers(0, 2, (30, 14)), [])])
def test_labels_of_arrays(tmp_path, capsys, labels, classes):
    images = np.arange(30, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    np.savez(tmp_path / "in.npz", images=images, labels=labels, extra=np.zeros(3))
    read = data.load(str(tmp_path / "in.npz"), tmp_path)
    assert read.classes == classes
    said = capsys.readouterr().err
    assert "left out: extra" in said and ("which are no classes" in said) == (not classes)
    for part in (read.train, read.val, read.test) if classes else ():
        assert part.labels.tolist() == [int(i) % 3 for i in pixels(part)[:, 0, 0, 0]]


def test_a_validation_folder_is_the_validation_split(tmp_path):
    for split, n in (("train", 20), ("valid", 7)):
        for i in range(n):
            picture(tmp_path / "in" / split / "ab"[i % 2] / f"{i}.png", seed=i + 100 * n)
    read = data.load(str(tmp_path / "in"), tmp_path)
    assert [len(part) for part in (read.train, read.val, read.test)] == [18, 7, 2]
    assert read.classes == ["a", "b"]
    for i in range(5):
        picture(tmp_path / "in" / "test" / f"{i}.png", seed=i)
    read = data.load(str(tmp_path / "in"), tmp_path)
    assert [len(part) for part in (read.train, read.val, read.test)] == [20, 7, 5]
    assert read.classes == ["a", "b", "unlabelled"] and read.test.labels.tolist() == [2] * 5


def test_a_test_folder_with_other_classes_is_used(tmp_path, capsys, workplace):
    for split, names in (("train", ["good"]), ("test", ["good", "scratch"])):
        for name in names:
            for i in range(12):
                picture(tmp_path / "in" / split / name / f"{i}.png", seed=i)
    read = data.load(str(tmp_path / "in"), tmp_path)
    assert read.classes == ["good", "scratch"] and read.test.labels.bincount().tolist() == [12, 12]
    assert "not the same classes" in capsys.readouterr().err
    status, error = outcome(train.main, ["--dataset", tmp_path / "in", "--conditional"], capsys)
    assert status == 1 and "scratch" in error and "train without --conditional" in error


def test_small_splits_have_each_class_in_proportion(tmp_path):
    for i in range(60):
        picture(tmp_path / "in" / "ab"[i % 3 == 0] / f"{i}.png", seed=i)
    read = data.load(str(tmp_path / "in"), tmp_path)
    counts = [part.labels.bincount(minlength=2).tolist() for part in (read.train, read.val, read.test)]
    assert counts == [[32, 16], [4, 2], [4, 2]]


def test_labels_of_two_types_are_the_same_classes(tmp_path, capsys):
    images = np.arange(40, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    np.savez(tmp_path / "in.npz", x_train=images, y_train=(np.arange(40) % 4).astype(str), x_test=images[:8],
             y_test=np.arange(8) % 4, x_val=images[:0])
    read = data.load(str(tmp_path / "in.npz"), tmp_path)
    assert read.classes == list("0123") and read.test.labels.tolist() == [0, 1, 2, 3] * 2
    assert "x_val is empty" in capsys.readouterr().err
    np.savez(tmp_path / "in.npz", x_train=images, y_train=np.arange(40) % 4, x_test=images[:8])
    assert data.load(str(tmp_path / "in.npz"), tmp_path).classes == [*"0123", "unlabelled"]
    assert "without labels" in capsys.readouterr().err


@pytest.mark.parametrize("layout, said", [("wrap/train wrap/test", "give .*wrap as the dataset"),
                                          ("images/train images/val", "give .*images as the dataset"),
                                          ("train_set test_set", "look like splits"),
                                          ("seg_train seg_test", "look like splits"),
                                          ("train dev", "look like splits"),
                                          ("train validate", "look like splits"),
                                          ("Training evaluation tests evaluate", "look like splits"),
                                          ("wrap/train wrap/validate", "give .*wrap as the dataset"),
                                          ("cat/train cat/test dog/train dog/test", "splits come first"),
                                          ("trainA trainB testA testB", "look like splits")])
def test_splits_one_level_down_are_no_class(tmp_path, layout, said):
    for folder in layout.split():
        for i in range(6):
            picture(tmp_path / "in" / folder / "a" / f"{i}.png", seed=i)
    with pytest.raises(UserError, match=said):
        data.load(str(tmp_path / "in"), tmp_path)


def test_an_empty_split_and_loose_images_are_said(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / "in" / "train" / f"{i}.png", seed=i)
    (tmp_path / "in" / "test").mkdir()
    picture(tmp_path / "in" / "loose.png", seed=50)
    assert len(data.load(str(tmp_path / "in"), tmp_path).test) == 2
    said = capsys.readouterr().err
    assert "test holds no images: a random tenth" in said and "1 images" in said


def test_folders_whose_names_are_no_text_stay_apart(tmp_path):
    for name in (b"M\xfcller", b"M\xf6ller", b"a\tb", b"a\nb"):
        for i in range(10):
            picture(tmp_path / "in" / os.fsdecode(name) / f"{i}.png", seed=len(name) + i)
    read = data.load(str(tmp_path / "in"), tmp_path)
    assert sorted(read.classes) == ["M\\xf6ller", "M\\xfcller", "a\\nb", "a\\tb"]
    assert len(read.train) + len(read.val) + len(read.test) == 40


def test_a_run_does_not_write_into_its_dataset(workplace, capsys):
    picture(workplace / "results" / "flat" / "0.png", seed=0)
    status, error = outcome(train.main, ["--dataset", "results/flat", "--log_dir", "flat"], capsys)
    assert status == 2 and "lies within results/flat" in error


def test_arrays_in_a_folder_that_are_parts_of_a_dataset(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("x_train", "y_train", "x_test", "y_test"):
        np.save(tmp_path / "in" / name, np.zeros((20, 9, 9), np.uint8))
    with pytest.raises(UserError, match="x_test.npy.* parts of one dataset"):
        data.load(str(tmp_path / "in"), tmp_path)


def test_labels_too_large_for_numbers_are_no_classes(tmp_path, capsys):
    for big in (1e20, np.inf):
        np.savez(tmp_path / "in.npz", x=np.eye(9)[None].repeat(20, 0), y=np.where(np.arange(20) % 2, big, 0))
        assert data.load(str(tmp_path / "in.npz"), tmp_path).classes == []
        assert "labels, which are no classes" in capsys.readouterr().err


def test_folders_below_the_classes_and_empty_ones_are_said(tmp_path, capsys):
    for i, name in enumerate(["animal/cat", "animal/dog", "plant/fern"] * 6):
        picture(tmp_path / "in" / name / f"{i}.png", seed=i)
    (tmp_path / "in" / "stone").mkdir()
    assert data.load(str(tmp_path / "in"), tmp_path).classes == ["animal", "plant"]
    said = capsys.readouterr().err
    assert "(animal, plant) are the classes; folders inside them, such as animal/cat, are not" in said
    assert "folders without images (stone)" in said


def test_later_pages_of_a_damaged_tiff_are_said(tmp_path, capsys):
    pages = [Image.fromarray((255 * blob(9, 9, i)).astype(np.uint8)) for i in range(6)]
    for i in range(6):
        (tmp_path / "in").mkdir(exist_ok=True)
        pages[0].save(tmp_path / "in" / f"{i}.tif", save_all=True, append_images=pages[1:])
    content = (tmp_path / "in" / "3.tif").read_bytes()
    (tmp_path / "in" / "3.tif").write_bytes(content[:len(content) // 2])
    read = data.load(str(tmp_path / "in"), tmp_path)
    assert len(read.train) + len(read.val) + len(read.test) < 36
    assert "1 images begin a damaged file, whose later pages" in capsys.readouterr().err
