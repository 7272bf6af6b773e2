"""Train an AE, a VAE or a conditional VAE on small images: python train.py --help"""

import argparse
import contextlib
import copy
import io
import math
import re
import shlex
import statistics
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from cli import (
    ArgumentParser,
    UserError,
    call,
    default_device,
    default_precision,
    device_type,
    multiply_in_tf32,
    number,
    one_line,
    own_device,
    run_name,
    say,
)
from data import load, warp
from datasets import DATASETS
from distributed import LOCAL_RANK, RANK, WORLD, processes, share, shared, total
from figures import save_grid
from model import DEFAULT_LOSS, build
from networks import NETWORKS
from optim import AdamW, Muon, follow, lr_schedule
from runs import (
    WAYS_ON,
    RunLog,
    Signals,
    all_finite,
    claimed,
    holds_run,
    load_checkpoint,
    lock,
    save_checkpoint,
    wipe,
    write_csv,
    write_json,
)
from utils import active_units, beta_schedule, interleave, normal, stream, stream_seed, upload


def parse_args(argv=None):
    """→ the arguments, and the checkpoint to go on from (None for a new run)."""
    parser = ArgumentParser(description="Train an AE, a VAE or a conditional VAE on small images.")
    default = "(default: %(default)s)"

    data = parser.add_argument_group("data")
    data.add_argument("--dataset", default="glyphs", metavar="NAME",
                      help=f"{', '.join(DATASETS)}, or the path of a folder of images {default}")
    data.add_argument("--data_dir", "--data_folder", default="data", metavar="DIR",
                      help=f"where datasets and caches are kept {default}")
    data.add_argument("--image_size", type=number(int, 8), nargs="+", metavar="N",
                      help="height [width] to resize and centre-crop to (default: as the images are)")
    data.add_argument("--levels", type=int, choices=(2, 16, 256), default=256,
                      help=f"values of a pixel: 2 binary, 16 4-bit, 256 as stored {default}")
    data.add_argument("--binarize", choices=("threshold", "stochastic"), default="threshold",
                      help=f"with --levels 2: pixel > 0.5, or a fresh Bernoulli draw each time {default}")
    data.add_argument("--transform", choices=("none", "grayscale", "grayscale3"), default="none",
                      help=f"as stored, luminance in one channel, or in three {default}")
    data.add_argument("--flip", action="store_true",
                      help="mirror training images left to right, each time with probability 1/2 (default: "
                           "not)")
    data.add_argument("--warp", type=number(float, 0), default=0.0, metavar="SHARE",
                      help="bend training images a little, at random, in this share of the epochs, the first "
                           "ones (default: 0, none)")
    data.add_argument("--limit", type=number(int, 1), metavar="N",
                      help="keep the first N training images (default: all)")

    model = parser.add_argument_group("model")
    model.add_argument("--loss_mode", choices=("ae", "vae"), default="vae", help=default)
    model.add_argument("--model", choices=list(NETWORKS), default="cnn", help=f"the networks {default}")
    model.add_argument("--conditional", action="store_true", help="a VAE given the class (default: not)")
    model.add_argument("--latent_size", "--z_dim", type=number(int, 1), default=32, metavar="N",
                       help=f"latent dimensions {default}")
    model.add_argument("--hidden_dims", type=number(int, 1), nargs="*", default=[512], metavar="N",
                       help="mlp, resnet: widths of the encoder's hidden layers beside the latents, reversed "
                            "in the decoder; with no number there are none (default: 512)")
    model.add_argument("--num_filters", type=number(int, 1), default=8, metavar="N",
                       help="cnn, resnet: channels of the first level; of the others cnn: 4 N, 8 N, 8 N, …, "
                            f"resnet: 2 N, 4 N, 4 N, … {default}")
    model.add_argument("--flow", type=number(int, 0), default=0, metavar="N",
                       help="pairs of coupling layers that take a VAE's Gaussian posterior to a richer one "
                            f"{default}")

    objective = parser.add_argument_group("objective")
    objective.add_argument("--recon_loss", choices=("mse", "bce", "categorical", "logistic"),
                           help="(default: by levels, 2 bce, 16 categorical, 256 mse)")
    objective.add_argument("--target_beta_val", type=number(float, 0), default=1.0, metavar="BETA",
                           help=f"weight of the KL {default}")
    objective.add_argument("--beta_mode", choices=("constant", "linear", "cyclical"), default="constant",
                           help="how beta goes to its target over the epochs; linear: 0 in the first, then "
                                f"BETA / epochs more in each {default}")
    objective.add_argument("--free_bits", type=number(float, 0), default=0.0, metavar="NATS",
                           help=f"an image's KL in a latent dimension counts as at least this {default}")
    objective.add_argument("--iw_train", type=number(int, 0), default=0, metavar="K",
                           help="train on the importance-weighted bound of K latents an image (default: 0, "
                                "the ELBO)")

    optimisation = parser.add_argument_group("optimisation")
    optimisation.add_argument("--epochs", "--user_epochs", type=number(int, 1), default=20, metavar="N",
                              help=default)
    optimisation.add_argument("--batch_size", type=number(int, 1), default=128, metavar="N", help=default)
    optimisation.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw",
                              help=f"muon: orthogonalised steps for matrices, AdamW's for the rest {default}")
    optimisation.add_argument("--lr", type=number(float, 0, above=True), default=1e-3, metavar="LR",
                              help=f"learning rate {default}")
    optimisation.add_argument("--lr_schedule", choices=("constant", "cosine"), default="constant",
                              help=f"cosine: up from 0 within the first steps, then down to 0 {default}")
    optimisation.add_argument("--ema", type=number(float, 0), default=0.999, metavar="DECAY",
                              help="judge and draw with a moving average of the weights, of this decay a "
                                   "step; 0: off (default: %(default)s)")
    optimisation.add_argument("--weight_decay", type=number(float, 0), default=0.0, metavar="W",
                              help=f"decoupled weight decay {default}")
    optimisation.add_argument("--grad_clip", type=number(float, 0), default=0.0, metavar="NORM",
                              help="clip the gradient's norm; losses are sums, so norms of hundreds are "
                                   "normal (default: 0, off)")

    run = parser.add_argument_group("run")
    run.add_argument("--log_dir", type=run_name, metavar="NAME",
                     help="the run's name, a/b for a subfolder (default: made of the arguments, such as "
                          "vae_mnist_cnn)")
    run.add_argument("--results_dir", default="results", metavar="DIR",
                     help=f"pictures and figures {default}")
    run.add_argument("--checkpoint_dir", default="checkpoints", metavar="DIR", help=default)
    run.add_argument("--overwrite", action="store_true",
                     help="replace the run that has this name (default: refuse)")
    run.add_argument("--seed", type=number(int, 0), default=1, metavar="N", help=default)
    run.add_argument("--seeds", type=number(int, 0), nargs="+", metavar="N",
                     help="a run for each seed, then mean ± standard deviation (default: --seed alone)")
    run.add_argument("--device", type=device_type, default=default_device(), help=default)
    run.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                     help="of the networks in training (fp32 on CUDA with tf32 products); auto is bf16 where "
                          "the hardware multiplies in it: elsewhere it is many times slower (default: auto)")
    run.add_argument("--compile", action="store_true", help="through torch.compile (default: not)")
    run.add_argument("--progress_bar", action=argparse.BooleanOptionalAction, default=sys.stderr.isatty(),
                     help="(default: on a terminal only)")
    run.add_argument("--resume", type=Path, metavar="FILE",
                     help="go on with the run of this checkpoint, whose arguments hold (default: a new run)")
    run.add_argument("--save_every", type=number(float, 0), default=60.0, metavar="SECONDS",
                     help=f"save last.pt this often, besides at the end of each epoch {default}")

    unset = object()
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    if "resume" in given:
        return resume_args(parser, defaults, given)
    args = Namespace(**{**defaults, **given})
    if args.dataset not in DATASETS and not (args.dataset and Path(args.dataset).is_dir()):
        parser.error(f"argument --dataset: {args.dataset!r} is neither one of {', '.join(DATASETS)} "
                     "nor a folder")
    if args.dataset not in DATASETS:
        for name in ("results_dir", "checkpoint_dir", "data_dir"):
            if Path(vars(args)[name]).resolve().is_relative_to(Path(args.dataset).resolve()):
                parser.error(f"argument --dataset: --{name} {vars(args)[name]} lies within {args.dataset!r}, "
                             "so what is written there would become images of it; give one of them another "
                             "place")
    if args.image_size:
        if len(args.image_size) > 2:
            parser.error(f"argument --image_size: {len(args.image_size)} numbers, but height [width] are one "
                         "or two")
        args.image_size = [args.image_size[0], args.image_size[-1]]
    if args.binarize == "stochastic" and args.levels != 2:
        parser.error(f"argument --binarize: stochastic goes with --levels 2, not {args.levels}")
    if args.loss_mode == "ae":
        if args.conditional:
            parser.error("argument --conditional: goes with --loss_mode vae, not ae")
        for name in ("flow", "free_bits", "iw_train"):
            if vars(args)[name]:
                parser.error(f"argument --{name}: goes with --loss_mode vae, not ae, which has no KL")
    if args.flow and args.free_bits:
        parser.error(f"argument --free_bits: {args.free_bits} does not go with --flow, whose KL has no parts "
                     "by dimension")
    if args.warp > 1:
        parser.error(f"argument --warp: {args.warp:g} is not allowed, only a share of the epochs from 0 to 1")
    if args.ema >= 1:
        parser.error(f"argument --ema: {args.ema:g} is not allowed, only a number below 1, such as 0.999")
    if args.iw_train:
        for name, alone in (("target_beta_val", 1), ("beta_mode", "constant"), ("free_bits", 0)):
            if vars(args)[name] != alone:
                parser.error(f"argument --{name}: {vars(args)[name]} does not go with --iw_train, whose "
                             "bound has no weight to set")
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        parser.error(f"argument --seeds: {' '.join(map(str, args.seeds))} names a seed twice")
    args.recon_loss = args.recon_loss or DEFAULT_LOSS[args.levels]
    if args.precision == "auto":  # once, so that a run goes on as it began
        args.precision = default_precision(args.device)
    if args.log_dir and not args.overwrite:
        for name in [args.log_dir, *(f"{args.log_dir}/seed_{seed}" for seed in args.seeds or ())]:
            for folder in (Path(args.results_dir) / name, Path(args.checkpoint_dir) / name):
                if holds_run(folder):
                    parser.error(f"argument --log_dir: {folder} holds a run already; {WAYS_ON}")
    return args, None


def resume_args(parser, defaults, given):
    """→ the arguments of the run to go on with, its checkpoint."""
    path = given.pop("resume")
    others = [other.as_posix() for other in sorted(path.parent.glob("*.pt")) if other != path]
    if not path.is_file():
        parser.error(f"argument --resume: {str(path)!r} is {'a folder' if path.is_dir() else 'not there'}; "
                     f"only a file such as {' or '.join(others) or 'checkpoints/NAME/last.pt'}")
    for name in given:
        if name not in ("data_dir", "save_every", "progress_bar", "device", "epochs"):
            parser.error(f"argument --{name}: not beside --resume, which keeps the run's own; only "
                         "--data_dir, --save_every, --progress_bar, --device and a larger --epochs")
    try:
        resumed = verified(path)
    except UserError as error:
        others = [other for other in others if is_whole(Path(other))]
        raise UserError(f"{error}; " + (f"whole, and good for --resume: {', '.join(others)}" if others else
                                        f"nothing else in {path.parent} can be resumed"))
    began = {**defaults, **resumed["args"], "resume": None, "overwrite": False,
             "progress_bar": defaults["progress_bar"]}
    args, before = Namespace(**{**began, **given}), began["epochs"]
    depends = scheduled(args)
    if args.epochs < before or (args.epochs > before and depends):
        allowed = f"on which {depends[0]} depends" if depends else "or more"
        parser.error(f"argument --epochs: {args.epochs} is not allowed with --resume, only "
                     f"{before} {allowed}")
    try:
        device_type(args.device)
    except argparse.ArgumentTypeError:
        parser.error(f"argument --device: the run began on {began['device']}, which is not on this machine; "
                     f"--device {default_device()} goes on, though not to the same last bit")
    if args.device != began["device"]:
        print(f"--device {args.device}: the run began on {began['device']}, so it will not end with the same "
              "last bit as without the change", file=sys.stderr)
    if resumed["processes"] != WORLD:
        print(f"the run began with {resumed['processes']} processes, not {WORLD}, so it will not end with "
              "the same last bit as without the change", file=sys.stderr)
    # Moved, copied or renamed, the run is where its file is, under the name that its folder has there.
    folder, name = path.resolve().parent, Path(args.log_dir).parts
    # One of a group is by itself now, where it has another name or those before it are not beside it.
    if args.seeds and not (folder.name == name[-1] and
                           all((folder.parent / f"seed_{seed}").is_dir()
                               for seed in args.seeds[:args.seeds.index(args.seed)])):
        args.seeds = None
    if folder.parts[-len(name):] != name:
        name = folder.parts[-2:] if args.seeds else folder.parts[-1:]
        args.log_dir = "/".join(name)
        try:
            run_name(args.log_dir)
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --resume: rename its folder, {error}")
    root = folder.parents[len(name) - 1]
    if root != Path(args.checkpoint_dir).resolve():
        args.checkpoint_dir = str(root)
    return args, resumed


# ------------------------------------------------------------------------------------------------------------
# The two loops

FOLLOW_EVERY = 16  # steps: were the average of the weights to follow each, a small model would slow down


def train_epoch(model, data, optimizer, args, state, beta, tick, ema=None):
    """The rest of one pass over the training images in a new order → the pass's mean rec, kl, bpd (see
    AE.forward).

    ema: a model that follows this one, its weights a moving average

    Counts steps in state["step"] and adds up the means' sums in state["sums"], so that it can stop after any
    step (where `tick` raises or the process dies) and go on from the same one.
    """
    model.train()
    device = torch.device(args.device)
    multiply_in_tf32(True)
    epoch, steps = state["epoch"], -(-len(data.train) // args.batch_size)
    done = state["step"] - epoch * steps
    order = torch.randperm(len(data.train), generator=stream(args.seed, "order", epoch))
    lr_of = learning_rate(args, data)
    for images, labels, noise, count, n in tqdm(batches(data.train, order, args, "train", epoch, first=done),
                                                f"epoch {epoch + 1}", steps, initial=done, leave=False,
                                                disable=not args.progress_bar):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            terms = model(images, labels, noise)
        loss = terms[0] + beta * terms[1]
        if WORLD > 1:  # DDP takes the mean over processes; with this weight each image counts once
            loss = loss * (count * WORLD / n)
        # elsewhere a look at each step would stall the device
        if device.type == "cpu" and not math.isfinite(loss.item()):
            raise FloatingPointError
        # here, since it takes longer once the optimiser has filled the caches
        state["sums"] = add_up(state["sums"], terms, count)
        optimizer.zero_grad()
        loss.backward()
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.param_groups[0]["lr"] = lr_of(state["step"])
        optimizer.step()
        done += 1
        if ema and (done % FOLLOW_EVERY == 0 or done == steps):
            decay = min(args.ema, (1 + state["step"]) / (10 + state["step"]))
            follow(ema, model, decay ** ((done - 1) % FOLLOW_EVERY + 1))
        state["step"] += 1
        tick()
    return means(total(state["sums"]), len(data.train))


@torch.no_grad()
def test_epoch(model, split, args, purpose, tick):
    """One pass over a split, with the same noise each time → its mean rec, kl, bpd."""
    model.eval()
    multiply_in_tf32(False)
    sums = no_sums(args.device)
    for images, labels, noise, count, _ in batches(split, torch.arange(len(split)), args, purpose):
        sums = add_up(sums, model(images, labels, noise), count)
        tick()
    return means(total(sums), len(split))


def batches(split, order, args, *key, first=0):
    """The batches of a pass in this order, from step `first` on → images, labels, noise, for how many images
    they count, and how many the batch has over all processes, each of which takes its part.

    They are made for several steps at once (one by one they would take a twentieth of a small model's time),
    and their random numbers for all processes: whoever asks for a step, it is the same one.
    """
    size = max(math.prod(split.stored.shape[1:]), 4 * math.prod(noise_shape(1, args)))  # bytes an image
    steps = max(1, 2**21 // (args.batch_size * size))  # 2 MB
    for which, chunk in enumerate(order.split(steps * args.batch_size)):
        left = torch.arange(len(chunk)).split(args.batch_size)[max(0, first - which * steps):]
        if not left:
            continue
        parts = [share(len(batch)) for batch in left]
        mine = [batch[part] for batch, (part, _) in zip(left, parts)]
        sizes = [len(batch) for batch in mine]
        part = slice(None) if sum(sizes) == len(chunk) else torch.cat(mine)
        images, labels = split.batch(chunk, args.seed, "binarize", *key, which, part=part)
        if args.flip and key[0] == "train":
            mirrored = torch.rand(len(chunk), generator=stream(args.seed, "flip", *key, which)) < 0.5
            mirrored = upload(mirrored[part], images.device).view(-1, 1, 1, 1)
            images = torch.where(mirrored, images.flip(-1), images)
        if key[0] == "train" and key[1] < args.warp * args.epochs:
            images = warp(images, stream(args.seed, "warp", *key, which), len(chunk), part)
        noise = [None] * len(left)
        if args.loss_mode == "vae":
            shape = noise_shape(len(chunk), args)
            noise = normal(shape, args.device, args.seed, "noise", *key, which)
            noise = noise[upload(part, args.device)].split(sizes)
        counts = [count for _, count in parts]
        yield from zip(images.split(sizes), labels.split(sizes), noise, counts, map(len, left))


def noise_shape(n, args):
    """Of n images, for one latent each or for the iw_train of them."""
    return n, *[args.iw_train] * bool(args.iw_train), args.latent_size


def learning_rate(args, data):
    """→ a function of the number of steps already taken."""
    return lr_schedule(args.lr_schedule, args.lr, args.epochs * -(-len(data.train) // args.batch_size))


def no_sums(device):
    return torch.zeros(1, dtype=torch.float32 if device == "mps" else torch.float64, device=device)


def add_up(sums, terms, n):
    """Sums over images, with a batch's means over n of them added; on the device, since a number fetched each
    step would stall a GPU.
    """
    return torch.add(sums, torch.stack([term.detach() for term in terms if term is not None]), alpha=n)


def means(sums, n):
    """Raises FloatingPointError where a mean is not finite."""
    if not sums.isfinite().all():
        raise FloatingPointError
    return dict(zip(("rec", "kl", "bpd"), (sums / n).tolist()))


# ------------------------------------------------------------------------------------------------------------
# A run

def run(args, data, resumed, signals):
    """Train one model and leave its files → the figures of test.json.

    resumed: the checkpoint from which to go on, as `verified` gives it; None starts anew
    """
    check(args, data, resumed)
    model, ema, optimizer, state = begin(args, data, resumed)
    judged = ema or model  # what is validated, drawn and tested
    trained = prepared(model, data, args)
    beta_of = beta_schedule(args.beta_mode, args.target_beta_val, args.epochs)
    args.log_dir = args.log_dir or shared(lambda: free_name(args))
    with claimed(args, resumed) as (results, checkpoints):
        say(f"{args.log_dir}: {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{'x'.join(map(str, data.shape))} pixels of {data.levels} levels, "
            f"{' + '.join(f'{n:,}' for n in data.about()['images'])} images, {args.device}, {args.precision}"
            + (f", {WORLD} processes" if WORLD > 1 else "")
            + (f"; goes on after step {state['step']:,}" if resumed else ""))
        if state["history"] and not shared(lambda: is_whole(checkpoints / "best.pt")):
            lost(args, state, checkpoints)
        log = RunLog(results, state["history"])
        keeper = Keeper(args, data, model, ema, optimizer, state, checkpoints, signals)
        try:
            if state["epoch"] < args.epochs and RANK == 0:
                (results / "test.json").unlink(missing_ok=True)  # of fewer epochs
            while state["epoch"] < args.epochs:
                beta = beta_of(state["epoch"])
                row = run_epoch(trained, ema, judged, data, optimizer, args, state, beta, keeper.tick)
                row["seconds"] = keeper.lap()
                improved = row["val_loss"] < state["best"]
                state |= {"epoch": row["epoch"], "sums": no_sums(args.device),
                          "best": min(state["best"], row["val_loss"]), "history": [*state["history"], row]}
                log.epoch(state["history"], lambda: draw_epoch(judged, data, args, row["epoch"], results))
                # In this order: killed between the two, the run goes on from the old last.pt and writes both
                # again.
                keeper.save(*["best.pt"] * improved, "last.pt")
                print_epoch(row, args, improved)
            best = shared(lambda: load_checkpoint(checkpoints / "best.pt"))
            judged.load_state_dict(best["ema"] or best["model"])
            test = {"epoch": best["epoch"], **test_figures(judged, data, args, keeper.tick)}
        except FloatingPointError:
            whole = [path.as_posix() for path in sorted(checkpoints.glob("*.pt")) if is_whole(path)]
            epoch = min(state["epoch"] + 1, args.epochs)
            raise UserError(f"epoch {epoch}, after step {state['step']}: the loss or a weight is not finite "
                            f"(lr {args.lr:g}, beta {beta_of(epoch - 1):g}). Start anew with a smaller --lr "
                            "or beta, or with --grad_clip 1000."
                            + (f" Still good: {', '.join(whole)}" if whole else ""))
        report(test, args)
        if RANK == 0:
            write_json(results / "test.json", test)
        log.close(state["history"])
        say(f"wrote {results} and {checkpoints / 'best.pt'}\n"
            f"draw: python infer.py --ckpt {shlex.quote((checkpoints / 'best.pt').as_posix())}")
        return test


def begin(args, data, resumed):
    """→ the model, its average (None without --ema), the optimiser and the state of the run, as they are at
    the start or in the checkpoint.
    """
    if resumed and resumed["processes"] == WORLD:
        torch.set_num_threads(resumed["threads"])  # another number would add up in another order
    torch.backends.cudnn.deterministic = True  # else the same step may end in another last bit
    torch.manual_seed(stream_seed(args.seed, "weights"))
    model, optimizer = build_both(args, data.about())
    ema = copy.deepcopy(model) if args.ema else None
    state = {"epoch": 0, "step": 0, "sums": no_sums("cpu"), "best": math.inf, "history": [], "elapsed": 0.0}
    if resumed:
        restore(model, ema, optimizer, resumed)
        state = {name: resumed[name] for name in state}
        # each process goes on with its own sums; where there are more or fewer of them, the first has all
        state["sums"] = state["sums"][RANK] if len(state["sums"]) == WORLD else \
            state["sums"].sum(0) * (RANK == 0)
    state["sums"] = state["sums"].to(no_sums(args.device))  # their device and precision
    return model, ema, optimizer, state


def scheduled(args):
    """The arguments for which the number of epochs cannot change any more."""
    names = ["beta_mode"] * (args.loss_mode == "vae") + ["lr_schedule", "warp"]
    return [f"--{name}" for name in names if vars(args)[name] not in ("constant", 0)]


def lost(args, state, checkpoints):
    """What to do without best.pt."""
    best = checkpoints / "best.pt"
    if state["epoch"] == args.epochs:
        raise UserError(f"{best} is missing or damaged, and with it the best epoch of a run that is over; "
                        + (f"draw the last one: python infer.py --ckpt {checkpoints / 'last.pt'}"
                           if scheduled(args) else
                           f"--epochs {args.epochs + 1} goes on from {checkpoints / 'last.pt'}"))
    if RANK == 0:
        print(f"{best} is missing or damaged: the best epoch is looked for anew from here", file=sys.stderr)
    state["best"] = math.inf


class Keeper:
    """Saves a run when it is time to, and when a signal asks for it."""

    def __init__(self, args, data, model, ema, optimizer, state, folder, signals):
        self.args, self.data, self.model, self.ema = args, data, model, ema
        self.optimizer, self.state = optimizer, state
        self.folder, self.signals, self.ticks, self.interval = folder, signals, 0, 1
        self.saved = self.agreed = time.monotonic()
        self.start = self.saved - state["elapsed"]  # of the epoch

    def lap(self):
        """Seconds of the epoch that ends now."""
        start, self.start = self.start, time.monotonic()
        return round(self.start - start, 3)

    def save(self, *names):
        sums = torch.zeros(WORLD, *self.state["sums"].shape).to(self.state["sums"])
        sums[RANK] = self.state["sums"]
        content = {"args": vars(self.args), "data": self.data.about(), "threads": torch.get_num_threads(),
                   "processes": WORLD, "model": self.model.state_dict(),
                   "ema": self.ema and self.ema.state_dict(),
                   "optimizer": self.optimizer.state_dict()["state"], **self.state, "sums": total(sums),
                   "elapsed": time.monotonic() - self.start}
        if not all_finite([content[part] for part in ("model", "ema", "optimizer", "sums")]):
            raise FloatingPointError
        for name in names if RANK == 0 else ():
            save_checkpoint(self.folder / name, content)
        self.saved = time.monotonic()

    def tick(self):
        """After each step: save when it is time to, and leave when a signal asks for it. Many processes agree
        on both, which takes time, after 16 steps or, where these are slow, about a second.
        """
        self.ticks += 1
        if WORLD > 1 and self.ticks < self.interval:
            return
        unfinished = self.state["epoch"] < self.args.epochs
        due = unfinished and time.monotonic() - self.saved >= self.args.save_every
        received = self.signals.received
        if WORLD > 1:
            step = (time.monotonic() - self.agreed) / self.ticks
            received, due, step = total(torch.tensor([received, due, step], dtype=torch.float64),
                                        torch.distributed.ReduceOp.MAX).tolist()
            self.agreed, self.ticks, self.interval = time.monotonic(), 0, max(1, min(16, int(1 / step)))
        if due or (received and unfinished):
            self.save("last.pt")
        if received:
            start = f"torchrun --standalone --nproc_per_node {WORLD}" if WORLD > 1 else "python"
            say(f"stopped after step {self.state['step']:,}; to go on:\n"
                f"{start} train.py --resume {shlex.quote((self.folder / 'last.pt').as_posix())}")
            sys.exit(128 + int(received))


def prepared(model, data, args):
    """The model as it is trained: over many processes, and compiled where that is asked for.

    Its first steps are taken here, on zeros and without an update. There it shows whether a compiler works,
    and DDP puts its buckets in their final order, so that a resumed run adds up gradients in the same order
    as one that was never stopped.
    """
    multiply_in_tf32(True)  # as in training, or all would be compiled anew there

    def rehearse(model):
        images = torch.zeros(len(range(0, min(args.batch_size, len(data.train)), WORLD)), *data.shape,
                             dtype=torch.uint8, device=args.device)
        noise = None if args.loss_mode == "ae" else torch.zeros(noise_shape(len(images), args),
                                                                device=args.device)
        for _ in range(2):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                rec, kl, _ = model(images, images.new_zeros(len(images), dtype=torch.long), noise)
            (rec + kl).backward()
            model.zero_grad()
        return model

    if args.compile:
        torch.compiler.reset()  # of an earlier seed
        error = None
        try:  # dynamic shapes would make a step's code depend on which batches came before
            compiled = rehearse(torch.compile(model, dynamic=False))
        except Exception as raised:  # a missing compiler may raise anything
            error = raised
        if total(torch.tensor(float(error is not None))):  # all processes compile, or none does
            if RANK == 0:
                print(f"--compile: no compiler works here ({one_line(error or 'in another process')}); the "
                      "run goes on without", file=sys.stderr)
        else:
            model = compiled
    if WORLD > 1:
        with warnings.catch_warnings():  # torch 2.13 has a new name for broadcast_buffers that 2.11 lacks
            warnings.simplefilter("ignore", FutureWarning)
            model = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
        rehearse(model)
    return model


def check(args, data, resumed):
    """Raise UserError where the data is not what the arguments, or the checkpoint, are about."""
    if args.conditional and not data.classes:
        raise UserError(f"--conditional: {args.dataset} has no classes (a folder a class makes them); "
                        "without --conditional it can be used as it is")
    if min(data.shape[1:]) < 8:
        raise UserError(f"{args.dataset}: images of {data.shape[1]}x{data.shape[2]} pixels are too small, "
                        "8x8 is the least; --image_size enlarges them")
    if shared(data.about) != data.about():
        raise UserError(f"{args.dataset} is not the same on all machines; copy the first one's to the others")
    if resumed and data.about() != resumed["data"]:
        raise UserError(f"{args.dataset} has changed since the run began (it was {resumed['data']}, and is "
                        f"{data.about()}); bring it back, or train anew")


def build_both(args, about):
    """→ the model and its optimiser."""
    model = build(vars(args), about).to(args.device)
    optimizer = Muon if args.optimizer == "muon" else AdamW
    return model, optimizer(model.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                            fused=torch.device(args.device).type != "mps")


def restore(model, ema, optimizer, resumed):
    """Put a checkpoint's tensors in their places. Raises some exception or other where they do not fit."""
    model.load_state_dict(resumed["model"])
    if ema:
        ema.load_state_dict(resumed["ema"])
    moments = resumed["optimizer"]  # without its settings, which are the arguments'
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    for i, parameter in enumerate(model.parameters() if resumed["step"] else ()):
        orthogonal = isinstance(optimizer, Muon) and parameter.ndim > 1
        for name in ("exp_avg",) if orthogonal else ("exp_avg", "exp_avg_sq"):
            if moments[i][name].shape != parameter.shape:
                raise ValueError(f"size mismatch for {name} of {list(parameter.shape)}")


def verified(path):
    """A checkpoint from which a run can go on. Raises UserError where anything in it is missing or does not
    fit.
    """
    state = load_checkpoint(path)
    if "optimizer" in state and state["optimizer"] is None:
        raise UserError(f"{path} was packed for drawing, without what training needs to go on")
    try:
        older = {"optimizer": "adamw"}  # what a run of an earlier version did not say
        model, optimizer = build_both(Namespace(**{**older, **state["args"], "device": "cpu"}), state["data"])
        restore(model, copy.deepcopy(model) if state["args"]["ema"] else None, optimizer, state)
        for name, kind in {"epoch": int, "step": int, "threads": int, "sums": torch.Tensor, "history": list,
                           "best": float, "elapsed": float, "processes": int}.items():
            if not isinstance(state[name], kind):
                raise TypeError(f"{name} is {state[name]!r}")
        if len(state["sums"]) != state["processes"]:
            raise ValueError(f"sums of {len(state['sums'])} processes, not {state['processes']}")
    except Exception as error:  # what somebody else wrote may raise anything
        raise UserError(f"{path} is damaged, or no checkpoint of this project: {one_line(error)}")
    return state


def is_whole(path):
    """Whether a checkpoint is there and verifies."""
    try:
        return bool(verified(path))
    except (UserError, OSError):
        return False


def run_epoch(trained, ema, judged, data, optimizer, args, state, beta, tick):
    """Train, validate → a row of metrics.csv, but for its seconds.

    trained: the model as `prepared` made it; judged: its average `ema`, or where there is none the model
    """
    train = figures(args, train_epoch(trained, data, optimizer, args, state, beta, tick, ema))
    val = figures(args, test_epoch(judged, data.val, args, "val", tick))
    if args.loss_mode == "ae":
        order = torch.arange(len(data.train))
        parts = batches(data.train, order, args, "prior", state["epoch"])
        judged.fit_prior((images for images, _, _, count, _ in parts if count), total)
    return {"epoch": state["epoch"] + 1, "beta": beta if args.loss_mode == "vae" else None,
            "lr": learning_rate(args, data)(state["step"] - 1),
            **{f"train_{name}": value for name, value in train.items()},
            **{f"val_{name}": value for name, value in val.items()}}


def figures(args, terms):
    """With the loss that ranks epochs: always at the target beta, so that annealing favours none."""
    if args.loss_mode == "ae":
        return {"loss": terms["rec"], "rec": terms["rec"]}
    return {"loss": terms["rec"] + args.target_beta_val * terms["kl"], **terms}


@torch.no_grad()
def test_figures(model, data, args, tick):
    """The model's figures on the test split."""
    terms = figures(args, test_epoch(model, data.test, args, "test", tick))
    test = {f"test_{name}": value for name, value in terms.items()}
    if args.loss_mode == "vae":
        batches = torch.arange(len(data.test)).split(args.batch_size)
        means = torch.cat([model.embed(*data.test.batch(index)) for index in batches])
        test["active_units"] = active_units(means) if len(means) >= 20 else None  # too few to tell a variance
    return test


def report(test, args):
    """Print the test figures, and what helps where the posterior has collapsed onto the prior."""
    say(f"best epoch {test['epoch']} on the test images: " + describe(test, "test_"))
    if args.loss_mode == "ae":
        return
    active = test["active_units"]
    say(f"active units: {'not known from so few test images' if active is None else active} of "
        f"{args.latent_size}")
    few = active is not None and active < min(2, args.latent_size)
    # with --iw_train what is called KL here is none, and nothing of the advice goes with it
    if not args.iw_train and (test["test_kl"] < 1 or few):
        say("the posterior collapsed: the decoder all but ignores z. What may help: "
            f"{'' if args.flow else '--free_bits 0.1, '}a smaller --target_beta_val, or --beta_mode linear")


def print_epoch(row, args, improved):
    beta = f"beta {row['beta']:.3g} | " if args.loss_mode == "vae" else ""
    epoch = f"{row['epoch']:>{len(str(args.epochs))}}/{args.epochs}"
    say(f"epoch {epoch} | {beta}train {describe(row, 'train_')} | val {describe(row, 'val_')} | "
        f"{row['seconds']:.1f} s{' *' if improved else ''}")


def describe(row, prefix):
    return ", ".join(f"{name} {row[prefix + name]:.{4 if name == 'bpd' else 2}f}"
                     for name in ("loss", "rec", "kl", "bpd") if row.get(prefix + name) is not None)


@torch.no_grad()
def draw_epoch(model, data, args, epoch, folder):
    """samples_EEE.png and reconstructions_EEE.png: the same latents and the same validation images each
    epoch.
    """
    n, labels = 64, None
    if args.conditional:  # a row a class, of the first ones where there are very many
        n = 8 * min(len(data.classes), 32)
        labels = torch.arange(n, device=args.device) // 8
    _, samples = model.sample(n, labels, generator=stream(args.seed, "samples"))
    save_grid(folder / f"samples_{epoch:03d}.png",
              f"{args.log_dir}, epoch {epoch}: samples from {model.prior_name}", samples, 8)
    images, labels = data.val.batch(torch.arange(min(32, len(data.val))))
    pairs = interleave(images / (data.levels - 1), model.reconstruct(images, labels), 8)
    save_grid(folder / f"reconstructions_{epoch:03d}.png",
              f"{args.log_dir}, epoch {epoch}: validation images, reconstructions below each", pairs, 8)


def wipe_group(args, group):
    """Delete the files of a group of seeds, of which some may not be trained again; none where one is in use.
    """
    folders = [folder for root in (args.results_dir, args.checkpoint_dir)
               for folder in (Path(root, group), *Path(root, group).glob("seed_*")) if folder.is_dir()]
    with contextlib.ExitStack() as locks:
        lock(locks, folders, [])
        wipe(folders)


def free_name(args):
    """A name made of what matters, with a number where it is taken."""
    name = "_".join(["cvae" if args.conditional else args.loss_mode,
                     args.dataset if args.dataset in DATASETS else
                     re.sub(r"[^\w.-]+", "_", Path(args.dataset).resolve().name) or "images", args.model])
    number, free = 1, name
    while any((Path(root) / free).exists() for root in (args.results_dir, args.checkpoint_dir)):
        number, free = number + 1, f"{name}_{number + 1}"
    return free


def run_seeds(args, data, resumed, signals):
    """A run for each seed in a folder of its own, then mean ± standard deviation of every test figure."""
    group = Path(args.log_dir).parent.as_posix() if resumed else \
        args.log_dir or shared(lambda: free_name(args))
    check(args, data, resumed)  # before anything is deleted
    if args.overwrite and RANK == 0:
        wipe_group(args, group)
    tests = []
    for seed in args.seeds:
        one = Namespace(**{**vars(args), "seed": seed, "log_dir": f"{group}/seed_{seed}"})
        state = resumed
        if resumed and resumed["args"]["seed"] != seed:
            kept = [Path(args.checkpoint_dir, one.log_dir, name) for name in ("last.pt", "best.pt")]
            state = shared(lambda: next((verified(path) for path in kept if is_whole(path)), None))
            one.overwrite = state is None  # a seed that was killed before its first save begins anew
        tests.append(run(one, data, state, signals))
    columns = [f"seed_{seed}" for seed in args.seeds]
    rows = []
    for name in tests[0]:
        values = [test[name] for test in tests if test[name] is not None]
        if not values:
            continue
        std = statistics.stdev(values) if len(values) > 1 else None
        rows.append({"figure": name, "mean": statistics.mean(values), "std": std,
                     **dict(zip(columns, values))})
        say(f"{name:14s} {rows[-1]['mean']:10.4f}" + (f" ± {std:.4f}" if std is not None else ""))
    if RANK == 0:
        write_csv(Path(args.results_dir) / group / "seeds.csv", ["figure", "mean", "std", *columns], rows)
    say(f"wrote {Path(args.results_dir) / group / 'seeds.csv'}")


def main(argv=None):
    with processes():
        args, resumed = shared(lambda: parse_args(argv))
        args.device = own_device(args.device)
        if RANK:
            args.progress_bar = False
        if LOCAL_RANK:
            # the first process of each machine fills the cache and says what there is to say
            total(torch.zeros(()))
        with contextlib.redirect_stderr(io.StringIO()) if LOCAL_RANK else contextlib.nullcontext():
            data = load(args.dataset, args.data_dir, args.image_size, args.levels, args.binarize,
                        args.transform, args.limit, args.device, progress_bar=args.progress_bar)
        if not LOCAL_RANK:
            total(torch.zeros(()))
        with Signals() as signals:
            (run_seeds if args.seeds else run)(args, data, resumed, signals)


if __name__ == "__main__":
    call(main)
