"""Where images come from: torchvision's datasets, folders, and glyphs that are made on the spot. Images are
decoded once, into a cache of plain .npy files.

To add a dataset of torchvision, add a line to NAMED. To add another source, write a function such as
read_glyphs, add its name to DATASETS, and call it in data.load.
"""

import contextlib
import hashlib
import io
import os
import re
import shutil
import socket
import sys
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cli import UserError, one_line

# name → class in torchvision.datasets, folder for archives downloaded by hand, the unpacked files
NAMED = {
    "mnist": ("MNIST", "MNIST/raw", "MNIST/raw/*-ubyte"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", "FashionMNIST/raw/*-ubyte"),
    "kmnist": ("KMNIST", "KMNIST/raw", "KMNIST/raw/*-ubyte"),
    "cifar10": ("CIFAR10", "", "cifar-10-batches-py/*"),
}
DATASETS = ("glyphs", *NAMED)
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
BLOCK = 1000  # images in memory at a time while a folder is decoded


# ------------------------------------------------------------------------------------------------------------
# Pixels

def grayscale(images, transform):
    """uint8 [N, C, H, W] in NumPy → the luminance (ITU-R BT.601) in one channel, or the same in three."""
    if images.shape[1] == 3:
        weights = torch.tensor([0.299, 0.587, 0.114])
        images = torch.cat([torch.einsum("nchw,c->nhw", part.float(), weights).round().byte()[:, None]
                            for part in torch.from_numpy(images).split(1000)]).numpy()
    return images.repeat(3, axis=1) if transform == "grayscale3" else images


def cover(image, size):
    """A PIL image, scaled to cover (H, W) and cropped at its centre."""
    from PIL import Image, ImageOps
    return ImageOps.fit(image, (size[1], size[0]), method=Image.Resampling.BICUBIC)


def resize(images, size):
    """`cover` for uint8 [N, C, H, W] in NumPy."""
    from PIL import Image
    grey = images.shape[1] == 1
    small = np.stack([np.asarray(cover(Image.fromarray(i[0] if grey else i.transpose(1, 2, 0)), size))
                      for i in images])
    return small[:, None] if grey else np.ascontiguousarray(small.transpose(0, 3, 1, 2))


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
            raise UserError(f"{dataset} is not in {folder}; --data_dir says where it is")
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
# A folder of images

def read_folder(root, data_dir, image_size, transform, progress_bar):
    """→ (train images, labels), (test images, labels), class names, the CRC-32 of all images and labels. The
    test part is empty if the folder has no train/ and test/.

    Raises UserError if the images cannot be used.
    """
    if not root.is_dir():
        raise UserError(f"{root} is neither one of {', '.join(DATASETS)} nor a folder of images")
    train, test, classes = list_splits(root)
    files = train + test
    if not files:
        raise UserError(f"{printable(root)} holds no images ({' '.join(sorted(SUFFIXES))}), neither directly "
                        "nor in a folder for each class")
    about = [3, image_size, transform, classes, len(train)]
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:8] + "-" + signature(
        about, root, [path for path, _ in files])
    images, labels, first_test, crc32, report = cached(
        data_dir, key, 5,
        lambda out: decode(out, root, files, len(train), image_size, transform, progress_bar))
    sys.stderr.write(report.tobytes().decode())  # each time, not only when the files are decoded
    n = int(first_test)
    if test and n == len(images):
        raise UserError(f"{printable(root)}: none of the image files in test/ can be read")
    return (images[:n], labels[:n]), (images[n:], labels[n:]), classes, int(crc32)


def list_splits(root):
    """→ training files, test files (none if the folder has no train/ and test/), each [(path, label)]; class
    names
    """
    files, classes = list_images(root)
    subfolders = {folder.name.lower(): folder for folder in sorted(root.iterdir()) if folder.is_dir()}
    train, test = (subfolders.get(name, subfolders.get(f"{name}ing")) for name in ("train", "test"))
    if train and test:
        both = f"{printable(train.name)}/ and {printable(test.name)}/"
        left_out = [name for name in classes if name not in (train.name, test.name)]
        (train_files, classes), (test_files, test_classes) = list_images(train), list_images(test)
        if classes != test_classes:
            raise UserError(f"{printable(root)}: {both} have different classes "
                            f"({', '.join(classes) or 'none'}; {', '.join(test_classes) or 'none'})")
        if left_out:
            print(f"{printable(root)}: beside {both}, {', '.join(left_out)} is left out", file=sys.stderr)
        return train_files, test_files, classes
    names, splits = {name.lower() for name in classes}, {"train", "training", "val", "valid", "validation",
                                                         "test", "testing"}
    if names & {"train", "training"} and names <= splits:
        raise UserError(f"{printable(root)} has {'/, '.join(classes)}/, which look like splits, but no "
                        "test/; rename one of them, or give the folder train/ itself as the dataset")
    return files, [], classes


def list_images(root):
    """→ [(path, label)], class names. Each subfolder is a class. If there is none, the files of the folder
    itself are the images. Hidden files and folders do not count.
    """
    def visible(name):
        return not name.startswith(".") and name != "__MACOSX"

    def is_image(name):
        return Path(name).suffix.lower() in SUFFIXES and visible(name)

    def inside(folder):
        files = []
        for where, folders, names in os.walk(folder):
            folders[:] = filter(visible, folders)  # os.walk then skips the others
            files += [Path(where) / name for name in names if is_image(name)]
        return sorted(files)
    folders = {printable(folder.name): inside(folder) for folder in sorted(root.iterdir())
               if folder.is_dir() and visible(folder.name)
               and not root.resolve().is_relative_to(folder.resolve())}  # a link back to the root
    folders = {name: files for name, files in folders.items() if files}
    loose = sorted(path for path in root.iterdir() if is_image(path.name) and not path.is_dir())
    if not folders:
        return [(path, 0) for path in loose], []
    if len(loose) > sum(map(len, folders.values())):
        raise UserError(f"{printable(root)} holds {len(loose)} images, and fewer in its folders "
                        f"({', '.join(folders)}): are these classes? Move one or the other elsewhere")
    if loose:
        print(f"{printable(root)}: its folders are classes, so {len(loose)} images beside them are left out",
              file=sys.stderr)
    return [(path, label) for label, files in enumerate(folders.values()) for path in files], list(folders)


def decode(out, root, files, n_train, image_size, transform, progress_bar):
    """Decode files [(path, label)] in parallel, into five open .npy files: images uint8 [N, C, H, W], labels
    int64 [N], the number of training images, the CRC-32 of images and labels, and a report of the files that
    cannot be read, as bytes.

    Raises UserError if sizes differ and there is no image_size, or if no file can be read.
    """
    from PIL import Image

    def read(path):
        try:
            return to_array(path, image_size)
        except MemoryError:
            raise
        except Exception as error:  # a damaged file may raise anything
            return one_line(error)
    images, kept, bad, sizes = ImageWriter(out[0], len(files), transform), [], [], Counter()
    with (warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool,
          tqdm(total=len(files), desc="decoding", leave=False, disable=not progress_bar) as bar):
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for first in range(0, len(files), BLOCK):
            block = files[first:first + BLOCK]
            arrays = list(pool.map(read, (path for path, _ in block)))
            bad += [(path, array) for (path, _), array in zip(block, arrays) if isinstance(array, str)]
            good = [i for i, array in enumerate(arrays) if not isinstance(array, str)]
            sizes.update(arrays[i].shape[:2] for i in good)
            if len(sizes) > 1:
                (a, _), (b, _) = sizes.most_common(2)
                raise UserError(f"{printable(root)}: its images differ in size ({a[1]}x{a[0]} and "
                                f"{b[1]}x{b[0]}, among others); --image_size {a[0]} {a[1]}, for example, "
                                f"makes them all {a[0]} pixels high and {a[1]} wide")
            if good:
                images.append([arrays[i] for i in good])
                kept += [first + i for i in good]
            bar.update(len(block))
    if not kept:
        raise UserError(f"{printable(root)}: none of its {len(files)} image files can be read, such as "
                        f"{printable(bad[0][0])} ({bad[0][1]})")
    report = [f"left out: {printable(path)} ({reason})\n" for path, reason in bad[:20]]
    if bad:
        report.append(f"{printable(root)}: {len(bad)} of {len(files)} files cannot be read, so left out\n")
    labels = np.array([files[i][1] for i in kept], np.int64)
    crc32 = images.finish(zlib.crc32(labels))
    save_arrays(out[1:], (labels, np.array(sum(i < n_train for i in kept)), np.array(crc32),
                          np.frombuffer("".join(report).encode(), np.uint8)))


class ImageWriter:
    """Writes images of one size into an open .npy file, block by block, so that they need not fit into
    memory. As long as all are grey, they have one channel; the first image in colour turns them all into
    three.
    """

    def __init__(self, file, most, transform):
        """most: an upper bound on the number of images"""
        self.file, self.most, self.transform = file, most, transform
        self.written, self.channels, self.size, self.start = 0, 1, None, 0

    def append(self, images):
        """images: a list of uint8 [H, W] or [H, W, 3]"""
        if not self.written:
            self.size = images[0].shape[:2]
            self.start = self.header(self.most, 3)  # as long as the header that `finish` writes
        if self.transform != "none" or any(image.ndim == 3 for image in images):
            images = [image if image.ndim == 3 else image[..., None].repeat(3, 2) for image in images]
            block = np.stack(images).transpose(0, 3, 1, 2)
        else:
            block = np.stack(images)[:, None]
        if self.transform != "none":
            block = grayscale(block, self.transform)
        if self.written and block.shape[1] > self.channels:
            self.widen()
        self.channels = max(self.channels, block.shape[1])
        self.file.write(block.repeat(self.channels // block.shape[1], axis=1).tobytes())
        self.written += len(images)

    def header(self, n, channels):
        """Write the head of the file → its length in bytes"""
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": "|u1", "fortran_order": False, "shape": (n, channels, *self.size)})
        return self.file.tell()

    def widen(self):
        """Turn the images so far into three channels, the last ones first, so that none is overwritten before
        it is read.
        """
        pixels = self.size[0] * self.size[1]
        for first in reversed(range(0, self.written, BLOCK)):
            self.file.seek(self.start + first * pixels)
            block = self.file.read(min(BLOCK, self.written - first) * pixels)
            self.file.seek(self.start + 3 * first * pixels)
            self.file.write(np.frombuffer(block, np.uint8).reshape(-1, 1, pixels).repeat(3, axis=1).tobytes())
        self.file.seek(self.start + 3 * self.written * pixels)

    def finish(self, crc32):
        """Write the true header → the CRC-32 of the images, continued from that of other data"""
        self.file.seek(self.start)
        while block := self.file.read(1 << 24):
            crc32 = zlib.crc32(block, crc32)
        self.file.seek(0)
        self.header(self.written, self.channels)
        return crc32


def to_array(path, image_size):
    """One image file → uint8, [H, W] if it is grey, otherwise [H, W, 3]. Turned as its camera says;
    transparent parts are white. Raises some exception if it cannot be read.
    """
    from PIL import Image, ImageOps
    if not path.is_file():  # reading a pipe would never end
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
            image = cover(image, image_size)
        pixels = np.asarray(image)
        return pixels[..., 0] if palette and (pixels == pixels[..., :1]).all() else pixels


def printable(path):
    """A path as text, even if its name holds bytes that are no text."""
    return os.fsencode(path).decode(errors="replace")


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
