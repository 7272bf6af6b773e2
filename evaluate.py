"""A model's measured figures."""

import math
import statistics

import torch
from tqdm import tqdm

from model import VAE
from runs import write_json
from utils import KLD, active_units, elbo_to_bpd, moments, normal, stream

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
                sums["kl"].append(ratio.mean(1) if model.flow else
                                  KLD(*model.encode(images, labels)).cpu().double())
                sums["iw_nll"].append(math.log(k) - torch.logsumexp(-rec - ratio, 1))
            else:
                sums["rec"].append(model.reconstruction_loss(params, images).cpu().double())
            bar.update(len(index))
    each = {name: torch.cat(parts) for name, parts in sums.items() if parts}
    measured = dict.fromkeys(("neg_elbo", "rec", "kl", "bpd", "iw_nll", "iw_nll_se", "iw_samples",
                             "active_units", "squared_error", "psnr", "pca_squared_error", "images"))
    measured |= {"rec": each["rec"].mean().item(), "images": len(order)}
    if is_vae:
        measured["kl"] = each["kl"].mean().item()
        if len(order) >= 20:  # fewer cannot tell a variance
            measured["active_units"] = active_units(torch.cat(embedded))
    if bounded:
        neg_elbo = measured["rec"] + measured["kl"]
        measured |= {"neg_elbo": neg_elbo, "bpd": elbo_to_bpd(neg_elbo, (1, *model.shape)),
                    "iw_nll": each["iw_nll"].mean().item(), "iw_samples": k,
                    "iw_nll_se": each["iw_nll"].std().item() / math.sqrt(len(order)) if len(order) > 1
                    else None}
    else:
        error = each["squared_error"].mean().item()
        measured |= {"squared_error": error,
                    "psnr": -10 * math.log10(error / math.prod(model.shape)) if error else None,
                    "pca_squared_error": pca_squared_error(data, order, model.latent_size)}
    return measured


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


def measure(it, path, args):
    """evaluation.json of a checkpoint → its figures."""
    measured = evaluate(it.model, it.data, args)
    it.folder.mkdir(parents=True, exist_ok=True)
    write_json(it.folder / "evaluation.json", {"ckpt": path.as_posix(), **measured})
    print(it.folder / "evaluation.json")
    return measured


def report(measured):
    """Print the figures of one checkpoint, or their mean ± standard deviation over several seeds."""
    for name in measured[0]:
        values = [one[name] for one in measured if one[name] is not None]
        if not values:
            continue
        if len(values) > 1 and name not in ("iw_samples", "images"):
            print(f"{name:18s} {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}")
        else:
            print(f"{name:18s}", f"{values[0]:,}" if isinstance(values[0], int) else f"{values[0]:.4f}")
