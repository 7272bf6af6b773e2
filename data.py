"""A dataset in memory, or mapped into it: uint8 images [N, C, H, W] and labels → batches of levels."""

import sys
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from cli import UserError
from datasets import DATASETS, read_glyphs, read_named
from files import ARRAYS, read_own, read_paths
from pixels import LINES, crops, grayscale, resize
from randomness import stream, stream_seed
from utils import to_device


@dataclass
class Split:
    """Some of the images of a dataset: the training, validation or test images.

    stored: uint8 [M, C, H, W], intensities 0 … 255, in memory or mapped into it; splits may share it
    rows: int64 [N], which of the stored images belong to this split, on the same device
    labels: int64 [N], on the device where batches go
    levels: the number of values of a pixel in a batch: 2, 16 or 256
    stochastic: whether pixels of levels 0 and 1 are drawn anew each time that an image is seen
    names: bytes [M], of the files of the stored images, or None
    """
    stored: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor
    levels: int
    stochastic: bool = False
    names: np.ndarray | None = None

    def __len__(self):
        return len(self.rows)

    def batch(self, index, *key, part=slice(None)):
        """The images at `index` as integer levels, uint8 [B, C, H, W], and their labels [B].

        key: of the random numbers (see randomness.stream) for stochastic binarisation; not needed without it
        part: which of these images to take; random numbers are drawn for all of them
        """
        taken, device = index[part], self.labels.device
        rows = to_device(index if self.stochastic else taken, self.rows.device)
        rows = self.rows.index_select(0, rows)  # faster than rows[…]
        images = to_device(self.stored.index_select(0, rows), device)
        if self.stochastic:
            images = binarize(images, *key)[to_device(part, device)]
        else:
            images = quantize(images, self.levels)
        return images, self.labels.index_select(0, to_device(taken, device))


@dataclass
class Data:
    """The three splits of a dataset.

    shape: (C, H, W); levels: a pixel is an integer from 0 to levels - 1
    classes: names, in the order of the labels; empty if the dataset has no classes
    crc32: of the images and labels as they are stored
    untyped: the value range taken for numbers whose type has none, see files.read_own
    """
    train: Split
    val: Split
    test: Split
    shape: tuple
    levels: int
    classes: list
    crc32: int
    untyped: list | None = None

    def about(self):
        """What a checkpoint keeps of the data."""
        return {"shape": list(self.shape), "levels": self.levels, "classes": self.classes,
                "images": [len(self.train), len(self.val), len(self.test)], "crc32": self.crc32,
                "untyped": self.untyped}


def load(dataset, data_dir="data", image_size=None, levels=256, binarize="threshold", transform="none",
         limit=None, device="cpu", download=True, progress_bar=False, value_range=None):
    """Read a dataset. Large ones are mapped into memory, not read into it.

    dataset: a name in DATASETS, or the path of a folder of images or of an array file (.npy, .npz)
    image_size: (H, W), or one number for both, to which images are resized and centre-cropped; None keeps
    their size
    levels: 256 as stored, 16 (4-bit), or 2; binarize: threshold (> 0.5) or stochastic, for 2 levels
    transform: none, grayscale (one channel) or grayscale3 (the same in three channels)
    limit: keep the first `limit` images of the training split
    value_range: of a folder or an array file, the values that become black and white
    → Data. Raises UserError if the dataset cannot be read.
    """
    data_dir = Path(data_dir)
    if image_size is not None:  # a list, as from the command line, so that both find the same cache
        image_size = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
    if dataset in DATASETS:
        train, test, classes = read_glyphs(data_dir) if dataset == "glyphs" else \
            read_named(dataset, data_dir, download)
        if image_size:
            if crops(train[0].shape[2:], image_size):
                print(f"all images {LINES['cropped']}", file=sys.stderr)
            train, test = ((resize(images, image_size), labels) for images, labels in (train, test))
        if transform != "none":
            train, test = ((grayscale(images, transform), labels) for images, labels in (train, test))
        crc32, untyped = 0, None
        for array in (*train, *test):
            crc32 = zlib.crc32(array, crc32)
        splits = split(train, None, test, levels, limit, proportional=False)
    else:
        parts, classes, crc32, report = read_own(Path(dataset), data_dir, image_size, transform, value_range,
                                                 progress_bar)
        if len(quantize(torch.tensor(report["intensities"], dtype=torch.uint8), levels).unique()) < 2:
            raise UserError(f"{dataset}: every pixel would have the same of {levels} levels; {report['fix']}")
        train, untyped = parts[0], report["untyped"]
        splits = split(*(part if len(part[0]) else None for part in parts), levels, limit, proportional=True)
    if not all(map(len, splits)):
        raise UserError(f"{dataset}: {' + '.join(str(len(part)) for part in splits)} images for training, "
                        "validation and test; each needs at least one, so give it ten or more")
    if levels == 2 and binarize == "stochastic":
        splits[0].stochastic = True
        splits[1:] = fixed_draw(splits[1], "val"), fixed_draw(splits[2], "test")
    return Data(*on_device(splits, torch.device(device)), tuple(train[0].shape[1:]), levels, classes, crc32,
                untyped)


def load_with(arguments, **changed):
    """`load` with the arguments of train.py, a dictionary, and some that are changed or added"""
    names = ("dataset", "data_dir", "image_size", "levels", "binarize", "transform", "limit", "device",
             "value_range")
    return load(**{name: arguments[name] for name in names} | changed)


def dataset_problem(name):
    """Why `load` cannot read a dataset of this name, or None"""
    path = Path(name)
    if name in DATASETS or name and (path.is_dir() or path.is_file() and path.suffix.lower() in ARRAYS):
        return None
    return f"{name!r} is neither one of {', '.join(DATASETS)} nor a folder nor an array file (.npy, .npz)"


def split(train, val, test, levels, limit, proportional):
    """Arrays (images, labels) → the training, validation and test split. Without validation images (None) a
    random tenth of the training images is taken for them, and without test images another tenth.

    proportional: whether each of these has images of each class in proportion
    """
    images, labels = map(torch.from_numpy, train[:2])
    names = train[2] if len(train) > 2 else None
    # One permutation for all runs, so that the validation figures of all seeds are about the same images.
    order, tenth = torch.randperm(len(images), generator=torch.Generator().manual_seed(42)), len(images) // 10
    if proportional:
        order = in_proportion(order, labels)
    splits = []
    for part in (test, val):
        if part is None:
            order, rows = order[:len(order) - tenth], order[len(order) - tenth:]
            splits.append(Split(images, rows, labels[rows], levels, names=names))
        else:
            splits.append(Split(torch.from_numpy(part[0]), torch.arange(len(part[0])),
                                torch.from_numpy(part[1]), levels, False, *part[2:]))
    return [Split(images, order[:limit], labels[order[:limit]], levels, names=names), *reversed(splits)]


def in_proportion(order, labels):
    """The indices `order`, moved so that any stretch of them has images of each class in proportion."""
    labels = labels[order]
    by_class, counts = labels.argsort(stable=True), labels.bincount()
    rank = torch.arange(len(order)) - (counts.cumsum(0) - counts)[labels[by_class]]  # within the class
    place = torch.empty(len(order), dtype=torch.float64)
    place[by_class] = (rank.double() + 0.5) / counts[labels[by_class]]
    return order[place.argsort(stable=True)]


def on_device(splits, device):
    """The splits on a device. Images that would fill more than half of its free memory are not moved."""
    moved = {id(split.stored): split.stored for split in splits}  # each array once, since splits share it
    for key, stored in moved.items():
        if device.type != "cuda" or stored.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            moved[key] = stored.to(device)
    stored = [moved[id(split.stored)] for split in splits]
    return [replace(split, stored=images, rows=split.rows.to(images.device), labels=split.labels.to(device))
            for split, images in zip(splits, stored)]


def fixed_draw(split, name):
    """A stochastic binarisation of a split that is drawn once and never changes, in memory."""
    everything = torch.arange(len(split))
    levels, labels = replace(split, stochastic=True).batch(everything, 42, "binarize", name)
    names = None if split.names is None else split.names[split.rows.cpu().numpy()]
    return Split(255 * levels, everything, labels, split.levels, names=names)


def own_images(paths, about, transform="none", value_range=None, binarize="threshold", device="cpu"):
    """Image files, folders of them or .npy files of any size, as the images that a model was trained on.

    about: of these, as Data.about returns it
    binarize: as in training, but pixels of an image that are drawn at random are always the same
    → a Split; the names of its labels, see read_paths. Raises UserError if one cannot be read.
    """
    images, names, labels, classes = read_paths(paths, about["shape"], transform, value_range,
                                                about.get("untyped"), about["classes"])
    images = torch.from_numpy(images)
    if about["levels"] == 2 and binarize == "stochastic":
        images = 255 * binarize_each(images)
    split = Split(images, torch.arange(len(images)), torch.from_numpy(labels), about["levels"], names=names)
    return on_device([split], torch.device(device))[0], classes


# ------------------------------------------------------------------------------------------------------------
# Pixels

def quantize(images, levels):
    """uint8 intensities 0 … 255 → integer levels, in place: as stored (256), the upper 4 bits (16), 1 where
    x > 0.5 (2).
    """
    return images if levels == 256 else images.bitwise_right_shift_({16: 4, 2: 7}[levels])


def binarize(images, *key):
    """uint8 intensities 0 … 255, [N, C, H, W] → 0 or 1, drawn with probability x / 255 from the stream of
    that key (Salakhutdinov & Murray 2008); in place on a CPU.

    On a CPU torch.bernoulli would take twenty times as long. Here two random bytes are one 16-bit word, which
    is compared with 257 x: that is x / 255 in units of 2⁻¹⁶, up to one unit. Black never turns white, and
    white never black. The low byte decides only one pixel in 256, so the images of a block share it.
    """
    if images.device.type == "cuda":
        return torch.bernoulli(images / 255, generator=stream(*key, device=images.device)).byte()
    generator = np.random.SFC64(stream_seed(*key))  # NumPy's fastest generator
    levels = images.cpu()
    pixels = levels.view(len(levels), -1).numpy()
    size = pixels.shape[1]
    step = max(1, 2**17 // size)  # as many images as stay in the cache
    carries = np.empty((step, size), bool)
    for first in range(0, len(pixels), step):
        block = pixels[first:first + step]
        carry = carries[:len(block)]
        drawn = generator.random_raw((len(block) + 1) * size // 8 + 1).view(np.uint8)
        high, low = drawn[:block.size].reshape(block.shape), drawn[block.size:block.size + size]
        # The word is below 257 x if high < x, or if high == x and low < x, which then equals high.
        np.less(np.minimum(low, 254), high, out=carry)  # 254, so that white is above every word
        high -= carry.view(np.uint8)
        np.less(high, block, out=block.view(bool))
    return levels.to(images.device)


def binarize_each(images):
    """`binarize` with a key for each image, the checksum of its bytes, so that the draw of an image does not
    depend on the others.
    """
    return torch.cat([binarize(image[None], "images", zlib.crc32(image.numpy())) for image in images])


def warp(images, generator, n, part=slice(None)):
    """Shift the rows of images [N, C, H, W], then their columns, each by a random parabola of its
    position: a digit slants, turns and bends a little. Shifts are whole pixels, so nothing blurs. The border
    is repeated.

    part: which of n images these are; random numbers are drawn for all n
    """
    slopes, bends = to_device(torch.randn(2, n, 2, generator=generator)[:, part], images.device)
    for axis, reach in enumerate((0.06, 0.04)):  # of the side's length, at the border
        t = torch.linspace(-1, 1, images.shape[2], device=images.device)
        side, slope, bend = images.shape[3], slopes[:, axis, None], bends[:, axis, None]
        shifts = (reach * side * (slope * t + bend * (t ** 2 - 1 / 3))).round().long()
        places = torch.arange(side, device=images.device) + shifts[:, None, :, None]
        images = images.gather(3, places.clamp(0, side - 1).expand_as(images)).transpose(2, 3)
    return images.contiguous()
