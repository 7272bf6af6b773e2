"""The arguments of train.py: what they are, what contradicts what, and those of a run that is resumed.

To add one, add it to make_parser; train.py finds it in `args`. One that a model is built from goes into
model.build too; then raise VERSION in runs.py, because older checkpoints lack it, and make those of the
clone anew. One that changes no result goes into NO_EFFECT in runs.py; one whose effect depends on --epochs
goes into `scheduled`.
"""

import argparse
import math
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import cli
import runs
from cli import UserError, device_type, number, run_name, warn
from data import dataset_problem
from datasets import DATASETS
from distributions import LIKELIHOODS, PRIORS, default_likelihood
from networks import NETWORKS
from optim import OPTIMIZERS
from training_state import is_whole, verify_checkpoint


def make_parser():
    parser = cli.ArgumentParser(description="Train an AE, a VAE or a conditional VAE on small images.")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", default="glyphs", metavar="NAME",
        help=f"{', '.join(DATASETS)}; or a folder of images, or an array file (.npy, .npz)")
    add("--data_dir", "--data_folder", default="data", metavar="DIR",
        help="where datasets and caches are kept")
    add("--image_size", type=number(int, 8), nargs="+", metavar="N",
        help="height [width] to resize and centre-crop to (default: as the images are)")
    add("--value_range", type=number(float, -math.inf, above=True), nargs=2, metavar=("LOW", "HIGH"),
        help="of a folder or an array file: the values that become black and white (default: 0 and "
             "255 of 8 bits, 0 and 65535 of 16; else 0 and 1, or 0 and 255, if the data show which)")
    add("--levels", type=int, choices=(2, 16, 256), default=256,
        help="number of values of a pixel; 2: binary; 16: 4 bits; 256: as stored")
    add("--binarize", choices=("threshold", "stochastic"), default="threshold",
        help="with --levels 2: white where x > 0.5, or drawn with probability x each time that a "
             "training image is seen")
    add("--transform", choices=("none", "grayscale", "grayscale3"), default="none",
        help="none: as stored; grayscale: one channel; grayscale3: three equal ones")
    add("--flip", action="store_true", help="mirror each training image left to right with probability 1/2")
    add("--warp", type=number(float, 0), default=0.0, metavar="SHARE",
        help="augmentation: bend training images a little, at random, in the first SHARE of the epochs")
    add("--limit", type=number(int, 1), metavar="N",
        help="use only N training images, the same ones in every run (default: all)")

    add = parser.add_argument_group("model").add_argument
    add("--loss_mode", choices=("ae", "vae"), default="vae", help="autoencoder or variational autoencoder")
    add("--model", choices=list(NETWORKS), default="cnn", help="encoder and decoder")
    add("--conditional", action="store_true", help="a VAE given the class of the image")
    add("--latent_size", "--z_dim", type=number(int, 1), default=32, metavar="N",
        help="number of latent dimensions")
    add("--hidden_dims", type=number(int, 1), nargs="*", default=[512], metavar="N",
        help="mlp, resnet: widths of the encoder's hidden layers; the decoder has them in reverse; no "
             "number: no hidden layer (default: 512)")
    add("--num_filters", type=number(int, 1), default=8, metavar="N",
        help="width of the cnn (8 N channels, then 16 N) or of the resnet (N channels, 2 N, then 4 N)")
    add("--prior", choices=list(PRIORS), default="normal",
        help="of a VAE; flow: coupling layers, trained with the model, in place of N(0, I). With one latent "
             "dimension that is a Gaussian with a learned mean and scale")
    add("--prior_layers", type=number(int, 1), default=8, metavar="N",
        help="number of coupling layers of --prior flow")

    add = parser.add_argument_group("objective").add_argument
    add("--recon_loss", choices=list(LIKELIHOODS),
        help="likelihood of an image given z; mse: squared error; gaussian: of a learned scale; logistic: a "
             "logistic density, cut into bins around the levels; bce: Bernoulli; categorical: a softmax over "
             "levels (default: bce for 2 levels, categorical for 16, for 256 gaussian, or mse for an "
             "autoencoder)")
    add("--target_beta_val", type=number(float, 0), default=1.0, metavar="BETA", help="weight of the KL")
    add("--beta_mode", choices=("constant", "linear", "cyclical"), default="constant",
        help="how beta changes over the epochs; linear: 0 in the first one, then BETA / epochs more in each; "
             "cyclical: up to four cycles, each rises from 0 in its first half and stays at BETA in its "
             "second")
    add("--free_bits", type=number(float, 0), default=0.0, metavar="NATS",
        help="against posterior collapse: do not push an image's KL in a latent dimension below this")
    add("--iw_train", type=number(int, 0), default=0, metavar="K",
        help="train with the importance-weighted bound of K latents per image; 0: with the ELBO")

    add = parser.add_argument_group("optimisation").add_argument
    add("--epochs", "--user_epochs", type=number(int, 1), default=10, metavar="N",
        help="passes over the training images")
    add("--batch_size", type=number(int, 1), default=128, metavar="N", help="images in a step")
    add("--optimizer", choices=list(OPTIMIZERS), default="adamw",
        help="muon: orthogonalised steps for matrices, those of AdamW for the rest")
    add("--lr", "--learning_rate", type=number(float, 0, above=True), default=2e-3, metavar="LR",
        help="learning rate")
    add("--lr_schedule", choices=("constant", "cosine"), default="constant",
        help="cosine: up to LR in the first hundredth of the steps, then down to 0")
    add("--ema", type=number(float, 0), default=0.999, metavar="DECAY",
        help="validate, draw and test with a moving average of the weights, with this decay per step; 0: off")
    add("--weight_decay", type=number(float, 0), default=0.0, metavar="W", help="decoupled weight decay")
    add("--grad_clip", type=number(float, 0), metavar="NORM",
        help="clip the gradient's norm; losses are sums, so norms of hundreds are normal; 0: off (default: "
             "1000 with --beta_mode linear or cyclical, or else 0)")

    add = parser.add_argument_group("run").add_argument
    add("--log_dir", type=run_name, metavar="NAME",
        help="name of the run, a/b for a subfolder (default: made of the arguments, such as vae_mnist_cnn)")
    add("--results_dir", default="results", metavar="DIR", help="where pictures and figures go")
    add("--checkpoint_dir", default="checkpoints", metavar="DIR", help="where checkpoints go")
    add("--overwrite", action="store_true", help="replace the run that has this name, and its seed_N")
    add("--seed", type=number(int, 0), default=1, metavar="N", help="seed of all random numbers")
    add("--seeds", type=number(int, 0), nargs="+", metavar="N",
        help="a run for each seed, then mean ± standard deviation; the same command with --log_dir resumes "
             "them (default: only --seed)")
    add("--device", type=device_type, default=cli.default_device(), help="cpu, cuda or mps")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="precision of the networks in training (on CUDA, fp32 has tf32 products); auto: bf16 if the "
             "hardware supports it, or else fp32, since bf16 would be many times slower")
    add("--compile", action="store_true", help="use torch.compile")
    add("--progress_bar", action=argparse.BooleanOptionalAction, default=sys.stderr.isatty(),
        help="show the progress of an epoch (default: only on a terminal)")
    add("--resume", type=Path, metavar="FILE",
        help="continue the run of this checkpoint, or of the last.pt in this folder, with its arguments "
             "(default: a new run)")
    add("--save_every", type=number(float, 0), default=60.0, metavar="SECONDS",
        help="save last.pt this often, besides at the end of each epoch")
    return parser


def parse_args(argv=None):
    """→ the arguments, and the checkpoint to go on from (None for a new run)"""
    parser, unset = make_parser(), object()  # parsed onto `unset` to know which options were given
    defaults = vars(parser.parse_args([]))
    given = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in given.items() if value is not unset}
    if "resume" in given:
        return resume_args(parser, defaults, given)
    args = Namespace(**{**defaults, **given})
    check_args(parser, args)
    args.recon_loss = args.recon_loss or default_likelihood(args.levels, args.loss_mode == "vae")
    if args.grad_clip is None:  # while beta is small, one strange image can have a gradient that ends a run
        args.grad_clip = 1000.0 if args.loss_mode == "vae" and args.beta_mode != "constant" else 0.0
    if args.precision == "auto":  # chosen once, so that a resumed run goes on as it began
        args.precision = cli.default_precision(args.device)
    if args.image_size:
        args.image_size = [args.image_size[0], args.image_size[-1]]
    args.command = shlex.join(["python", "train.py", *map(str, sys.argv[1:] if argv is None else argv)])
    unused = dict.fromkeys(runs.OF_KL, "ae") if args.loss_mode == "ae" else {}
    unused |= {name: args.model for name in ("hidden_dims", "num_filters")
               if name not in NETWORKS[args.model][2]}
    for name, where in unused.items():
        if name in given:
            warn(f"--{name} changes nothing with {where}")
    return args, None


def check_args(parser, args):
    """Exit if the arguments contradict each other, or name something that is not there or is taken."""
    problem = dataset_problem(args.dataset)
    if problem:
        parser.error(f"argument --dataset: {problem}" + cli.did_you_mean(args.dataset, DATASETS))
    low, high = args.value_range or (0, 1)
    if args.value_range and (args.dataset in DATASETS or not 1e-30 < abs(high - low) < 1e30):
        parser.error(f"argument --value_range: {low:g} {high:g} " + (
            f"goes with a folder or an array file, not with {args.dataset}" if args.dataset in DATASETS else
            "are too near or too far apart; black and white are two different values, such as 0 and 255"))
    for name in ("results_dir", "checkpoint_dir", "data_dir"):
        if args.dataset not in DATASETS and \
                Path(vars(args)[name]).resolve().is_relative_to(Path(args.dataset).resolve()):
            parser.error(f"argument --dataset: --{name} {vars(args)[name]} lies within {args.dataset!r}, so "
                         "what is written there would become images of it; move one of them")
    for root in (args.results_dir, args.checkpoint_dir) if args.dataset not in DATASETS else ():
        folder = Path(root, args.log_dir or "")
        if args.log_dir and Path(args.dataset).resolve().is_relative_to(folder.resolve()):
            parser.error(f"argument --log_dir: {args.dataset!r} lies within {folder}, where the run would "
                         "write pictures; take another name")
    if max(args.image_size or [0]) > 2048:
        parser.error(f"argument --image_size: {max(args.image_size)} is too large; 2048 is the most")
    if len(args.image_size or ()) > 2:
        parser.error(f"argument --image_size: {len(args.image_size)} numbers, only height [width]")
    if args.binarize == "stochastic" and args.levels != 2:
        parser.error(f"argument --binarize: stochastic goes with --levels 2, not {args.levels}")
    for name in ("conditional", "prior", "free_bits", "iw_train"):
        if args.loss_mode == "ae" and vars(args)[name] != parser.get_default(name):
            parser.error(f"argument --{name}: goes with --loss_mode vae, not ae")
    if args.prior != "flow" and args.prior_layers != parser.get_default("prior_layers"):
        parser.error(f"argument --prior_layers: {args.prior_layers} goes with --prior flow, not {args.prior}")
    if args.prior != "normal" and args.free_bits:
        parser.error(f"argument --free_bits: {args.free_bits} does not go with --prior {args.prior}, whose "
                     "KL has no parts by dimension")
    if args.warp > 1:
        parser.error(f"argument --warp: {args.warp:g} is not allowed, only a share of the epochs from 0 to 1")
    if args.ema >= 1:
        parser.error(f"argument --ema: {args.ema:g} is not allowed, only a number below 1, such as 0.999")
    for name, only in (("target_beta_val", 1), ("beta_mode", "constant"), ("free_bits", 0)):
        if args.iw_train and vars(args)[name] != only:
            parser.error(f"argument --{name}: {vars(args)[name]} does not go with --iw_train, whose bound "
                         "has no KL to weight")
    if args.seeds and args.seed != parser.get_default("seed"):
        parser.error(f"argument --seed: {args.seed} does not go with --seeds, which names all seeds")
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        parser.error(f"argument --seeds: {' '.join(map(str, args.seeds))} names a seed twice")
    for root in (args.results_dir, args.checkpoint_dir):
        folder = Path(root, args.log_dir or "")
        taken = runs.holds_run(folder) or (runs.holds_seeds(folder) and not args.seeds)
        if args.log_dir and not args.overwrite and taken:
            parser.error(f"argument --log_dir: {folder} holds a run already; {runs.HOW_TO_GO_ON}")


def resume_args(parser, defaults, given):
    """→ the arguments of the run to resume, its checkpoint"""
    path = given.pop("resume")
    path = path / "last.pt" if path.is_dir() else path
    others = [other.as_posix() for other in (sorted(path.parent.glob("*.pt"))
                                             or sorted(path.parent.glob("seed_*/last.pt"))) if other != path]
    if not path.is_file():
        killed = not others and (path.parent / "lock").exists()
        parser.error(f"argument --resume: {str(path)!r} is not there; " + (
            "the run was killed before it was saved; start it anew, with --overwrite" if killed else
            f"only a file such as {' or '.join(others) or 'checkpoints/NAME/last.pt'}"))
    for name in given:
        if name not in ("dataset", "data_dir", "save_every", "progress_bar", "device", "epochs"):
            parser.error(f"argument --{name}: not with --resume, which keeps the run's value; allowed are "
                         "--dataset (where it was moved to), --data_dir, --save_every, --progress_bar, "
                         "--device and --epochs")
    try:
        checkpoint = verify_checkpoint(path)
    except UserError as error:
        others = [other for other in others if is_whole(Path(other))]
        raise UserError(f"{error}; " + (f"whole, and good for --resume: {', '.join(others)}" if others else
                                        f"nothing else in {path.parent} can be resumed"))
    last = path.parent / "last.pt"
    if path.name != "last.pt" and is_whole(last) \
            and runs.load_checkpoint(last)["step"] > checkpoint["step"]:
        parser.error(f"argument --resume: {path} is older than {last}, which would be lost; resume that, or "
                     f"copy {path.name} into a new folder, such as checkpoints/OTHER, and resume it there")
    began = {**defaults, **checkpoint["args"], "resume": None, "overwrite": False,
             "progress_bar": defaults["progress_bar"]}
    args = Namespace(**{**began, **given})
    fixed = scheduled(args)
    if args.epochs < checkpoint["epoch"] or (args.epochs != began["epochs"] and fixed):
        parser.error(f"argument --epochs: not {args.epochs} with --resume; it must be " + (
            f"{began['epochs']}, because {fixed[0]} depends on it" if fixed else
            f"{checkpoint['epoch']} or more, since epoch {checkpoint['epoch']} is finished"))
    try:
        device_type(args.device)
    except argparse.ArgumentTypeError:
        parser.error(f"argument --device: the run began on {began['device']}, which is not on this machine; "
                     f"--device {cli.default_device()} continues it; the last bits will differ")
    if args.device != began["device"]:
        warn(f"--device {args.device}: the run began on {began['device']}, so its result will differ in the "
             "last bits")
    find_run(parser, path, args, given)
    problem = dataset_problem(args.dataset)
    if problem:
        parser.error(f"argument --dataset: {problem}" if "dataset" in given else
                     f"argument --resume: the run's dataset {problem}; give its new place with --dataset")
    return args, checkpoint


def find_run(parser, path, args, given):
    """Set checkpoint_dir and log_dir of the run from where its checkpoint is now: it may have been moved,
    copied or renamed (see also runs.name_of_run), or named from another working directory. In the last case
    the run's other relative paths are moved too, except those given on the command line.
    """
    folder, name = path.resolve().parent, Path(args.log_dir).parts
    if folder.parts[-len(name):] != name:
        name = folder.parts[-len(name):] if folder.name.startswith("seed_") else folder.parts[-1:]
        try:
            run_name("/".join(name))
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --resume: rename its folder, {error}")
    root, began = folder.parents[len(name) - 1], Path(args.checkpoint_dir)
    args.log_dir = "/".join(name)
    if root == began.resolve():
        return
    args.checkpoint_dir = str(root)
    if not began.is_absolute() and root.parts[-len(began.parts):] == began.parts:
        base = root.parents[len(began.parts) - 1]  # the working directory of the training
        for other in ("results_dir", "data_dir", "dataset"):
            if other not in given and not (other == "dataset" and args.dataset in DATASETS):
                setattr(args, other, str(base / getattr(args, other)))


def scheduled(args):
    """The options in use that depend on --epochs, which a resumed run with any of them cannot change. A
    --warp of 1 bends images in every epoch, so it does not depend on their number.
    """
    names = ["beta_mode"] * (args.loss_mode == "vae") + ["lr_schedule", "warp"]
    return [f"--{name}" for name in names if vars(args)[name] not in ("constant", 0, 1)]
