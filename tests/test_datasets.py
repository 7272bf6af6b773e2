"""Tests of datasets.py."""

import numpy as np
import torch

import data
import datasets
from tests.conftest import pixels, write_idx


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


def test_mnist_is_read_split_and_resized(tmp_path, capsys):
    write_idx(tmp_path)
    mnist = data.load("mnist", tmp_path)
    assert [len(s) for s in (mnist.train, mnist.val, mnist.test)] == [45, 5, 20]
    assert mnist.classes == list("0123456789") and torch.equal(mnist.test.labels, torch.arange(20) % 10)
    assert len(data.load("mnist", tmp_path, limit=7).train) == 7
    data.load("mnist", tmp_path, image_size=(20, 21))
    assert not capsys.readouterr().err
    small = data.load("mnist", tmp_path, image_size=(14, 21), transform="grayscale3")
    assert "more than a twentieth of each is cropped away" in capsys.readouterr().err
    assert small.shape == (3, 14, 21) and torch.equal(pixels(small.val)[:, 0], pixels(small.val)[:, 2])
    assert [len(small.train), len(small.val)] == [45, 5]


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
