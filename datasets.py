"""Datasets that have a name: those of torchvision, and glyphs that are made on the spot; the cache of plain
.npy files. Folders and array files are read in files.py.

To add a dataset of torchvision whose class takes `train` and has `data`, `targets` and `classes`, as CIFAR10,
add a line to NAMED. To add another source, write a function such as read_glyphs, add its name to DATASETS,
and call it in data.load.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import torch

from cli import UserError, one_line

# name → class in torchvision.datasets, folder for archives downloaded by hand, the unpacked files
NAMED = {
    "mnist": ("MNIST", "MNIST/raw", "MNIST/raw/*-ubyte"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", "FashionMNIST/raw/*-ubyte"),
    "kmnist": ("KMNIST", "KMNIST/raw", "KMNIST/raw/*-ubyte"),
    "cifar10": ("CIFAR10", "", "cifar-10-batches-py/*"),
}
DATASETS = ("glyphs", *NAMED)


# ------------------------------------------------------------------------------------------------------------
# The cache: .npy files, mapped into memory, read without pickle

def cached(data_dir, key, count, make):
    """`count` arrays from data_dir/cache/key. If they cannot be read, `make(files)` writes each of them as
    .npy into an open file. If no file can be written there, the arrays are kept in memory.
    """
    folder = data_dir / "cache" / key

    def read():  # mapped copy-on-write, because torch wants writable memory
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
        except OSError:  # the folder exists: it is damaged, or another process was faster
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


def save_arrays(files, arrays):
    for file, array in zip(files, arrays):
        np.save(file, array, allow_pickle=False)


def signature(about, folder, files):
    """A hash for a cache of these files: it changes if a file in the folder is new, gone or changed.

    about: what else the cached arrays depend on
    """
    digest = hashlib.sha256(repr(about).encode())
    for path in files:
        with contextlib.suppress(OSError):  # a broken link is reported when it is read
            status = path.stat()
            digest.update(f"{os.fspath(path.relative_to(folder))!r} {status.st_size} {status.st_mtime_ns}\n"
                          .encode())
    return digest.hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------------
# Datasets of torchvision

def import_torchvision():
    """Import torchvision, also beside a torch that its compiled operators were not built for (CPU-only
    torch).

    This project uses none of these operators. But importing torchvision registers Python code for some of
    them, which fails if they are missing. So each missing operator is declared to torch, without code.
    """
    while True:
        try:
            import torchvision
            return torchvision
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if not missing:
                raise
            torch.library.define(missing[1], "() -> ()")  # raises for the same name twice: the loop ends


def read_named(dataset, data_dir, download):
    """→ (train images, labels), (test images, labels), class names, in NumPy. From the cache, or else through
    torchvision, whose import takes a second.
    """
    def key():
        return f"{dataset}-{signature(1, data_dir, sorted(data_dir.glob(NAMED[dataset][2])))}"

    arrays = None
    if not (data_dir / "cache" / key()).is_dir():
        arrays = fetch(dataset, data_dir, download)  # first, because the key depends on the unpacked files
    images, labels, test_images, test_labels, classes = cached(
        data_dir, key(), 5,
        lambda files: save_arrays(files, arrays or fetch(dataset, data_dir, download)))
    return (images, labels), (test_images, test_labels), classes.tolist()


def fetch(dataset, data_dir, download):
    """→ train images, labels, test images, labels, class names; downloaded if they are not there

    Raises UserError if that fails.
    """
    torchvision = import_torchvision()
    name, by_hand, _ = NAMED[dataset]
    source, folder = getattr(torchvision.datasets, name), data_dir / by_hand
    names = [file for file, _ in source.resources] if hasattr(source, "resources") else [source.filename]
    # torchvision's downloads, which are deleted after unpacking; the user's own archives stay
    archives = [folder / file for file in names if not (folder / file).exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints a line for each mirror it tries
            parts = [source(data_dir, train=train, download=download) for train in (True, False)]
    except Exception as error:
        if not download:
            raise UserError(f"{dataset} is not in {folder}; give its place with --data_dir")
        raise UserError(f"{dataset} could not be downloaded ({one_line(error)}): put its files into "
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
# glyphs: digits in the typefaces that matplotlib ships

def read_glyphs(data_dir):
    """→ (train images, labels), (test images, labels), class names, in NumPy"""
    arrays = cached(data_dir, "glyphs-1", 4, lambda files: save_arrays(files, make_glyphs()))
    return arrays[:2], arrays[2:], [str(digit) for digit in range(10)]


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
