"""The small mathematics of VAEs, under the names that courses use; the grid of images.

Imports none of the project's other files.
"""

import math

import torch
from torch.nn.functional import pad

# ------------------------------------------------------------------------------------------------------------
# Mathematics


def normalize(images, levels, dtype=torch.float32):
    """Integer levels 0 … levels - 1 → [-1, 1], any shape."""
    return (images.to(dtype) * (2 / (levels - 1))).sub_(1)


def sample_reparameterize(mean, std, noise=None):
    """z = mean + std · noise, with gradients to both (Kingma & Welling 2014, eq. 10).

    mean, std, noise: any one shape; noise ~ N(0, 1), drawn here when not given → the same shape
    """
    return mean + std * (torch.randn_like(std) if noise is None else noise)


def KLD(mean, log_std):
    """KL(N(mean, exp(log_std)²) ‖ N(0, I)) of each row, in nats (Kingma & Welling 2014, app. B).

    mean, log_std: [..., D] → [...]
    """
    log_var = 2 * log_std
    return 0.5 * (mean * mean + torch.expm1(log_var) - log_var).sum(-1)


def log_normal(x):
    """log N(x; 0, I) of each row, in nats, [..., D] → [...]"""
    return -0.5 * (x ** 2 + math.log(2 * math.pi)).sum(-1)


def elbo_to_bpd(elbo, img_shape):
    """Bits per dimension of a negative evidence lower bound, which must be taken at beta = 1.

    elbo: [B] (or its mean), nats per image; img_shape: the batch's [B, C, H, W] → the shape of elbo
    """
    return elbo * math.log2(math.e) / math.prod(img_shape[1:])


def active_dimensions(means):
    """Which latent dimensions carry information: the variance over x of E[z|x] is above 0.01
    (Burda et al. 2016, section 5).

    means: [N, D], posterior means of N images → bool [D]
    """
    return means.cpu().double().var(0, correction=0) > 0.01


def active_units(means):
    """The number of active dimensions, int."""
    return int(active_dimensions(means).sum())


def mean_and_covariance(batches, size, all_reduce_sum=lambda sums: sums):
    """The mean and the covariance of vectors that come in batches [B, size] → float64 [size], [size, size].

    all_reduce_sum: adds up a tensor over processes, each of which has its own batches
    Raises FloatingPointError if a number is not finite.
    """
    sums = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    for batch in batches:  # second moments of (x, 1): those of x, the sum of x, and the number of vectors
        batch = pad(batch, (0, 1), value=1.0)
        batch = (batch.cpu() if batch.device.type == "mps" else batch).double()
        sums = sums.to(batch.device) + batch.T @ batch
    sums = all_reduce_sum(sums.cpu())  # on the CPU, since a process may have had no batch and no device
    if not sums.isfinite().all():
        raise FloatingPointError
    sums = sums / sums[-1, -1]
    mean = sums[-1, :-1]
    return mean, sums[:-1, :-1] - mean.outer(mean)


def beta_schedule(mode, target, epochs):
    """The weight of the KL as a function of the number of epochs already finished.

    mode: a choice of train.py's --beta_mode; a new one is a branch here, and a choice in arguments.py

    constant: target. linear: target · finished / epochs, so 0 in the first epoch (and in the only one), and
    target · (1 - 1 / epochs) in the last.
    cyclical: up to four cycles of whole epochs; each rises linearly from 0 during its first half and stays
    at target during the second (Fu et al. 2019, eq. 6-7, M = 4, R = 0.5); fewer cycles if they would be
    shorter than two epochs.
    """
    if mode == "constant":
        return lambda finished: target
    if mode == "linear":
        return lambda finished: target * finished / epochs
    if mode == "cyclical":
        cycles = max(1, min(4, epochs // 2))
        starts = [math.ceil(cycle * epochs / cycles) for cycle in range(cycles + 2)]

        def cyclical(finished):
            cycle = finished * cycles // epochs
            start, end = starts[cycle:cycle + 2]
            return target * min(1.0, (finished - start) / (end - start) / 0.5)
        return cyclical
    raise ValueError(f"beta mode {mode!r}: constant, linear or cyclical")


@torch.no_grad()
def visualize_manifold(decoder, grid_size=20):
    """The images of a 2-D latent space, at the percentiles (i + 0.5) / grid_size of N(0, 1) on both axes
    (Kingma & Welling 2014, fig. 4): z₁ grows to the right, z₂ upwards.

    decoder: any callable from z [n, 2] to mean images in [0, 1], [n, C, H, W]
    → one image [3, grid_size · H, grid_size · W] in [0, 1]
    """
    percentiles = (torch.arange(grid_size) + 0.5) / grid_size
    z = torch.distributions.Normal(0.0, 1.0).icdf(percentiles)
    z2, z1 = torch.meshgrid(z.flip(0), z, indexing="ij")
    images = decoder(torch.stack([z1, z2], dim=-1).view(-1, 2))
    return image_grid(images, grid_size, line=0)


# ------------------------------------------------------------------------------------------------------------
# Grids of images

GRID_GREY = 0.4  # the lines between images, and empty places


def interleave(above, below, nrow):
    """Two batches of images in the order of a grid with nrow images per row: a row of the first, the same row
    of the second, and so on. Grey images fill up a short last row.
    """
    rest = torch.full((-len(above) % nrow, *above.shape[1:]), GRID_GREY)
    rows = zip(*(torch.cat([images.float().cpu(), rest]).split(nrow) for images in (above, below)))
    return torch.cat([part for pair in rows for part in pair])


def image_grid(images, nrow, line=1):
    """Images [N, C, H, W] in [0, 1] → one image of all of them [3, H', W'].

    nrow: images per row; line: the width of the lines around them, in pixels. This is torchvision's
    make_grid, without the import of torchvision, which takes a second.
    """
    images, nrow = images.float().cpu(), min(nrow, len(images))
    empty = images.new_full((-len(images) % nrow, *images.shape[1:]), GRID_GREY)
    tiles = pad(torch.cat([images, empty]), (line, 0, line, 0), value=GRID_GREY)
    _, channels, height, width = tiles.shape
    grid = tiles.view(-1, nrow, channels, height, width).permute(2, 0, 3, 1, 4)
    grid = grid.reshape(channels, -1, nrow * width).expand(3, -1, -1)
    return pad(grid, (0, line, 0, line), value=GRID_GREY)


# ------------------------------------------------------------------------------------------------------------
# Devices

def to_device(values, device):
    """Copy a tensor to a device, without waiting for a busy GPU. A slice is returned as it is."""
    if isinstance(values, slice):
        return values
    return values.to(device, non_blocking=torch.device(device).type == "cuda")
