"""Your own images: a folder of image files or of .npy files, or one array file (.npy, .npz). They are decoded
once, into a cache (datasets.cached) from which they are mapped into memory.

Whatever is left out or reinterpreted is counted, and each kind is said in one line.
"""

import hashlib
import json
import os
import re
import sys
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import UserError, few, one_line
from datasets import DATASETS, cached, save_arrays, signature
from pixels import (
    Found,
    UntypedValues,
    as_stack,
    finish_image,
    grayscale,
    range_advice,
    to_array,
    to_bytes,
)

SPLITS = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")  # names of folders
SPLIT_LIKE = re.compile(r"(?<![A-Za-z])(?i:train(ing)?|val(id(at(e|ion))?)?|tests?|testing|dev"
                        r"|eval(uat(e|ion))?|holdout)(?i:set|data|images)?(?![a-z])")  # seg_train, trainA
ARRAYS = (".npy", ".npz")  # suffixes of array files
UNLABELLED = "unlabelled"  # the class of images without one, beside images with classes
BYTES = 2**25  # of images in memory at a time while they are decoded


def read_own(path, data_dir, image_size=None, transform="none", value_range=None, progress_bar=False):
    """Read a folder or an array file.

    value_range: the values (LOW, HIGH) that become black and white; None: those of the file's type
    → [training, validation, test] images uint8 [N, C, H, W], labels [N] and names of files [N] (of an array
    file none), where splits that the folder or file does not tell apart are empty; class names; the CRC-32 of
    all images and labels; a report: "intensities", the lowest and the highest; "fix", a line about how to
    change these; "untyped", the value range taken for numbers whose type has none, or None

    Raises UserError if the images cannot be used.
    """
    if path.is_dir():
        said = []
        splits, classes = list_splits(path, said)
        files = [file for part in splits for file in part]
        if not files:
            raise UserError(f"{printable(path)} holds no images that can be read (such as .png, .jpg, .tif "
                            "or .npy), neither directly nor in a folder for each class")
        print(*said, sep="\n", end="\n" * bool(said), file=sys.stderr)
        stamp = signature([classes, *map(len, splits)], path, [file for file, _ in files])
    elif path.is_file() and path.suffix.lower() in ARRAYS:
        splits, classes, stamp = None, None, signature([], path.parent, [path])
    else:
        raise UserError(f"{path} is neither one of {', '.join(DATASETS)} nor a folder of images nor an array "
                        "file")
    key = "-".join(hashlib.sha256(part).hexdigest()[:8] for part in (
        os.fsencode(path.resolve()), repr([10, image_size, transform, value_range, stamp]).encode()))

    def make(out):
        writer = Writer(out[0], transform)
        if splits is None:
            of_arrays = read_arrays(path, writer, image_size, value_range, progress_bar)
        else:
            read_folder(path, splits, writer, image_size, value_range, progress_bar)
        save_arrays(out[1:], writer.finish(path, of_arrays if splits is None else classes, value_range))
    images, labels, counts, crc32, report, names = cached(data_dir, key, 6, make)
    report = json.loads(report.tobytes())
    for line in report["lines"]:  # each time, not only when the files are decoded
        print(line, file=sys.stderr)
    ends = np.cumsum([0, *counts])
    parts = [(images[a:b], labels[a:b], names[a:b] if len(names) else None) for a, b in zip(ends, ends[1:])]
    return parts, report["classes"], int(crc32), report


# ------------------------------------------------------------------------------------------------------------
# Which files there are

@cache
def suffixes():
    """The suffixes of all files that can be read: those of the installed Pillow's formats, and .npy."""
    from PIL import Image, ImageFile
    Image.init()
    readable = {name for name, (factory, _) in Image.OPEN.items()
                if not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))}
    # movies and vector graphics, which Pillow can only recognise, or needs another program for
    readable -= {"MPEG", "EPS", "WMF"}
    return {suffix for suffix, name in Image.registered_extensions().items() if name in readable} | {".npy"}


def list_splits(root, said):
    """→ the training, validation and test files, each [(path, label)]; class names. Without a train/ all are
    training files.

    said: gets lines about what is left out
    """
    subfolders = {folder.name.lower(): folder for folder in sorted(root.iterdir()) if folder.is_dir()}
    parts = [next((subfolders[name] for name in names if name in subfolders), None) for names in SPLITS]
    train, val, test = parts
    if train and (val or test):
        by_class = list_parts(root, parts, said)
    else:
        by_class = [list_images(root, said), {}, {}]
        refuse_other_splits(root, subfolders.values(), by_class[0])
    number = {name: i for i, name in enumerate(dict.fromkeys(name for part in by_class for name in part))}
    classes = [] if set(number) <= {""} else [name or UNLABELLED for name in number]
    return [[(path, number[name]) for name, files in part.items() for path in files]
            for part in by_class], classes


def list_parts(root, parts, said):
    """→ list_images of train/, val/ and test/, of which one may be None. Raises UserError."""
    names = ", ".join(f"{printable(part.name)}/" for part in parts if part)
    others = [f"{printable(path.name)}/" for path in sorted(root.iterdir())
              if path not in parts and list_images(path, [])]
    loose = sum(path.suffix.lower() in suffixes() for path in root.iterdir() if path.is_file())
    others += [f"{loose} images"] * bool(loose)
    if others:
        said.append(f"{printable(root)}: left out: {few(others)}, because it has {names}")
    by_class = [list_images(part, said) if part else {} for part in parts]
    if not by_class[0]:
        raise UserError(f"{printable(parts[0])} holds no images that can be read")
    for part, files in zip(parts, by_class):
        if part and not files:
            said.append(f"{printable(part)} holds no images: a random tenth of the training images takes its "
                        "place")
    if len({tuple(part) for part in by_class if part}) > 1:
        said.append(f"{printable(root)}: not the same classes in {names} (" + "; ".join(
            few(name or "none" for name in part) for part in by_class if part) + ")")
    return by_class


def refuse_other_splits(root, subfolders, classes):
    """Raise UserError if folders or .npy files look like splits in another layout than train/, val/, test/.
    If they were taken for classes, test images would be trained on.

    classes: as list_images returns them
    """
    within = []  # folders that hold splits
    for folder in subfolders:
        inner = {name.lower() for name in next(os.walk(folder), ("", [], []))[1]}
        if inner & set(SPLITS[0]) and any(map(SPLIT_LIKE.search, inner - set(SPLITS[0]))) \
                and list_images(folder, []):
            within.append(folder)
    if within:
        raise UserError(f"{printable(root)}: {few(f'{printable(folder.name)}/' for folder in within)} has "
                        "splits (train/ and others) inside; " + (
                            f"give {printable(within[0])} as the dataset" if len(within) == 1 else
                            "the splits come first, their classes in them: train/cat, test/cat"))
    folders = [name for name in classes if name]
    if folders and all(map(SPLIT_LIKE.search, folders)):
        raise UserError(f"{printable(root)} has {few(folders)}, which look like splits, but there is no "
                        "train/ beside val/ or test/; rename them, or give one of them itself as the dataset")
    arrays = [path.name for path in classes.get("", ()) if path.suffix.lower() == ".npy"
              and any(path.stem.lower() in names for pair in KEYS[1:] for names in pair)]
    if arrays:
        raise UserError(f"{printable(root)} has {few(arrays)}, which look like parts of one dataset; save "
                        "them in one file: np.savez('all.npz', x_train=…, y_train=…, x_test=…)")


def list_images(root, said):
    """→ {class name: files}. Each subfolder is a class. If there is none, the files of the folder itself are
    the images, of the class "". Links are followed. Hidden files and folders do not count.

    said: gets lines about what is left out
    """
    skipped = Counter()
    if not root.is_dir():
        return {}

    def visible(name):
        return not name.startswith(".") and name not in ("__MACOSX", "Thumbs.db", "desktop.ini")

    def images(where, names):
        names = [name for name in names if visible(name)]
        good = [name for name in names if Path(name).suffix.lower() in suffixes()]
        skipped.update(Path(name).suffix.lower() or "no suffix" for name in set(names) - set(good))
        return [Path(where) / name for name in good]

    def left_out(error):
        said.append(f"left out: {printable(error.filename)} ({error.strerror})")

    def inside(folder):
        files, seen = [], {root.resolve()}
        for where, folders, names in os.walk(folder, followlinks=True, onerror=left_out):
            if Path(where).resolve() in seen:  # a link that leads back, or into a folder that was read
                folders.clear()
                continue
            seen.add(Path(where).resolve())
            folders[:] = sorted(filter(visible, folders))
            files += images(where, names)
        return sorted(files)
    folders = {printable(folder.name): inside(folder) for folder in sorted(root.iterdir())
               if folder.is_dir() and visible(folder.name)
               and not root.resolve().is_relative_to(folder.resolve())}  # a link back to the root
    empty = [name for name, files in folders.items() if not files]
    folders = {name: files for name, files in folders.items() if files}
    if folders and empty:
        said.append(f"{printable(root)}: left out: folders without images ({few(empty)})")
    deeper = [file for files in folders.values() for file in files
              if len(file.relative_to(root).parts) > 2]
    if deeper:
        said.append(f"{printable(root)}: its folders ({few(folders)}) are the classes; folders inside them, "
                    f"such as {printable(deeper[0].parent.relative_to(root).as_posix())}, are not")
    loose = sorted(images(root, [path.name for path in root.iterdir() if not path.is_dir()]))
    if skipped:
        kinds = few(f"{n:,} {suffix}" for suffix, n in skipped.most_common())
        said.append(f"{printable(root)}: left out: files of other kinds ({kinds})")
    if folders and len(loose) > sum(map(len, folders.values())):
        raise UserError(f"{printable(root)} holds {len(loose)} images, and fewer in its folders "
                        f"({few(folders)}): are these classes? Move one or the other elsewhere")
    if folders and loose:
        said.append(f"{printable(root)}: left out: {len(loose)} images beside its folders, which are classes")
    return folders or ({"": loose} if loose else {})


def printable(path):
    """A path as text of one line; bytes that are no text, and letters such as tabs, are escaped."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode()
                   for letter in text)


# ------------------------------------------------------------------------------------------------------------
# A folder

def count_images(path, found):
    """How many images a file holds, and about how many bytes one of them has: the pages of a TIFF, the images
    of a .npy file, 1 of any other file. A TIFF whose list of pages is damaged is counted in `found`.
    """
    from PIL import Image
    try:
        if path.suffix.lower() == ".npy":
            stack = as_stack(np.load(path, mmap_mode="r", allow_pickle=False), single=True)
            return len(stack), stack[:1].nbytes
        if path.suffix.lower() in (".tif", ".tiff"):
            with warnings.catch_warnings(record=True) as warned, Image.open(path) as image:
                warnings.simplefilter("always")
                try:
                    pages = image.n_frames
                except Exception:  # the list breaks off; at some places Pillow only warns
                    pages = 1
                    warned.append("Corrupt EXIF data")
            found.kinds["pages"] += any("EXIF" in str(warning) for warning in warned)
            return pages, image.width * image.height * 4
    except Exception:  # it is reported when it is read
        pass
    return 1, 0


def read_images(path, part, image_size, value_range, found):
    """The images of a file in a range of its pages → a list of uint8 [H, W] or [H, W, 3]. Raises some
    exception if it cannot be read.
    """
    if not path.is_file():  # reading a pipe would never end
        raise ValueError("no file")
    if path.suffix.lower() == ".npy":
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        found.kinds["channels first"] += bool(array.ndim == 3 and array.shape[0] in (3, 4))
        stack = as_stack(array, single=True)[part.start:part.stop]
        return [finish_image(to_bytes(image, value_range, found), image_size, found) for image in stack]
    images = []
    with open_image(path) as image:
        for page in part:
            if page:
                image.seek(page)
            if page and image.format == "TIFF" and image.tag_v2.get(254, 0) & 1:
                continue  # a smaller copy of another page
            images.append(to_array(image, image_size, value_range, found))
    return images


def open_image(path):
    """Open an image file. Raises ValueError if several such would need gigabytes."""
    from PIL import Image
    try:
        return Image.open(path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS // 10**6} million pixels; scale it down first")


def read_folder(root, splits, writer, image_size, value_range, progress_bar):
    """Decode the files of the splits, [(path, label)] each, in parallel, and give them to the writer. Raises
    UserError if sizes differ and there is no image size, or if no file can be read.
    """
    from PIL import Image
    items = []  # path, label, split, some pages; a page at a time has to fit into memory
    for split, files in enumerate(splits):
        for path, label in files:
            pages, size = count_images(path, writer.found)
            step = max(1, BYTES // 4 // max(size, 1))
            items += [(path, label, split, range(first, min(first + step, pages)))
                      for first in range(0, pages, step)]

    untyped = None

    def read(item, value_range=value_range):
        path, _, _, part = item
        found = Found(untyped)
        try:
            return read_images(path, part, image_size, value_range, found), found, None
        except MemoryError:
            raise
        except Exception as error:  # a damaged file may raise anything
            return [], found, error

    workers = min(8, os.cpu_count())  # each holds a whole photo, of 36 MB and more
    most_pages = max((len(part) for *_, part in items), default=1)  # that one item has
    largest = 0  # the bytes of the largest image so far
    with (warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool,
          tqdm(total=len(items), desc="decoding", leave=False, disable=not progress_bar) as bar):
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # see open_image
        warnings.filterwarnings("ignore", category=UserWarning)  # of damaged metadata
        position, block = 0, workers
        while position < len(items):
            done = items[position:position + block]
            results = list(pool.map(read, done))
            if any(isinstance(error, UntypedValues) for _, _, error in results):
                # such as 32-bit TIFFs: all files are decoded once more, to find the range of these
                untyped = untyped_range(root, items, read, pool)
                results = list(pool.map(read, done))
            for (path, label, split, part), (images, found, error) in zip(done, results):
                if error:
                    writer.unreadable.append((path, one_line(error)))
                writer.found.add(found)
                name = printable(path.relative_to(root).as_posix())
                writer.append(images, [label] * len(images), split,
                              [name + (f"#{part.start + i}" if (part.start, len(part)) != (0, 1) else "")
                               for i in range(len(images))])
                check_sizes(root, writer)
                largest = max([largest, *(image.nbytes for image in images)])
            writer.flush()
            position += len(done)
            block = max(workers, min(1000, BYTES // (largest * most_pages))) if largest else workers
            bar.update(len(done))
    if not writer.written:
        path, error = writer.unreadable[0]
        raise UserError(f"{printable(root)}: none of its {len(items)} image files can be used, such as "
                        f"{printable(path)} ({error})")
    writer.found.untyped, writer.files = untyped, len({path for path, *_ in items})
    for names, files, count in zip(SPLITS, splits, writer.counts):
        if files and not count:
            raise UserError(f"{printable(root)}: none of the image files in {names[0]}/ can be read")


def plain_range(found, path):
    """The value range of numbers without one of their type, where it is plain: [0, 1] or [0, 255]. Raises
    UserError elsewhere.
    """
    if None not in found.ranges:
        raise UserError(f"{printable(path)}: no value in it is finite")
    low, high = found.ranges[None]
    for top in (1, 255):
        if 0 <= low and high <= top:
            return 0, top
    raise UserError(f"{printable(path)}: {range_advice(low, high)}")


def untyped_range(root, items, read, pool):
    """The value range of the numbers whose type has none. Raises UserError if it is not plain."""
    total = Found()
    for first in range(0, len(items), 64):
        for _, found, _ in pool.map(lambda item: read(item, (0, 1)), items[first:first + 64]):
            total.add(found)
    return plain_range(total, root)


def check_sizes(root, writer):
    """Raise UserError if images differ in size. The line names a size that a VAE here can learn."""
    if len(writer.sizes) < 2:
        return
    (a, _), (b, _) = writer.sizes.most_common(2)
    height, width = a
    turned = a == b[::-1]  # photos upright and across
    if turned:
        height = width = min(a)
    scale = min(1, 64 / max(height, width))
    height, width = (max(8, 8 * round(side * scale / 8) if scale < 1 else side) for side in (height, width))
    raise UserError(f"{printable(root)}: its images differ in size ({a[1]}x{a[0]} and {b[1]}x{b[0]}, among "
                    f"others); --image_size {height} {width}, for example, makes them all {height} pixels "
                    f"high and {width} wide")


def read_paths(paths, shape, transform, value_range, untyped, known=()):
    """Image files and folders of them, brought to a shape (C, H, W) → uint8 [N, C, H, W], names of the files,
    bytes [N], labels [N], and their names. An image has the class that a folder of training images would give
    it, or else that of its folder's name if that is a known class, or else "". Raises UserError if one cannot
    be read.

    untyped: the value range of numbers whose type has none
    """
    files, images, names, labels, said = [], [], [], [], []
    for path in paths:
        splits, own = list_splits(path, said) if path.is_dir() else ([[(path, 0)]], [])
        if not any(splits):
            raise UserError(f"{printable(path)} holds no images that can be read")
        for file, label in (item for part in splits for item in part):
            folder = printable(file.resolve().parent.name)
            files.append((file, own[label] if own else folder if folder in known else ""))
    classes = list(dict.fromkeys(name for _, name in files))
    found = Found(untyped)
    for path, label in files:
        try:
            if path.suffix.lower() == ".npz":
                raise ValueError("it may hold many arrays; save one of them as .npy")
            read = read_images(path, range(count_images(path, found)[0]), shape[1:], value_range, found)
            if not read:
                raise ValueError("it holds no image")
        except UntypedValues as error:
            raise UserError(f"{printable(path)}: {one_line(error).split(';')[0]}, and the model was not "
                            "trained on such numbers; save it as uint8 or uint16")
        except Exception as error:  # a damaged file may raise anything
            raise UserError(f"{printable(path)} cannot be read ({one_line(error)})")
        images += read
        labels += [classes.index(label)] * len(read)
        names += [printable(path) + (f"#{page}" if len(read) > 1 else "") for page in range(len(read))]
    for line in [*said, *found.lines(value_range, trained=True)]:
        print(line, file=sys.stderr)
    colour = np.stack([image if image.ndim == 3 else image[..., None].repeat(3, 2) for image in images])
    colour = np.ascontiguousarray(colour.transpose(0, 3, 1, 2))
    if transform == "none" and shape[0] == 1:
        transform = "grayscale"
    return colour if transform == "none" else grayscale(colour, transform), np.array(
        [name.encode() for name in names], "S"), np.array(labels, np.int64), classes


# ------------------------------------------------------------------------------------------------------------
# An array file

# the keys that people use for images and labels of training, validation and test; in lower case
KEYS = [(("train_images", "x_train", "images", "x", "data", "arr_0"),
         ("train_labels", "y_train", "labels", "y", "label", "targets", "target", "arr_1")),
        (("val_images", "x_val", "x_valid"), ("val_labels", "y_val", "y_valid")),
        (("test_images", "x_test"), ("test_labels", "y_test"))]


def read_arrays(path, writer, image_size, value_range, progress_bar):
    """Give the images of a .npy or .npz file to the writer → class names. Raises UserError."""
    try:
        if path.suffix.lower() == ".npy":
            file = {"images": np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            file = np.load(path, allow_pickle=False)
            if isinstance(file, np.ndarray):
                file = {"images": file}
        keys = {key.lower(): key for key in file}
        if len(keys) < len(file):
            raise ValueError("some of its keys differ only in upper and lower case")
        parts = [tuple(next((keys.pop(name) for name in names if name in keys), None) for names in pair)
                 for pair in KEYS]
        if not any(images for images, _ in parts) and len(keys) == 1:
            parts[0] = keys.popitem()[1], None
        if not parts[0][0]:
            raise ValueError(f"its keys are {', '.join(file) or 'none'}; images and labels, for example, or "
                             "x_train and y_train are needed")
        stacks = [as_stack(file[images], single=False) if images else None for images, _ in parts]
        if not len(stacks[0]):
            raise ValueError("it has no training images")
        labels, classes = read_labels(path, [label and file[label] for _, label in parts],
                                      [0 if stack is None else len(stack) for stack in stacks], writer)
    except Exception as error:  # bytes that only look like an array file may raise anything
        if re.search("pickle|Python objects", str(error)):
            error = "it is damaged, or holds Python objects; save numbers, and labels as numbers or text " \
                    "(array.astype(str))"
        if isinstance(error, EOFError):
            error = "it is empty, or its end is missing; save it again"
        raise UserError(f"{printable(path)}: {one_line(error)}")
    if keys:
        writer.lines.append(f"{printable(path)}: left out: {few(keys.values())}")
    for (key, _), stack in zip(parts, stacks):
        if key and not len(stack):
            writer.lines.append(f"{printable(path)}: {key} is empty: a random tenth of the training images "
                                "takes its place")

    def blocks(stack):
        step = max(1, BYTES // 4 // max(1, stack[:1].nbytes))
        return (slice(first, first + step) for first in range(0, len(stack), step))
    untyped = [stack for stack in stacks if stack is not None and stack.dtype.kind != "b"
               and stack.dtype.newbyteorder("=") not in (np.uint8, np.uint16)]
    if untyped and not value_range:
        found = Found()
        for stack in untyped:
            for block in blocks(stack):
                to_bytes(stack[block], (0, 1), found)  # for the range that it finds
        writer.found.untyped = plain_range(found, path)
    total = sum(len(stack) for stack in stacks if stack is not None)
    with tqdm(total=total, desc="reading", leave=False, disable=not progress_bar) as bar:
        for split, (stack, of_split) in enumerate(zip(stacks, labels)):
            for block in blocks(stack) if stack is not None else ():
                images = [finish_image(to_bytes(image, value_range, writer.found), image_size, writer.found)
                          for image in stack[block]]
                writer.append(images, of_split[block], split)
                check_sizes(path, writer)
                writer.flush()
                bar.update(len(images))
    return classes


def read_labels(path, arrays, lengths, writer):
    """Labels of the three splits as they are stored → numbers of classes [N] for each, and class names. [N],
    [N, 1] and one-hot [N, K] are classes, named by their text; numbers of any other kind are not. Raises
    ValueError.
    """
    flat = []
    for array, n in zip(arrays, lengths):
        if array is None or not n:
            flat.append([""] * n)
            continue
        if array.ndim == 0 or len(array) != n:
            raise ValueError(f"{n} images, but {1 if array.ndim == 0 else len(array)} labels")
        if array.ndim == 2 and array.shape[1] > 1 and array.dtype.kind in "buif" and \
                ((array == 0) | (array == 1)).all() and (array.sum(1) == 1).all():
            array = array.argmax(1)
        array = array.reshape(n, -1)
        if array.shape[1] != 1 or array.dtype.kind == "f" and not (
                (array == np.round(array)) & (np.abs(array.astype(np.float64)) < 2**53)).all():
            writer.lines.append(f"{printable(path)}: left out: its labels, which are no classes")
            return [np.zeros(n, np.int64) for n in lengths], []
        if array.dtype.kind in "bf":
            array = array.astype(np.int64)
        flat.append([label.decode(errors="backslashreplace") if isinstance(label, bytes) else str(label)
                     for label in array[:, 0].tolist()])
    found = set().union(*flat)
    if found <= {""}:
        return [np.zeros(n, np.int64) for n in lengths], []
    if "" in found:
        writer.lines.append(f"{printable(path)}: images without labels are of the class {UNLABELLED}")
    numeric = all(re.fullmatch(r"-?\d+", name) for name in found - {""})
    names = sorted(found - {""}, key=int if numeric else str) + [""] * ("" in found)
    number = {name: i for i, name in enumerate(names)}
    return [np.array([number[name] for name in labels], np.int64) for labels in flat], \
        [name or UNLABELLED for name in names]


# ------------------------------------------------------------------------------------------------------------
# Writing the cache

class Writer:
    """Writes images of one size into an open .npy file, block by block, so that they need not fit into
    memory. As long as all are grey, they have one channel; the first image in colour turns them all into
    three.
    """

    def __init__(self, file, transform):
        self.file, self.transform = file, transform
        self.written, self.channels, self.start = 0, 1, 0
        self.waiting, self.labels, self.counts, self.sizes = [], [], [0, 0, 0], Counter()
        self.found, self.unreadable, self.lines, self.files, self.names = Found(), [], [], 0, []
        self.low, self.high = 255, 0

    def append(self, images, labels, split, names=()):
        """images: a list of uint8 [H, W] or [H, W, 3], which `flush` writes; split: 0, 1, 2, in this order"""
        self.names += [name.encode() for name in names]
        self.waiting += images
        self.labels += list(labels)
        self.counts[split] += len(images)
        self.sizes.update(image.shape[:2] for image in images)

    def flush(self):
        images, self.waiting = self.waiting, []
        if not images:
            return
        if not self.written:
            self.start = self.header(10**9, 3)  # as long as the header that `finish` writes
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
        self.low, self.high = min(self.low, int(block.min())), max(self.high, int(block.max()))
        self.file.write(np.ascontiguousarray(block.repeat(self.channels // block.shape[1], axis=1)))
        self.written += len(images)

    def header(self, n, channels):
        """Write the head of the file → its length in bytes"""
        (size,) = self.sizes
        np.lib.format.write_array_header_1_0(
            self.file, {"descr": "|u1", "fortran_order": False, "shape": (n, channels, *size)})
        return self.file.tell()

    def widen(self):
        """Turn the images so far into three channels, the last ones first, so that none is overwritten before
        it is read.
        """
        (size,) = self.sizes
        pixels = size[0] * size[1]
        step = max(1, BYTES // 4 // pixels)
        for first in reversed(range(0, self.written, step)):
            self.file.seek(self.start + first * pixels)
            block = self.file.read(min(step, self.written - first) * pixels)
            self.file.seek(self.start + 3 * first * pixels)
            self.file.write(np.frombuffer(block, np.uint8).reshape(-1, 1, pixels).repeat(3, axis=1).tobytes())
        self.file.seek(self.start + 3 * self.written * pixels)

    def finish(self, path, classes, value_range):
        """Write the true header → labels [N], the number of images of each split [3], the CRC-32 of images
        and labels, a report in JSON, as bytes, and the names of the files [N]
        """
        labels = np.array(self.labels, np.int64)
        crc32 = zlib.crc32(labels)
        self.file.seek(self.start)
        while block := self.file.read(1 << 24):
            crc32 = zlib.crc32(block, crc32)
        self.file.seek(0)
        self.header(self.written, self.channels)
        name, lines = printable(path), self.lines
        lines += [f"left out: {printable(path)} ({reason})" for path, reason in self.unreadable[:20]]
        if self.unreadable:
            bad = len({path for path, _ in self.unreadable})
            lines.append(f"{name}: {bad} of {self.files} files cannot be read, so left out")
        lines += [f"{name}: {line}" for line in self.found.lines(value_range)]
        fix = "".join(range_advice(*values) for values in [*self.found.ranges.values()][-1:])
        report = {"lines": lines, "classes": classes, "intensities": [self.low, self.high], "fix": fix,
                  "untyped": self.found.untyped}
        report = np.frombuffer(json.dumps(report).encode(), np.uint8)
        return labels, np.array(self.counts), np.array(crc32), report, np.array(self.names, "S")
