"""What all scripts share: argument types, devices, errors of one line, exit status. The arguments themselves
are in each script, those of train.py in arguments.py.
"""

import argparse
import contextlib
import ctypes
import difflib
import gc
import math
import os
import re
import sys
import time
from pathlib import Path

import torch

import processors
from distributed import LOCAL_RANK, RANK, WORLD


class UserError(Exception):
    """An error that the user can fix. The message is one line that says how."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with errors of one line (exit status 2), defaults in --help, and no abbreviations."""

    class Formatter(argparse.HelpFormatter):
        def __init__(self, prog):
            super().__init__(prog, max_help_position=32, width=100)

        def _get_help_string(self, action):
            unset = any(action.default is value for value in (None, False, argparse.SUPPRESS))
            if unset or "(default" in action.help:
                return action.help
            return f"{action.help} (default: %(default)s)"

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=self.Formatter,
                         usage="python %(prog)s [options]", **kwargs)
        # argparse takes -1e3 for an option, as it knows no exponents
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        message += did_you_mean(unknown[1], self._option_string_actions) if unknown else ""
        self.exit(2, f"{self.prog}: error: {message}\n")


def did_you_mean(word, known):
    """A question about the known word that contains this one or is most like it, to end a message; "" if
    there is none
    """
    part = word.lstrip("-")
    near = [name for name in known if len(part) > 2 and part in name] \
        or difflib.get_close_matches(word, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


# ------------------------------------------------------------------------------------------------------------
# Argument types

def number(kind, low, above=False):
    """An argument type: a finite int or float that is at least `low`, or greater than it (`above`)."""
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


def run_name(text):
    """An argument type: the name of a run, a relative path that stays below the two root folders."""
    parts = text.split("/")
    if any(part in ("", ".", "..") or not re.fullmatch(r"[\w.+=,@ -]+", part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed, only a name such as my_run or "
                                         "group/my_run")
    return text


def device_type(text):
    """An argument type: cpu, cuda, cuda:N or mps, if this machine has it."""
    available = ["cpu", *["cuda"] * torch.cuda.is_available(),
                 *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
                 *["mps"] * torch.backends.mps.is_available()]
    if text not in available:
        raise argparse.ArgumentTypeError(f"{text!r} is not on this machine, only {', '.join(available)}")
    return text


# ------------------------------------------------------------------------------------------------------------
# Devices

def default_device():
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def is_cuda(device):
    return torch.device(device).type == "cuda"


def default_precision(device):
    """bf16 if the hardware multiplies in it (AVX512-BF16, AMX, CUDA from Ampere on), otherwise fp32."""
    if is_cuda(device):
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = device == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in
                                         ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return "bf16" if native else "fp32"


def own_device(device):
    """The device of this process, where --device gives the kind: each of many processes needs its own GPU.

    Raises UserError if there are too few.
    """
    if WORLD == 1 or device == "cpu":
        return device
    if device == "mps":
        raise UserError("--device mps: only a single process can use it; use --device cpu with several")
    if LOCAL_RANK >= torch.cuda.device_count():
        raise UserError(f"--nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}: this machine has only "
                        f"{torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(LOCAL_RANK)
    return "cuda"


MOST_THREADS = processors.threads = torch.get_num_threads()  # torch's choice, which knows the physical cores


def set_threads(n):
    """Compute with n threads."""
    torch.set_num_threads(n)
    processors.threads = n


def adapt_threads(load=None):
    """Compute with as many threads as other processes leave free, unless the user has chosen their number.
    With more, threads wait for each other in every operation.

    load: what to judge others by, from its last look on (default: processors.load)
    → whether the number has changed
    """
    load = load or processors.load
    if processors.THREADS_CHOSEN or WORLD > 1 or load.seconds() < 0.5:  # a coarse count
        return False
    others = load.look()
    threads = min(MOST_THREADS, processors.free(others))
    changed = threads != torch.get_num_threads()
    if changed:
        set_threads(threads)
        most, all_processors = processors.available(), len(processors.affinity())
        say(f"computes with {threads} thread{'s' * (threads > 1)}: other processes use {others:.1f} of "
            f"{all_processors} processors"
            + f", of which this process may use {most}" * (most < all_processors))
    return changed


def allow_tf32(allowed):
    """Allow or forbid CUDA to round the factors of fp32 products to 10 bits (TF32), as in training."""
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = \
        "tf32" if allowed else "ieee"


def keep_freed_memory():
    """Make glibc keep freed memory for the next step instead of returning it to the system, where each page
    would cost a fault: measured at a tenth of a step's time, for a small model a fifth.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)      # M_MMAP_THRESHOLD, to its maximum
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# ------------------------------------------------------------------------------------------------------------
# Messages and exit status

def one_line(error):
    """The message of any exception, on one line and not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def few(names, most=8):
    """The first names as text; an ellipsis stands for the others."""
    names = list(names)
    return ", ".join(names[:most]) + ", …" * (len(names) > most)


def say(text):
    """Print at once, from the first process. A reader that is gone, such as `| head`, must not end a run."""
    try:
        if RANK == 0:
            print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def warn(text):
    """Print a line on stderr, from the first process."""
    if RANK == 0:
        print(text, file=sys.stderr, flush=True)


def error_message(error):
    """The line for an error that the user can fix; None for any other, which is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):  # a full or read-only disk, a missing permission, …
        return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
    if isinstance(error, MemoryError):
        return "out of memory; a smaller --batch_size, --image_size or --limit needs less"
    if isinstance(error, torch.OutOfMemoryError):
        return f"{one_line(error)}; a smaller --batch_size, --image_size or model needs less"
    if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
        return "out of memory; a smaller --batch_size, --image_size or model needs less"
    if isinstance(error, RuntimeError) and WORLD > 1 and re.search("gloo|nccl|connection", str(error), re.I):
        time.sleep(10)  # the process that failed first prints its message; then torchrun ends this one
        return f"another process has ended, or cannot be reached ({one_line(error)})"


def run_script(main):
    """Run a script's `main` and end the process with its exit status: 0; 1 and one line for an error that the
    user can fix; 2 for wrong arguments (ArgumentParser.error); 130 after Ctrl-C; 128 + N for a run that saved
    its state after signal N (training_state.Saver).
    """
    gc.set_threshold(100_000)  # imports make a million objects, none of them garbage
    keep_freed_memory()
    processors.watch()
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        status, message = 1, error_message(error)
        if message is None:
            raise
        if RANK:
            time.sleep(3)  # if all processes have this error, torchrun ends the others after the first
            message = f"process {RANK} of {WORLD}: {message}"
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    if WORLD > 1:
        # gloo's threads may drop a tensor while Python shuts down, which aborts it (pytorch issue 190489)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status if isinstance(status, int) else bool(status))
    gc.freeze()  # otherwise Python looks through all objects once more at its end, for half a second
    sys.exit(status)
