"""Turn a checkpoint into pictures: python infer.py --ckpt checkpoints/NAME/best.pt"""

import math
import re
import sys
from pathlib import Path

import torch

from data import load
from model import build
from utils import (ArgumentParser, UserError, call, default_device, device_type, interleave, load_checkpoint,
                   number, one_line, save_grid, save_picture, stream, visualize_manifold)


def parse_args(argv=None):
    parser = ArgumentParser(description="Turn a checkpoint into pictures, in results/<run>/.")
    default = "(default: %(default)s)"
    parser.add_argument("--ckpt", type=Path, metavar="FILE",
                        help="(default: the newest checkpoints/**/best.pt)")
    parser.add_argument("--results_dir", metavar="DIR",
                        help="where pictures go (default: where the training's went)")
    parser.add_argument("--dataset", metavar="PATH",
                        help="the folder of images, if it was moved (default: as in training)")
    parser.add_argument("--data_dir", "--data_folder", metavar="DIR",
                        help="where a named dataset is (default: as in training)")
    parser.add_argument("--only", metavar="NAMES", default=",".join(PICTURES),
                        help=f"comma-separated {default}")
    parser.add_argument("--num_samples", type=number(int, 1), default=64, metavar="N", help=default)
    parser.add_argument("--temperature", type=number(float, 0), default=1.0, metavar="T",
                        help=f"scales the prior's standard deviation {default}")
    parser.add_argument("--classes", nargs="+", metavar="NAME",
                        help="of a conditional model: only these (default: all)")
    parser.add_argument("--seed", type=number(int, 0), default=1, metavar="N", help=default)
    parser.add_argument("--device", type=device_type, default=default_device(), help=default)
    args = parser.parse_args(argv)
    args.only = args.only.split(",")
    for name in args.only:
        if name not in PICTURES:
            parser.error(f"argument --only: {name!r} is none of {', '.join(PICTURES)}")
    if args.ckpt is None:
        found = sorted(Path("checkpoints").glob("**/best.pt"), key=lambda path: path.stat().st_mtime)
        if not found:
            parser.error("argument --ckpt: there is no checkpoints/**/best.pt here; train one with python "
                         "train.py")
        args.ckpt = found[-1]
    if not args.ckpt.is_file():
        parser.error(f"argument --ckpt: {str(args.ckpt)!r} is "
                     f"{'a folder' if args.ckpt.is_dir() else 'not there'}; "
                     "only a file such as checkpoints/NAME/best.pt")
    return args


def restore(path, device):
    """A checkpoint's model, ready to use, and the checkpoint."""
    state = load_checkpoint(path)
    try:
        model = build(state["args"], state["data"])
        model.load_state_dict(state["model"])
        for name in ("results_dir", "dataset", "data_dir", "image_size", "levels", "binarize", "transform"):
            state["args"][name]
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not hold a model of this project ({one_line(error)})")
    return model.to(device).eval(), state


def chosen_classes(args, about):
    """The labels that --classes gives, all by default; by number where no class has a number for its name.

    → int64 [n]
    """
    names = about["classes"]
    label = {name: i for i, name in enumerate(names)}
    if not any(name.isdecimal() for name in names):
        label |= {str(i): i for i in range(len(names))}
    unknown = [name for name in args.classes or () if name not in label]
    if unknown:
        raise UserError(f"--classes: there is no {', '.join(unknown)}, only {', '.join(names)}")
    return torch.tensor([label[name] for name in args.classes or names], device=args.device)


# ------------------------------------------------------------------------------------------------------------
# One function a picture: (model, about, split, args, save) → nothing, or why there is none.
# split is the test split, None where the dataset is not on this machine.

def samples(model, about, split, args, save):
    """Mean images of samples from the prior and, where the likelihood is one of discrete pixels, draws from
    it.
    """
    columns, labels = math.ceil(math.sqrt(args.num_samples)), None
    if args.conditional:
        labels = chosen_classes(args, about)
        labels = labels[torch.arange(args.num_samples, device=args.device) * len(labels) // args.num_samples]
    drawn, mean = model.sample(args.num_samples, labels, args.temperature, stream(args.seed, "samples"))
    save(mean, "samples", columns, f"samples from {model.prior_name}: mean images")
    if model.is_likelihood:
        save(drawn / (about["levels"] - 1), "samples_drawn", columns,
             f"the same samples from {model.prior_name}: pixels drawn from the likelihood")


def reconstructions(model, about, split, args, save):
    """Random test images, and below each the decoder's mean image of its latent."""
    order = shuffled(split, about, args, "reconstructions")
    if not len(order):
        return "no test image is of these classes"
    images, labels = split.batch(order[:64])
    pairs = interleave(images / (about["levels"] - 1), model.reconstruct(images, labels), 16)
    save(pairs, "reconstructions", 16, "test images, the reconstruction below each")


def interpolations(model, about, split, args, save, steps=10):
    """Straight lines in the latent space between two test images (of one class where the model is
    conditional).
    """
    order = shuffled(split, about, args, "interpolations")
    if not len(order):
        return "no test image is of these classes"
    first, last = order[:8], order.flip(0)[:8]
    if args.conditional:
        last = torch.stack([order[split.labels[order] == split.labels[i]][-1] for i in first])
    (a, labels), (b, _) = split.batch(first), split.batch(last)
    weights = torch.linspace(0, 1, steps, device=a.device)[:, None]
    rows = []
    for i, (start, end) in enumerate(zip(model.embed(a, labels), model.embed(b, labels))):
        between = model.mean_image(model.decode(torch.lerp(start, end, weights), labels[i].expand(steps)))
        rows += [a[i:i + 1] / (about["levels"] - 1), between, b[i:i + 1] / (about["levels"] - 1)]
    save(torch.cat(rows), "interpolations", steps + 2,
         "test images at the two ends, between them the straight line from the one's latent to the other's")


def manifold(model, about, split, args, save):
    """A 2-D latent space, decoded at the percentiles of the prior; for a conditional model one picture a
    class.
    """
    if model.latent_size != 2:
        return f"the latent has {model.latent_size} dimensions, not 2"
    for label in chosen_classes(args, about) if args.conditional else [None]:
        def decoder(z):
            z = model.to_prior(args.temperature * z.to(args.device))
            return model.mean_image(model.decode(z, label if label is None else label.expand(len(z)))).cpu()
        name = "" if label is None else about["classes"][label]
        file, caption = "manifold", f"the 2-D latent space at the percentiles of {model.prior_name}"
        if name:
            file, caption = re.sub(r"[^\w-]+", "_", f"{file}_{name}"), f"{caption}, class {name}"
        save(visualize_manifold(decoder), file, None, caption)


def classes(model, about, split, args, save, columns=10):
    """A row a class, the same latent down each column."""
    if not args.conditional:
        return "the model is not conditional"
    labels = chosen_classes(args, about)
    z = model.prior(columns, args.temperature, stream(args.seed, "classes"))
    images = model.mean_image(model.decode(z.repeat(len(labels), 1), labels.repeat_interleave(columns)))
    names = ", ".join(about["classes"][label] for label in labels.tolist())
    save(images, "classes", columns, f"a row a class ({names}), the same latent down each column")


def shuffled(split, about, args, purpose):
    """The images of the split, or those of the chosen classes, in a random order. → indices, int64 [n]"""
    order = torch.randperm(len(split), generator=stream(args.seed, purpose)).to(args.device)
    return order[torch.isin(split.labels[order], chosen_classes(args, about))] if args.conditional else order


PICTURES = {"samples": samples, "reconstructions": reconstructions, "interpolations": interpolations,
            "manifold": manifold, "classes": classes}
NEED_DATA = {"reconstructions", "interpolations"}


@torch.no_grad()
def main(argv=None):
    args = parse_args(argv)
    model, state = restore(args.ckpt, args.device)
    trained, about = state["args"], state["data"]
    args.conditional = trained["conditional"]
    if args.classes and not args.conditional:
        raise UserError(f"--classes: {args.ckpt} is not a conditional model")
    if args.conditional:
        chosen_classes(args, about)  # a class that does not exist ends it before anything is drawn

    split = None
    if NEED_DATA & set(args.only):
        try:
            data = load(args.dataset or trained["dataset"], args.data_dir or trained["data_dir"],
                        trained["image_size"], trained["levels"], trained["binarize"], trained["transform"],
                        device=args.device, download=False)
            if any(data.about()[name] != about[name] for name in ("shape", "levels", "classes")):
                raise UserError(f"{args.dataset or trained['dataset']} is not what the model was trained on: "
                                f"{about['shape']}, classes {about['classes']}")
            split = data.test
        except (UserError, OSError) as error:
            left_out = [name for name in args.only if name in NEED_DATA]
            args.only = [name for name in args.only if name not in NEED_DATA]
            print(f"left out {', '.join(left_out)}: {error}", file=sys.stderr)

    folder = Path(args.results_dir or trained["results_dir"]) / trained["log_dir"]
    folder.mkdir(parents=True, exist_ok=True)

    def save(images, name, nrow, caption):
        path, caption = folder / f"{name}.png", f"{trained['log_dir']}: {caption}"
        save_picture(images, path, caption) if nrow is None else save_grid(images, path, nrow, caption)
        print(path)

    for name in args.only:
        reason = PICTURES[name](model, about, split, args, save)
        if reason:
            print(f"left out {name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    call(main)
