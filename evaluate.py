"""The measured figures of a model, as infer.py --evaluate writes them."""

import math
import statistics

import torch
from tqdm import tqdm

from model import VAE
from utils import active_units, elbo_to_bpd, mean_and_covariance, normal, stream

FIGURES = ("neg_elbo", "rec", "kl", "bpd", "iw_nll", "iw_nll_se", "iw_samples", "active_units",
           "squared_error", "psnr", "pca_squared_error", "images")


def evaluate(model, data, args):
    """The figures of evaluation.json: means over the test images, or over args.limit of them.

    neg_elbo, rec, kl: the negative ELBO and its two terms, nats an image; bpd: the ELBO in bits/dim
    iw_nll: the negative log-likelihood by importance sampling (Burda et al. 2016, eq. 8), nats an image, with
        args.iw_samples latents an image; iw_nll_se: its standard error over the images
    squared_error: of the reconstruction, summed over pixels in [0, 1]; psnr: of its mean, in dB
    pca_squared_error: see below
    A figure that does not apply is None.
    """
    order = torch.randperm(len(data.test), generator=stream("evaluate"))[:args.limit]
    has_elbo = isinstance(model, VAE) and model.likelihood.is_discrete
    k = args.iw_samples if has_elbo else 1
    embedded, parts = [], []
    with tqdm(total=len(order), desc="evaluating", unit=" images", disable=None) as bar:
        for which, index in enumerate(order.split(max(1, model.max_batch // k))):
            images, labels = data.test.batch(index)
            embedded.append(model.embed(images, labels))
            params = None if has_elbo else model.decode(embedded[-1], labels)
            parts.append(vae_terms(model, images, labels, k, args, which) if isinstance(model, VAE) else
                         {"rec": model.likelihood.loss(params, images)})
            if not has_elbo:
                error = (images / (data.levels - 1) - model.likelihood.mean(params)).cpu().double()
                parts[-1]["squared_error"] = error.square().flatten(1).sum(1)
            bar.update(len(index))
    each = {name: torch.cat([part[name].cpu().double() for part in parts]) for name in parts[0]}
    measured = dict.fromkeys(FIGURES) | {"rec": each["rec"].mean().item(), "images": len(order)}
    if isinstance(model, VAE):
        measured["kl"] = each["kl"].mean().item()
        if len(order) >= 20:  # fewer are too few for a variance
            measured["active_units"] = active_units(torch.cat(embedded))
    if has_elbo:
        neg_elbo = measured["rec"] + measured["kl"]
        error = each["iw_nll"].std().item() / math.sqrt(len(order)) if len(order) > 1 else None
        return measured | {"neg_elbo": neg_elbo, "bpd": elbo_to_bpd(neg_elbo, (1, *model.shape)),
                           "iw_nll": each["iw_nll"].mean().item(), "iw_nll_se": error, "iw_samples": k}
    error = each["squared_error"].mean().item()
    return measured | {"squared_error": error,
                       "psnr": -10 * math.log10(error / math.prod(model.shape)) if error else None,
                       "pca_squared_error": pca_squared_error(data, order, model.latent_size)}


def vae_terms(model, images, labels, k, args, which):
    """rec, kl and iw_nll of each image, with k latents, in float64; which: the number of the batch"""
    parts = []
    for first in range(0, k, model.max_batch):
        shape = len(images), min(model.max_batch, k - first), model.latent_size
        noise = normal(shape, args.device, args.seed, "evaluate", which, first)
        parts.append(model.log_weights(images, labels, noise))
    rec, log_ratio = (torch.cat(part, 1).cpu().double() for part in zip(*parts))
    kl = model.exact_kl(images, labels)
    return {"rec": rec.mean(1), "kl": log_ratio.mean(1) if kl is None else kl,
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


def print_figures(measured):
    """Print the figures of one model, or the mean ± standard deviation of several."""
    for name in measured[0]:
        values = [figures[name] for figures in measured if figures[name] is not None]
        if not values:
            continue
        if len(values) > 1 and name not in ("iw_samples", "images"):
            print(f"{name:18s} {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}")
        else:
            print(f"{name:18s}", f"{values[0]:,}" if isinstance(values[0], int) else f"{values[0]:.4f}")
