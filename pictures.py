"""The pictures of a model that infer.py draws, a function for each.

To add one, write a function of a Subject and put its name into PICTURES, and into NEED_DATA if it needs the
dataset. Add its file to FILES in runs.py, so that --overwrite deletes it. Axes and captions are drawn by
figures.py.
"""

import json
import math
import re
import shlex
import zlib
from argparse import Namespace
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

import figures
from cli import UserError, few
from data import Data
from figures import save_grid, save_picture
from model import AE
from randomness import stream
from runs import differing_arguments, in_use, is_unfinished
from utils import active_dimensions, image_grid, interleave, mean_and_covariance, visualize_manifold


@dataclass
class Subject:
    """What is drawn or measured: the model of a checkpoint, and what belongs to it.

    data: None if it is not needed, or not on this machine; args: of infer.py; folder: for the pictures
    """
    model: AE
    checkpoint: dict
    path: Path
    data: Data | None
    args: Namespace
    folder: Path

    def __post_init__(self):
        self.trained, self.about = self.checkpoint["args"], self.checkpoint["data"]  # its arguments, its data
        self.conditional, self.scale = self.trained["conditional"], self.about["levels"] - 1
        if self.args.prior == "model" and self.model.prior is None:
            raise UserError(f"--prior model: {self.path} is an autoencoder, which has none")
        if self.args.prior == "fitted" and self.model.fitted is None:
            raise UserError(f"--prior fitted: {self.path} has no mixture fitted to its latents"
                            + " (a trained prior needs none)" * (self.trained["prior"] == "flow"))
        self.fitted = self.model.fitted is not None and self.args.prior != "model"
        self.prior_name = self.model.sampling_prior(self.fitted).description
        self.base_name = self.model.sampling_prior().base_name
        if self.args.temperature != 1:
            self.prior_name += f", temperature {self.args.temperature:g}"

    def save(self, name, draw, caption, *content):
        """Write a picture with draw(path, caption, *content)."""
        unfinished = f", unfinished, epoch {self.checkpoint['epoch']}" * is_unfinished(self.checkpoint)
        only = f", only classes {few(self.args.classes)}" if self.args.classes else ""
        draw(self.folder / name, f"{self.trained['log_dir']}{unfinished}{only}: {caption}", *content)
        print(self.folder / name)

    @cached_property
    def asked_labels(self):
        """The labels of --classes, or of all classes, int64 [n]. If no class has a number for its name,
        --classes may give numbers. Raises UserError if a class does not exist.
        """
        names, asked = self.about["classes"], self.args.classes
        label = {name: i for i, name in enumerate(names)}
        if not any(name.isdecimal() for name in names):
            label |= {str(i): i for i in range(len(names))}
        unknown = [name for name in asked or () if name not in label]
        if unknown:
            raise UserError(f"--classes: there is no {', '.join(unknown)}, only {', '.join(names)}")
        return torch.tensor([label[name] for name in asked or names], device=self.args.device)

    @property
    def class_file_names(self):
        """The names of the classes for files; different ones, also where signs had to be replaced"""
        names = [re.sub(r"[^\w-]+", "_", name) for name in self.about["classes"]]
        alike = len(set(names)) < len(names)
        return [f"{name}_{label}" if alike else name for label, name in enumerate(names)]

    def few_classes(self, picture, most=32):
        """The first of `asked_labels`, int64 [n]; a line says how many are left out of a picture."""
        if len(self.asked_labels) > most:
            print(f"{picture}: the first {most} of {len(self.asked_labels):,} classes; --classes names "
                  "others")
        return self.asked_labels[:most]

    def measured(self, name):
        """The content of test.json or evaluation.json; an empty dictionary if it is not of this checkpoint"""
        try:
            found = json.loads((self.folder / name).read_text())
            same = Path(found.get("ckpt", self.path)).resolve() == self.path.resolve()
            # a model that was measured before the end of its run had no mixture yet
            prior = self.model.sampling_prior(self.model.fitted is not None).description
            same = same and found["epoch"] == self.checkpoint["epoch"] and found.get("prior") in (None, prior)
            return found if same else {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # not measured, or damaged
            return {}

    def shuffled(self, purpose):
        """The indices of the test images (of the chosen classes) in a random order, int64 [n]"""
        split = self.data.test
        order = torch.randperm(len(split), generator=stream(self.args.seed, purpose)).to(self.args.device)
        return order[torch.isin(split.labels[order], self.asked_labels)] if self.conditional else order

    def test_images(self, index):
        """→ test images in [0, 1], their latents, their labels"""
        images, labels = self.data.test.batch(index)
        return images / self.scale, self.model.embed(images, labels), labels

    def even_labels(self, n):
        """n labels, as evenly as n allows over the classes; None if the model is not conditional"""
        if self.conditional:
            chosen = torch.arange(n, device=self.args.device) * len(self.asked_labels) // n
            return self.asked_labels[chosen]

    def sample(self, n, purpose, fitted=None):
        """→ drawn levels, mean images and labels of n samples; purpose: of the random numbers"""
        labels, generator = self.even_labels(n), stream(self.args.seed, purpose)
        fitted = self.fitted if fitted is None else fitted
        return *self.model.sample(n, labels, self.args.temperature, generator, fitted), labels

    @cached_property
    def codes(self):
        """The latents of up to 10,000 test images, or of 1,000 samples if the dataset is not here. A
        namespace:

        z [N, D] and labels [N], on the CPU; base [N, D]: z in the base space of the prior
        std [N, D] of the posterior (None for an AE), kl [D] in nats (None if it has no parts by dimension)
        order: the dimensions, most active first: by kl, or by the variance of base (of an AE of z)
        active [D]: of a VAE, whether the variance of base is above 0.01
        """
        if self.data and len(self.shuffled("latents")):
            index = self.shuffled("latents")[:10_000].split(self.model.max_batch)
            batches = map(self.data.test.batch, index)
        else:
            labels = self.even_labels(1000)
            images, _ = self.model.sample(1000, labels, generator=stream(self.args.seed, "latents"),
                                          fitted=self.fitted)
            labels = torch.zeros(1000, dtype=torch.long) if labels is None else labels
            batches = zip(images.split(self.model.max_batch), labels.split(self.model.max_batch))
        found, codes = Namespace(std=None, kl=None, active=None), []
        for images, labels in batches:
            code = self.model.encode(images, labels)
            z, *log_std = code if isinstance(code, tuple) else (code,)
            codes.append((z, self.model.to_base(z, labels), labels, *log_std))
        found.z, found.base, found.labels, *log_std = (torch.cat(parts).cpu() for parts in zip(*codes))
        if log_std:
            found.std, found.active = log_std[0].exp(), active_dimensions(found.base)
            found.kl = self.model.prior.kl_by_dimension(found.z, log_std[0])
        if found.kl is not None:
            found.kl = weight = found.kl.mean(0)
        else:  # in the base space of an AE all variances are about 1
            weight = (found.z if found.std is None else found.base).var(0, correction=0)
        found.order = weight.argsort(descending=True)
        return found

    def plane(self, z):
        """A plane to show latents [N, D] in: their own two dimensions, or the first two principal
        components.

        → origin [D], directions [2, D], names of the axes
        """
        d = self.model.latent_size
        if d <= 2:
            return torch.zeros(d), torch.eye(2, d), ["z1", "z2" if d == 2 else "(one dimension)"]
        mean, covariance = mean_and_covariance([z], d)
        variances, directions = torch.linalg.eigh(covariance)  # in ascending order
        shares = variances.flip(0)[:2] / variances.sum().clamp_min(1e-30)
        return mean.float(), directions.T.flip(0)[:2].float(), [
            f"principal component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, 1)]


# ------------------------------------------------------------------------------------------------------------
# A function for each picture. It returns nothing, or the reason why there is no picture.

def samples(subject):
    """Mean images of samples, and pixels drawn from the likelihood if it is one of discrete pixels. Samples
    from the mixture have those from N(0, I) beside them.
    """
    n, name = subject.args.num_samples, subject.prior_name
    drawn, mean, _ = subject.sample(n, "samples")
    columns = math.ceil(math.sqrt(n))
    subject.save("samples.png", save_grid, f"samples from {name}: mean images", mean, columns)
    if subject.fitted and subject.model.prior is not None:
        _, plain, _ = subject.sample(n, "samples", fitted=False)
        cooler = f", temperature {subject.args.temperature:g}" * (subject.args.temperature != 1)
        subject.save("samples_prior.png", save_grid, f"samples from {subject.model.prior.description}"
                     f"{cooler}: mean images. Those of samples.png come from {name}, because the latents "
                     "of all images together are not distributed as N(0, I)", plain, columns)
    if subject.model.likelihood.is_discrete:
        subject.save("samples_drawn.png", save_grid,
                     f"the same samples from {name}: pixels drawn from the likelihood", drawn / subject.scale,
                     columns)


def reconstructions(subject):
    """Random test images, with the mean image of its latent below each."""
    images, z, labels = subject.test_images(subject.shuffled("reconstructions")[:64])
    columns = min(16, len(images))
    subject.save("reconstructions.png", save_grid, "test images, the reconstruction below each",
                 interleave(images, subject.model.mean_images(z, labels), columns), columns)


STEPS = 9  # images of a line between two latents


def interpolations(subject, pairs=5):
    """Lines between the latents of test images of different classes: straight, and on the sphere in the base
    space of the prior. For a conditional model, between images of one class.
    """
    ends = interpolation_ends(subject, pairs)
    if not ends:
        return "it needs two test images" + " of one class" * subject.conditional
    (a, starts, labels), (b, stops, others) = map(subject.test_images, ends)
    rows = [lines_between(subject, a[i:i + 1], b[i:i + 1], starts[i], stops[i], labels[i].expand(STEPS))
            for i in range(len(starts))]
    kind = " of one class" * subject.conditional + " of different classes" * bool((labels != others).all())
    subject.save("interpolations.png", figures.labelled_grid, f"between the latents of two test images{kind}"
                 f"; spherical: along an arc, {subject.base_name}", torch.cat(rows), STEPS + 2,
                 ["linear", "spherical"] * len(starts), line_names())


def line_names():
    """The names of the columns that lines_between makes"""
    return ["image", *(f"{t:.3g}" for t in torch.linspace(0, 1, STEPS).tolist()), "image"]


def lines_between(subject, a, b, start, stop, labels=None):
    """Two rows of images from the image a to the image b: mean images along a straight line between their
    latents [D], and on the sphere in the base space.
    """
    model, weights = subject.model, torch.linspace(0, 1, STEPS, device=start.device)[:, None]
    ends = model.to_base(torch.stack([start, stop]), None if labels is None else labels[:2])
    lines = torch.lerp(start, stop, weights), model.from_base(slerp(*ends, weights), labels)
    return torch.cat([part for z in lines for part in (a, model.mean_images(z, labels), b)])


def interpolation_ends(subject, pairs):
    """→ the indices of the first and of the second test images of at most `pairs` pairs; None if there is
    none
    """
    order, first, second = subject.shuffled("interpolations")[:500], [], []
    labels = subject.data.test.labels
    for i in order:
        if len(first) == pairs:
            break
        if i in second:
            continue
        others = order[~torch.isin(order, torch.stack([i, *first, *second]))]
        same_class = labels[others] == labels[i]
        fitting = others[same_class if subject.conditional else ~same_class]
        if not (len(fitting) or subject.conditional):  # no image of another class is left
            fitting = others
        if len(fitting):
            first.append(i)
            second.append(fitting[-1])
    return (torch.stack(first), torch.stack(second)) if first else None


def slerp(start, end, weights):
    """Points on the arc of a circle around 0 between two vectors [D] (Shoemake 1985). If these differ in
    length, it changes linearly along the arc. On the straight line if both point in the same direction, or
    in opposite ones.

    weights: [N, 1] → [N, D]
    """
    cosine = torch.nn.functional.cosine_similarity(start, end, dim=0)
    if cosine.abs() > 1 - 1e-6:
        return torch.lerp(start, end, weights)
    angle = cosine.acos()
    first, last = torch.nn.functional.normalize(torch.stack([start, end]), dim=1)
    arc = (torch.sin((1 - weights) * angle) * first + torch.sin(weights * angle) * last) / torch.sin(angle)
    return torch.lerp(start.norm(), end.norm(), weights) * arc


def manifold(subject):
    """A 2-D latent space, decoded at the percentiles of N(0, 1) in the base space of the prior. For a
    conditional model, a picture for each class.
    """
    model = subject.model
    if model.latent_size != 2:
        return f"the latent has {model.latent_size} dimensions, not 2"

    def decoder(z, label=None):
        labels = None if label is None else label.expand(len(z))
        z = model.from_base(subject.args.temperature * z.to(subject.args.device), labels)
        return model.mean_images(z, labels).cpu()
    cooler = f" times {subject.args.temperature:g}" * (subject.args.temperature != 1)
    caption = f"mean images at the percentiles of N(0, I){cooler} {subject.base_name}"
    if not subject.conditional:
        subject.save("manifold.png", save_picture, caption, visualize_manifold(decoder))
    for label in subject.few_classes("manifold") if subject.conditional else ():
        name = subject.about["classes"][label]
        grid = visualize_manifold(lambda z, label=label: decoder(z, label))
        subject.save(f"manifold_{subject.class_file_names[label]}.png", save_picture,
                     f"{caption}, class {name}", grid)


def classes(subject, columns=10):
    """A row for each class, with the same noise in each column."""
    if not subject.conditional:
        return "the model is not conditional"
    labels = subject.few_classes("classes")
    z = torch.cat([subject.model.sample_latents(
        columns, label.expand(columns), subject.args.temperature, stream(subject.args.seed, "classes"),
        subject.fitted) for label in labels])
    subject.save("classes.png", figures.labelled_grid, "a row for each class, the same noise in each column: "
                 f"mean images of samples from {subject.prior_name}",
                 subject.model.mean_images(z, labels.repeat_interleave(columns)), columns,
                 [subject.about["classes"][label] for label in labels.tolist()])


def latents(subject):
    """The latents of the test images, coloured by class."""
    origin, directions, axes = subject.plane(subject.codes.z)
    points = (subject.codes.z - origin) @ directions.T
    what = "latents" if subject.codes.std is None else "means of the posterior"
    names, size = subject.about["classes"], subject.model.latent_size
    many = f", coloured by their {len(names)} classes" if len(names) > 20 else ""
    plane = (f", in two directions of {size}: what overlaps here may be apart in the others"
             if size > 2 else "")
    subject.save("latents.png", figures.latents, f"{what} of {len(points):,} test images{many}{plane}",
                 points, subject.codes.labels, names, axes)


def units(subject):
    """The KL of each latent dimension, and the posterior averaged over images beside the prior."""
    codes = subject.codes
    if codes.kl is None:
        return "an AE has no KL, and with --prior flow the KL does not split by dimension"
    if len(codes.z) < 20:
        return "fewer than 20 test images are too few for a variance"
    first = codes.order[:6]
    reach = max(4.0, (codes.z[:, first].abs() + 2 * codes.std[:, first]).quantile(0.99).item())
    t = torch.linspace(-reach, reach, 201)
    densities = {}
    for d in first.tolist():
        posterior = torch.distributions.Normal(codes.z[:, d, None], codes.std[:, d, None])
        densities[f"z{d + 1}"] = posterior.log_prob(t).exp().mean(0)
    n, kl = int(codes.active.sum()), codes.kl.sum()
    subject.save("units.png", figures.units, f"{n} of {subject.model.latent_size} units active (the variance "
                 f"of their mean over {len(codes.z):,} test images is above 0.01), KL {kl:.1f} nats",
                 [f"z{d + 1}" for d in codes.order.tolist()], codes.kl[codes.order],
                 codes.active[codes.order], t, densities)


def traversals(subject, rows=10, steps=11):
    """A row for each of the most active dimensions of the base space. The others stay as in a test image."""
    codes, (_, z, label) = subject.codes, subject.test_images(subject.shuffled("traversals")[:1])
    offsets, chosen = torch.linspace(-3, 3, steps), codes.order[:rows].tolist()
    labels = label.expand(len(chosen) * steps)
    base = subject.model.to_base(z, label).repeat(len(labels), 1)
    for row, d in enumerate(chosen):
        base[row * steps:(row + 1) * steps, d] = offsets.to(base)
    names = [f"z{d + 1}" + (f" ({codes.kl[d]:.2f} nats)" if codes.kl is not None else "") for d in chosen]
    images = subject.model.mean_images(subject.model.from_base(base, labels), labels)
    of = " of the prior" if subject.trained["loss_mode"] == "vae" else ""
    subject.save("traversals.png", figures.labelled_grid, "the most active latent dimensions one by one, "
                 f"from -3 to 3 standard deviations{of}, {subject.base_name}; the others as in a test image",
                 images, steps, names,
                 [f"{round(offset, 1) + 0.0:.1f}" for offset in offsets.tolist()])


def nearest(subject, n=8, k=9):
    """Samples beside the training images with the nearest pixels, which shows what the model has memorised.

    A blurred mean image is closer to all images than a sharp one. So distances are compared with those of
    reconstructions of test images, which the model has not seen.
    """
    _, mean, labels = subject.sample(n, "nearest")
    _, z, unseen = subject.test_images(subject.shuffled("nearest")[:100])
    asked = torch.cat([mean, subject.model.mean_images(z, unseen)]).flatten(1)
    distances, found = nearest_training_images(subject, asked, n, k)
    away = (found[:, 0] - asked[:n]).norm(dim=1).tolist()  # cdist is not exact near 0
    names = [""] * n
    if labels is not None:
        names = [f"{subject.about['classes'][label]}: " for label in labels.tolist()]
    shown = torch.cat([asked[:n, None], found], 1)
    low, middle = distances[n:, 0].quantile(distances.new_tensor([0.1, 0.5])).tolist()
    subject.save("nearest.png", figures.labelled_grid, f"mean images of samples from {subject.prior_name}, "
                 f"and the {shown.shape[1] - 1} training images nearest to each, with the Euclidean distance "
                 f"of the nearest. Reconstructed test images have theirs at {middle:.2f} (median), "
                 f"one in ten below {low:.2f}; if most samples are below {low:.2f}, images are memorised",
                 shown.view(-1, *subject.model.shape), shown.shape[1],
                 [f"{name}{distance:.2f}" for name, distance in zip(names, away)],
                 ["sample", "nearest", *map(str, range(2, shown.shape[1]))])


def nearest_training_images(subject, asked, n, k):
    """The k training images nearest to images [N, pixels] → their distances [N, k], and of the first n the
    images [n, k, pixels]
    """
    train, size = subject.data.train, asked.shape[1]
    distances, found = asked.new_zeros(len(asked), 0), asked.new_zeros(n, 0, size)
    for which, index in enumerate(torch.arange(len(train)).split(max(1, 2**24 // size))):
        images = train.batch(index, "nearest", which)[0].flatten(1) / subject.scale
        best = torch.cdist(asked, images).topk(min(k, len(images)), largest=False)
        distances = torch.cat([distances, best.values], 1)
        found = torch.cat([found, images[best.indices[:n]]], 1)
        distances, kept = distances.topk(min(k, distances.shape[1]), largest=False)
        found = found.gather(1, kept[:n, :, None].expand(-1, -1, size))
    return distances, found


def progress(subject):
    """The samples after each epoch of the training, from the prior of the loss, as an animation."""
    folder = Path(subject.trained["results_dir"], subject.trained["log_dir"])
    frames = sorted(folder.glob("samples_[0-9]*.png"), key=lambda path: int(path.stem.split("_")[1]))
    if len(frames) < 2:
        return "it needs the samples_EEE.png of two epochs or more, which train.py draws"
    figures.progress(subject.folder / "progress.gif", frames)
    print(subject.folder / "progress.gif")


PICTURES = {"samples": samples, "reconstructions": reconstructions, "interpolations": interpolations,
            "manifold": manifold, "classes": classes, "latents": latents, "units": units,
            "traversals": traversals, "nearest": nearest, "progress": progress}
NEED_DATA = {"reconstructions", "interpolations", "latents", "units", "traversals", "nearest"}


def draw_images(subject, split):
    """images.png: the user's own images, the reconstruction below each; of a conditional model beside each, a
    column for each class. images_interpolation.png: between the latents of two images.
    """
    model, n = subject.model, min(len(split), 64)
    subject.folder.mkdir(parents=True, exist_ok=True)
    levels, _ = split.batch(torch.arange(n))
    images = levels / subject.scale
    if len(split) > n:
        print(f"images.png: the first {n} of {len(split):,} images; --export measures all")
    if not subject.conditional:
        columns, shown = min(16, n), model.reconstruct(levels)
        subject.save("images.png", save_grid, "your images, the reconstruction below each",
                     interleave(images, shown, columns), columns)
    else:
        classes = subject.few_classes("images.png")
        rows = [torch.cat([image[None] / subject.scale, model.reconstruct(
            image.expand(len(classes), -1, -1, -1), classes)]) for image in levels]
        subject.save("images.png", figures.labelled_grid, "your images, and their reconstructions as images "
                     "of each class", torch.cat(rows), len(classes) + 1, None,
                     ["image", *(subject.about["classes"][label] for label in classes.tolist())])
    if len(split) == 2:
        rows, names = [], []
        for label in subject.few_classes("images_interpolation.png") if subject.conditional else [None]:
            labels = None if label is None else label.expand(STEPS)
            z = model.embed(levels, None if label is None else label.expand(2))
            rows.append(lines_between(subject, images[:1], images[1:], z[0], z[1], labels))
            kind = "" if label is None else f" as {subject.about['classes'][label]}"
            names += [f"linear{kind}", f"spherical{kind}"]
        subject.save("images_interpolation.png", figures.labelled_grid, "between the latents of your images; "
                     f"spherical: along an arc, {subject.base_name}",
                     torch.cat(rows), STEPS + 2, names, line_names())


# ------------------------------------------------------------------------------------------------------------
# --compare, --explore

def compare(subjects, args):
    """A picture of several models: samples, and reconstructions of the same test images; with figures."""
    runs = [subject.trained["log_dir"] for subject in subjects]
    differing = differing_arguments([subject.trained for subject in subjects])
    if any(subject.trained["levels"] != 2 for subject in subjects):
        differing = [name for name in differing if name != "binarize"]  # it is for two levels
    columns = [comparison(subject, differing) for subject in subjects]
    known = [name for name in columns[0][3] if any(column[3][name] != "–" for column in columns)]
    columns = [(*column[:3], {name: column[3][name] for name in known}) for column in columns]
    names = "_and_".join(re.sub(r"[^\w.-]+", "_", run) for run in runs)
    path = Path(args.results_dir or subjects[0].trained["results_dir"], "compare", f"{short(names)}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    priors = dict.fromkeys(subject.prior_name for subject in subjects)
    caption = f"samples from {' or '.join(priors)}; test images, the reconstruction below each"
    measured = [evaluated(subject) for subject in subjects]
    warnings = comparison_warnings(differing, measured, "test squared error" in known)
    figures.compare(path, "; ".join([caption, *warnings]), columns)
    rows = [("", runs), *((f"--{name}", [in_use(subject.trained, name) for subject in subjects])
                          for name in differing),
            *((name, [column[3][name] for column in columns]) for name in known)]
    for figure, values in rows:
        print(f"{figure:20s}", *(f"{value!s:>{max(12, len(run))}}" for run, value in zip(runs, values)))
    print(*warnings, sep="\n", end="\n" * bool(warnings))
    missing = [subject for subject, found in zip(subjects, measured) if not found]
    if missing:
        discrete = any(subject.trained["loss_mode"] == "vae" and subject.model.likelihood.is_discrete
                       for subject in missing)
        print(f"to measure {'NLL and ' * discrete}quality of samples, where they apply: python infer.py "
              "--evaluate --ckpt", *(shlex.quote(subject.path.as_posix()) for subject in missing))
    print(path)


def short(name, most=200):
    """A name that a file can have; what is cut off becomes a checksum."""
    return name if len(name) <= most else f"{name[:most]}_{zlib.crc32(name.encode()):08x}"


def comparison_warnings(differing, measured, has_error):
    """A line for each reason why figures of models cannot be compared.

    differing: the arguments in which they differ; measured: see `evaluated`, of each model
    has_error: whether the table has a test squared error
    """
    unlike = {"dataset", "value_range", "levels", "binarize", "image_size", "transform"} & set(differing)
    unlike_losses = {"loss_mode", "recon_loss", "target_beta_val", "iw_train", "conditional"} & set(differing)
    warnings = []
    if unlike or unlike_losses:
        what = "losses, NLL and errors" if unlike else \
            "val losses" + " and NLL" * ("conditional" in unlike_losses)
        warnings.append(
            f"{what} cannot be compared: the models differ in --{', --'.join(sorted(unlike | unlike_losses))}"
            + ("; val reconstruction and val KL can" if unlike | unlike_losses == {"target_beta_val"} else
               "; the test squared error can" * (not unlike and has_error)))
    sizes = {found.get("images") for found in measured if {"iw_nll", "frechet_distance"} & found.keys()}
    if len(sizes - {None}) > 1:
        warnings.append("NLL and figures of samples cannot be compared: they are of different numbers of "
                        "test images")
    return warnings


def comparison(subject, differing):
    """A column for figures.compare. `differing`: the arguments to name"""
    model, trained, pairs, error, active = subject.model, subject.trained, None, None, None
    last = (subject.checkpoint["history"] or [{}])[-1]
    _, mean, _ = subject.sample(36, "samples")
    if subject.data and len(order := subject.shuffled("reconstructions")):
        images, z, labels = subject.test_images(order[:18])
        columns = min(6, len(images))
        pairs = image_grid(interleave(images, model.mean_images(z, labels), columns), columns)
        error = 0.0
        for index in order.split(model.max_batch):
            images, z, labels = subject.test_images(index)
            error += (images - model.mean_images(z, labels)).square().sum().item() / len(order)
        if subject.codes.active is not None and len(subject.codes.z) >= 20:
            active = int(subject.codes.active.sum())
    suffix, measured = "" if subject.fitted or model.fitted is None else "_model_prior", evaluated(subject)
    kl = None if trained["iw_train"] else last.get("val_kl")  # of the importance-weighted bound it is no KL

    def decimals(value, places=2):
        return "–" if value is None else f"{value:.{places}f}"
    unfinished = ", unfinished" * is_unfinished(subject.checkpoint)
    nll = f"{measured['iw_nll']:.2f} ({measured['iw_samples']:,})" \
        if {"iw_nll", "iw_samples"} <= measured.keys() else "–"
    return ([f"{trained['log_dir']}, epoch {subject.checkpoint['epoch']}{unfinished}",
             *(f"{name} {in_use(trained, name)}" for name in differing)],
            image_grid(mean, 6), pairs,
            {"parameters": f"{sum(p.numel() for p in model.parameters()):,}",
             "val loss": decimals(last.get("val_loss")),
             "val reconstruction": decimals(last.get("val_rec")), "val KL, nats": decimals(kl),
             "val bits/dim": decimals(last.get("val_bpd"), 4), "test squared error": decimals(error),
             "active units": decimals(active, 0), "NLL (latents)": nll,
             "frechet distance": decimals(measured.get(f"frechet_distance{suffix}")),
             "coverage": decimals(measured.get(f"coverage{suffix}"))})


def evaluated(subject):
    """The numbers of evaluation.json by name, if they are of this checkpoint; else an empty dictionary."""
    return {name: value for name, value in subject.measured("evaluation.json").items()
            if isinstance(value, (int, float))}


def explore(subject):
    """Make the window in which latents are changed by hand → figures.Explorer"""
    codes, (origin, directions, _) = subject.codes, subject.plane(subject.codes.base)
    model, device = subject.model, subject.args.device
    numbers = subject.asked_labels.tolist() if subject.conditional else []
    all_names = subject.about["classes"]

    @torch.no_grad()
    def decode(base, label):
        labels = torch.tensor([numbers[label]], device=device) if numbers else None
        return model.mean_images(model.from_base(base.to(device), labels), labels)[0]

    @torch.no_grad()
    def random(label):
        labels = torch.tensor([numbers[label]], device=device) if numbers else None
        z = model.sample_latents(1, labels, subject.args.temperature, fitted=subject.fitted)
        return model.to_base(z, labels)[0].cpu()

    from_data = subject.data and len(subject.shuffled("latents"))
    return figures.Explorer(
        f"{subject.trained['log_dir']}: {'test images' if from_data else 'samples of the model'} as points",
        decode, random, (codes.base[0], numbers.index(codes.labels[0]) if numbers else None),
        codes.order[:10].tolist(), (codes.base - origin) @ directions.T, codes.labels,
        all_names if from_data or numbers else [], origin, directions,
        [all_names[label] for label in numbers])
