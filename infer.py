"""Turn a checkpoint into pictures, or measure it: python infer.py --ckpt checkpoints/NAME/best.pt"""

import math
import re
import sys
from pathlib import Path

import torch

from tqdm import tqdm

from data import load
from model import VAE, build
from utils import (KLD, ArgumentParser, UserError, active_units, call, default_device, device_type,
                   elbo_to_bpd, interleave, load_checkpoint, moments, multiply_in_tf32, normal, number,
                   one_line, save_grid, save_picture, stream, visualize_manifold, write_json)


def parse_args(argv=None):
    parser = ArgumentParser(description="Turn a checkpoint into pictures, or measure it, in results/<run>/.")
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
    parser.add_argument("--evaluate", action="store_true",
                        help="measure the model on the test images in place of drawing (default: draw)")
    parser.add_argument("--iw_samples", type=number(int, 1), default=500, metavar="K",
                        help=f"with --evaluate: latents an image for the likelihood {default}")
    parser.add_argument("--limit", type=number(int, 1), metavar="N",
                        help="with --evaluate: of a fixed random N of the test images (default: all)")
    parser.add_argument("--seed", type=number(int, 0), default=1, metavar="N", help=default)
    parser.add_argument("--device", type=device_type, default=default_device(), help=default)
    args = parser.parse_args(argv)
    drawing, measuring = ("only", "num_samples", "temperature", "classes"), ("iw_samples", "limit")
    for name in drawing if args.evaluate else measuring:
        if vars(args)[name] != parser.get_default(name):
            parser.error(f"argument --{name}: goes {'without' if args.evaluate else 'with'} --evaluate")
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
        model.load_state_dict(state.get("ema") or state["model"])
        for name in ("results_dir", "dataset", "data_dir", "image_size", "levels", "binarize", "transform",
                     "limit"):
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


# ------------------------------------------------------------------------------------------------------------
# Measuring

DECODED = 2**20  # numbers that a decoder gives at a time, which bounds the memory


def evaluate(model, data, args):
    """The figures of evaluation.json, means over test images. In nats an image: the negative ELBO, its two
    parts, and the negative log-likelihood by importance sampling (Burda et al. 2016, eq. 8), each with
    iw_samples latents an image (one where the loss is no likelihood); squared errors are on [0, 1], and psnr
    is that of their mean. None where a figure does not apply.
    """
    order = torch.randperm(len(data.test), generator=stream("evaluate"))[:args.limit]
    is_vae, bounded = isinstance(model, VAE), isinstance(model, VAE) and model.is_likelihood
    k = args.iw_samples if bounded else 1
    rows = max(1, DECODED // (model.channels * math.prod(model.shape[1:])))
    embedded, sums = [], {"rec": [], "kl": [], "iw_nll": [], "squared_error": []}
    with tqdm(total=len(order), desc="evaluating", unit=" images", disable=None) as bar:
        for which, index in enumerate(order.split(max(1, rows // k))):
            images, labels = data.test.batch(index)
            embedded.append(model.embed(images, labels))
            if not bounded:
                params = model.decode(embedded[-1], labels)
                error = (images / (data.levels - 1) - model.mean_image(params)).cpu().double()
                sums["squared_error"].append(error.square().flatten(1).sum(1))
            if is_vae:
                parts = []
                for first in range(0, k, rows):
                    shape = len(index), min(rows, k - first), model.latent_size
                    noise = normal(shape, args.device, args.seed, "evaluate", which, first)
                    parts.append(model.weigh(images, labels, noise))
                rec, ratio = (torch.cat(part, 1).cpu().double() for part in zip(*parts))
                sums["rec"].append(rec.mean(1))
                sums["kl"].append(KLD(*model.encode(images, labels)).cpu().double())
                sums["iw_nll"].append(math.log(k) - torch.logsumexp(-rec - ratio, 1))
            else:
                sums["rec"].append(model.reconstruction_loss(params, images).cpu().double())
            bar.update(len(index))
    each = {name: torch.cat(parts) for name, parts in sums.items() if parts}
    figures = dict.fromkeys(("neg_elbo", "rec", "kl", "bpd", "iw_nll", "iw_nll_se", "iw_samples",
                             "active_units", "squared_error", "psnr", "pca_squared_error", "images"))
    figures |= {"rec": each["rec"].mean().item(), "images": len(order)}
    if is_vae:
        figures["kl"] = each["kl"].mean().item()
        if len(order) >= 20:  # fewer cannot tell a variance
            figures["active_units"] = active_units(torch.cat(embedded))
    if bounded:
        neg_elbo = figures["rec"] + figures["kl"]
        figures |= {"neg_elbo": neg_elbo, "bpd": elbo_to_bpd(neg_elbo, (1, *model.shape)),
                    "iw_nll": each["iw_nll"].mean().item(), "iw_samples": k,
                    "iw_nll_se": each["iw_nll"].std().item() / math.sqrt(len(order)) if len(order) > 1
                    else None}
    else:
        error = each["squared_error"].mean().item()
        figures |= {"squared_error": error,
                    "psnr": -10 * math.log10(error / math.prod(model.shape)) if error else None,
                    "pca_squared_error": pca_squared_error(data, order, model.latent_size)}
    return figures


def pca_squared_error(data, order, components):
    """The squared error on [0, 1] of an image of the test split at `order` that principal components of the
    training images leave: no linear autoencoder does better on those. None for images of more than 8,192
    numbers, whose covariance would fill the memory.
    """
    if math.prod(data.shape) > 8192:
        return None

    def images(split, order):
        for which, index in enumerate(order.split(1000)):
            yield split.batch(index, "pca", which)[0].flatten(1) / (data.levels - 1)
    mean, covariance = moments(images(data.train, torch.arange(len(data.train))), math.prod(data.shape))
    basis = torch.linalg.eigh(covariance)[1][:, -components:]  # in ascending order
    error = 0.0
    for x in images(data.test, order):
        centred = x.to(mean) - mean
        error += (centred - centred @ basis @ basis.T).square().sum().item()
    return error / len(order)


def read_data(args, trained, about):
    """The dataset of a checkpoint. Raises UserError where it is another one, or not on this machine."""
    data = load(args.dataset or trained["dataset"], args.data_dir or trained["data_dir"],
                trained["image_size"], trained["levels"], trained["binarize"], trained["transform"],
                trained["limit"], args.device, download=False)
    if any(data.about()[name] != about[name] for name in ("shape", "levels", "classes")):
        raise UserError(f"{args.dataset or trained['dataset']} is not what the model was trained on: "
                        f"{about['shape']}, classes {about['classes']}")
    if args.evaluate and any(data.about()[name] != about[name] for name in ("images", "crc32")):
        raise UserError(f"{args.dataset or trained['dataset']} has changed since the model was trained: its "
                        "test images may be among those of the training now; bring it back as it was")
    return data


@torch.no_grad()
def main(argv=None):
    args = parse_args(argv)
    multiply_in_tf32(False)
    model, state = restore(args.ckpt, args.device)
    trained, about = state["args"], state["data"]
    args.conditional = trained["conditional"]
    if args.classes and not args.conditional:
        raise UserError(f"--classes: {args.ckpt} is not a conditional model")
    if args.conditional:
        chosen_classes(args, about)  # a class that does not exist ends it before anything is drawn

    data = None
    if args.evaluate or NEED_DATA & set(args.only):
        try:
            data = read_data(args, trained, about)
        except (UserError, OSError) as error:
            if args.evaluate:
                raise
            left_out = [name for name in args.only if name in NEED_DATA]
            args.only = [name for name in args.only if name not in NEED_DATA]
            print(f"left out {', '.join(left_out)}: {error}", file=sys.stderr)

    folder = Path(args.results_dir or trained["results_dir"]) / trained["log_dir"]
    folder.mkdir(parents=True, exist_ok=True)
    if args.evaluate:
        figures = evaluate(model, data, args)
        for name, value in figures.items():
            if value is not None:
                print(f"{name:18s} {value:,}" if isinstance(value, int) else f"{name:18s} {value:.4f}")
        write_json(folder / "evaluation.json", {"ckpt": args.ckpt.as_posix(), **figures})
        print(folder / "evaluation.json")
        return

    def save(images, name, nrow, caption):
        path, caption = folder / f"{name}.png", f"{trained['log_dir']}: {caption}"
        save_picture(images, path, caption) if nrow is None else save_grid(images, path, nrow, caption)
        print(path)

    for name in args.only:
        reason = PICTURES[name](model, about, data and data.test, args, save)
        if reason:
            print(f"left out {name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    call(main)
