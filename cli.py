"""The command line: argument types, devices, errors of one line, the exit status."""

import argparse
import contextlib
import ctypes
import gc
import math
import os
import re
import sys
import time
from pathlib import Path

import torch

from distributed import LOCAL_RANK, RANK, WORLD


class UserError(Exception):
    """Something that the user can mend. The message is one line that says how."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with errors of a single line (exit status 2) and no abbreviated options."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=lambda prog: argparse.HelpFormatter(
            prog, max_help_position=42, width=150), usage="python %(prog)s [options]", **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, above=False):
    """An argparse type: a finite int or float, at least `low`, or greater than it (`above`)."""
    high = 2**31 - 1 if kind is int else math.inf
    allowed = f"a {'whole' if kind is int else 'finite'} number {'>' if above else '>='} {low}"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value < high or (value == low and not above)):
            raise argparse.ArgumentTypeError(f"{text[:30]!r} is not allowed, only {allowed}")
        return value
    return parse


def device_type(text):
    """An argparse type: cpu, cuda, cuda:N or mps, where this machine has it."""
    here = ["cpu", *["cuda"] * torch.cuda.is_available(),
            *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
            *["mps"] * torch.backends.mps.is_available()]
    if text not in here:
        raise argparse.ArgumentTypeError(f"{text!r} is not on this machine, only {', '.join(here)}")
    return text


def default_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def default_precision(device):
    """bf16 where the hardware multiplies in it (AVX512-BF16, AMX; Ampere or newer), elsewhere fp32."""
    if torch.device(device).type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device == "cpu" and any(getattr(torch.cpu, name, bool)() for name in
                                         ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if native else "fp32"


def own_device(device):
    """The device of this process, where --device says the kind: each of many processes has a GPU of its own.
    Raises UserError where there are too few.
    """
    if WORLD == 1 or device == "cpu":
        return device
    if device == "mps":
        raise UserError("--device mps: one process alone can use it; --device cpu goes with many")
    if LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}: this machine has only "
                        f"{torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(LOCAL_RANK)
    return "cuda"


def multiply_in_tf32(yes):
    """Whether CUDA may round the factors of fp32 products to 10 bits: in training, never in evaluation."""
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = \
        "tf32" if yes else "ieee"


def run_name(text):
    """An argparse type: the name of a run, a relative path that stays below the two roots."""
    parts = text.split("/")
    if any(part in ("", ".", "..") or not re.fullmatch(r"[\w.+=,@ -]+", part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed, only a name such as my_run or "
                                         "group/my_run")
    return text


def one_line(error):
    """What an exception of any kind says, on one line and not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def say(text):
    """Print at once, from one process. A reader that has gone, such as `| head`, must not end a run."""
    try:
        if RANK == 0:
            print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def keep_memory():
    """Have glibc keep the memory that a step frees for the next one. It would return it to the system, and
    every page of it would cost a fault: a tenth of a step's time, of a small model's a fifth.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another system, another allocator
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)      # M_MMAP_THRESHOLD: its own maximum
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def call(main):
    """Run a script's `main` and end the process: what a user can mend ends it with one line on stderr and
    exit status 1.
    """
    gc.set_threshold(100_000)  # imports make a million objects, and no garbage worth looking for
    keep_memory()
    status, message = 1, None
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code
    except UserError as error:
        message = str(error)
    except OSError as error:  # a full or read-only disk, a lost permission, …
        place = f": {error.filename}" if error.filename else ""
        message = f"{error.strerror or error}{place}"
    except MemoryError:
        message = "out of memory; a smaller --batch_size, --image_size or --limit needs less"
    except torch.OutOfMemoryError as error:
        message = f"{one_line(error)}; a smaller --batch_size, --image_size or model needs less"
    except RuntimeError as error:
        if "DefaultCPUAllocator" in str(error):
            message = "out of memory; a smaller --batch_size, --image_size or model needs less"
        elif WORLD > 1 and re.search("gloo|nccl|connection", str(error), re.IGNORECASE):
            time.sleep(10)  # torchrun will have ended this one by then, after the message of the other
            message = f"another process has ended, or cannot be reached ({one_line(error)})"
        else:
            raise
    except KeyboardInterrupt:
        status = 130
    if message:
        if RANK:
            time.sleep(3)  # what ends all processes is said by the first, whose end ends the others
            message = f"process {RANK} of {WORLD}: {message}"
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    if WORLD > 1:
        # gloo's threads may drop a tensor while Python shuts down, which aborts it (pytorch issue 190489)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    gc.freeze()  # else Python looks through all of them once more at its end, for half a second
    sys.exit(status)
