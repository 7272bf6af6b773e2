"""Any dataset → uint8 images [N, C, H, W] and labels, on one device or mapped from disk → batches of integer
levels.
"""

import contextlib
import hashlib
import io
import math
import os
import shutil
import socket
import sys
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from utils import UserError, one_line, stream, stream_seed, upload

NAMED = {  # name → (class in torchvision.datasets, where its archives can be put by hand, its unpacked files)
    "mnist": ("MNIST", "MNIST/raw", "MNIST/raw/*-ubyte"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", "FashionMNIST/raw/*-ubyte"),
    "kmnist": ("KMNIST", "KMNIST/raw", "KMNIST/raw/*-ubyte"),
    "cifar10": ("CIFAR10", "", "cifar-10-batches-py/*"),
}
DATASETS = ("glyphs", *NAMED)
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


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


def grey(images, transform):
    """uint8 [N, C, H, W] in NumPy → its luminance (ITU-R BT.601) in one channel, or the same in three."""
    if images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114])
        images = torch.cat([torch.einsum("nchw,c->nhw", part.float(), weights).round().byte()[:, None]
                            for part in torch.from_numpy(images).split(1000)]).numpy()
    return images.repeat(3, axis=1) if transform == "grayscale3" else images


def fit(image, size):
    """A PIL image, scaled to cover (H, W) and cropped at its centre."""
    from PIL import Image, ImageOps
    return ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BICUBIC)


def resize(images, size):
    """The same for uint8 [N, C, H, W], in NumPy."""
    from PIL import Image
    grey = images.shape[1] == 1
    small = np.stack([np.asarray(fit(Image.fromarray(i[0] if grey else i.transpose(1, 2, 0)), size))
                      for i in images])
    return small[:, None] if grey else np.ascontiguousarray(small.transpose(0, 3, 1, 2))


# ------------------------------------------------------------------------------------------------------------
# The cache of what takes long to make: plain .npy files, mapped into memory, read without pickle

def cached(data_dir, key, count, make):
    """The `count` arrays that `make(files)` writes as .npy, each into an open file of its own, kept in
    data_dir/cache/key. A cache that cannot be read is made again; where none can be written, the arrays are
    held in memory.
    """
    folder = data_dir / "cache" / key

    def read():  # mapped copy-on-write, since torch wants tensors that could be written
        return [np.load(folder / f"{number}.npy", mmap_mode="c", allow_pickle=False)
                for number in range(count)]
    with contextlib.suppress(Exception):  # damaged bytes may raise anything
        return read()
    partial = folder.with_name(f"{key}.{os.getpid()}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            make([stack.enter_context(open(partial / f"{number}.npy", "w+b")) for number in range(count)])
        try:
            os.replace(partial, folder)
        except OSError:  # there is one already: another process was first, or it is the damaged one
            with contextlib.suppress(Exception):
                return read()
            shutil.rmtree(folder)
            os.replace(partial, folder)
        return read()
    except OSError as error:
        print(f"{folder}: not cached ({error.strerror})", file=sys.stderr)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = [io.BytesIO() for _ in range(count)]
    make(files)
    return [np.load(io.BytesIO(file.getbuffer())) for file in files]


def save(files, arrays):
    for file, array in zip(files, arrays):
        np.save(file, array, allow_pickle=False)


def signature(about, folder, files):
    """Of what is cached about files: it changes where a file in that folder is new, gone or changed."""
    digest = hashlib.sha256(repr(about).encode())
    for path in files:
        with contextlib.suppress(OSError):  # a link to nowhere or to itself: who reads it will name it
            status = path.stat()
            digest.update(f"{os.fspath(path.relative_to(folder))!r} {status.st_size} {status.st_mtime_ns}\n"
                          .encode())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------
# The named datasets, through torchvision

def read_named(dataset, data_dir, download):
    """→ (train images, labels), (test images, labels), class names, in NumPy; from the cache, or else from
    what torchvision reads, whose import takes a second.
    """
    def key():
        return f"{dataset}-{signature(1, data_dir, sorted(data_dir.glob(NAMED[dataset][2])))}"

    arrays = None
    if not (data_dir / "cache" / key()).is_dir():
        arrays = fetch(dataset, data_dir, download)  # before the key is made of the files
    images, labels, test_images, test_labels, classes = cached(
        data_dir, key(), 5, lambda files: save(files, arrays or fetch(dataset, data_dir, download)))
    return (images, labels), (test_images, test_labels), classes.tolist()


def fetch(dataset, data_dir, download):
    """→ train images, labels, test images, labels, class names; downloaded where they are not there."""
    from utils import torchvision
    name, by_hand, _ = NAMED[dataset]
    source, folder = getattr(torchvision.datasets, name), data_dir / by_hand
    names = [file for file, _ in source.resources] if hasattr(source, "resources") else [source.filename]
    archives = [folder / file for file in names if not (folder / file).exists()]  # the user's own stay
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints a line for each mirror it tries
            parts = [source(data_dir, train=train, download=download) for train in (True, False)]
    except Exception as error:
        if not download:
            raise UserError(f"{dataset} is not in {folder}; --data_dir says where it is")
        raise UserError(f"{dataset} could not be fetched ({one_line(error)}): put its files into "
                        f"{folder.resolve()}, or use --dataset glyphs, which needs no network")
    finally:
        socket.setdefaulttimeout(timeout)
    for archive in archives:
        archive.unlink(missing_ok=True)
    arrays = []
    for part in parts:
        images = np.asarray(part.data)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        arrays += [np.ascontiguousarray(images), np.asarray(part.targets, dtype=np.int64)]
    return [*arrays, np.array([name.split(" - ")[0] for name in parts[0].classes])]  # MNIST's are "3 - three"


# ------------------------------------------------------------------------------------------------------------
# A folder of images

def read_folder(root, data_dir, image_size, transform, progress_bar):
    """→ (train images, labels), (test images, labels), class names, CRC-32 of all images and labels; the test
    part is empty where the folder has no train/ and test/.
    """
    if not root.is_dir():
        raise UserError(f"{root} is neither one of {', '.join(DATASETS)} nor a folder of images")
    parts = [list_images(root), ([], [])]
    splits = {"train", "training", "val", "valid", "validation", "test", "testing"}
    names = {name.lower() for name in parts[0][1]}
    named = {folder.name.lower(): folder for folder in sorted(root.iterdir()) if folder.is_dir()}
    train, test = (named.get(name, named.get(f"{name}ing")) for name in ("train", "test"))
    if train and test:
        both = f"{printable(train.name)}/ and {printable(test.name)}/"
        left_out = [name for name in parts[0][1] if name not in (train.name, test.name)]
        parts = [list_images(train), list_images(test)]
        if parts[0][1] != parts[1][1]:
            raise UserError(f"{printable(root)}: {both} have different classes "
                            f"({', '.join(parts[0][1]) or 'none'}; {', '.join(parts[1][1]) or 'none'})")
        if left_out:
            print(f"{printable(root)}: beside {both}, {', '.join(left_out)} is left out", file=sys.stderr)
    elif names & {"train", "training"} and names <= splits:
        raise UserError(f"{printable(root)} has {'/, '.join(parts[0][1])}/, which look like splits, but no "
                        "test/; give one of them a new name, or name the folder train/ itself as the dataset")
    classes, n_train = parts[0][1], len(parts[0][0])
    files = [(path, label) for part, _ in parts for path, label in part]
    if not files:
        raise UserError(f"{printable(root)} holds no images ({' '.join(sorted(SUFFIXES))}), neither flat nor "
                        "in a folder a class")
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8] + "-" + signature(
        [3, image_size, transform, classes, n_train], root, [path for path, _ in files])
    images, labels, first_test, crc32, report = cached(
        data_dir, key, 5, lambda out: decode(out, root, files, n_train, image_size, transform, progress_bar))
    sys.stderr.write(report.tobytes().decode())  # each time, not only when they were decoded
    n = int(first_test)
    if n_train < len(files) and n == len(images):
        raise UserError(f"{printable(root)}: none of the image files in test/ can be read")
    return (images[:n], labels[:n]), (images[n:], labels[n:]), classes, int(crc32)


def list_images(root):
    """→ [(path, label)], class names. A subfolder is a class; without any, the files of the folder itself
    count. Hidden files and folders are no images and no classes.
    """
    def visible(name):
        return not name.startswith(".") and name != "__MACOSX"

    def is_image(name):
        return Path(name).suffix.lower() in SUFFIXES and visible(name)

    def inside(folder):
        files = []
        for where, folders, names in os.walk(folder):
            folders[:] = filter(visible, folders)  # the walk goes into no others
            files += [Path(where) / name for name in names if is_image(name)]
        return sorted(files)
    folders = {printable(folder.name): inside(folder) for folder in sorted(root.iterdir())
               if folder.is_dir() and visible(folder.name)
               and not root.resolve().is_relative_to(folder.resolve())}  # a link that leads back
    folders = {name: files for name, files in folders.items() if files}
    flat = sorted(path for path in root.iterdir() if is_image(path.name) and not path.is_dir())
    if not folders:
        return [(path, 0) for path in flat], []
    if len(flat) > sum(map(len, folders.values())):
        raise UserError(f"{printable(root)} holds {len(flat)} images, and fewer in its folders "
                        f"({', '.join(folders)}): are these classes? Move one or the other elsewhere")
    if flat:
        print(f"{printable(root)}: it has a folder a class, so {len(flat)} images beside them are left out",
              file=sys.stderr)
    return [(path, label) for label, files in enumerate(folders.values()) for path in files], list(folders)


def decode(out, root, files, n_train, image_size, transform, progress_bar):
    """Decode files [(path, label)] in parallel, into five open .npy files: images uint8 [N, C, H, W], labels
    int64 [N], where the test begins, the CRC-32 of images and labels, and a report of the files that cannot
    be read, as bytes. A thousand images at a time are in memory.

    One channel where every file is grey, three otherwise. Raises UserError where the sizes differ and
    image_size does not say to which size they should go, or where no file can be read.
    """
    from PIL import Image

    def read(path):
        try:
            return to_array(path, image_size)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file may raise anything
            return one_line(error)
    kept, bad, sizes, channels, start = [], [], Counter(), 1, 0
    with (warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool,
          tqdm(total=len(files), desc="decoding", leave=False, disable=not progress_bar) as bar):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for first in range(0, len(files), 1000):
            part = files[first:first + 1000]
            arrays = list(pool.map(read, (path for path, _ in part)))
            bad += [(path, array) for (path, _), array in zip(part, arrays) if isinstance(array, str)]
            good = [i for i, array in enumerate(arrays) if not isinstance(array, str)]
            sizes.update(arrays[i].shape[:2] for i in good)
            if len(sizes) > 1:
                (a, _), (b, _) = sizes.most_common(2)
                raise UserError(f"{printable(root)}: its images differ in size ({a[1]}x{a[0]} and "
                                f"{b[1]}x{b[0]}, among others); --image_size {a[0]} {a[1]}, say, brings all "
                                f"to {a[0]} rows of {a[1]} pixels")
            if good:
                size = next(iter(sizes))
                start = start or write_header(out[0], (len(files), 3, *size))  # as long as the real one
                block = [arrays[i] for i in good]
                if transform != "none" or any(image.ndim == 3 for image in block):
                    block = [image if image.ndim == 3 else image[..., None].repeat(3, 2) for image in block]
                    block = np.stack(block).transpose(0, 3, 1, 2)
                else:
                    block = np.stack(block)[:, None]
                if transform != "none":
                    block = grey(block, transform)
                if kept and block.shape[1] > channels:
                    widen(out[0], start, len(kept), math.prod(size))
                channels = max(channels, block.shape[1])
                out[0].write(block.repeat(channels // block.shape[1], axis=1).tobytes())
                kept += [first + i for i in good]
            bar.update(len(part))
    lines = [f"left out: {printable(path)} ({reason})\n" for path, reason in bad[:20]]
    if bad:
        lines.append(f"{printable(root)}: {len(bad)} of {len(files)} files cannot be read and are left out\n")
    if not kept:
        raise UserError(f"{printable(root)}: none of its {len(files)} image files can be read, such as "
                        f"{printable(bad[0][0])} ({bad[0][1]})")
    labels = np.array([files[i][1] for i in kept], np.int64)
    out[0].seek(start)
    crc32 = zlib.crc32(labels)
    while block := out[0].read(1 << 24):
        crc32 = zlib.crc32(block, crc32)
    out[0].seek(0)
    write_header(out[0], (len(kept), channels, *size))
    for file, array in zip(out[1:], (labels, np.array(sum(i < n_train for i in kept)), np.array(crc32),
                                     np.frombuffer("".join(lines).encode(), np.uint8))):
        np.save(file, array, allow_pickle=False)


def write_header(file, shape):
    """The head of a .npy file of uint8, as long for any number of images; → its length in bytes."""
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.tell()


def widen(file, start, n, size):
    """Turn n grey images of `size` bytes, from `start` on, into three channels; from the last to the first,
    so that none is overwritten before it is read.
    """
    for first in reversed(range(0, n, 1000)):
        file.seek(start + first * size)
        block = np.frombuffer(file.read(min(1000, n - first) * size), np.uint8).reshape(-1, 1, size)
        file.seek(start + 3 * first * size)
        file.write(block.repeat(3, axis=1).tobytes())
    file.seek(start + 3 * n * size)


def to_array(path, image_size):
    """One image file → uint8 [H, W] where it is grey, else [H, W, 3]; upright, transparent parts on white."""
    from PIL import Image, ImageOps
    if not path.is_file():  # a pipe would be waited for without end
        raise ValueError("no file")
    with Image.open(path) as image:
        kind, image = image.format, ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16") or (image.mode == "I" and kind in ("PNG", "PPM")):
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if image.mode in ("I", "F"):
            raise ValueError("pixels of 32 bits, whose range is not known; 8 or 16 bits can be read")
        grey, palette = image.mode in ("1", "L", "LA", "La"), image.mode in ("P", "PA")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if grey else "RGB")
        if image_size:
            image = fit(image, image_size)
        pixels = np.asarray(image)
        return pixels[..., 0] if palette and (pixels == pixels[..., :1]).all() else pixels


def printable(path):
    """A path whose name may hold bytes that are no text."""
    return os.fsencode(path).decode(errors="replace")


# ------------------------------------------------------------------------------------------------------------
# glyphs: digits in the typefaces that matplotlib ships

TYPEFACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
             "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
             "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10", "cmb10")


def make_glyphs(seed=42, train=60_000, test=10_000):
    """Grey 28×28 renderings of the ten digits, each with its own typeface, stroke, rotation, shear, scale and
    shift.

    → train images uint8 [60000, 1, 28, 28], labels, test images, labels
    """
    templates = render_digits()
    generator = torch.Generator().manual_seed(seed)
    n = train + test
    labels = torch.randint(10, (n,), generator=generator)
    choice = [torch.randint(size, (n,), generator=generator) for size in templates.shape[1:3]]
    uniform = torch.rand(n, 6, generator=generator) * 2 - 1
    angle, shear = 0.26 * uniform[:, 0], 0.25 * uniform[:, 1]                # ±15 degrees
    width, height = 1.15 + 0.2 * uniform[:, 2], 1.0 + 0.12 * uniform[:, 3]   # of the window looked through
    images = torch.empty(n, 1, 28, 28, dtype=torch.uint8)
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(n, 2, 2)
    skew = torch.eye(2).repeat(n, 1, 1)
    skew[:, 0, 1] = shear
    affine = torch.cat([rotation @ skew * torch.stack([width, height], 1)[:, None],
                        0.15 * uniform[:, 4:, None]], 2)
    for i in torch.arange(n).split(1000):
        look = torch.nn.functional.affine_grid(affine[i], (len(i), 1, 28, 28), align_corners=False)
        glyphs = templates[labels[i], choice[0][i], choice[1][i]][:, None]
        drawn = torch.nn.functional.grid_sample(glyphs, look, align_corners=False)
        images[i] = (drawn * 255).round().byte()
    images, labels = images.numpy(), labels.numpy()
    return [images[:train], labels[:train], images[train:], labels[train:]]


def render_digits(strokes=(0, 2, 4)):
    """→ float [10, typefaces, strokes, 56, 56] in [0, 1], white on black, slightly blurred so that sampling
    every second pixel does not alias.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    drawn = torch.empty(10, len(TYPEFACES), len(strokes), 112, 112)
    for f, typeface in enumerate(TYPEFACES):
        font = ImageFont.truetype(os.fspath(folder / f"{typeface}.ttf"), 100)
        for digit in range(10):
            for s, stroke in enumerate(strokes):
                canvas = Image.new("L", (112, 112))
                ImageDraw.Draw(canvas).text((56, 56), str(digit), 255, font, anchor="mm", stroke_width=stroke)
                drawn[digit, f, s] = torch.from_numpy(np.array(canvas)) / 255
    small = torch.nn.functional.avg_pool2d(drawn.flatten(0, 2)[:, None], 4, 2, 1)
    return small.view(*drawn.shape[:3], 56, 56)
