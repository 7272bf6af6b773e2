"""A run on disk: its folders and locks, checkpoint files, the log, signals. Independent of the model: how a
run begins and resumes is in train.py, how it is saved and stops in training_state.py.
"""

import argparse
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

from cli import UserError, did_you_mean, one_line, run_name, warn
from distributed import RANK, WORLD
from figures import draw_curves

# ------------------------------------------------------------------------------------------------------------
# Folders: results/NAME and checkpoints/NAME

HOW_TO_GO_ON = "take another name, --resume its last.pt (if it was saved at all) to continue it, or " \
               "--overwrite to start it anew"
EPOCH_PICTURES = ("samples_[0-9][0-9][0-9]*.png", "reconstructions_[0-9][0-9][0-9]*.png")
FILES = ("metrics.csv", "seeds.csv", "test.json", "evaluation.json", "events.out.*", "curves.png",
         "samples.png", "samples_drawn.png", "samples_prior.png",
         "samples/[0-9]*.png", "samples/*/[0-9]*.png", "reconstructions.png",
         *EPOCH_PICTURES, "interpolations.png", "manifold*.png", "classes.png",
         *(f"latents{split}.{kind}" for split in ("", "_train", "_val", "_images")
           for kind in ("csv", "npz", "png")), "units.png", "traversals.png", "nearest.png", "images.png",
         "images_interpolation.png", "progress.gif", "index.html", "last.pt", "best.pt", "*.tmp")


# arguments that do not change what is trained
NO_EFFECT = {"command", "log_dir", "results_dir", "checkpoint_dir", "data_dir", "overwrite", "resume",
             "progress_bar", "save_every", "seeds"}


OF_KL = ("target_beta_val", "beta_mode")  # arguments that change nothing in an autoencoder


def in_use(args, name):
    """The value of an argument of a run as text; "–" if it changes nothing there"""
    return "–" if args.get("loss_mode") == "ae" and name in OF_KL else str(args.get(name))


def differing_arguments(runs):
    """The names of the arguments in which runs differ, without NO_EFFECT. runs: dictionaries of arguments"""
    names = sorted({name for args in runs for name in args} - NO_EFFECT)
    return [name for name in names if len({in_use(args, name) for args in runs} - {"–"}) > 1]


def holds_run(folder):
    return any((folder / name).exists() for name in ("metrics.csv", "last.pt", "best.pt"))


def holds_seeds(folder):
    """Whether --seeds made runs in this folder."""
    return (folder / "seeds.csv").exists() or any(folder.glob("seed_*/last.pt"))


def delete_run(folder):
    """Delete the files of a run, and nothing else that may lie in its folder."""
    for path in [path for name in FILES for path in folder.glob(name)] if holds_run(folder) else []:
        path.unlink()


def delete_all_runs(results, checkpoints):
    """Delete the run in these folders and those that --seeds made below them. Raises UserError if one of them
    is in use; then nothing is deleted.
    """
    names = {"", *(folder.name for root in (results, checkpoints) for folder in root.glob("seed_*"))}
    with contextlib.ExitStack() as locks:
        for name in sorted(names):
            locks.enter_context(run_folders(results / name, checkpoints / name, resume=True))
        for name in names:
            delete_run(results / name)
            delete_run(checkpoints / name)
        (results / "seeds.csv").unlink(missing_ok=True)


@contextlib.contextmanager
def run_folders(results, checkpoints, resume=False):
    """Make and lock the two folders of a run while the context is entered. Only the first of many processes
    does it, for all of them.

    resume: they may hold a run
    Raises UserError if a folder cannot be written, is in use by another process, or holds a run. Then nothing
    that was made here is left behind.
    """
    if RANK:
        yield
        return
    made, locked = [], []
    try:
        try:
            for folder in (results, checkpoints):
                for path in [*reversed(folder.parents), folder]:
                    if not path.exists():
                        path.mkdir(exist_ok=True)
                        made.append(path)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}); --results_dir and "
                            "--checkpoint_dir choose another place")
        with contextlib.ExitStack() as locks:
            # both may be one folder, which must not be locked twice
            for folder in {folder.resolve(): folder for folder in (results, checkpoints)}.values():
                locks.enter_context(lock(folder))
                locked.append(folder)
            if not resume and (holds_run(results) or holds_run(checkpoints)):
                # the arguments were checked, but another process may have been faster
                raise UserError(f"{checkpoints} holds a run already; {HOW_TO_GO_ON}")
            yield
    finally:
        if not any(checkpoints.glob("*.pt")):  # the run ended before there was anything to keep
            with contextlib.suppress(OSError):
                for path in reversed(made):
                    shutil.rmtree(path) if path in locked else path.rmdir()


@contextlib.contextmanager
def lock(folder):
    """Keep other processes from training into a folder. The system drops the lock when the process ends,
    however it ends. Raises UserError if another process holds it.
    """
    with open(folder / "lock", "a+b", buffering=0) as file:
        try:
            if os.name == "nt":
                import msvcrt
                file.seek(1 << 20)  # behind the text, which stays readable
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if os.name == "nt" or isinstance(error, BlockingIOError):
                file.seek(0)
                holder = file.read(200).decode().strip() or "another process"
                raise UserError(f"{folder} is being trained by {holder}; wait for it, or take another "
                                "--log_dir")
            warn(f"{folder} cannot be locked ({error.strerror}): make sure that no other process uses it")
        with contextlib.suppress(OSError):  # a full disk must not stop a run
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
        yield


# ------------------------------------------------------------------------------------------------------------
# Files: replaced atomically

def atomic_write(path, content):
    """Write bytes to a file. A reader finds the old content or the new one and never a part, even if this
    process is killed.
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
        raise OSError(error.errno, error.strerror, str(path))  # a failed write does not name its file


def write_json(path, values):
    atomic_write(path, (json.dumps(values, indent=2) + "\n").encode())


def csv_bytes(columns, rows):
    """Rows are dictionaries. A value that a row lacks is left empty."""
    lines = [columns, *(["" if row.get(name) is None else str(row[name]) for name in columns]
                        for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines).encode()


def write_csv(path, columns, rows):
    atomic_write(path, csv_bytes(columns, rows))


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: dictionaries of plain data and tensors

FORMAT, VERSION = "plain-vae", 6


def checkpoint_bytes(checkpoint):
    buffer = io.BytesIO()
    torch.save({"format": f"{FORMAT} {VERSION}", **checkpoint}, buffer)
    return buffer.getbuffer()


def save_checkpoint(path, checkpoint):
    atomic_write(path, checkpoint_bytes(checkpoint))  # torch.save has its own error for a full disk


def find_checkpoint(parser, path):
    """The file that --ckpt names, or the best.pt of the folder that it names; without it the newest
    checkpoints/**/best.pt. Exit if there is none.
    """
    found = sorted(Path("checkpoints").glob("**/best.pt"), key=lambda path: path.stat().st_mtime)
    if path is None:
        if not found:
            parser.error("argument --ckpt: there is no checkpoints/**/best.pt here; train one with python "
                         "train.py")
        path = found[-1]
    if (path / "best.pt").is_file():
        path = path / "best.pt"
    if not path.is_file():
        parser.error(f"argument --ckpt: {str(path)!r} is {'a folder' if path.is_dir() else 'not there'}; "
                     "only a file such as checkpoints/NAME/best.pt, or its folder"
                     + did_you_mean(path.as_posix(), [known.as_posix() for known in found]))
    return path


def describe_checkpoint(path, checkpoint):
    """Which run a checkpoint is of, which epoch of how many, and whether the run is unfinished."""
    epoch, epochs = checkpoint["epoch"], checkpoint["args"]["epochs"]
    return (f"{Path(path).as_posix()}: run {checkpoint['args']['log_dir']}, epoch {epoch} of {epochs}"
            + ", unfinished" * is_unfinished(checkpoint))


def is_unfinished(checkpoint):
    return not checkpoint["finished"] and checkpoint["epoch"] < checkpoint["args"]["epochs"]


def name_of_run(path, args):
    """The name of the run that a checkpoint is of: that of its folder below the folder of checkpoints, where
    the run may have been renamed or copied since; anywhere else the one that it was trained with.

    args: those in the checkpoint
    """
    folder, root = Path(path).resolve().parent, Path(args["checkpoint_dir"])
    for above in folder.parents:
        if above == root.resolve() or above.parts[-len(root.parts):] == root.parts:
            with contextlib.suppress(argparse.ArgumentTypeError):  # a name that no run can have
                return run_name(folder.relative_to(above).as_posix())
    return args["log_dir"]


def load_checkpoint(path):
    """Read a checkpoint onto the CPU, without executing any code in it. Its args["log_dir"] is the name that
    the run has now, see name_of_run.

    Raises UserError if the file is damaged, holds a number that is not finite, or is not of this project.
    """
    path = Path(path)
    content = io.BytesIO(path.read_bytes())
    try:
        with zipfile.ZipFile(content) as archive:  # torch would load a flipped bit without a word
            damaged = archive.testzip()
    except Exception:  # bytes that only look like a zip may raise anything
        raise UserError(f"{path} is not a checkpoint of this project, or was cut short")
    if damaged:
        raise UserError(f"{path} is damaged: {damaged} in it does not match its checksum")
    try:
        content.seek(0)
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
        name, version = checkpoint["format"].rsplit(" ", 1)
        version = int(version)
        assert name == FORMAT
        assert isinstance(checkpoint["model"], dict) and isinstance(checkpoint["data"], dict)
        assert version < VERSION or isinstance(checkpoint["epoch"] + checkpoint["args"]["epochs"], int)
        assert version < VERSION or isinstance(checkpoint["finished"], bool)
        assert all(value.layout == torch.strided and not value.is_quantized for value in tensors(checkpoint))
        run_name(checkpoint["args"]["log_dir"])  # a file from elsewhere must not choose where we write
        checkpoint["args"]["log_dir"] = name_of_run(path, checkpoint["args"])
    except Exception:
        raise UserError(f"{path} is not a checkpoint of this project")
    if version != VERSION:
        raise UserError(f"{path} was written by {'a newer' if version > VERSION else 'an older'} version of "
                        f"this project (format {version}; this one reads {VERSION})")
    for part in ("model", "ema", "fitted", "optimizer"):
        if not all_finite(checkpoint.get(part)):
            raise UserError(f"{path} is damaged: a number in its {part} is not finite")
    return checkpoint


def tensors(tree):
    """All tensors in nested dictionaries and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (dict, list, tuple)):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors(part)


def all_finite(tree):
    return all(bool(value.isfinite().all()) for value in tensors(tree))


# ------------------------------------------------------------------------------------------------------------
# The log: metrics.csv, pictures, TensorBoard's events

# of metrics.csv; runs with other columns are packed by submit.py without pictures
COLUMNS = ("epoch", "beta", "lr", "train_loss", "train_rec", "train_kl", "train_bpd",
           "val_loss", "val_rec", "val_kl", "val_bpd", "seconds")
SECONDS_BETWEEN_CURVES = 10  # drawing them takes longer than an epoch of a small model


class RunLog:
    """Writes the log of a run into its results folder. Training does not depend on it: the first write that
    fails is reported, and no failure ends the run.
    """

    def __init__(self, folder, history):
        """history: the rows of metrics.csv so far"""
        self.folder, self.curves_drawn, self.failed, self.writer = folder, time.monotonic(), False, None
        # TensorBoard writes in a thread of its own
        threading.excepthook = lambda raised: self.attempt(self.fail, raised.exc_value)
        self.attempt(self.open, len(history))
        # after a kill between the file and last.pt, the file has a row too many
        self.attempt(write_csv, folder / "metrics.csv", COLUMNS, history)

    def attempt(self, write, *args):
        if RANK:
            return
        try:
            write(*args)
        except Exception as error:
            if not self.failed:
                warn(f"{self.folder}: a picture or a log file cannot be written ({one_line(error)}); "
                     "training goes on, and further failures are not reported")
            self.failed = True

    def fail(self, error):
        raise error

    def open(self, epochs):
        from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(self.folder, purge_step=epochs + 1)

    def epoch(self, history, draw):
        """Log an epoch.

        history: the rows of metrics.csv, the last one new
        draw: a function that draws the epoch's pictures, or None
        """
        self.attempt(write_csv, self.folder / "metrics.csv", COLUMNS, history)
        if draw:
            self.attempt(draw)
        self.attempt(self.events, history[-1], draw)
        if time.monotonic() - self.curves_drawn > SECONDS_BETWEEN_CURVES:
            self.attempt(draw_curves, history, self.folder / "curves.png")
            self.curves_drawn = time.monotonic()

    def events(self, row, pictures):
        for name, value in row.items():
            if name not in ("epoch", "seconds") and value is not None:
                self.writer.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
        from PIL import Image
        for name in ("samples", "reconstructions") if pictures else ():
            with Image.open(self.folder / f"{name}_{row['epoch']:03d}.png") as image:
                self.writer.add_image(name, np.asarray(image), row["epoch"], dataformats="HWC")
        self.writer.flush()

    def close(self, history):
        self.attempt(draw_curves, history, self.folder / "curves.png")
        self.attempt(lambda: self.writer.close())


# ------------------------------------------------------------------------------------------------------------
# Signals

class Signals:
    """While entered, SIGINT and SIGTERM only set `received`, for the training loop to look at. A
    second signal ends the process at once, unless there are many processes: each of these gets a signal
    twice, from the terminal and from torchrun, and torchrun itself kills those that take too long.
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
        if self.received and kind and issubclass(kind, RuntimeError) and WORLD > 1:
            sys.exit(128 + self.received)  # the error only says that another process has stopped
