"""A run on disk: its folders and their lock, checkpoint files, the log, signals. Knows no model."""

import contextlib
import io
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

from cli import UserError, one_line, run_name
from distributed import RANK, WORLD
from figures import draw_curves

WAYS_ON = "take another name, --resume its last.pt to go on with it, or --overwrite to replace it"

OURS = ("metrics.csv", "seeds.csv", "test.json", "evaluation.json", "events.out.*", "curves.png",
        "samples*.png", "reconstructions*.png", "interpolations.png", "manifold*.png", "classes.png",
        "latents.png", "units.png", "traversals.png", "nearest.png", "progress.gif", "last.pt",
        "best.pt", "*.tmp")


def holds_run(folder):
    return any((folder / name).exists() for name in ("metrics.csv", "seeds.csv", "last.pt", "best.pt")) or \
        any(folder.glob("seed_*/last.pt"))


def wipe(folders):
    """Delete a run's files, and nothing else that may lie in its folders."""
    for folder in folders:
        for path in [path for name in OURS for path in folder.glob(name)] if holds_run(folder) else []:
            path.unlink()


@contextlib.contextmanager
def claimed(args, resumed):
    """The run's two folders, made and locked, after everything else that could fail → results, checkpoints.

    Leaves nothing behind where a folder cannot be written or
    belongs to another process. Of many processes the first does it for all.
    """
    folders = [Path(root) / args.log_dir for root in (args.results_dir, args.checkpoint_dir)]
    if RANK:
        yield folders
        return
    made, held = [], []
    try:
        try:
            for folder in folders:
                for path in [*reversed(folder.parents), folder]:
                    if not path.exists():
                        path.mkdir(exist_ok=True)
                        made.append(path)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); --results_dir and "
                            "--checkpoint_dir move it")
        with contextlib.ExitStack() as locks:
            lock(locks, folders, held)
            # also one that another process has made just now
            if not resumed and any(map(holds_run, folders)):
                if not args.overwrite:
                    raise UserError(f"{folders[1]} holds a run already; {WAYS_ON}")
                wipe(folders)
            yield folders
    finally:
        if not any(folders[1].glob("*.pt")):  # it ended before there was anything to keep
            with contextlib.suppress(OSError):
                for path in reversed(made):
                    shutil.rmtree(path) if path in held else path.rmdir()


def lock(locks, folders, held):
    """Lock folders until the stack `locks` ends, and add them to the list `held`; one that is named twice
    once, for it would lock itself out.
    """
    for folder in {folder.resolve(): folder for folder in folders}.values():
        locks.enter_context(locked(folder))
        held.append(folder)


@contextlib.contextmanager
def locked(folder):
    """Keep other processes from training into a folder. The system drops the lock when the process ends,
    however it ends, so nothing has to be cleaned up. Raises UserError where another process holds it.
    """
    with open(folder / "lock", "a+b", buffering=0) as file:
        try:
            if os.name == "nt":
                import msvcrt
                file.seek(1 << 20)  # beyond the text, which stays readable
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if os.name == "nt" or isinstance(error, BlockingIOError):
                file.seek(0)
                raise UserError(f"{folder} is being trained by "
                                f"{file.read(200).decode().strip() or 'another process'}"
                                "; wait for it, or take another --log_dir")
            print(f"{folder} cannot be locked ({error.strerror}): see to it that no other process trains "
                  "into it", file=sys.stderr)
        with contextlib.suppress(OSError):  # a full disk must not keep a run from going on
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


class Signals:
    """While it is entered, SIGINT and SIGTERM only set `received`, for the training loop to look at; the
    second one ends the process at once. Each of many processes gets a signal twice, from the terminal and
    from torchrun, which itself kills those that take too long.
    """

    def __enter__(self):
        self.received = 0
        self.before = {number: signal.signal(number, self.handle)
                       for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number, frame):
        if self.received and WORLD == 1:
            os._exit(128 + number)
        self.received = number

    def __exit__(self, kind, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.received and kind and issubclass(kind, RuntimeError) and WORLD > 1:  # a collective was torn
            sys.exit(128 + self.received)


FORMAT, VERSION = "plain-vae", 2


def atomic_write(path, content):
    """Put bytes in the place of a file: whoever reads it, whenever this process dies, finds the old or the
    new.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path))  # a failed write does not say where


def checkpoint_bytes(state):
    buffer = io.BytesIO()
    torch.save({"format": f"{FORMAT} {VERSION}", **state}, buffer)
    return buffer.getbuffer()


def save_checkpoint(path, state):
    atomic_write(path, checkpoint_bytes(state))  # torch.save to a full disk would say something else


def checkpoint_file(parser, path):
    """The file that --ckpt names, or without it the newest checkpoints/**/best.pt; ends the command where
    there is none.
    """
    if path is None:
        found = sorted(Path("checkpoints").glob("**/best.pt"), key=lambda found: found.stat().st_mtime)
        if not found:
            parser.error("argument --ckpt: there is no checkpoints/**/best.pt here; train one with python "
                         "train.py")
        path = found[-1]
    if not path.is_file():
        parser.error(f"argument --ckpt: {str(path)!r} is {'a folder' if path.is_dir() else 'not there'}; "
                     "only a file such as checkpoints/NAME/best.pt")
    return path


def load_checkpoint(path):
    """Read a checkpoint onto the CPU, without executing anything that it may hold.

    Raises UserError where the file is damaged, holds a number that is not finite, or is none of this
    project's.
    """
    content = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(content) as archive:  # torch itself would load a flipped bit in silence
            damaged = archive.testzip()
    except Exception:  # bytes that only look like a zip may raise anything
        raise UserError(f"{path} is not a checkpoint of this project, or was cut short")
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} in it does not match its checksum")
    try:
        content.seek(0)
        state = torch.load(content, map_location="cpu", weights_only=True)
        name, version = state["format"].rsplit(" ", 1)
        version = int(version)
        assert name == FORMAT and isinstance(state["model"], dict) and isinstance(state["data"], dict)
        assert all(value.layout == torch.strided and not value.is_quantized for value in tensors(state))
        run_name(state["args"]["log_dir"])  # a file from elsewhere must not choose where we write
    except Exception:
        raise UserError(f"{path} is not a checkpoint of this project")
    if version != VERSION:
        raise UserError(f"{path} was written by {'a newer' if version > VERSION else 'an older'} version of "
                        f"this project (format {version}; this one reads {VERSION})")
    for part in ("model", "ema", "optimizer"):
        if not all_finite(state.get(part)):
            raise UserError(f"{path} is damaged: a number in its {part} is not finite")
    return state


def tensors(tree):
    """All tensors in nested dictionaries and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(part)


def all_finite(tree):
    return all(bool(value.isfinite().all()) for value in tensors(tree))


COLUMNS = ("epoch", "beta", "lr", "train_loss", "train_rec", "train_kl", "train_bpd",
           "val_loss", "val_rec", "val_kl", "val_bpd", "seconds")


def csv_bytes(columns, rows):
    """Rows are dictionaries; what a row lacks is left empty."""
    lines = [columns, *(["" if row.get(name) is None else str(row[name]) for name in columns]
                        for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines).encode()


def write_csv(path, columns, rows):
    atomic_write(path, csv_bytes(columns, rows))


def write_json(path, values):
    atomic_write(path, (json.dumps(values, indent=2) + "\n").encode())


class RunLog:
    """metrics.csv, pictures and TensorBoard's events in the run's results folder. The training does not
    depend on them: the first write that fails is reported, and none ends the run."""

    def __init__(self, folder, history):
        self.folder, self.drawn, self.failed, self.writer = folder, time.monotonic(), False, None
        # for TensorBoard, which writes in a thread
        threading.excepthook = lambda raised: self.attempt(self.fail, raised.exc_value)
        self.attempt(self.open, len(history))
        # a resumed run may have one row too many
        self.attempt(write_csv, folder / "metrics.csv", COLUMNS, history)

    def attempt(self, write, *args):
        if RANK:
            return
        try:
            write(*args)
        except Exception as error:
            if not self.failed:
                print(f"{self.folder}: a picture or log cannot be written ({one_line(error)}); the training "
                      "goes on, and this is said once", file=sys.stderr, flush=True)
            self.failed = True

    def fail(self, error):
        raise error

    def open(self, epochs):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(self.folder, purge_step=epochs + 1)

    def epoch(self, history, draw):
        """history: the rows of metrics.csv so far, the last one new; draw: writes the pictures of this epoch.
        """
        self.attempt(write_csv, self.folder / "metrics.csv", COLUMNS, history)
        self.attempt(draw)
        self.attempt(self.events, history[-1])
        if time.monotonic() - self.drawn > 10:  # drawing takes longer than a small model's epoch
            self.attempt(draw_curves, history, self.folder / "curves.png")
            self.drawn = time.monotonic()

    def events(self, row):
        for name, value in row.items():
            if name not in ("epoch", "seconds") and value is not None:
                self.writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        from PIL import Image
        for name in ("samples", "reconstructions"):
            with Image.open(self.folder / f"{name}_{row['epoch']:03d}.png") as image:
                self.writer.add_image(name, np.asarray(image), row["epoch"], dataformats="HWC")
        self.writer.flush()

    def close(self, history):
        self.attempt(draw_curves, history, self.folder / "curves.png")
        self.attempt(lambda: self.writer.close())
