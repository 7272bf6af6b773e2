"""What everyone shares: the small mathematics, random streams, the command line's manners, pictures,
checkpoints and the log of a run. Imports none of the project's other files.
"""

import argparse
import contextlib
import ctypes
import datetime
import gc
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import signal
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch.nn.functional import pad
from torch.optim.adamw import adamw


# ------------------------------------------------------------------------------------------------------------
# The command line: a user's mistake is one line and an exit status, never a traceback.

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


# ------------------------------------------------------------------------------------------------------------
# Many processes, as torchrun starts them. One alone is process 0 of 1, for which these functions do nothing.

RANK, LOCAL_RANK, WORLD = (int(os.environ[name]) if dist.is_torchelastic_launched() else alone
                           for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


@contextlib.contextmanager
def processes():
    """Join the other processes while it is entered."""
    if WORLD > 1:  # the others may wait long while one decodes the images
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                                timeout=datetime.timedelta(days=1))
    yield
    if WORLD > 1:
        dist.destroy_process_group()


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


def share(n):
    """This process's part of a batch of n images, as a slice → the slice, how many images it counts for.

    Where none is left for it, it computes the first one and counts it for nothing, since every process has to
    take part in a step.
    """
    return (slice(RANK, None, WORLD) if RANK < n else slice(0, 1)), len(range(RANK, n, WORLD))


def total(values, op=dist.ReduceOp.SUM):
    """Sums (or what `op` says) over all processes of a tensor that each of them has."""
    if WORLD > 1:
        values = values.clone()
        dist.all_reduce(values, op)
    return values


def shared(make):
    """What `make()` gives in the first process, in all of them; where it ends that one, it ends all."""
    values = [None]
    if RANK == 0:
        try:
            values = [make()]
        except SystemExit as end:
            values = [end]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    if isinstance(values[0], SystemExit):
        raise values[0]
    return values[0]


def upload(values, device):
    """A tensor on a device; a GPU that is still busy is not waited for. A slice is good for any device."""
    if isinstance(values, slice):
        return values
    return values.to(device, non_blocking=torch.device(device).type == "cuda")


def multiply_in_tf32(yes):
    """Whether CUDA may round the factors of fp32 products to 10 bits: in training, never in evaluation."""
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = \
        "tf32" if yes else "ieee"


# ------------------------------------------------------------------------------------------------------------
# Mathematics

def sample_reparameterize(mean, std, noise=None):
    """z = mean + std · noise, with gradients to both (Kingma & Welling 2014, eq. 10).

    mean, std, noise: any one shape; noise ~ N(0, 1), drawn here when not given → the same shape
    """
    return mean + std * (torch.randn_like(std) if noise is None else noise)


def KLD(mean, log_std):
    """KL(N(mean, exp(log_std)²) ‖ N(0, I)) of each row, in nats (Kingma & Welling 2014, app. B).

    mean, log_std: [..., D] → [...]
    """
    log_var = 2 * log_std
    return 0.5 * (mean * mean + torch.expm1(log_var) - log_var).sum(-1)


def elbo_to_bpd(elbo, img_shape):
    """Bits per dimension of a negative evidence lower bound, which must be taken at beta = 1.

    elbo: [B] (or its mean), in nats an image; img_shape: the batch's [B, C, H, W] → the same shape
    """
    return elbo * math.log2(math.e) / math.prod(img_shape[1:])


def active_units(means):
    """How many latent dimensions carry information: the variance over x of E[z|x] is above 0.01
    (Burda et al. 2016, section 5).

    means: [N, D], posterior means of N images → int
    """
    return int((means.cpu().double().var(0, correction=0) > 0.01).sum())


def moments(batches, size, total=lambda sums: sums):
    """The mean and the covariance of vectors, which come in batches [B, size] → float64 [size], [size, size].

    total: adds up a tensor over processes, each of which has its own batches
    Raises FloatingPointError where a number is not finite.
    """
    sums = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    for batch in batches:  # the second moments of (x, 1): those of x, their sum and how many they are
        batch = pad(batch, (0, 1), value=1.0)
        batch = (batch.cpu() if batch.device.type == "mps" else batch).double()
        sums = sums.to(batch.device) + batch.T @ batch
    sums = total(sums.cpu())  # a process without a batch knows no other device
    if not sums.isfinite().all():
        raise FloatingPointError
    sums = sums / sums[-1, -1]
    mean = sums[-1, :-1]
    return mean, sums[:-1, :-1] - mean.outer(mean)


def beta_schedule(mode, target, epochs):
    """The weight of the KL as a function of the number of epochs already finished.

    constant: target. linear: target · finished / epochs, so 0 in the first epoch (and in the only one).
    cyclical: up to four cycles, each rising linearly from 0 through its first half and staying at target for
    the rest (Fu et al. 2019, eq. 6-7, M = 4, R = 0.5); fewer cycles where they would be shorter than two
    epochs.
    """
    if mode == "constant":
        return lambda finished: target
    if mode == "linear":
        return lambda finished: target * finished / epochs
    if mode == "cyclical":
        length = epochs / max(1, min(4, epochs // 2))
        return lambda finished: target * min(1.0, (finished % length) / length / 0.5)
    raise ValueError(f"beta mode {mode!r}: constant, linear or cyclical")


def lr_schedule(mode, lr, steps):
    """The learning rate as a function of the number of steps already taken, of `steps` in all.

    constant: lr. cosine: up in a straight line over the first hundredth, then down to 0 along half a cosine
    (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    if mode == "constant":
        return lambda step: lr
    if mode == "cosine":
        return lambda step: lr * min((step + 1) / max(1, steps // 100),
                                     (1 + math.cos(math.pi * step / steps)) / 2)
    raise ValueError(f"learning-rate schedule {mode!r}: constant or cosine")


@torch.no_grad()
def orthogonalize(matrices):
    """[N, R, C] → of each matrix U S Vᵀ (its singular value decomposition) roughly U Vᵀ: singular values
    between about 0.7 and 1.2, but for those that were hardly there. By the Newton-Schulz iteration of Muon
    (Jordan et al. 2024), which is products alone.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class AdamW(torch.optim.AdamW):
    """torch's, for one group of parameters. Without what torch's does at each step for other uses, a small
    model's step is a thirtieth shorter; without what keeps it apart from torch.compile, a start most of a
    second, since that is not imported.
    """
    add_param_group, state_dict, load_state_dict = map(inspect.unwrap, (
        torch.optim.AdamW.add_param_group, torch.optim.AdamW.state_dict, torch.optim.AdamW.load_state_dict))

    def zero_grad(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    @torch.no_grad()
    def step(self):
        options = self.param_groups[0]
        parameters = [parameter for parameter in options["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device if options["fused"] else "cpu"),
                    "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        states = [self.state[parameter] for parameter in parameters]
        moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        adamw(parameters, [parameter.grad for parameter in parameters], *moments, [],
              [state["step"] for state in states], fused=options["fused"], amsgrad=False, maximize=False,
              beta1=options["betas"][0], beta2=options["betas"][1], lr=options["lr"],
              weight_decay=options["weight_decay"], eps=options["eps"])


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for matrices, also embeddings and, as [outputs, inputs · 9], convolutions,
    and AdamW for vectors. A matrix's step is its momentum, orthogonalised and made as long as AdamW's, so
    that one learning rate and weight decay fit both (Liu et al. 2025).

    torch.optim.Muon takes no convolutions, and one matrix after the other. Processes on unlike machines round
    these products differently.
    """

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.alike = {}  # matrices, by shape: those of one shape take one product
        for parameter in self.param_groups[0]["params"]:
            if parameter.ndim > 1:
                self.alike.setdefault(parameter.shape, []).append(parameter)

    @torch.no_grad()
    def step(self):
        options = self.param_groups[0]
        for shape, matrices in self.alike.items():
            updates = []
            for matrix in matrices:
                state = self.state[matrix]
                if not state:  # AdamW, when it loads a state, looks for the step in each
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(matrix)}
                momentum = state["exp_avg"].lerp_(matrix.grad, 0.05)
                updates.append(matrix.grad.lerp(momentum, 0.95).flatten(1))  # Nesterov's
                matrix.grad = None  # AdamW has nothing to do there
            updates = orthogonalize(torch.stack(updates))
            length = 0.2 * math.sqrt(max(updates.shape[1:]))
            for matrix, update in zip(matrices, updates):
                matrix.mul_(1 - options["lr"] * options["weight_decay"])
                matrix.add_(update.view(shape), alpha=-options["lr"] * length)
        super().step()


@torch.no_grad()
def visualize_manifold(decoder, grid_size=20):
    """The images of a 2-D latent space, at the percentiles (i + 0.5) / grid_size of N(0, 1) on both axes
    (Kingma & Welling 2014, fig. 4): z₁ grows to the right, z₂ upwards.

    decoder: any callable from z [n, 2] to mean images in [0, 1], [n, C, H, W]
    → one image [3, grid_size · H, grid_size · W] in [0, 1]
    """
    percentiles = (torch.arange(grid_size) + 0.5) / grid_size
    z = torch.distributions.Normal(0.0, 1.0).icdf(percentiles)
    z2, z1 = torch.meshgrid(z.flip(0), z, indexing="ij")
    images = decoder(torch.stack([z1, z2], dim=-1).view(-1, 2))
    return image_grid(images, grid_size, line=0)


# ------------------------------------------------------------------------------------------------------------
# Randomness: every draw is a pure function of (seed, purpose, index), so a run can stop and go on anywhere.

def stream_seed(*key):
    """63 bits that depend on every part of the key. A hash, since seed + step of one seed would be another's.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(*key, device="cpu"):
    """A new generator for one purpose, such as stream(seed, "noise", step): on a CUDA device, else on the
    CPU.
    """
    device = torch.device(device)
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(stream_seed(*key))


def normal(shape, device, *key):
    """N(0, 1) numbers from the stream of that key."""
    generator = stream(*key, device=device)
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


# ------------------------------------------------------------------------------------------------------------
# torchvision and pictures

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
    # `from utils import torchvision` works, and only those who use it wait for its import.
    if name == "torchvision":
        return _torchvision()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def save_picture(path, caption, image):
    """Write one image with a caption below it as PNG.

    image: [3, H, W] in [0, 1]; enlarged by a whole factor where it is small
    """
    from PIL import Image, ImageDraw, ImageFont
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    scale = math.ceil(640 / pixels.shape[1])
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    font = ImageFont.load_default(size=15)
    characters = max(16, int((pixels.shape[1] - 16) / font.getlength("n")))
    text = textwrap.fill(caption, characters)
    height = 12 + 20 * (text.count("\n") + 1)
    canvas = Image.new("RGB", (pixels.shape[1], pixels.shape[0] + height), "white")
    canvas.paste(Image.fromarray(pixels), (0, 0))
    ImageDraw.Draw(canvas).multiline_text((8, pixels.shape[0] + 5), text, fill="black", font=font)
    canvas.save(path)


LINES = 0.4  # grey between the images of a grid


def interleave(above, below, nrow):
    """Two batches of images as one for a grid of nrow images a row: a row of the first, the same of the
    second, …; a last row that is short is filled up in the grey of the lines.
    """
    rest = torch.full((-len(above) % nrow, *above.shape[1:]), LINES)
    rows = zip(*(torch.cat([images.float().cpu(), rest]).split(nrow) for images in (above, below)))
    return torch.cat([part for pair in rows for part in pair])


def image_grid(images, nrow, line=1):
    """Images [N, C, H, W] in [0, 1] → one image of them [3, H', W'], nrow images a row, lines of that width
    around them. (torchvision's make_grid would make each command wait longer, for the import.)
    """
    images, nrow = images.float().cpu(), min(nrow, len(images))
    empty = images.new_full((-len(images) % nrow, *images.shape[1:]), LINES)
    tiles = pad(torch.cat([images, empty]), (line, 0, line, 0), value=LINES)
    _, channels, height, width = tiles.shape
    grid = tiles.view(-1, nrow, channels, height, width).permute(2, 0, 3, 1, 4)
    grid = grid.reshape(channels, -1, nrow * width).expand(3, -1, -1)
    return pad(grid, (0, line, 0, line), value=LINES)


def save_grid(path, caption, images, nrow):
    """Write images [N, C, H, W] in [0, 1] as one captioned PNG, nrow images a row."""
    save_picture(path, caption, image_grid(images, nrow))


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: plain data and tensors, replaced atomically, verified when read

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


# ------------------------------------------------------------------------------------------------------------
# The log of a run

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


def draw_curves(history, path):
    """The metrics as a picture: a panel each for loss, reconstruction, KL, bits/dim where there are any, and
    beta where it changes, in one row or two.
    """
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be here, would fail the import
    from matplotlib.figure import Figure  # pyplot would take 0.3 s more, and look for a screen
    from matplotlib.ticker import MaxNLocator
    panels = [("loss", "loss at the target beta"), ("rec", "reconstruction"), ("kl", "KL"),
              ("bpd", "bits/dim"), ("beta", "beta")]
    panels = [(key, title) for key, title in panels
              if (len({row["beta"] for row in history}) > 1 if key == "beta"
                  else history[0].get("val_" + key) is not None)]
    best = min(history, key=lambda row: row["val_loss"])["epoch"]
    epochs = [row["epoch"] for row in history]
    rows = 1 if len(panels) < 4 else 2
    columns = math.ceil(len(panels) / rows)
    width, height = 3.8, 3.4  # inches, of a panel
    figure = Figure(figsize=(width * columns, height * rows))
    for i, (key, title) in enumerate(panels):  # in set places: a layout that fits itself takes twice as long
        row, column = divmod(i, columns)
        axis = figure.add_axes([(column + 0.95 / width) / columns, (rows - 1 - row + 0.5 / height) / rows,
                                (1 - 1.05 / width) / columns, (1 - 0.8 / height) / rows])
        curves = {"": "beta"} if key == "beta" else {"train_": "train", "val_": "validation"}
        for prefix, label in curves.items():
            axis.plot(epochs, [row[prefix + key] for row in history], label=label,
                      marker="." if len(epochs) < 30 else "")
        axis.axvline(best, color="grey", linestyle=":", label=f"best epoch ({best})")
        axis.set(title=title, xlabel="epoch")
        axis.ticklabel_format(useOffset=False)
        values = [row[prefix + key] for row in history for prefix in curves]
        if 0 < 10 * min(values) < max(values):  # without a penalty the first KL would hide the rest
            axis.set_yscale("log")
        if key in ("loss", "rec", "kl"):  # a squared error has no unit
            axis.set_ylabel("nats per image" if key == "kl" or "val_bpd" in history[0] else "per image")
        if key == "beta":
            axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend()
    figure.savefig(path, dpi=100)
