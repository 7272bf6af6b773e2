"""Tests of data.py."""

import inspect
import math

import numpy as np
import pytest
import torch

import arguments
import data
import train
from tests.conftest import pixels


def test_stochastic_binarisation_keeps_black_and_white_and_is_right_between():
    ramp = torch.arange(256, dtype=torch.uint8).repeat(20_000, 1, 1, 1)
    frequency = sum(data.binarize(ramp.clone(), seed).double().mean(0).flatten() for seed in range(5)) / 5
    p = torch.arange(256).double() / 255
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 100_000).sqrt()).all()  # exactly at 0 and 255
    # An end is wrong once in 65,536 draws where the comparison is off by one: look at millions.
    assert not data.binarize(torch.zeros(4001, 1, 1, 1003, dtype=torch.uint8), 1).any()
    assert data.binarize(torch.full((4001, 1, 1, 1003), 255, dtype=torch.uint8), 1).all()


def test_quantisation():
    stored = torch.arange(256, dtype=torch.uint8)
    as_stored, two, sixteen = (data.quantize(stored.clone(), levels) for levels in (256, 2, 16))
    assert torch.equal(as_stored, stored) and torch.equal(two, (stored.double() / 255 > 0.5).byte())
    # ⌊16 x⌋ with 16 → 15, for x = pixel / 256 (the 8-bit pixel as the lower end of its interval)
    assert torch.equal(sixteen, (16 * stored.double() / 256).floor().clamp(max=15).byte())


def test_stochastic_val_and_test_are_one_fixed_draw_and_train_a_fresh_one(folder, tmp_path):
    a, b = (data.load(str(folder), tmp_path, levels=2, binarize="stochastic") for _ in range(2))
    assert torch.equal(pixels(a.val), pixels(b.val)) and pixels(a.val).max() == 1
    assert torch.equal(pixels(a.test), pixels(b.test)) and pixels(a.test).max() == 1
    index = torch.arange(50)
    first, second = (a.train.batch(index, 1, "binarize", step)[0] for step in (1, 2))
    assert first.max() == 1 and not torch.equal(first, second)
    assert torch.equal(first, a.train.batch(index, 1, "binarize", 1)[0])


def test_own_images_are_drawn_once_where_those_of_the_training_were_drawn(tmp_path):
    grey = np.full((200, 8, 8), 64, np.uint8)
    grey[:, 0], grey[:, 1], grey[:, 2, 0] = 0, 255, np.arange(200)  # the draw is that of the image
    np.save(tmp_path / "grey.npy", grey), np.save(tmp_path / "one.npy", grey[7:8])
    about = {"shape": [1, 8, 8], "levels": 2, "classes": []}
    for binarize, share in (("stochastic", 64 / 255), ("threshold", 0)):
        found, alone = (pixels(data.own_images([tmp_path / name], about, binarize=binarize)[0])
                        for name in ("grey.npy", "one.npy"))
        assert torch.equal(found[7:8], alone) and found[:, :, 0].max() == 0 and found[:, :, 1].min() == 1
        assert found[:, :, 3:].double().mean().item() == pytest.approx(share, abs=0.02)  # 4 standard errors


def test_the_data_of_a_run_are_loaded_with_all_its_arguments(monkeypatch):
    args, _ = arguments.parse_args(["--image_size=16", "--levels=2", "--binarize=stochastic", "--limit=9"])
    args = vars(args)
    names, seen = set(inspect.signature(data.load).parameters) - {"download", "progress_bar"}, {}
    monkeypatch.setattr(data, "load", seen.update)
    data.load_with(args, limit=7, download=False)
    assert seen == {**{name: args[name] for name in names}, "limit": 7, "download": False}


def test_one_number_is_the_height_and_the_width(folder, tmp_path):
    sizes = 16, (16, 16), [16, 16]
    square, *others = (data.load(str(folder), tmp_path, image_size=size) for size in sizes)
    assert square.shape[1:] == (16, 16) and len(list((tmp_path / "cache").iterdir())) == 1  # decoded once
    assert all(torch.equal(pixels(square.test), pixels(other.test)) for other in others)


def test_flip_mirrors_half_of_the_training_images_and_no_others(folder, tmp_path):
    args, _ = arguments.parse_args([f"--dataset={folder}", "--loss_mode=ae", "--flip"])
    split, order = data.load(str(folder), tmp_path).train, torch.randperm(320)

    def seen(*key):
        return torch.cat([batch[0] for batch in train.batches(split, order, args, *key)])
    stored, first, second = split.batch(order)[0], seen("train", 0), seen("train", 1)
    kept, mirrored = ((first == images).flatten(1).all(1) for images in (stored, stored.flip(-1)))
    assert (kept | mirrored).all() and 120 < kept.sum() < 200
    assert torch.equal(first, seen("train", 0)) and not torch.equal(first, second)
    assert torch.equal(seen("val"), stored)


def test_warp_slides_rows_and_columns_of_the_first_epochs_training_images(folder, tmp_path):
    side, n = 41, 300
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([y, x]).byte().expand(n, -1, -1, -1)  # where does a pixel come from?
    warped = data.warp(places, torch.Generator().manual_seed(1), n).long()
    from_y, from_x = warped[:, 0], warped[:, 1]
    down, along = (from_y - y)[:, side // 2], from_x - x  # a column slides as one …
    middle = slice(15, 26)                                # (where no border is met)
    assert torch.equal((from_y - y)[:, middle], down[:, None].expand(n, 11, side))
    rows = torch.full((n, side), 99).scatter(1, from_y[:, :, side // 2], along[:, :, side // 2])
    own = rows.gather(1, from_y[:, middle, middle].flatten(1)).view(n, 11, 11)
    assert torch.equal(along[:, middle, middle], own)     # … and so does a row
    t = np.linspace(-1, 1, side)
    parabola = np.polynomial.Polynomial.fit  # least squares, by whole pixels
    assert all(abs(parabola(t, shifts, 2)(t) - shifts).max() < 1 for shifts in down.numpy())
    for edge, reach in ((down[:, 0], 0.04), (along[:, 0, side // 2], 0.06)):
        assert edge.float().std().item() == pytest.approx(reach * side * math.hypot(1, 2 / 3), rel=0.2)
        assert abs(edge.float().mean()) < 0.5
    half = slice(100, 200)
    again = data.warp(places[half], torch.Generator().manual_seed(1), n, half)
    assert torch.equal(again.long(), warped[half])

    args, _ = arguments.parse_args([f"--dataset={folder}", "--epochs=4", "--warp=0.5"])
    split, order = data.load(str(folder), tmp_path).train, torch.randperm(320)

    def seen(*key):
        return torch.cat([batch[0] for batch in train.batches(split, order, args, *key)])
    stored = split.batch(order)[0]
    assert torch.equal(seen("train", 0), seen("train", 0)) and \
        not torch.equal(seen("train", 0), seen("train", 1)) and not torch.equal(seen("train", 1), stored)
    assert torch.equal(seen("train", 2), stored) and torch.equal(seen("val"), stored)
    args.warp, args.epochs = 0.28, 25  # 7 epochs, though the product is above 7 in floats
    assert not torch.equal(seen("train", 6), stored) and torch.equal(seen("train", 7), stored)
