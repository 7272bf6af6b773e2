"""Where images come from: torchvision's names, folders, glyphs; decoded once, cached."""

import contextlib
import hashlib
import io
import math
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

NAMED = {  # name → (class in torchvision.datasets, where its archives can be put by hand, its unpacked files)
    "mnist": ("MNIST", "MNIST/raw", "MNIST/raw/*-ubyte"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", "FashionMNIST/raw/*-ubyte"),
    "kmnist": ("KMNIST", "KMNIST/raw", "KMNIST/raw/*-ubyte"),
    "cifar10": ("CIFAR10", "", "cifar-10-batches-py/*"),
}
DATASETS = ("glyphs", *NAMED)
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


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
    torchvision = _torchvision()
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


def _torchvision():
    """Import torchvision, also beside a torch for which its compiled operators were not built (a CPU-only
    torch, say).

    This project uses none of those operators, but importing torchvision registers Python code for some of
    them and fails where they are missing. So each that it misses is declared to torch, without code behind
    it.
    """
    while True:
        try:
            import torchvision
            return torchvision
        except RuntimeError as error:
            missing = re.search(r"operator (torchvision::\w+) does not exist", str(error))
            if not missing:
                raise
            torch.library.define(missing[1], "() -> ()")  # a second time for one name raises: this loop ends


def __getattr__(name):
    # `from datasets import torchvision` works, and only those who use it wait for its import.
    if name == "torchvision":
        return _torchvision()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
