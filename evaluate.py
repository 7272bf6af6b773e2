"""The measured figures of a model, as infer.py --evaluate writes them."""

import contextlib
import io
import math
import statistics
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import warp
from model import VAE, ConditionalVAE
from randomness import normal, stream
from runs import atomic_write
from utils import active_units, elbo_to_bpd, mean_and_covariance, to_device

METRICS = ("neg_elbo", "rec", "kl", "bpd", "iw_nll", "iw_nll_se", "iw_samples", "active_units",
           "squared_error", "psnr", "pca_squared_error", "images")

COUNTS = ("iw_samples", "images", "samples_judged", "train_images_judged")
WIDTH = 29  # of names in print_metrics
WORDS = {"neg_elbo": "nats per image, lower is better",
         "rec": "-log p(x|z), nats per image; of mse an error", "kl": "nats per image",
         "bpd": "bits/dim",
         "iw_nll": "-log p(x), or -log p(x|class); nats per image, lower is better",
         "iw_nll_se": "its standard error",
         "iw_samples": "latents per image; with fewer the NLL is higher",
         "active_units": "latent dimensions in use",
         "squared_error": "of reconstructions, summed over pixels in [0, 1]",
         "psnr": "of reconstructions, dB, higher is better",
         "pca_squared_error": "of as many principal components of training images",
         "images": "test images measured",
         "prior": "(what the samples judged below are drawn from)",
         "frechet_distance": "of samples from test images, lower is better",
         "precision": "samples that are near test images", "recall": "test images that are near samples",
         "density": "test images around a sample", "coverage": "test images with a sample nearby",
         "class_accuracy": "samples seen as the class asked for",
         "frechet_floor": "the distance of unseen training images",
         "judge_accuracy": "of the classifier in whose features samples are compared"}


def evaluate(model, data, args):
    """The figures of evaluation.json: means over the test images, or over args.limit of them.

    neg_elbo, rec, kl: the negative ELBO and its two terms, nats per image; bpd: neg_elbo in bits/dim
    iw_nll: the negative log-likelihood by importance sampling (Burda et al. 2016, eq. 8), nats per image,
        with args.iw_samples latents per image; iw_nll_se: its standard error over the images
    squared_error: of the reconstruction, summed over pixels in [0, 1]; psnr: of its mean, in dB
    pca_squared_error: see below
    A figure that does not apply is None.
    """
    order = torch.randperm(len(data.test), generator=stream("evaluate"))[:args.limit]
    has_elbo = isinstance(model, VAE) and model.likelihood.is_discrete
    k = args.iw_samples if has_elbo else 1
    print(f"measures {len(order):,} test images"
          + f", with {k:,} latents each (--iw_samples: fewer are faster)" * (k > 1), flush=True)
    embedded, parts = [], []
    with tqdm(total=len(order), desc="evaluating", unit=" images", disable=None) as bar:
        for which, index in enumerate(order.split(max(1, model.max_batch // k))):
            images, labels = data.test.batch(index)
            z = model.embed(images, labels)
            embedded.append(model.to_base(z, labels))
            params = None if has_elbo else model.decode(z, labels)
            parts.append(vae_terms(model, images, labels, k, args, which) if isinstance(model, VAE) else
                         {"rec": model.likelihood.loss(params, images)})
            if not has_elbo:
                error = (images / (data.levels - 1) - model.likelihood.mean(params)).cpu().double()
                parts[-1]["squared_error"] = error.square().flatten(1).sum(1)
            bar.update(len(index))
    each = {name: torch.cat([part[name].cpu().double() for part in parts]) for name in parts[0]}
    measured = dict.fromkeys(METRICS) | {"rec": each["rec"].mean().item(), "images": len(order)}
    if isinstance(model, VAE):
        measured["kl"] = each["kl"].mean().item()
        if len(order) >= 20:  # fewer are too few for a variance
            measured["active_units"] = active_units(torch.cat(embedded))  # in the base space
    if has_elbo:
        neg_elbo = measured["rec"] + measured["kl"]
        error = each["iw_nll"].std().item() / math.sqrt(len(order)) if len(order) > 1 else None
        return measured | {"neg_elbo": neg_elbo, "bpd": elbo_to_bpd(neg_elbo, (1, *model.shape)),
                           "iw_nll": each["iw_nll"].mean().item(), "iw_nll_se": error, "iw_samples": k}
    error = each["squared_error"].mean().item()
    return measured | {"squared_error": error,
                       "psnr": -10 * math.log10(error / math.prod(model.shape)) if error else None,
                       "pca_squared_error": pca_squared_error(data, order, model.latent_size)}


def each_image(model, split, args, draws=16):
    """Figures of each of the N images of a split, in NumPy by name:

    label: the number of the class; z [N, D]: of a VAE the posterior's mean, and std [N, D]: its standard
        deviation
    kl: of q(z|x) from the prior, nats; loss: −log p(x|z) + kl, the mean over `draws` draws of z. That is the
        −ELBO, in nats, unless the likelihood is none (mse, and bce of grey images). An AE has no std and kl.
    squared_error: of the reconstruction of z, summed over pixels in [0, 1]
    """
    parts = []
    everything = torch.arange(len(split))
    with tqdm(total=len(split), desc="exporting", unit=" images", disable=None) as bar:
        for which, index in enumerate(everything.split(max(1, model.max_batch // draws))):
            images, labels = split.batch(index, args.seed, "export", which)
            code = model.encode(images, labels)
            z = code[0] if isinstance(model, VAE) else code
            params = model.decode(z, labels)
            error = images / (split.levels - 1) - model.likelihood.mean(params)
            part = {"label": labels, "z": z, "squared_error": error.square().flatten(1).sum(1)}
            if isinstance(model, VAE):
                terms = vae_terms(model, images, labels, draws, args, which)
                part |= {"std": code[1].exp(), "kl": terms["kl"], "loss": terms["rec"] + terms["kl"]}
            else:
                part["loss"] = model.likelihood.loss(params, images)
            parts.append({name: value.cpu().numpy() for name, value in part.items()})
            bar.update(len(index))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def vae_terms(model, images, labels, k, args, which):
    """rec, kl and iw_nll of each image, with k latents, in float64; which: the number of the batch"""
    parts = []
    for first in range(0, k, model.max_batch):
        shape = len(images), min(model.max_batch, k - first), model.latent_size
        noise = normal(shape, args.device, args.seed, "evaluate", which, first)
        parts.append(model.log_weights(images, labels, noise))
    rec, log_ratio = (torch.cat(part, 1).cpu().double() for part in zip(*parts))
    kl = model.exact_kl(images, labels)
    return {"rec": rec.mean(1), "kl": log_ratio.mean(1) if kl is None else kl.cpu(),
            "iw_nll": model.neg_bound(rec, log_ratio)}


def pca_squared_error(data, order, components):
    """The squared error on [0, 1] of an image of the test split at `order` when the principal components of
    the training images reconstruct it. No linear autoencoder has a lower one on the training images. None for
    images of more than 8,192 numbers, whose covariance would not fit into memory.
    """
    if math.prod(data.shape) > 8192:
        return None

    def images(split, order):
        for which, index in enumerate(order.split(1000)):
            yield split.batch(index, "pca", which)[0].flatten(1) / (data.levels - 1)
    mean, covariance = mean_and_covariance(images(data.train, torch.arange(len(data.train))),
                                           math.prod(data.shape))
    basis = torch.linalg.eigh(covariance)[1][:, -components:]  # eigenvalues are in ascending order
    error = 0.0
    for x in images(data.test, order):
        centred = x.to(mean) - mean
        error += (centred - centred @ basis @ basis.T).square().sum().item()
    return error / len(order)


def print_metrics(measured):
    """Print the figures of one model, or the mean ± standard deviation of several."""
    for name in measured[0]:
        values = [figures[name] for figures in measured if figures[name] is not None]
        if not values:
            continue
        value = values[0]
        if len(values) > 1 and isinstance(value, float | int) and name not in COUNTS:
            shown = f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}"
        else:
            shown = f"{value:.4f}" if isinstance(value, float) else \
                f"{value:,}" if isinstance(value, int) else value
        words = "the same from N(0, I)" if name.endswith("_model_prior") else WORDS.get(name, "")
        print(f"{name:{WIDTH}s} {shown:18s} {words}".rstrip())


# ------------------------------------------------------------------------------------------------------------
# Sample quality, in the features of a classifier of the same dataset, the judge

QUALITY = ("frechet_distance", "precision", "recall", "density", "coverage", "class_accuracy")
NEIGHBOURS, MOST_COMPARED = 5, 5000  # of precision, recall, density and coverage
FEWEST, WORST_JUDGE = 2000, 0.9  # test images, accuracy: below these the figures would mislead
JUDGE_EPOCHS = 10  # with fewer, some seeds recognise less than 99.2% of MNIST's test images


def evaluate_samples(model, data, grey, args, folder):
    """The figures of samples in evaluation.json. All are None, and a line says why, if they would
    mislead; of a judge that is not good enough, its accuracy stays.

    grey: a function that returns the same dataset with 256 levels and all training images
    folder: of caches, see cached_judge

    prior: what samples are drawn from, in words
    frechet_distance and others: see sample_quality; of a model with two priors also for the trained one, as
        frechet_distance_model_prior and so on
    frechet_floor: the distance between the test images and training images that the judge has not seen, both
        with the levels of the model
    judge_accuracy: on the test images, the mean over classes
    samples_judged, train_images_judged: how many images were compared; of precision, recall, density and
        coverage at most MOST_COMPARED
    """
    both = model.fitted is not None and model.prior is not None
    names = [*QUALITY, *(f"{name}_model_prior" for name in QUALITY)] if both else QUALITY
    figures = dict.fromkeys(["prior", *names, "frechet_floor", "judge_accuracy", "samples_judged",
                             "train_images_judged"])
    n = min(len(data.test), args.limit or 10_000, 10_000)
    if len(data.classes) < 2 or n < FEWEST:
        print("no figures of samples: " + ("the judge of samples needs classes" if len(data.classes) < 2 else
                                           f"{n:,} test images are too few, {FEWEST:,} are the least"))
        return figures
    if n < min(len(data.test), 10_000):
        print(f"figures of samples depend on their number: compare these only with others of {n:,} images")
    grey = grey()
    judge, half = cached_judge(grey, len(data.classes), folder), len(grey.train) // 2
    other = slice(half, half + n)
    unseen = replace(grey.train, rows=grey.train.rows[other], labels=grey.train.labels[other],
                     levels=data.levels, stochastic=data.train.stochastic)

    def batches(split, order, *key):
        for block, index in enumerate(order.split(1000)):
            yield split.batch(index, *key, block)[0] / (data.levels - 1)
    order = torch.randperm(len(data.test), generator=stream("quality"))[:n]
    real, seen = judged(judge, batches(data.test, order))
    classes = data.test.labels.cpu()[order]
    # the mean over classes: where one is frequent, always naming it would look good
    accuracy = statistics.mean((seen == label)[classes == label].double().mean().item()
                               for label in classes.unique())
    if accuracy < WORST_JUDGE:
        print(f"no figures of samples: the judge is right on {accuracy:.0%} of the test images only")
        return figures | {"judge_accuracy": accuracy}
    floor, _ = judged(judge, batches(unseen, torch.arange(len(unseen)), args.seed, "floor"))
    figures |= {"prior": model.sampling_prior(model.fitted is not None).description,
                "judge_accuracy": accuracy, "frechet_floor": frechet_distance(floor, real),
                "samples_judged": n, "train_images_judged": len(floor)}
    judged_priors = [(False, "_model_prior"), (True, "")] if both else [(model.prior is None, "")]
    for fitted, suffix in judged_priors:
        quality = sample_quality(model, data, judge, args, fitted, order, real)
        figures |= {name + suffix: value for name, value in quality.items()}
    return figures


class Judge(nn.Module):
    """A small classifier of images of at most 32×32 pixels: [0, 1] → 128 features → the class."""

    def __init__(self, shape, num_classes):
        super().__init__()
        self.size = height, width = tuple(min(side, 32) for side in shape[1:])
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(64 * (height // 4) * (width // 4), 128), nn.ReLU())
        self.out = nn.Linear(128, num_classes)

    def forward(self, images):
        """[B, C, H, W] in [0, 1] → features [B, 128], logits of the classes [B, K]"""
        if images.shape[2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True)
        features = self.features(2 * images - 1)
        return features, self.out(features)


def train_judge(data, num_classes, batch_size=128):
    """A judge of a dataset of 256 levels, trained on the first half of its training images (their order is
    random). A third of the images is shown as stored, a third with a threshold, a third drawn at random, so
    that grey and binary images are familiar to it.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge(data.shape, num_classes).to(data.test.labels.device)
    half, device = len(data.train) // 2, data.test.labels.device
    steps = JUDGE_EPOCHS * math.ceil(half / batch_size)
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    with torch.enable_grad(), tqdm(total=steps, desc="training a judge of samples", disable=None) as bar:
        for _ in range(JUDGE_EPOCHS):
            for index in torch.randperm(half, generator=generator).split(batch_size):
                images, labels = data.train.batch(index)
                images = warp(images, generator, len(index)) / 255
                kind = torch.randint(3, (len(index), 1, 1, 1), generator=generator).to(device)
                drawn = torch.rand(images.shape, generator=generator).to(device) < images
                images = torch.where(kind == 0, images, torch.where(kind == 1, images > 0.5, drawn).float())
                loss = F.cross_entropy(judge(images)[1], labels, label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return judge.eval()


def cached_judge(data, num_classes, folder):
    """The judge of a dataset, from the folder of caches, or trained and put there."""
    path = folder / f"judge_{data.crc32:08x}_{'x'.join(map(str, data.shape))}_{JUDGE_EPOCHS}_epochs.pt"
    judge = Judge(data.shape, num_classes)
    try:
        judge.load_state_dict(torch.load(path, weights_only=True))
    except Exception:  # not there, or damaged in whatever way
        print("trains a classifier to judge samples, once for this dataset: minutes on a CPU", flush=True)
        judge = train_judge(data, num_classes)
        with contextlib.suppress(OSError):  # a folder that cannot be written costs time, nothing else
            folder.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            torch.save(judge.cpu().state_dict(), buffer)
            atomic_write(path, buffer.getvalue())
    return judge.to(data.test.labels.device).eval()


def judged(judge, images):
    """Images [N, C, H, W] in [0, 1], in batches → features [N, 128] and the classes seen [N], on the CPU"""
    parts = [(features.cpu(), logits.argmax(1).cpu()) for features, logits in map(judge, images)]
    return tuple(torch.cat(part) for part in zip(*parts))


def sample_quality(model, data, judge, args, fitted, order, real):
    """How near samples are to the test images at `order`, whose features are `real`. There are as many
    samples, with the same classes if the model is conditional: drawn pixels if the likelihood is one of
    discrete pixels, mean images otherwise.

    frechet_distance: between Gaussians with the same moments (Heusel et al. 2017)
    precision, recall, density, coverage: see `manifold_metrics`
    class_accuracy: of a conditional model, the share of mean images in which the judge sees the right class
    """
    generator, drawn, right = stream(args.seed, "quality", fitted), [], []
    conditional = isinstance(model, ConditionalVAE)
    for index in order.split(model.max_batch):
        labels = data.test.labels[to_device(index, data.test.labels.device)] if conditional else None
        levels, mean = model.sample(len(index), labels, generator=generator, fitted=fitted)
        shown = levels / (data.levels - 1) if model.likelihood.is_discrete else mean
        drawn.append(judge(shown)[0].cpu())
        if conditional:
            right.append((judge(mean)[1].argmax(1) == labels).double().cpu())
    drawn = torch.cat(drawn)
    return {"frechet_distance": frechet_distance(real, drawn),
            **manifold_metrics(real[:MOST_COMPARED], drawn[:MOST_COMPARED]),
            "class_accuracy": torch.cat(right).mean().item() if right else None}


def frechet_distance(a, b):
    """‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½) of the Gaussians with the moments of a [N, D] and b [M, D]
    (Dowson & Landau 1982)
    """
    (mean_a, cov_a), (mean_b, cov_b) = (mean_and_covariance([x], x.shape[1]) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()  # the trace of (Σ₁ Σ₂)^½
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def manifold_metrics(real, drawn, k=NEIGHBOURS):
    """real [N, D], drawn [M, D] → figures from balls around the points of one set; each reaches to the k-th
    nearest point of the same set (Kynkäänniemi et al. 2019; Naeem et al. 2020)

    precision: the share of the drawn that lie in a ball of a real one; recall: the other way round
    density: how many balls of real ones a drawn one lies in, on average, divided by k; it may be above 1
    coverage: the share of balls of real ones in which a drawn one lies
    """
    def cdist(a, b):  # through a matrix product, distances near 0 would not be exact
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    distances = cdist(real, drawn)
    # the nearest of all is the point itself
    radius, other = (cdist(x, x).kthvalue(k + 1, 1).values for x in (real, drawn))
    inside = distances < radius[:, None]
    return {"precision": inside.any(0).double().mean().item(),
            "recall": (distances < other).any(1).double().mean().item(),
            "density": inside.double().sum(0).mean().item() / k,
            "coverage": inside.any(1).double().mean().item()}
