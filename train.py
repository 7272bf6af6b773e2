"""Train an AE, a VAE or a conditional VAE on small images: python train.py --help"""

import processors  # isort: skip (before torch)
import contextlib
import io
import json
import math
import re
import shlex
import statistics
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import cli
import distributed
import runs
from arguments import parse_args, scheduled
from cli import UserError, few, say, warn
from data import load_with, warp
from datasets import DATASETS
from distributed import RANK, WORLD, all_reduce_sum, broadcast
from distributions import Mixture, enough_latents, fit_mixture
from execution import prepare_network, record
from figures import save_grid
from optim import lr_schedule, update_ema
from randomness import draw_noise, noise_shape, normal, stream
from runs import load_checkpoint, save_checkpoint
from training_state import Saver, is_whole, new_state, restore_state, verify_checkpoint, zero_sums
from utils import active_units, beta_schedule, interleave, to_device

# ------------------------------------------------------------------------------------------------------------
# The two loops

EMA_EVERY = 16  # steps between updates of the average; an update in each step would slow down a small model


def train_epoch(state, data, args, after_step):
    """Train for the rest of the epoch → the means of rec, kl and bpd over its images (see AE.forward).

    An epoch passes once over the training images in a new order. It can stop after any step, because
    after_step exits or the process dies; state.step and state.sums say where to continue.
    Raises FloatingPointError if the loss is not finite.
    """
    state.model.train()
    cli.allow_tf32(True)
    steps, beta, lr = steps_per_epoch(data, args), beta_at(state.epoch, args), learning_rate(data, args)
    if cli.is_cuda(args.device):  # so that a recorded step reads it anew
        beta = torch.tensor(beta, device=args.device)
    order = torch.randperm(len(data.train), generator=stream(args.seed, "order", state.epoch))
    done = state.step - state.epoch * steps
    for images, labels, noise, count, n in tqdm(
            batches(data.train, order, args, "train", state.epoch, first=done), f"epoch {state.epoch + 1}",
            steps, initial=done, leave=False, disable=not args.progress_bar):
        state.optimizer.set_lr(lr(state.step))
        # DDP takes the mean over processes; with this weight each image counts once
        weight = count * WORLD / n if WORLD > 1 else None
        state.sums = add_terms(state.sums, state.take_step(images, labels, noise, beta, weight), count)
        done += 1
        if state.ema and (done % EMA_EVERY == 0 or done == steps):
            decay = min(args.ema, (1 + state.step) / (10 + state.step))  # at first it forgets faster
            since_update = (done - 1) % EMA_EVERY + 1
            update_ema(state.ema, state.model, decay ** since_update)
        state.step += 1
        after_step()
    return means(all_reduce_sum(state.sums), len(data.train))


def take_step(state, args, images, labels, noise, beta, weight):
    """A step of training: forward, backward, update of the weights → the terms of the loss, as AE.forward
    returns them

    weight: of the loss, or None
    """
    precision = torch.autocast(images.device.type, torch.bfloat16, enabled=args.precision == "bf16")
    with precision:
        terms = state.network(images, labels, noise)
    rec, kl, _ = terms
    loss = rec + beta * kl
    if weight is not None:
        loss = loss * weight
    # on a GPU, loss.item() would wait for each step to end; there `means` checks once an epoch
    if images.device.type == "cpu" and not math.isfinite(loss.item()):
        raise FloatingPointError
    state.optimizer.zero_grad()
    loss.backward()
    if args.grad_clip:
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), args.grad_clip)
    with precision:  # for the matrix products of Muon
        state.optimizer.step()
    return [None if term is None else term.detach() for term in terms]


@torch.no_grad()
def test_epoch(model, split, args, purpose, after_step):
    """One pass over the validation or test images → the means of rec, kl and bpd.

    purpose: names the random numbers, which are the same each time
    Raises FloatingPointError if a mean is not finite.
    """
    model.eval()
    cli.allow_tf32(False)
    sums = zero_sums(args.device)
    for images, labels, noise, count, _ in batches(split, torch.arange(len(split)), args, purpose):
        sums = add_terms(sums, model(images, labels, noise), count)
        after_step()
    return means(all_reduce_sum(sums), len(split))


def batches(split, order, args, *key, first=0):
    """Yield this process's share of each batch of a pass in this order, from step `first` on.

    key: (purpose,), or with the epoch, such as ("train", epoch), which chooses the random numbers
    → images, labels, noise (None for an AE), the number of images in this share (0 if there are too few for
    each process, and the share is a placeholder), and that of the whole batch

    Batches are made for several steps at once, because one by one they would take a twentieth of a small
    model's time. Random numbers are drawn for the whole batch of all processes, so they do not depend
    on the number of processes.
    """
    size = max(math.prod(split.stored.shape[1:]), 4 * math.prod(noise_shape(1, args)))  # bytes an image
    steps = max(1, 2**21 // (args.batch_size * size))  # about 2 MB
    for block, chunk in enumerate(order.split(steps * args.batch_size)):
        remaining = torch.arange(len(chunk)).split(args.batch_size)[max(0, first - block * steps):]
        if not remaining:
            continue
        shards = [distributed.shard(len(batch)) for batch in remaining]
        mine = [batch[part] for batch, (part, _) in zip(remaining, shards)]
        sizes = [len(batch) for batch in mine]
        part = slice(None) if sum(sizes) == len(chunk) else torch.cat(mine)
        images, labels = split.batch(chunk, args.seed, "binarize", *key, block, part=part)
        if args.flip and key[0] == "train":
            mirrored = torch.rand(len(chunk), generator=stream(args.seed, "flip", *key, block)) < 0.5
            mirrored = to_device(mirrored[part], images.device).view(-1, 1, 1, 1)
            images = torch.where(mirrored, images.flip(-1), images)
        if key[0] == "train" and key[1] < round(args.warp * args.epochs, 6):  # 0.28 · 25 > 7 in floats
            images = warp(images, stream(args.seed, "warp", *key, block), len(chunk), part)
        noise = [None] * len(remaining)
        if args.loss_mode == "vae":
            noise = draw_noise(len(chunk), args, *key, block)[to_device(part, args.device)].split(sizes)
        counts = [count for _, count in shards]
        yield from zip(images.split(sizes), labels.split(sizes), noise, counts, map(len, remaining))


def steps_per_epoch(data, args):
    return -(-len(data.train) // args.batch_size)


def beta_at(epoch, args):
    """The weight of the KL in an epoch; epochs count from 0."""
    return beta_schedule(args.beta_mode, args.target_beta_val, args.epochs)(epoch)


def learning_rate(data, args):
    """→ the learning rate as a function of the number of steps already taken"""
    return lr_schedule(args.lr_schedule, args.lr, args.epochs * steps_per_epoch(data, args))


def add_terms(sums, terms, n):
    """Add a batch's means over n images to sums over images. On the device, because fetching a number in each
    step would make a GPU wait.
    """
    return torch.add(sums, torch.stack([term for term in terms if term is not None]), alpha=n)


def means(sums, n):
    """Sums over n images → their means by name. Raises FloatingPointError if one is not finite."""
    if not sums.isfinite().all():
        raise FloatingPointError
    return dict(zip(("rec", "kl", "bpd"), (sums / n).tolist()))


# ------------------------------------------------------------------------------------------------------------
# A run

def run(args, data, checkpoint, signals):
    """Train one model and write its files → the content of test.json

    checkpoint: the one to resume from, as `verify_checkpoint` returns it; None for a new run
    Raises UserError.
    """
    check_data(args, data, checkpoint)
    state = begin_or_resume(args, data, checkpoint)
    args.log_dir = args.log_dir or broadcast(lambda: free_name(args))
    results, checkpoints = Path(args.results_dir, args.log_dir), Path(args.checkpoint_dir, args.log_dir)
    if args.overwrite and RANK == 0:
        runs.delete_all_runs(results, checkpoints)
    with runs.run_folders(results, checkpoints, resume=checkpoint is not None):
        print_start(args, data, state)
        # a resumed run compares new epochs with the best one so far
        if state.history and not broadcast(lambda: is_whole(checkpoints / "best.pt")):
            forget_best(args, state, checkpoints)
        log = runs.RunLog(results, state.history)
        saver = Saver(args, data, state, checkpoints, signals)
        try:
            if state.epoch < args.epochs and RANK == 0:
                (results / "test.json").unlink(missing_ok=True)  # it belongs to a shorter run
            while state.epoch < args.epochs:
                row = run_epoch(state, data, args, saver)
                improved = state.is_best(row)
                state.epoch, state.sums = row["epoch"], zero_sums(args.device)
                state.best, state.history = min(state.best, row["val_loss"]), [*state.history, row]
                # of a long run about 60 epochs have pictures
                drawn = state.epoch % math.ceil(args.epochs / 60) == 0 or state.epoch in (1, args.epochs)
                log.epoch(state.history, (lambda: draw_epoch(state, data, args, results)) if drawn else None)
                if not args.compile:  # compiled code is made for one number of threads
                    cli.adapt_threads()
                # In this order: after a kill between the two files, the run goes on from the old last.pt and
                # writes both again.
                saver.save(*["best.pt", "last.pt"] if improved else ["last.pt"])
                print_epoch(row, args, state)
            state.take_step = None  # with its recording it would keep this state, and a GPU's memory
            resumed_here = checkpoint and state.step == checkpoint["step"]
            if resumed_here and checkpoint["args"]["epochs"] != args.epochs:
                saver.save("last.pt")  # --epochs ends the run where it stands
            best_epoch = fit_best(state, data, args, checkpoints / "best.pt", saver.after_step)
            test = {"epoch": best_epoch, **test_best(state.evaluated, data, args, saver.after_step)}
        except FloatingPointError:
            raise UserError(not_finite_message(args, state, checkpoints))
        if RANK == 0:
            runs.write_json(results / "test.json", test)
        print_test(test, args, len(data.test), error_ratio(state.evaluated, data),
                   steps_per_epoch(data, args))
        log.close(state.history)
        best = shlex.quote((checkpoints / "best.pt").as_posix())
        say(f"wrote {results} and {checkpoints / 'best.pt'}\ndraw:    python infer.py --ckpt {best}\n"
            f"measure: python infer.py --evaluate --ckpt {best}")
        return test


def run_epoch(state, data, args, saver):
    """Train and validate for an epoch → a row of metrics.csv"""
    train = with_ranking_loss(args, train_epoch(state, data, args, saver.after_step))
    val = with_ranking_loss(args, test_epoch(state.evaluated, data.val, args, "val", saver.after_step))
    if args.loss_mode == "ae":  # the Gaussian that samples are drawn from
        order = torch.arange(len(data.train))
        parts = batches(data.train, order, args, "prior", state.epoch)
        state.evaluated.fit_gaussian((images for images, _, _, count, _ in parts if count), all_reduce_sum)
    beta, lr = beta_at(state.epoch, args), learning_rate(data, args)(state.step - 1)
    return {"epoch": state.epoch + 1, "beta": beta if args.loss_mode == "vae" else None, "lr": lr,
            **{f"train_{name}": value for name, value in train.items()},
            **{f"val_{name}": value for name, value in val.items()}, "seconds": saver.lap()}


def with_ranking_loss(args, terms):
    """Add `loss`, which ranks epochs. It is always at the target beta, so that annealing does not make the
    first epochs look best.
    """
    if args.loss_mode == "ae":
        return {"loss": terms["rec"], "rec": terms["rec"]}
    return {"loss": terms["rec"] + args.target_beta_val * terms["kl"], **terms}


@torch.no_grad()
def fit_best(state, data, args, path, after_step):
    """Load the weights of best.pt, fit a mixture to latents of training images (see enough_latents), and
    write best.pt again with the mixture, as that of a finished run → the best epoch

    Each latent is one draw from q(z|x). Samples from the mixture are better than those from N(0, I), which
    the latents of all images together do not match (Hoffman & Johnson 2016; Ghosh et al. 2020). The first
    process fits the mixture and broadcasts it.
    """
    best, model = broadcast(lambda: load_checkpoint(path)), state.evaluated.eval()
    model.load_state_dict(best["ema"] or best["model"])
    cli.allow_tf32(False)  # a run that is resumed after its last epoch has not been through test_epoch

    def fit():
        of_class = data.train.labels.cpu() if args.conditional else torch.zeros(len(data.train))
        most = enough_latents(args.latent_size)
        chosen = torch.cat([(of_class == label).nonzero()[:most, 0] for label in of_class.unique()])
        latents = []
        for block, index in enumerate(chosen.split(1024)):
            images, labels = data.train.batch(index, args.seed, "binarize", "mixture", block)
            noise = normal((len(index), args.latent_size), args.device, args.seed, "noise", "mixture", block)
            for first in range(0, len(index), model.max_batch):  # an encoder is about as large as a decoder
                part = slice(first, first + model.max_batch)
                latents.append(model.sample_posterior(images[part], labels[part], noise[part]).cpu())
        per_class = {"labels": of_class[chosen], "num_classes": len(data.classes), "components": 10}
        mixture = fit_mixture(torch.cat(latents), **per_class if args.conditional else {})
        return dict(mixture.named_buffers())
    if model.prior is None or model.prior.wants_mixture:
        best["fitted"] = broadcast(fit)
        model.fitted = Mixture(**best["fitted"]).to(args.device)
    best["finished"], best["args"]["epochs"] = True, args.epochs
    if RANK == 0:
        save_checkpoint(path, best)
    after_step()
    return best["epoch"]


@torch.no_grad()
def test_best(model, data, args, after_step):
    """→ the terms of the loss on the test images, and the number of active units"""
    terms = with_ranking_loss(args, test_epoch(model, data.test, args, "test", after_step))
    test = {f"test_{name}": value for name, value in terms.items()}
    if args.loss_mode == "vae":
        index = torch.arange(len(data.test)).split(args.batch_size)
        latents = torch.cat([model.to_base(model.embed(images, labels), labels)
                             for images, labels in map(data.test.batch, index)])
        test["active_units"] = active_units(latents) if len(latents) >= 20 else None  # too few for a variance
    return test


@torch.no_grad()
def error_ratio(model, data):
    """The squared error of reconstructed test images divided by that of one constant image, their mean. At 1
    or above, the model has learned nothing about single images. 0 if the images do not differ.
    """
    n = min(len(data.test), 1000)
    parts = torch.arange(n).split(model.max_batch)
    mean_image = sum(data.test.batch(index)[0].sum(0) for index in parts) / (n * (data.levels - 1))
    error = variation = 0.0
    for images, labels in map(data.test.batch, parts):
        x = images / (data.levels - 1)
        error += (x - model.reconstruct(images, labels)).square().sum().item()
        variation += (x - mean_image).square().sum().item()
    return error / variation if variation else 0.0


# ------------------------------------------------------------------------------------------------------------
# How a run begins, or goes on after it was killed

def begin_or_resume(args, data, checkpoint):
    """→ the State of a new run, or that of the checkpoint"""
    same_processes = checkpoint and checkpoint["processes"] == WORLD
    if same_processes and checkpoint["threads"] <= processors.available() and not processors.THREADS_CHOSEN:
        cli.set_threads(checkpoint["threads"])  # the last bit of a sum depends on their number
    else:
        cli.adapt_threads()
    if checkpoint and not same_processes:
        warn(f"the run began with {checkpoint['processes']} processes, not {WORLD}, so its result will "
             "differ in the last bits")
    elif checkpoint and checkpoint["threads"] != torch.get_num_threads():
        warn(f"the run was computed with {checkpoint['threads']} threads, not {torch.get_num_threads()}, so "
             "its result will differ in the last bits")
    torch.backends.cudnn.deterministic = True  # otherwise the same step may end in another last bit
    state = new_state(args, data.about())
    if checkpoint:
        restore_state(state, checkpoint)
    state.sums = state.sums.to(zero_sums(args.device))
    state.network = prepare_network(state.model, data, args)
    state.take_step = record(partial(take_step, state, args), args, min(args.batch_size, len(data.train)))
    return state


def check_data(args, data, checkpoint=None):
    """Raise UserError if the data does not fit the arguments, or the checkpoint."""
    if args.conditional and not data.classes:
        raise UserError(f"--conditional: {args.dataset} has no classes (in a folder, each subfolder is one); "
                        "without --conditional it can be used as it is")
    if args.conditional and not args.limit:  # the first images need not have all classes
        asked = torch.cat([data.val.labels, data.test.labels])
        unseen = set(asked.tolist()) - set(data.train.labels.tolist())
        if unseen:
            names = few(data.classes[label] for label in sorted(unseen))
            raise UserError(f"--conditional: no training image is of the class {names}, which validation or "
                            "test images have; remove these images, or train without --conditional")
    if min(data.shape[1:]) < 8:
        raise UserError(f"{args.dataset}: images of {data.shape[1]}x{data.shape[2]} pixels are too small, "
                        "the minimum is 8x8; --image_size enlarges them")
    if broadcast(data.about) != data.about():
        raise UserError(f"{args.dataset} is not the same on all machines; copy the first one's to the others")
    if checkpoint:
        check_unchanged(args, data, checkpoint)


def check_unchanged(args, data, checkpoint):
    """Raise UserError if the data is not that of the checkpoint."""
    differing = [part for part, value in data.about().items() if value != checkpoint["data"].get(part)]
    if differing:
        raise UserError(f"{args.dataset} does not hold the images that the run began with (it differs in "
                        f"{', '.join(differing)}); give their place with --dataset, or train a new run")


def free_name(args):
    """A name for the run, of the loss mode, the dataset and the model. If it is taken, it gets a number, but
    with --overwrite the run replaces the one of this name.
    """
    name = "_".join(["cvae" if args.conditional else args.loss_mode,
                     args.dataset if args.dataset in DATASETS else
                     re.sub(r"[^\w.-]+", "_", Path(args.dataset).resolve().name) or "images", args.model])
    count, free, roots = 1, name, (args.results_dir, args.checkpoint_dir)
    while not args.overwrite and any(Path(root, free).exists() for root in roots):
        count, free = count + 1, f"{name}_{count + 1}"
    return free


# ------------------------------------------------------------------------------------------------------------
# How a run fails

def forget_best(args, state, checkpoints):
    """Go on without best.pt. Raises UserError if the run is over."""
    best = checkpoints / "best.pt"
    if state.epoch == args.epochs:
        raise UserError(f"{best} is missing or damaged, and with it the best epoch of a finished run; "
                        + (f"draw the last epoch: python infer.py --ckpt {checkpoints / 'last.pt'}"
                           if scheduled(args) else
                           f"--epochs {args.epochs + 1} goes on from {checkpoints / 'last.pt'}"))
    warn(f"{best} is missing or damaged: from here on the run looks for a new best epoch")
    state.best = math.inf


def not_finite_message(args, state, checkpoints):
    """The message for a loss or a weight that is not finite."""
    whole = [path.as_posix() for path in sorted(checkpoints.glob("*.pt")) if is_whole(path)]
    epoch = min(state.epoch + 1, args.epochs)
    vae = args.loss_mode == "vae"
    return (f"epoch {epoch}, after step {state.step}: the loss or a weight is not finite (lr {args.lr:g}"
            + f", beta {beta_at(epoch - 1, args):g}" * vae + "). Start a new run with a smaller --lr"
            + " or --target_beta_val" * vae + f", or with {clip_advice(args)}."
            + (f" Still good: {', '.join(whole)}" if whole else ""))


def clip_advice(args):
    """The argument that makes steps smaller where they were too large."""
    return f"--grad_clip {args.grad_clip / 10 if args.grad_clip else 1000:g}"


# ------------------------------------------------------------------------------------------------------------
# What a run prints and draws

def print_start(args, data, state):
    say(f"{args.log_dir}: {sum(p.numel() for p in state.model.parameters()):,} parameters, "
        f"{'x'.join(map(str, data.shape))} pixels of {data.levels} levels, "
        f"{' + '.join(f'{n:,}' for n in data.about()['images'])} images, {args.device}, {args.precision}, "
        + (f"{WORLD} processes" if WORLD > 1 else f"threads: {torch.get_num_threads()}")
        + (f"; goes on after step {state.step:,}" if state.step and state.epoch < args.epochs else ""))
    if state.epoch == args.epochs:
        dropped = state.step - state.epoch * steps_per_epoch(data, args)
        say(f"all {args.epochs} epochs are done"
            + f"; {dropped:,} step{'s' * (dropped > 1)} after them do not count" * (dropped > 0))
    elif args.loss_mode == "vae" and args.beta_mode != "constant":
        first, last = beta_at(0, args), beta_at(args.epochs - 1, args)
        say(f"beta is {first:.3g} in the first epoch and {last:.3g} in the last "
            f"(--beta_mode {args.beta_mode}); losses are printed at the target, {args.target_beta_val:g}")
    if data.classes:
        counts = data.train.labels.bincount(minlength=len(data.classes)).tolist()
        named = few((f"{name} ({count:,})" for name, count in zip(data.classes, counts)), most=5)
        say(f"{len(counts)} classes, with their training images: {named}")
    steps = steps_per_epoch(data, args) * args.epochs
    if len(data.train) < 10_000 and steps < 1000 and not state.step:
        batch_size = min(args.batch_size, max(1, len(data.train) // 20))
        epochs = max(args.epochs, math.ceil(1000 / math.ceil(len(data.train) / batch_size)))
        clip = f" and {clip_advice(args)}" * (args.recon_loss == "gaussian" and not args.grad_clip)
        say(f"the run has only {steps:,} step{'s' * (steps > 1)}: the model may learn more with --batch_size "
            f"{batch_size} and --epochs {epochs}{clip}; stop, and start again with these and --overwrite")
    if args.recon_loss == "categorical" and data.levels == 256:
        say("--recon_loss categorical computes a softmax of 256 levels at each pixel, which takes many times "
            "as long as --recon_loss logistic")


def print_epoch(row, args, state):
    beta = f"beta {row['beta']:.3g} | " if args.loss_mode == "vae" else ""
    epoch = f"{row['epoch']:>{len(str(args.epochs))}}/{args.epochs}"
    seconds = (args.epochs - row["epoch"]) * row["seconds"]
    left = f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
    best = next(other["epoch"] for other in state.history if other["val_loss"] == state.best)
    say(f"epoch {epoch} | {beta}train {describe(row, 'train_')} | val {describe(row, 'val_')} | "
        f"{row['seconds']:.1f} s{left if seconds else ''}{', best so far' if best == row['epoch'] else ''}")
    if row["epoch"] - best == 10 and row["epoch"] < args.epochs:
        say(f"the validation loss has not fallen for 10 epochs; best.pt keeps epoch {best}")
    recs = [past["train_rec"] for past in state.history]
    if len(recs) > 2 and row["beta"] == state.history[-2]["beta"] \
            and recs[-1] - recs[-2] > max((recs[0] - min(recs)) / 4, abs(recs[0]) / 20):
        say("the training loss has jumped, probably because a step was too large (best.pt is of epoch "
            f"{best}). What may help: a new run with {clip_advice(args)}")


def print_test(test, args, images, ratio, steps):
    """The test figures, and advice if nothing was learned, or if the posterior has collapsed onto the prior.

    images: how many; ratio: as error_ratio returns it; steps: of an epoch
    """
    say("test images" + f" (only {images}, so these figures are rough)" * (images < 100)
        + f", by epoch {test['epoch']}, the best in validation: " + describe(test, "test_"))
    active = test.get("active_units")
    if args.loss_mode == "vae":
        say("active units: " + ("not known from so few test images" if active is None else
                                f"{active} of {args.latent_size}"))
    few_active = active is not None and active < min(2, args.latent_size)
    # with --iw_train, L_reg is no KL, and the advice does not apply
    collapsed = args.loss_mode == "vae" and not args.iw_train and (test["test_kl"] < 1 or few_active)
    if ratio > (1.1 if collapsed else 0.99):  # a collapsed model decodes the mean image, whose ratio is 1
        say(f"nothing was learned: reconstructions are no better than the mean test image ({ratio:.2f} times "
            "its squared error). What may help: " + (
                "more steps, by a smaller --batch_size and more --epochs" if steps < 10 else
                f"more --epochs, a smaller --lr than {args.lr:g}"
                + f", {clip_advice(args)}" * (not args.grad_clip)))
    elif collapsed:
        say("the posterior collapsed: the decoder hardly uses z. What may help: "
            + "--free_bits 0.1, " * (args.prior == "normal" and not args.free_bits)
            + "a smaller --target_beta_val" + ", or --beta_mode linear" * (args.beta_mode == "constant"))


def describe(row, prefix):
    return ", ".join(f"{name} {row[prefix + name]:.{4 if name == 'bpd' else 2}f}"
                     for name in ("loss", "rec", "kl", "bpd") if row.get(prefix + name) is not None)


@torch.no_grad()
def draw_epoch(state, data, args, folder):
    """samples_EEE.png and reconstructions_EEE.png: the same latents and validation images in each epoch."""
    model, epoch, n, labels = state.evaluated, state.epoch, 64, None
    if args.conditional:  # a row for each of the first 32 classes
        n = 8 * min(len(data.classes), 32)
        labels = torch.arange(n, device=args.device) // 8
    _, samples = model.sample(n, labels, generator=stream(args.seed, "samples"))
    save_grid(folder / f"samples_{epoch:03d}.png",
              f"{args.log_dir}, epoch {epoch}: samples from {model.sampling_prior().description}", samples, 8)
    images, labels = data.val.batch(torch.arange(min(32, len(data.val))))
    columns = min(8, len(images))
    pairs = interleave(images / (data.levels - 1), model.reconstruct(images, labels), columns)
    save_grid(folder / f"reconstructions_{epoch:03d}.png",
              f"{args.log_dir}, epoch {epoch}: validation images, reconstructions below each", pairs, columns)


# ------------------------------------------------------------------------------------------------------------
# Several seeds

def run_seeds(args, data, signals):
    """A run NAME/seed_N for each seed, then the mean and standard deviation of their test figures. The same
    command again, with --log_dir NAME, skips the seeds that are finished and resumes one that is not.
    """
    check_data(args, data)
    group = args.log_dir or broadcast(lambda: free_name(args))
    if args.overwrite and RANK == 0:
        runs.delete_all_runs(Path(args.results_dir, group), Path(args.checkpoint_dir, group))
    tests = []
    for seed in args.seeds:
        one = Namespace(**{**vars(args), "seed": seed, "seeds": None, "overwrite": False,
                           "log_dir": f"{group}/seed_{seed}"})
        checkpoint, test, one.overwrite = broadcast(lambda: earlier_run(one, data))
        try:
            tests.append(run(one, data, checkpoint, signals) if test is None else test)
        except SystemExit:
            say(f"to go on with all seeds, repeat the command with --log_dir {group}, without --overwrite")
            raise
    columns = [f"seed_{seed}" for seed in args.seeds]
    rows = []
    for name in tests[0]:
        values = [test[name] for test in tests if test[name] is not None]
        if values:
            std = statistics.stdev(values) if len(values) > 1 else None
            rows.append({"figure": name, "mean": statistics.mean(values), "std": std,
                         **{column: test[name] for column, test in zip(columns, tests)}})
            say(f"{name:14s} {rows[-1]['mean']:10.4f}" + (f" ± {std:.4f}" if std is not None else ""))
    if RANK == 0:
        runs.write_csv(Path(args.results_dir, group, "seeds.csv"), ["figure", "mean", "std", *columns], rows)
    say(f"wrote {Path(args.results_dir, group, 'seeds.csv')}")


def earlier_run(args, data):
    """→ the checkpoint of this run if it was begun before, or None; its test figures if it is finished, or
    None; whether its folder holds only the leftovers of a run that was killed before its first checkpoint

    Raises UserError if it had other arguments or other data, or if its checkpoint is missing.
    """
    results, folder = Path(args.results_dir, args.log_dir), Path(args.checkpoint_dir, args.log_dir)
    # a run that was killed between its first two files has only best.pt
    paths = [folder / name for name in ("last.pt", "best.pt") if (folder / name).is_file()]
    if not paths:
        log = results / "metrics.csv"
        # such a run has the header, and perhaps the row of the first epoch
        if (results / "test.json").exists() or log.exists() and len(log.read_text().splitlines()) > 2:
            raise UserError(f"{results} holds results, but {folder} no checkpoint to go on from; "
                            "take another --log_dir, or --overwrite to start all seeds anew")
        return None, None, log.exists()
    path = next(filter(is_whole, paths), paths[0])
    checkpoint = verify_checkpoint(path)
    differing = runs.differing_arguments([checkpoint["args"], vars(args)])
    if differing:
        name = differing[0]
        raise UserError(f"{path} was trained with --{name} {checkpoint['args'].get(name)}, not "
                        f"{vars(args).get(name)}; take another --log_dir, or --overwrite to start all "
                        "seeds anew")
    check_unchanged(args, data, checkpoint)
    try:
        test = json.loads((results / "test.json").read_text())
        finished = checkpoint["epoch"] == args.epochs and {"epoch", "test_loss", "test_rec"} <= test.keys()
    except (OSError, ValueError, AttributeError):  # no such file, or not one of ours
        finished = False
    return checkpoint, test if finished else None, False


def main(argv=None):
    with distributed.process_group():
        args, checkpoint = broadcast(lambda: parse_args(argv))
        args.device = cli.own_device(args.device)
        if RANK:
            args.progress_bar = False
        waits = distributed.LOCAL_RANK > 0
        if waits:  # wait until the first process of this machine has filled the cache and printed messages
            distributed.barrier()
        with contextlib.redirect_stderr(io.StringIO()) if waits else contextlib.nullcontext():
            data = load_with(vars(args), progress_bar=args.progress_bar)
        if not waits:
            distributed.barrier()
        with runs.Signals() as signals:
            if args.seeds:
                run_seeds(args, data, signals)
            else:
                run(args, data, checkpoint, signals)


if __name__ == "__main__":
    cli.run_script(main)
