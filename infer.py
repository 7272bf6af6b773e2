"""Turn a checkpoint into pictures, or measure it: python infer.py --ckpt checkpoints/NAME/best.pt"""

import math
import re
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import figures
from cli import (
    ArgumentParser,
    UserError,
    call,
    default_device,
    device_type,
    multiply_in_tf32,
    number,
    one_line,
)
from data import DATASETS, Data, load
from evaluate import DECODED, measure, report
from figures import save_grid, save_picture
from model import AE, VAE, build
from runs import checkpoint_file, load_checkpoint
from utils import KLD, image_grid, interleave, moments, stream, visualize_manifold


def parse_args(argv=None):
    parser = ArgumentParser(description="Turn a checkpoint into pictures, or measure it, in results/<run>/.")
    default = "(default: %(default)s)"
    parser.add_argument("--ckpt", type=Path, nargs="+", metavar="FILE",
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
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--evaluate", action="store_true",
                      help="measure the model on the test images in place of drawing (default: draw)")
    mode.add_argument("--compare", action="store_true",
                      help="one picture of several checkpoints side by side (default: draw)")
    mode.add_argument("--explore", action="store_true",
                      help="a window to move through the latent space by hand (default: draw)")
    parser.add_argument("--iw_samples", type=number(int, 1), default=500, metavar="K",
                        help=f"with --evaluate: latents an image for the likelihood {default}")
    parser.add_argument("--limit", type=number(int, 1), metavar="N",
                        help="with --evaluate: of a fixed random N of the test images (default: all)")
    parser.add_argument("--seed", type=number(int, 0), default=1, metavar="N", help=default)
    parser.add_argument("--device", type=device_type, default=default_device(), help=default)
    args = parser.parse_args(argv)
    chosen = next((name for name in ("evaluate", "compare", "explore") if vars(args)[name]), "draw")
    for name, modes in (("only", "draw"), ("num_samples", "draw"), ("temperature", "draw, compare, explore"),
                        ("classes", "draw, compare, explore"), ("iw_samples", "evaluate"),
                        ("limit", "evaluate")):
        if vars(args)[name] != parser.get_default(name) and chosen not in modes:
            parser.error(f"argument --{name}: goes with " + (
                "--evaluate" if modes == "evaluate" else f"drawing, not with --{chosen}"))
    args.only = args.only.split(",")
    for name in args.only:
        if name not in PICTURES:
            parser.error(f"argument --only: {name!r} is none of {', '.join(PICTURES)}")
    if args.dataset and args.dataset not in DATASETS and not Path(args.dataset).is_dir():
        parser.error(f"argument --dataset: {args.dataset!r} is neither one of {', '.join(DATASETS)} "
                     "nor a folder")
    args.ckpt = [checkpoint_file(parser, path) for path in args.ckpt or [None]]
    if args.compare and len(args.ckpt) < 2:
        parser.error("argument --compare: goes with two or more checkpoints after --ckpt")
    if len(args.ckpt) > 1 and chosen not in ("compare", "evaluate"):
        parser.error(f"argument --ckpt: {len(args.ckpt)} checkpoints, but only --compare and --evaluate take "
                     "more than one")
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


# ------------------------------------------------------------------------------------------------------------
# One function a picture: subject → nothing, or why there is none.

@dataclass
class Subject:
    """What is drawn: a checkpoint's model, and what goes with it.

    state: the checkpoint; data: None where the dataset is not on this machine; folder: for the pictures
    """
    model: AE
    state: dict
    data: Data | None
    args: Namespace
    folder: Path

    def __post_init__(self):
        self.trained, self.about = self.state["args"], self.state["data"]
        self.conditional, self.scale = self.trained["conditional"], self.about["levels"] - 1
        self.rows = max(1, DECODED // (self.model.channels * math.prod(self.model.shape[1:])))  # at a time
        self.prior_name = self.model.prior_name
        if self.args.temperature != 1:
            self.prior_name += f", temperature {self.args.temperature:g}"

    def save(self, name, draw, caption, *content):
        """Write a picture: draw(path, caption, *content)."""
        draw(self.folder / name, f"{self.trained['log_dir']}: {caption}", *content)
        print(self.folder / name)

    @cached_property
    def classes(self):
        """The labels that --classes gives, all by default; by number where no class has a number for its
        name. → int64 [n]
        """
        names, asked = self.about["classes"], self.args.classes
        label = {name: i for i, name in enumerate(names)}
        if not any(name.isdecimal() for name in names):
            label |= {str(i): i for i in range(len(names))}
        unknown = [name for name in asked or () if name not in label]
        if unknown:
            raise UserError(f"--classes: there is no {', '.join(unknown)}, only {', '.join(names)}")
        return torch.tensor([label[name] for name in asked or names], device=self.args.device)

    def shuffled(self, purpose):
        """The test images, or those of the chosen classes, in a random order. → indices, int64 [n]"""
        split = self.data.test
        order = torch.randperm(len(split), generator=stream(self.args.seed, purpose)).to(self.args.device)
        return order[torch.isin(split.labels[order], self.classes)] if self.conditional else order

    def images(self, index):
        """Test images at `index` → in [0, 1], their latents, their labels."""
        images, labels = self.data.test.batch(index)
        return images / self.scale, self.model.embed(images, labels), labels

    def decoded(self, z, labels=None):
        """Mean images of latents, in bounded memory."""
        parts = z.to(self.args.device).split(self.rows)
        labels = [None] * len(parts) if labels is None else labels.split(self.rows)
        return torch.cat([self.model.mean_image(self.model.decode(*part)) for part in zip(parts, labels)])

    def spread_labels(self, n):
        """n labels, all classes alike; None where the model has no use for them."""
        if self.conditional:
            return self.classes[torch.arange(n, device=self.args.device) * len(self.classes) // n]

    def drawn(self, n):
        """Images that the model draws, in batches → images as levels, labels."""
        labels, generator = self.spread_labels(n), stream(self.args.seed, "latents")
        for index in torch.arange(n, device=self.args.device).split(self.rows):
            part = None if labels is None else labels[index]
            images, _ = self.model.sample(len(index), part, 1.0, generator)
            yield images, torch.zeros_like(index) if part is None else part

    @cached_property
    def codes(self):
        """Latents of up to 10,000 test images, or, where there are none here, of images that the model draws.

        → z, [N, D], and labels, [N], on the CPU; order: dimensions, most active first; of a Gaussian
        posterior std, [N, D], and kl, [D] (None for an AE and with --flow, where the order is that of the
        variance); of a VAE active, [D]
        """
        order = self.shuffled("latents")[:10_000] if self.data else ()
        batches = map(self.data.test.batch, order.split(self.rows)) if len(order) else self.drawn(1000)
        gaussian = isinstance(self.model, VAE) and not self.model.flow
        encode = self.model.encode if gaussian else self.model.embed
        codes = [(encode(*batch), batch[1].cpu()) for batch in batches]
        found = Namespace(labels=torch.cat([labels for _, labels in codes]), std=None, kl=None, active=None)
        if gaussian:
            found.z, log_std = (torch.cat(parts).cpu() for parts in zip(*[code for code, _ in codes]))
            found.std = log_std.exp()
            found.kl = weight = KLD(found.z.T[..., None], log_std.T[..., None]).mean(1)
        else:
            found.z = torch.cat([z for z, _ in codes]).cpu()
            weight = found.z.var(0, correction=0)
        if isinstance(self.model, VAE):
            found.active = found.z.var(0, correction=0) > 0.01
        found.order = weight.argsort(descending=True)
        return found

    def plane(self):
        """Where latents are seen in two dimensions: these themselves, or their first two principal
        components.

        → origin [D], directions [2, D], names of the axes
        """
        z, d = self.codes.z, self.model.latent_size
        if d <= 2:
            return torch.zeros(d), torch.eye(2, d), ["z1", "z2" if d == 2 else "(one dimension)"]
        mean, covariance = moments([z], d)
        variances, directions = torch.linalg.eigh(covariance)  # in ascending order
        shares = variances.flip(0)[:2] / variances.sum().clamp_min(1e-30)
        return mean.float(), directions.T.flip(0)[:2].float(), [
            f"principal component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, 1)]

    def spread(self):
        """The mean and the standard deviation of each latent dimension before any image is seen, [D] each."""
        rows = self.model.to_prior(torch.zeros(1, self.model.latent_size, device=self.args.device))
        if isinstance(self.model, VAE):
            return rows[0].cpu(), torch.ones(self.model.latent_size)
        return rows[0].cpu(), self.model.prior_scale.norm(dim=1).cpu()


def samples(it):
    """Mean images of samples from the prior and, where the likelihood is one of discrete pixels, draws from
    it.
    """
    n, labels = it.args.num_samples, it.spread_labels(it.args.num_samples)
    drawn, mean = it.model.sample(n, labels, it.args.temperature, stream(it.args.seed, "samples"))
    columns = math.ceil(math.sqrt(n))
    it.save("samples.png", save_grid, f"samples from {it.prior_name}: mean images", mean, columns)
    if it.model.is_likelihood:
        it.save("samples_drawn.png", save_grid, f"the same samples from {it.prior_name}: pixels drawn from "
                "the likelihood", drawn / it.scale, columns)


def reconstructions(it):
    """Random test images, and below each the decoder's mean image of its latent."""
    images, z, labels = it.images(it.shuffled("reconstructions")[:64])
    it.save("reconstructions.png", save_grid, "test images, the reconstruction below each",
            interleave(images, it.decoded(z, labels), 16), 16)


def interpolations(it, pairs=5, steps=9):
    """Lines in the latent space between test images of different classes, straight and on the sphere; for a
    conditional model between two images of one class.
    """
    order, first, last = it.shuffled("interpolations")[:500], [], []
    of = it.data.test.labels
    for i in order:
        if len(first) == pairs:
            break
        others = order[~torch.isin(order, torch.stack([i, *first, *last]))]
        fitting = others[(of[others] == of[i]) == it.conditional]
        if not (len(fitting) or it.conditional):  # all are of one class
            fitting = others
        if len(fitting):
            first.append(i)
            last.append(fitting[-1])
    if not first:
        return "it takes two test images" + " of one class" * it.conditional
    (a, starts, labels), (b, ends, others) = it.images(torch.stack(first)), it.images(torch.stack(last))
    weights, centre = torch.linspace(0, 1, steps, device=a.device)[:, None], it.spread()[0].to(a.device)
    rows, names = [], []
    for i, (start, end) in enumerate(zip(starts, ends)):
        for name, line in (("linear", torch.lerp), ("spherical", slerp)):
            z = centre + line(start - centre, end - centre, weights)
            rows += [a[i:i + 1], it.decoded(z, labels[i].expand(steps)), b[i:i + 1]]
            names.append(name)
    kind = " of one class" * it.conditional + " of different classes" * bool((labels != others).all())
    it.save("interpolations.png", figures.labelled_grid, f"between the latents of two test images{kind}",
            torch.cat(rows), steps + 2, names,
            ["image", *(f"{t:.3g}" for t in weights[:, 0].tolist()), "image"])


def manifold(it):
    """A 2-D latent space, decoded at the percentiles of the prior; for a conditional model one picture a
    class.
    """
    if it.model.latent_size != 2:
        return f"the latent has {it.model.latent_size} dimensions, not 2"
    for label in it.classes if it.conditional else [None]:
        def decoder(z):
            z = it.model.to_prior(it.args.temperature * z.to(it.args.device))
            return it.decoded(z, label if label is None else label.expand(len(z))).cpu()
        name = "" if label is None else it.about["classes"][label]
        file, caption = "manifold", f"the 2-D latent space at the percentiles of {it.prior_name}"
        if name:
            file, caption = re.sub(r"[^\w-]+", "_", f"{file}_{name}"), f"{caption}, class {name}"
        it.save(f"{file}.png", save_picture, caption, visualize_manifold(decoder))


def classes(it, columns=10):
    """A row a class, the same latent down each column."""
    if not it.conditional:
        return "the model is not conditional"
    z = it.model.prior(columns, it.args.temperature, stream(it.args.seed, "classes"))
    images = it.decoded(z.repeat(len(it.classes), 1), it.classes.repeat_interleave(columns))
    it.save("classes.png", figures.labelled_grid, "a row a class, the same latent down each column", images,
            columns, [it.about["classes"][label] for label in it.classes.tolist()])


def latents(it):
    """The test images' latents, coloured by class."""
    origin, directions, axes = it.plane()
    points = (it.codes.z - origin) @ directions.T
    what = "latents" if it.codes.kl is None else "means of the posterior"
    names = it.about["classes"]
    many = f", coloured by their {len(names)} classes" if len(names) > 20 else ""
    it.save("latents.png", figures.latents, f"{what} of {len(points):,} test images{many}", points,
            it.codes.labels, names, axes)


def units(it):
    """KL by latent dimension, and the posterior averaged over images beside the prior."""
    codes = it.codes
    if codes.kl is None:
        return "the KL of an AE and with --flow has no parts by dimension"
    if len(codes.z) < 20:
        return "fewer than 20 test images cannot tell a variance"
    first = codes.order[:6]
    reach = max(4.0, (codes.z[:, first].abs() + 2 * codes.std[:, first]).quantile(0.99).item())
    t = torch.linspace(-reach, reach, 201)
    densities = {}
    for d in first.tolist():
        normal = torch.distributions.Normal(codes.z[:, d, None], codes.std[:, d, None])
        densities[f"z{d + 1}"] = normal.log_prob(t).exp().mean(0)
    n = int(codes.active.sum())
    it.save("units.png", figures.units, f"{n} of {it.model.latent_size} units active (their mean's variance "
            f"over {len(codes.z):,} test images is above 0.01), KL {codes.kl.sum():.1f} nats",
            codes.kl[codes.order], codes.active[codes.order], t, densities)


def traversals(it, rows=10, steps=11):
    """A row a latent dimension, most active first, the others held at those of a test image."""
    _, z, label = it.images(it.shuffled("traversals")[:1])
    centre, spread = it.spread()
    offsets, chosen = torch.linspace(-3, 3, steps), it.codes.order[:rows].tolist()
    z = z.cpu().repeat(len(chosen) * steps, 1)
    for row, d in enumerate(chosen):
        z[row * steps:(row + 1) * steps, d] = centre[d] + offsets * spread[d]
    names = [f"z{d + 1}" + (f" ({it.codes.kl[d]:.2f} nats)" if it.codes.kl is not None else "")
             for d in chosen]
    it.save("traversals.png", figures.labelled_grid, "the most active latent dimensions one by one, from -3 "
            "to 3 standard deviations; the others as in a test image", it.decoded(z, label.expand(len(z))),
            steps, names, [f"{round(offset, 1) + 0.0:.1f}" for offset in offsets.tolist()])


def nearest(it, n=8, k=9):
    """Samples beside the training images nearest to them in pixels: what was learned by heart shows. Means
    are blurred, and so nearer to any image, wherefore reconstructions of unseen images are the measure.
    """
    labels = it.spread_labels(n)
    _, mean = it.model.sample(n, labels, it.args.temperature, stream(it.args.seed, "nearest"))
    _, z, unseen = it.images(it.shuffled("nearest")[:100])
    asked, train = torch.cat([mean, it.decoded(z, unseen)]).flatten(1), it.data.train
    distances, found = asked.new_zeros(len(asked), 0), asked.new_zeros(n, 0, asked.shape[1])
    for which, index in enumerate(torch.arange(len(train)).split(max(1, 16 * DECODED // asked.shape[1]))):
        images = train.batch(index, "nearest", which)[0].flatten(1) / it.scale
        best = torch.cdist(asked, images).topk(min(k, len(images)), largest=False)
        distances, found = (torch.cat(part, 1) for part in ((distances, best.values),
                                                            (found, images[best.indices[:n]])))
        distances, kept = distances.topk(min(k, distances.shape[1]), largest=False)
        found = found.gather(1, kept[:n, :, None].expand(-1, -1, asked.shape[1]))
    away = (found[:, 0] - asked[:n]).norm(dim=1).tolist()  # cdist's is not exact near 0
    names = [""] * n if labels is None else [f"{it.about['classes'][label]}: " for label in labels.tolist()]
    shown = torch.cat([asked[:n, None], found], 1)
    it.save("nearest.png", figures.labelled_grid, f"mean images of samples from {it.prior_name}, and the "
            "training images nearest to each, with the distance of the nearest (median of reconstructions of "
            f"unseen test images: {distances[n:, 0].median():.2f})", shown.view(-1, *it.model.shape),
            shown.shape[1],
            [f"{name}{distance:.2f}" for name, distance in zip(names, away)],
            ["sample", "nearest", *map(str, range(2, shown.shape[1]))])


def progress(it):
    """The samples after each epoch of the training, as a film."""
    folder = Path(it.trained["results_dir"], it.trained["log_dir"])
    frames = sorted(folder.glob("samples_[0-9]*.png"), key=lambda path: int(path.stem.split("_")[1]))
    if len(frames) < 2:
        return "it is made of the training's samples_EEE.png, of two epochs or more"
    it.save("progress.gif", figures.progress, "", frames)


def slerp(start, end, weights):
    """Points between two vectors [D] on the arc of a circle around 0, which keeps their length (Shoemake
    1985); on the straight line where both point in one direction, or in opposite ones. weights: [N, 1]
    """
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=0)
    if cosine.abs() > 1 - 1e-6:
        return torch.lerp(start, end, weights)
    angle = cosine.acos()
    return (torch.sin((1 - weights) * angle) * start + torch.sin(weights * angle) * end) / torch.sin(angle)


PICTURES = {"samples": samples, "reconstructions": reconstructions, "interpolations": interpolations,
            "manifold": manifold, "classes": classes, "latents": latents, "units": units,
            "traversals": traversals, "nearest": nearest, "progress": progress}
NEED_DATA = {"reconstructions", "interpolations", "latents", "units", "traversals", "nearest"}


def read_data(args, trained, about):
    """The dataset of a checkpoint. Raises UserError where it is another one, or not on this machine."""
    data = load(args.dataset or trained["dataset"], args.data_dir or trained["data_dir"],
                trained["image_size"], trained["levels"], trained["binarize"], trained["transform"],
                trained["limit"], args.device, download=False)
    if any(data.about()[name] != about[name] for name in ("shape", "levels", "classes")):
        raise UserError(f"{args.dataset or trained['dataset']} is not what the model was trained on: "
                        f"{about['shape']}, classes {about['classes']}")
    if any(data.about()[name] != about[name] for name in ("images", "crc32")):
        raise UserError(f"{args.dataset or trained['dataset']} has changed since the model was trained: its "
                        "test images may be among those of the training now; bring it back as it was")
    return data


UNTOLD = {"log_dir", "results_dir", "checkpoint_dir", "data_dir", "overwrite", "resume", "progress_bar",
          "save_every", "seeds"}  # arguments that make no other model


def differing(subjects):
    """The arguments in which their models differ."""
    options = sorted({name for it in subjects for name in it.trained} - UNTOLD)
    return [name for name in options if len({str(it.trained.get(name)) for it in subjects}) > 1]


def compare(subjects, args):
    """compare.png: the same latents decoded, the same images reconstructed, and figures of several models."""
    differ, columns = differing(subjects), []
    for it in subjects:
        last, pairs, error, kl, active = (it.state["history"] or [{}])[-1], None, None, None, None
        _, mean = it.model.sample(36, it.spread_labels(36), args.temperature, stream(args.seed, "samples"))
        if it.data and len(order := it.shuffled("reconstructions")):
            images, z, labels = it.images(order[:18])
            pairs = image_grid(interleave(images, it.decoded(z, labels), 6), 6)
            error = 0.0
            for index in order.split(it.rows):
                images, z, labels = it.images(index)
                error += (images - it.decoded(z, labels)).square().sum().item() / len(order)
            if it.codes.active is not None and len(it.codes.z) >= 20:
                active = int(it.codes.active.sum())
        if not it.trained.get("iw_train"):  # what such a run adds to the reconstruction is no KL
            kl = last.get("val_kl")
        columns.append((
            [f"{it.trained['log_dir']}, epoch {it.state['epoch']}",
             *(f"{name} {it.trained.get(name)}" for name in differ)],
            image_grid(mean, 6), pairs,
            {"parameters": f"{sum(p.numel() for p in it.model.parameters()):,}",
             "val reconstruction": decimals(last.get("val_rec")), "val KL, nats": decimals(kl),
             "val bits/dim": decimals(last.get("val_bpd"), 4), "test squared error": decimals(error),
             "active units": decimals(active, 0)}))
    told = [name for name in columns[0][3] if any(column[3][name] != "–" for column in columns)]
    columns = [(*column[:3], {name: column[3][name] for name in told}) for column in columns]
    path = Path(args.results_dir or subjects[0].trained["results_dir"]) / "compare.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    names = sorted({it.prior_name for it in subjects}, key=len)
    figures.compare(path, f"samples from {' or '.join(names)}; test images, the reconstruction below each",
                    columns)
    runs = [it.trained["log_dir"] for it in subjects]
    for figure, values in [("", runs), *((name, [column[3][name] for column in columns]) for name in told)]:
        print(f"{figure:20s}", *(f"{value:>{max(12, len(run))}s}" for run, value in zip(runs, values)))
    print(path)


def decimals(value, places=2):
    return "–" if value is None else f"{value:.{places}f}"


def explore(it):
    """A window with the decoder's image of a latent, and what moves it → the window, see figures.Explorer."""
    codes, (origin, directions, _), (centre, spread) = it.codes, it.plane(), it.spread()
    numbers = it.classes.tolist() if it.conditional else []

    @torch.no_grad()
    def decode(z, label):
        return it.decoded(z, torch.tensor([numbers[label]], device=it.args.device) if numbers else None)[0]

    seen = it.data and len(it.shuffled("latents"))
    names = it.about["classes"] if seen or numbers else []
    return figures.Explorer(
        f"{it.trained['log_dir']}: {'test images' if seen else 'images that the model drew'} as points",
        decode, lambda: it.model.prior(1, it.args.temperature)[0].cpu(),
        (codes.z[0], numbers.index(codes.labels[0]) if numbers else None), codes.order[:10].tolist(), centre,
        spread, (codes.z - origin) @ directions.T, codes.labels, names, origin, directions,
        [it.about["classes"][number] for number in numbers])


def open_checkpoint(path, args):
    """→ what is to be drawn; its dataset too, where something needs it and it is here."""
    model, state = restore(path, args.device)
    trained = state["args"]
    folder = Path(args.results_dir or trained["results_dir"]) / trained["log_dir"]
    it = Subject(model, state, None, args, folder)
    if args.classes and not it.conditional:
        raise UserError(f"--classes: {path} is not a conditional model")
    if it.conditional:
        it.classes  # one that does not exist ends it before anything is drawn
    if args.evaluate or args.compare or args.explore or NEED_DATA & set(args.only):
        try:
            it.data = read_data(args, trained, state["data"])
        except (UserError, OSError) as error:
            if args.evaluate:
                raise
            print(f"without the dataset: {error}", file=sys.stderr)
    return it


@torch.no_grad()
def main(argv=None):
    args = parse_args(argv)
    multiply_in_tf32(False)
    if args.explore:
        figures.want_window()
    subjects = [open_checkpoint(path, args) for path in args.ckpt]
    if args.compare:
        return compare(subjects, args)
    if args.evaluate:
        measured = []
        for it, path in zip(subjects, args.ckpt):
            measured.append(measure(it, path, args))
            report(measured[-1:])
        seeds = {it.trained["seed"] for it in subjects}
        if differing(subjects) == ["seed"] and len(seeds) == len(subjects):
            print("mean ± standard deviation of the seeds")
            report(measured)
        return
    it = subjects[0]
    if args.explore:
        window = explore(it)  # its widgets live as long as it does
        figures.show()
        return window
    it.folder.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        if name in NEED_DATA and not it.data:
            reason = "it needs the dataset"
        elif name in NEED_DATA and not len(it.shuffled(name)):
            reason = "no test image is of these classes"
        else:
            reason = PICTURES[name](it)
        if reason:
            print(f"left out {name}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    call(main)
