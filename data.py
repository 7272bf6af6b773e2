"""Any dataset → uint8 images [N, C, H, W] and labels, on one device or mapped from disk → batches of integer
levels.
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cli import UserError
from datasets import DATASETS, cached, grey, make_glyphs, read_folder, read_named, resize, save
from utils import stream, stream_seed, upload


@dataclass
class Split:
    """Some of the images of a dataset, which all its splits share.

    stored: uint8 [M, C, H, W], intensities 0 … 255, in memory or mapped into it; rows: int64 [N], which of
    them these are, on the same device; labels: int64 [N], on the device where batches go. As a batch is
    taken, intensities become 2, 16 or 256 levels; where `stochastic`, levels 0 and 1, drawn anew each time an
    image is seen.
    """
    stored: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    levels: int
    stochastic: bool = False

    def __len__(self):
        return len(self.rows)

    def batch(self, index, *key, part=slice(None)):
        """The images at `index` as integer levels, and their labels.

        key: the stream of random numbers (see utils.stream) for stochastic binarisation; unused without it
        part: which of them to take; random numbers are drawn for all
        """
        taken, device = index[part], self.labels.device
        rows = upload(index if self.stochastic else taken, self.rows.device)
        rows = self.rows.index_select(0, rows)  # faster than rows[…]
        images = upload(self.stored.index_select(0, rows), device)
        if self.stochastic:
            images = binarize(images, *key)[upload(part, device)]
        else:
            images = quantize(images, self.levels)
        return images, self.labels.index_select(0, upload(taken, device))


@dataclass
class Data:
    train: Split
    val: Split
    test: Split
    shape: tuple    # (C, H, W)
    levels: int     # a pixel is an integer from 0 to levels - 1
    classes: list   # names, in the order of the labels; empty where the data has no classes
    crc32: int      # of the images and labels as they are stored

    def about(self):
        """What a checkpoint says of the data."""
        return {"shape": list(self.shape), "levels": self.levels, "classes": self.classes,
                "images": [len(self.train), len(self.val), len(self.test)], "crc32": self.crc32}


def load(dataset, data_dir="data", image_size=None, levels=256, binarize="threshold", transform="none",
         limit=None, device="cpu", download=True, progress_bar=False):
    """Read a dataset. What is large is mapped into memory rather than read.

    dataset: one of DATASETS, or the path of a folder of images
    image_size: (H, W) to which images are resized and centre-cropped; None keeps their own size
    levels: 256 as stored, 16 (4-bit), or 2; binarize: threshold (> 0.5) or stochastic, for 2 levels
    transform: none, grayscale (one channel) or grayscale3 (the same in three)
    limit: keep the first so many images of the training split
    → Data; raises UserError where it cannot be read
    """
    data_dir = Path(data_dir)
    if dataset in DATASETS:
        if dataset == "glyphs":
            arrays = cached(data_dir, "glyphs-1", 4, lambda files: save(files, make_glyphs()))
            train, test, classes = arrays[:2], arrays[2:], [str(digit) for digit in range(10)]
        else:
            train, test, classes = read_named(dataset, data_dir, download)
        if image_size:
            train, test = ((resize(images, image_size), labels) for images, labels in (train, test))
        if transform != "none":
            train, test = ((grey(images, transform), labels) for images, labels in (train, test))
        crc32 = 0
        for array in (*train, *test):
            crc32 = zlib.crc32(array, crc32)
    else:
        train, test, classes, crc32 = read_folder(Path(dataset), data_dir, image_size, transform,
                                                  progress_bar)
    (images, labels), (test_images, test_labels) = (map(torch.from_numpy, part) for part in (train, test))
    # One permutation for all runs: validation figures of different seeds are about the same images.
    order, tenth = torch.randperm(len(images), generator=torch.Generator().manual_seed(42)), len(images) // 10
    if len(test_images):
        test_rows = torch.arange(len(test_images))
    else:  # a folder without train/ and test/: a tenth each
        test_images, test_labels = images, labels
        order, test_rows = order[:len(order) - tenth], order[len(order) - tenth:]
    order, held_out = order[:len(order) - tenth], order[len(order) - tenth:]
    train = Split(images, order[:limit], labels[order[:limit]], levels)
    val = Split(images, held_out, labels[held_out], levels)
    test = Split(test_images, test_rows, test_labels[test_rows], levels)
    if not (len(train) and len(val) and len(test)):
        raise UserError(f"{dataset}: {len(train)} + {len(val)} + {len(test)} images for training, validation "
                        "and test; each needs at least one, so give it ten or more")
    if levels == 2 and binarize == "stochastic":
        train.stochastic = True
        val, test = fixed_draw(val, "val"), fixed_draw(test, "test")
    return Data(*on_device((train, val, test), torch.device(device)), tuple(images.shape[1:]), levels,
                classes, crc32)


def on_device(splits, device):
    """The splits on a device; images that would fill more than half of its free memory stay where they are.
    """
    moved = {id(split.stored): split.stored for split in splits}  # each once, as they share it
    for key, stored in moved.items():
        if device.type != "cuda" or stored.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            moved[key] = stored.to(device)
    stored = [moved[id(split.stored)] for split in splits]
    return [replace(split, stored=images, rows=split.rows.to(images.device), labels=split.labels.to(device))
            for split, images in zip(splits, stored)]


def fixed_draw(split, name):
    """One stochastic binarisation of a split, the same for ever, in memory."""
    everything = torch.arange(len(split))
    levels, labels = replace(split, stochastic=True).batch(everything, 42, "binarize", name)
    return Split(255 * levels, everything, labels, split.levels)


# ------------------------------------------------------------------------------------------------------------
# Pixels

def quantize(images, levels):
    """uint8 intensities 0 … 255 → levels, which take their place: as stored (256), the upper 4 bits (16), 1
    where x > 0.5 (2).
    """
    return images if levels == 256 else images.bitwise_right_shift_({16: 4, 2: 7}[levels])


def binarize(images, *key):
    """uint8 intensities 0 … 255, [N, C, H, W] → 0 or 1, drawn with probability x / 255 from the stream of
    that key (Salakhutdinov & Murray 2008). On a CPU they take the place of the intensities.

    On a CPU torch.bernoulli would take twenty times as long. Two uniform bytes as one 16-bit word are
    compared with 257 x, which is x / 255 in units of 2⁻¹⁶ but for one unit at most; black never turns white,
    nor white black. The low byte decides one pixel in 256, so that the images of a block share it.
    """
    if images.device.type == "cuda":
        return torch.bernoulli(images / 255, generator=stream(*key, device=images.device)).byte()
    generator = np.random.SFC64(stream_seed(*key))  # the fastest there is
    levels = images.cpu()
    pixels = levels.view(len(levels), -1).numpy()
    size = pixels.shape[1]
    step = max(1, 2**17 // size)  # as many images as stay in the cache
    carries = np.empty((step, size), bool)
    for first in range(0, len(pixels), step):
        part = pixels[first:first + step]
        carry = carries[:len(part)]
        drawn = generator.random_raw((len(part) + 1) * size // 8 + 1).view(np.uint8)
        high, low = drawn[:part.size].reshape(part.shape), drawn[part.size:part.size + size]
        # the word is below 257 part where high < part, or high == part and low < part, which is then high
        np.less(np.minimum(low, 254), high, out=carry)  # white is above any word
        high -= carry.view(np.uint8)
        np.less(high, part, out=part.view(bool))
    return levels.to(images.device)


def warp(images, generator, n, part=slice(None)):
    """Slide the rows of images [N, C, H, W], then their columns, along a line and a parabola of their own: a
    digit slants, turns and bends a little. They slide by whole pixels, so that nothing blurs; the border
    repeats.

    part: which of n images these are; random numbers are drawn for all
    """
    slopes, bends = upload(torch.randn(2, n, 2, generator=generator)[:, part], images.device)
    for axis, reach in enumerate((0.06, 0.04)):  # of a side, at the border
        t = torch.linspace(-1, 1, images.shape[2], device=images.device)
        side, slope, bend = images.shape[3], slopes[:, axis, None], bends[:, axis, None]
        shifts = (reach * side * (slope * t + bend * (t ** 2 - 1 / 3))).round().long()
        places = torch.arange(side, device=images.device) + shifts[:, None, :, None]
        images = images.gather(3, places.clamp(0, side - 1).expand_as(images)).transpose(2, 3)
    return images.contiguous()


