"""The state of training, and its checkpoint: how it is made, saved, read again, verified."""

import copy
import math
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import cli
import distributed
import processors
import runs
from cli import UserError, say, warn
from distributed import RANK, WORLD, all_reduce_sum
from distributions import Mixture
from model import AE, build
from optim import OPTIMIZERS
from randomness import stream_seed
from runs import load_checkpoint


@dataclass
class State:
    """What training changes. A checkpoint holds all of it but `network` and `take_step`: a new field goes
    into Saver.save and restore_state too.
    """
    model: AE
    ema: AE | None                      # the moving average of the model's weights; None with --ema 0
    optimizer: torch.optim.Optimizer
    sums: torch.Tensor                  # of the terms of this epoch's images so far, in this process
    network: torch.nn.Module = None     # the model as it is called in training, see execution.py
    take_step: Callable = None          # train.take_step, or a recording of it, see execution.py
    epoch: int = 0                      # epochs finished
    step: int = 0                       # steps taken in all epochs
    best: float = math.inf              # the lowest validation loss so far
    history: list = field(default_factory=list)  # rows of metrics.csv
    elapsed: float = 0.0                # seconds that this epoch took before the last save

    def is_best(self, row):
        """Whether this row of metrics.csv has the lowest validation loss so far; if so, it is saved as
        best.pt. The loss is at the target beta, see train.with_ranking_loss.
        """
        return row["val_loss"] < self.best

    @property
    def evaluated(self):
        """The model that is validated, drawn and tested."""
        return self.ema or self.model


def zero_sums(device):
    """Sums before the first step: a single zero, to which two terms or three (with bits/dim) can be added."""
    return torch.zeros(1, dtype=torch.float32 if device == "mps" else torch.float64, device=device)


def new_state(args, about):
    """about: of the data, as Data.about returns it"""
    torch.manual_seed(stream_seed(args.seed, "weights"))
    model = build(vars(args), about).to(args.device)
    optimizer = OPTIMIZERS[args.optimizer](
        model.parameters(), weight_decay=args.weight_decay, fused=torch.device(args.device).type != "mps",
        lr=torch.tensor(args.lr, device=args.device) if cli.is_cuda(args.device) else args.lr)
    return State(model, copy.deepcopy(model) if args.ema else None, optimizer, zero_sums(args.device))


def restore_state(state, checkpoint):
    """Put the content of a checkpoint into a new state. May raise any exception if it does not fit."""
    state.model.load_state_dict(checkpoint["model"])
    if state.ema:
        state.ema.load_state_dict(checkpoint["ema"])
    if checkpoint["fitted"] and state.model.prior is None:  # an AE's; a VAE's is fitted after the last epoch
        state.evaluated.fitted = Mixture(**checkpoint["fitted"]).to(state.sums.device)
    moments = checkpoint["optimizer"]  # without the learning rate and other arguments
    state.optimizer.load_state_dict({"state": moments,
                                     "param_groups": state.optimizer.state_dict()["param_groups"]})
    for i, parameter in enumerate(state.model.parameters() if checkpoint["step"] else ()):
        for name in state.optimizer.moments(parameter):
            if moments[i][name].shape != parameter.shape:
                raise ValueError(f"size mismatch for {name} of {list(parameter.shape)}")
    for name, kind in {"epoch": int, "step": int, "best": float, "history": list, "elapsed": float}.items():
        if not isinstance(checkpoint[name], kind):
            raise TypeError(f"{name} is {checkpoint[name]!r}")
        setattr(state, name, checkpoint[name])
    sums = checkpoint["sums"]
    if len(sums) != checkpoint["processes"]:
        raise ValueError(f"sums of {len(sums)} processes, not {checkpoint['processes']}")
    # Each process goes on with its own sums; if there are more or fewer processes now, the first one has all.
    state.sums = sums[RANK] if len(sums) == WORLD else sums.sum(0) * (RANK == 0)


def verify_checkpoint(path):
    """Load a checkpoint from which a run can go on. Raises UserError if anything in it is missing or does not
    fit.
    """
    checkpoint = load_checkpoint(path)
    if "optimizer" in checkpoint and checkpoint["optimizer"] is None:
        raise UserError(f"{path} was packed for drawing, without what training needs to go on")
    try:
        restore_state(new_state(Namespace(**{**checkpoint["args"], "device": "cpu"}), checkpoint["data"]),
                   checkpoint)
        if not isinstance(checkpoint["threads"], int):
            raise TypeError(f"threads is {checkpoint['threads']!r}")
    except Exception as error:  # a file from elsewhere may raise anything
        raise UserError(f"{path} is damaged, or no checkpoint of this project: {cli.one_line(error)}")
    return checkpoint


def is_whole(path):
    """Whether a run can go on from this checkpoint."""
    try:
        return bool(verify_checkpoint(path))
    except (UserError, OSError):
        return False


class Saver:
    """Saves a run: at the end of an epoch, every --save_every seconds, and when a signal asks it to stop."""

    def __init__(self, args, data, state, folder, signals):
        self.args, self.data, self.state, self.folder, self.signals = args, data, state, folder, signals
        self.steps, self.interval = 0, 1  # steps since the processes last agreed; steps until they do again
        self.saved = self.agreed = time.monotonic()
        self.stepped = time.perf_counter()  # monotonic() has steps of 16 ms on Windows
        self.epoch_start = self.saved - state.elapsed
        self.step_seconds, self.timed = [], state.step  # of the training steps of this epoch; the last one
        self.first_median, self.warned = None, False

    def lap(self):
        """Restart the epoch's clock → the seconds of the epoch that ends now"""
        start, self.epoch_start = self.epoch_start, time.monotonic()
        self.warn_if_slow()
        return round(self.epoch_start - start, 3)

    def warn_if_slow(self):
        """Say once if the steps of an epoch took several times as long as the run's first ones."""
        # not of a GPU, whose steps end long after they were started
        if len(self.step_seconds) >= 50 and self.args.device == "cpu":
            self.first_median = self.first_median or statistics.median(self.step_seconds[5:50])
            slower = statistics.median(self.step_seconds) / max(self.first_median, 1e-6)
            if slower > 3 and not self.warned:
                self.warned = True
                warn(f"steps take {slower:.0f} times as long as the first ones: something else keeps the "
                     "machine busy; OMP_NUM_THREADS=1 before the commands helps, or run them one by one")
        self.step_seconds = []

    def save(self, *names):
        """Write the state to these files. Raises FloatingPointError if it could not be read again."""
        state = self.state
        sums = torch.zeros(WORLD, *state.sums.shape).to(state.sums)
        sums[RANK] = state.sums
        checkpoint = {"args": vars(self.args), "data": self.data.about(), "threads": torch.get_num_threads(),
                      "processes": WORLD, "model": state.model.state_dict(),
                      "ema": state.ema and state.ema.state_dict(),
                      "fitted": state.evaluated.fitted and dict(state.evaluated.fitted.named_buffers()),
                      "optimizer": state.optimizer.state_dict()["state"], "epoch": state.epoch,
                      "step": state.step, "sums": all_reduce_sum(sums), "best": state.best,
                      "history": state.history, "elapsed": time.monotonic() - self.epoch_start,
                      "finished": False}
        parts = "model", "ema", "fitted", "optimizer", "sums"
        if not runs.all_finite([checkpoint[part] for part in parts]):
            raise FloatingPointError
        if RANK == 0:
            content = runs.checkpoint_bytes(checkpoint)
            for name in names:
                runs.atomic_write(self.folder / name, content)
        self.saved, self.stepped = time.monotonic(), time.perf_counter()  # not counted as a step's time

    def after_step(self):
        """Save if it is time to, and exit if a signal asks for it. Many processes must agree on both. That
        takes time, so they do it every 16 steps, or about every second if steps are slow.
        """
        if self.state.step > self.timed:  # not of validation, whose batches take less
            self.step_seconds.append(time.perf_counter() - self.stepped)
            self.timed = self.state.step
        self.save_if_due()
        self.stepped = time.perf_counter()

    def use_fewer_threads(self):
        """Go on with fewer threads if others have needed our processors for a second → whether it did.

        A convolution can take a hundred times as long while one of its threads waits for a processor, and the
        end of a long epoch is far away. The number is saved at once, so that a resumed run repeats it.
        """
        crowd = processors.crowd
        if self.args.compile or crowd is None or crowd.seconds() < 1 or not cli.adapt_threads(crowd):
            return False
        processors.load.look()  # after the epoch, only the time from here on counts
        return True

    def save_if_due(self):
        self.steps += 1
        if WORLD > 1 and self.steps < self.interval:
            return
        unfinished = self.state.epoch < self.args.epochs
        due = unfinished and (time.monotonic() - self.saved >= self.args.save_every
                              or self.use_fewer_threads())
        received = self.signals.received
        if WORLD > 1:
            seconds = (time.monotonic() - self.agreed) / self.steps
            received, due, seconds = distributed.all_reduce_max(
                torch.tensor([received, due, seconds], dtype=torch.float64)).tolist()
            self.agreed, self.steps = time.monotonic(), 0
            self.interval = max(1, min(16, int(1 / max(seconds, 1e-3))))
        if due or (received and unfinished):
            self.save("last.pt")
        if received:
            start = f"torchrun --standalone --nproc_per_node {WORLD}" if WORLD > 1 else "python"
            say(f"stopped after step {self.state.step:,}; to go on:\n"
                f"{start} train.py --resume {shlex.quote((self.folder / 'last.pt').as_posix())}")
            sys.exit(128 + int(received))
