"""Turn a checkpoint into pictures, or measure it: python infer.py --ckpt checkpoints/NAME/best.pt

From Python: `model, checkpoint = restore("checkpoints/NAME/best.pt")`.
"""

import processors  # isort: skip (before torch)
import sys
from pathlib import Path

import torch

import cli
import figures
from cli import ArgumentParser, UserError, device_type, few, number, one_line, run_script
from data import dataset_problem, load_with, own_images
from datasets import DATASETS
from distributions import Mixture
from evaluate import evaluate, evaluate_samples, print_metrics
from export import export_latents, export_samples, renew_page, write_page
from model import build
from pictures import NEED_DATA, PICTURES, Subject, compare, draw_images, explore
from runs import (
    describe_checkpoint,
    differing_arguments,
    find_checkpoint,
    is_unfinished,
    load_checkpoint,
    write_json,
)


def restore(path, device="cpu"):
    """The model of a checkpoint in evaluation mode, without gradients of its weights, and the checkpoint, a
    dictionary.

    path: a string or a path; device: such as "cpu" or "cuda"
    Raises UserError if the file is damaged or not of this project.
    """
    checkpoint = load_checkpoint(path)
    try:
        model = build(checkpoint["args"], checkpoint["data"])
        model.load_state_dict(checkpoint.get("ema") or checkpoint["model"])
        if checkpoint["fitted"]:
            model.fitted = Mixture(**checkpoint["fitted"])
        for name in ("results_dir", "dataset", "data_dir", "image_size", "value_range", "levels", "binarize",
                     "transform", "limit"):
            checkpoint["args"][name]  # raises KeyError if it is missing
        checkpoint["data"]["images"], checkpoint["data"]["crc32"], checkpoint["epoch"], checkpoint["history"]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not hold a model of this project ({one_line(error)})")
    return model.to(device).eval().requires_grad_(False), checkpoint


# ------------------------------------------------------------------------------------------------------------
# Drawing, measuring, exporting

def draw(subject):
    """Draw the pictures of --only, or all that apply, and the page. Raises UserError if one of --only is left
    out.
    """
    subject.folder.mkdir(parents=True, exist_ok=True)
    if {"samples", "classes", "nearest"} & set(subject.args.only or PICTURES):
        warn_without_mixture(subject)
    left_out, names = [], subject.args.only or PICTURES
    for name in names:
        if name in NEED_DATA and not subject.data:
            reason = "it needs the dataset"
        elif name in NEED_DATA and not len(subject.shuffled(name)):
            reason = "no test image is of these classes"
        else:
            reason = PICTURES[name](subject)
        left_out += [f"left out {name}: {reason}"] * bool(reason)
    if len(left_out) < len(names):
        print(f"open {write_page(subject)} to see them all")
    if subject.args.only and left_out:
        raise UserError("; ".join(left_out))
    if subject.data and not len(subject.shuffled("any")):
        print(f"no test image is of these classes, so without {', '.join(sorted(NEED_DATA))}",
              file=sys.stderr)


def warn_without_mixture(subject):
    prior = subject.model.prior
    if subject.model.fitted is None and prior is not None and prior.wants_mixture \
            and subject.args.prior != "model":
        print("no mixture is fitted to the latents of this checkpoint (best.pt gets one when the run ends): "
              f"samples are drawn from {prior.description}, and look worse", file=sys.stderr)


def quality(subject):
    """The figures of samples of a Subject, see evaluate_samples."""
    trained, args = subject.trained, subject.args
    folder = Path(args.data_dir or trained["data_dir"])

    def grey():
        return load_with(trained, dataset=args.dataset or trained["dataset"], data_dir=folder, levels=256,
                         binarize="threshold", limit=None, device=args.device, download=False)
    return evaluate_samples(subject.model, subject.data, grey, args, folder / "cache")


def measure(subjects):
    """Write evaluation.json of each, and print the figures; of several finished seeds also their mean."""
    measured = []
    for subject in subjects:
        measured.append(evaluate(subject.model, subject.data, subject.args) | quality(subject))
        subject.folder.mkdir(parents=True, exist_ok=True)
        path = subject.folder / "evaluation.json"
        write_json(path, {"ckpt": subject.path.as_posix(), "epoch": subject.checkpoint["epoch"],
                          **measured[-1]})
        print(path)
        print_metrics(measured[-1:])
        renew_page(subject)
        if measured[-1]["iw_nll"] is None and subject.model.prior is not None:
            print(f"no NLL: {subject.trained['recon_loss']} is no likelihood of discrete pixels; train with "
                  f"--recon_loss {'bce' if subject.about['levels'] == 2 else 'logistic'}")
        elif measured[-1]["iw_nll"] and (subject.about["levels"], subject.trained["binarize"]) == (
                2, "threshold"):
            print("white where x > 0.5: published figures of binary MNIST are of pixels drawn at random "
                  "(--binarize stochastic) and cannot be compared with these")
    trained = [subject.trained for subject in subjects]
    if differing_arguments(trained) == ["seed"] and len({run["seed"] for run in trained}) == len(trained):
        other = [subject for subject in subjects if not subject.checkpoint["finished"]]
        # the figures of an unfinished run are of fewer epochs, and of samples without the mixture
        if 0 < len(other) < len(subjects) or any(is_unfinished(subject.checkpoint) for subject in other):
            print("no mean of the seeds, because not all are the best.pt of a finished run: "
                  + few(subject.path.as_posix() for subject in other))
        else:
            print("mean ± standard deviation of the seeds")
            print_metrics(measured)


def export(subject, split, own_classes):
    """Write the numbers of each image of a split, or of --images, whose labels are of own_classes. Raises
    UserError if a conditional model needs a class for these.
    """
    classes = subject.about["classes"]
    if subject.args.images and subject.conditional:
        if len(subject.asked_labels) == 1:
            split.labels[:] = subject.asked_labels
        elif not subject.args.classes and set(own_classes) <= set(classes):
            number = torch.tensor([classes.index(name) for name in own_classes]).to(split.labels)
            split.labels = number[split.labels]
        else:
            raise UserError("--export: the model is conditional; --classes names the class of these images, "
                            "if they are not in folders with the names of its classes")
    elif subject.args.images:
        classes = own_classes
    subject.folder.mkdir(parents=True, exist_ok=True)
    part = "images" if subject.args.images else subject.args.split
    export_latents(subject.model, split, classes, subject.args,
                   subject.folder / ("latents" if part == "test" else f"latents_{part}"))


# ------------------------------------------------------------------------------------------------------------
# Arguments

def parse_args(argv=None):
    parser = ArgumentParser(description="Turn a checkpoint into pictures, or measure it, in results/<run>/.")
    parser.add_argument("--ckpt", type=Path, nargs="*", metavar="FILE",
        help="a checkpoint, or the folder of a best.pt (default, also without a name: the newest "
             "checkpoints/**/best.pt)")
    mode = parser.add_argument_group("in place of pictures").add_mutually_exclusive_group()
    mode.add_argument("--evaluate", action="store_true", help="measure the model on the test images")
    mode.add_argument("--compare", action="store_true", help="one picture of several checkpoints")
    mode.add_argument("--explore", action="store_true",
                      help="open a window to move through the latent space by hand")
    mode.add_argument("--export", action="store_true",
                      help="write latents.csv and latents.npz: z, KL, loss and squared error of each image")
    mode.add_argument("--export_samples", type=number(int, 1), metavar="N",
                      help="write N samples as PNG files")
    add = parser.add_argument_group("which samples and images").add_argument
    add("--images", type=Path, nargs="+", metavar="PATH",
        help="draw, or --export, these image files or folders in place of the test images; of two images "
             "also what lies between them")
    add("--only", metavar="NAMES",
        help=f"which pictures, separated by commas (default: all that apply of {', '.join(PICTURES)})")
    add("--num_samples", type=number(int, 1), default=64, metavar="N", help="of samples.png")
    add("--temperature", type=number(float, 0), default=1.0, metavar="T",
        help="scales the standard deviation of the prior")
    add("--prior", choices=("model", "fitted"),
        help="what samples are drawn from: the prior of training, or the mixture fitted to latents after it "
             "(default: fitted, where there is one)")
    add("--classes", nargs="+", metavar="NAME",
        help="of a conditional model: only these (default: all); with --export the class of --images")
    add("--split", choices=("train", "val", "test"), default="test", help="with --export: which images")
    add("--iw_samples", type=number(int, 1), default=500, metavar="K",
        help="with --evaluate: latents per image for the likelihood")
    add("--limit", type=number(int, 1), metavar="N",
        help="with --evaluate: only a fixed random N of the test images (default: all; the quality of "
             "samples needs 2,000)")
    add = parser.add_argument_group("places and machine").add_argument
    add("--results_dir", metavar="DIR", help="where pictures go (default: the --results_dir of the training)")
    add("--dataset", metavar="PATH",
        help="the folder or array file, if it was moved (default: as in training)")
    add("--data_dir", "--data_folder", metavar="DIR",
        help="where a named dataset is (default: as in training)")
    add("--seed", type=number(int, 0), default=1, metavar="N", help="of all random numbers")
    add("--device", type=device_type, default=cli.default_device(), help="cpu, cuda or mps")
    args = parser.parse_args(argv)
    check_args(parser, args)
    args.newest = not args.ckpt
    args.ckpt = [find_checkpoint(parser, path) for path in args.ckpt or [None]]
    return args


def check_args(parser, args):
    """Exit if the arguments contradict each other, or name something that does not exist."""
    chosen = next((name for name in ("evaluate", "compare", "explore", "export", "export_samples")
                   if vars(args)[name]), "draw")
    draws = ("draw", "compare", "explore", "export_samples")
    for name, modes in (("only", ("draw",)), ("num_samples", ("draw",)), ("temperature", draws),
                        ("prior", draws), ("classes", (*draws, "export")), ("iw_samples", ("evaluate",)),
                        ("limit", ("evaluate",)), ("split", ("export",)), ("images", ("draw", "export"))):
        if vars(args)[name] != parser.get_default(name) and chosen not in modes:
            parser.error(f"argument --{name}: goes with " + (
                f"drawing, not with --{chosen}" if "draw" in modes else f"--{modes[0]}"))
    for name in ("only", "split", "num_samples", "temperature", "prior"):
        if args.images and vars(args)[name] != parser.get_default(name):
            parser.error(f"argument --images: not beside --{name}")
    if args.classes and args.export and not args.images:
        parser.error("argument --classes: with --export it goes with --images; without these all classes are "
                     "exported, and the column label names them")
    for path in args.images or ():
        if not path.exists():
            parser.error(f"argument --images: {str(path)!r} is not there")
    args.only = args.only and args.only.split(",")
    for name in args.only or ():
        if name not in PICTURES:
            parser.error(f"argument --only: {name!r} is none of {', '.join(PICTURES)}"
                         + cli.did_you_mean(name, PICTURES))
    if args.dataset and dataset_problem(args.dataset):
        parser.error(f"argument --dataset: {dataset_problem(args.dataset)}"
                     + cli.did_you_mean(args.dataset, DATASETS))
    if args.compare and len(args.ckpt or ()) < 2:
        parser.error("argument --compare: goes with two or more checkpoints after --ckpt")
    if len(args.ckpt or ()) > 1 and chosen not in ("compare", "evaluate"):
        parser.error(f"argument --ckpt: {len(args.ckpt)} checkpoints, but only --compare and --evaluate take "
                     "more than one")


def open_checkpoint(path, args):
    """→ the Subject, with its dataset if that is needed and here. Raises UserError."""
    model, checkpoint = restore(path, args.device)
    trained = checkpoint["args"]
    folder = Path(args.results_dir or trained["results_dir"]) / trained["log_dir"]
    subject = Subject(model, checkpoint, path, None, args, folder)
    if args.classes and not subject.conditional:
        raise UserError(f"--classes: {path} is not a conditional model")
    if subject.conditional:
        _ = subject.asked_labels  # raises now, before anything is drawn, if one does not exist
    if not (args.images or args.export_samples) and NEED_DATA & set(args.only or NEED_DATA):
        try:
            subject.data = read_data(args, trained, checkpoint["data"])
        except (UserError, OSError) as error:
            if args.evaluate or args.export or args.dataset:
                raise
            lost = "" if args.only or args.compare or args.explore else \
                f", and so without {', '.join(sorted(NEED_DATA))}"
            moved = trained["dataset"] not in DATASETS and not Path(trained["dataset"]).exists()
            print(f"without the dataset{lost}: {error}" + "; give its new place with --dataset" * moved,
                  file=sys.stderr)
    return subject


def read_data(args, trained, about):
    """The dataset of a checkpoint. Raises UserError if it is another one, or not on this machine."""
    name = args.dataset or trained["dataset"]
    data = load_with(trained, dataset=name, data_dir=args.data_dir or trained["data_dir"], device=args.device,
                     download=False)
    differing = [part for part in ("shape", "levels", "classes") if data.about()[part] != about[part]]
    if differing:
        raise UserError(f"{name} is not what the model was trained on (it differs in "
                        f"{', '.join(differing)}); --images takes any images")
    if any(data.about()[part] != about[part] for part in ("images", "crc32")):
        raise UserError(f"{name} has changed since the model was trained: images of the training may be "
                        "among its test images now; bring it back as it was, or give any images to "
                        "--images")
    return data


@torch.no_grad()
def main(argv=None):
    args = parse_args(argv)
    cli.allow_tf32(False)
    if not processors.THREADS_CHOSEN:
        cli.set_threads(min(torch.get_num_threads(), processors.available()))
    if args.explore:
        figures.want_window()
    subjects = [open_checkpoint(path, args) for path in args.ckpt]
    if args.newest:
        print(describe_checkpoint(subjects[0].path, subjects[0].checkpoint))
    if args.compare:
        compare(subjects, args)
    elif args.evaluate:
        measure(subjects)
    elif args.images or args.export:
        subject = subjects[0]
        if args.images:
            split, own_classes = own_images(args.images, subject.about, subject.trained["transform"],
                                            subject.trained["value_range"], subject.trained["binarize"],
                                            args.device)
            shape, levels = "x".join(map(str, subject.about["shape"])), subject.about["levels"]
            drawn = "drawn at random " * ((levels, subject.trained["binarize"]) == (2, "stochastic"))
            print(f"--images: {len(split):,}, brought to {shape} pixels of {levels} levels, {drawn}as in "
                  "training")
        else:
            split, own_classes = getattr(subject.data, args.split), None
        if args.export:
            export(subject, split, own_classes)
        else:
            draw_images(subject, split)
            renew_page(subject)
    elif args.export_samples:
        warn_without_mixture(subjects[0])
        export_samples(subjects[0], args.export_samples)
    elif args.explore:
        window = explore(subjects[0])  # kept, because its widgets live as long as it does
        figures.show()
        return window
    else:
        draw(subjects[0])


if __name__ == "__main__":
    run_script(main)
