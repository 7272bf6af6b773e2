"""Likelihoods p(x|z) of an image's pixels, and distributions of latents: priors p(z), a flow for the
posterior.

A likelihood says how many numbers the decoder gives for a pixel (the params), and what they mean. To add one,
write a class with the members of SquaredError and put its name into LIKELIHOODS; no other file changes.

Below, images are integer levels [B, C, H, W], and params are [B, channels(C), H, W] from the decoder.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils import KLD, log_normal, normalize

# ------------------------------------------------------------------------------------------------------------
# Likelihoods


class SquaredError:
    """`mse`: the squared error on [-1, 1] of the mean, which is tanh(params). It is not a
    likelihood, so the loss is not a bound on log p(x).
    """

    is_discrete = False  # whether it is a likelihood of discrete pixels, so that bits/dim mean something

    def __init__(self, levels):
        """levels: the number of values of a pixel; images hold 0 … levels - 1"""
        self.levels = levels

    def channels(self, image_channels):
        """The number of params of a pixel, for images with so many channels."""
        return image_channels

    def loss(self, params, images):
        """−log p(x|z) of each image, summed over pixels, in nats (here the squared error) → [B]"""
        return ((params.tanh() - normalize(images, self.levels, params.dtype)) ** 2).flatten(1).sum(1)

    def mean(self, params):
        """The expected image in [0, 1] → [B, C, H, W]"""
        return (params.tanh() + 1) / 2

    def draw(self, params, generator=None):
        """Integer levels drawn from the distribution (here the levels nearest to the mean)
        → uint8 [B, C, H, W]
        """
        return nearest_levels(self.mean(params), self.levels)


class Bernoulli:
    """`bce`: params are the logits of the pixel being white (1). With more than 2 levels the targets lie
    between 0 and 1: then this is the cross-entropy that many courses use, but no likelihood.
    """

    def __init__(self, levels):
        self.levels, self.is_discrete = levels, levels == 2

    def channels(self, image_channels):
        return image_channels

    def loss(self, params, images):
        targets = images.to(params.dtype) / (self.levels - 1)
        return F.binary_cross_entropy_with_logits(params, targets, reduction="none").flatten(1).sum(1)

    def mean(self, params):
        return params.sigmoid()

    def draw(self, params, generator=None):
        if not self.is_discrete:
            return nearest_levels(self.mean(params), self.levels)
        return (uniform(params.shape, params, generator) < params.sigmoid()).byte()


class Categorical:
    """`categorical`: a softmax over the levels of each pixel and channel. Params are its logits: first those
    of level 0 for all channels, then those of level 1, and so on.
    """

    is_discrete = True

    def __init__(self, levels):
        self.levels = levels

    def channels(self, image_channels):
        return self.levels * image_channels

    def by_level(self, params):
        """[B, levels · C, H, W] → [B, levels, C, H, W]"""
        return params.unflatten(1, (self.levels, -1))

    def loss(self, params, images):
        return F.cross_entropy(self.by_level(params), images.long(), reduction="none").flatten(1).sum(1)

    def mean(self, params):
        values = torch.linspace(0, 1, self.levels, dtype=params.dtype, device=params.device)
        return torch.einsum("bkchw,k->bchw", self.by_level(params).softmax(1), values)

    def draw(self, params, generator=None):
        cumulative = self.by_level(params).softmax(1).cumsum(1)[:, :-1]
        u = uniform(cumulative[:, :1].shape, params, generator)
        return (u > cumulative).sum(1).byte()  # the inverse of the cumulative distribution


class DiscretizedLogistic:
    """`logistic`: a logistic distribution on [-1, 1], cut into bins around the levels; the first and the last
    bin extend to infinity (Salimans et al. 2017, eq. 2, one component). Params are the means of all channels,
    then their log scales.
    """

    is_discrete = True

    def __init__(self, levels):
        self.levels = levels

    def channels(self, image_channels):
        return 2 * image_channels

    def mean_and_log_scale(self, params):
        """→ two [B, C, H, W]; log scales are clamped, so that exp neither overflows nor vanishes"""
        mean, log_scale = params.chunk(2, dim=1)
        return mean, log_scale.clamp(-7, 7)

    def log_prob(self, params, images):
        """log P(level) of each pixel and channel → [B, C, H, W]"""
        mean, log_scale = self.mean_and_log_scale(params)
        centre = normalize(images, self.levels, params.dtype) - mean
        half, rate = 1 / (self.levels - 1), torch.exp(-log_scale)
        upper, lower = rate * (centre + half), rate * (centre - half)
        # σ(upper) - σ(lower) = σ(upper) σ(-lower) (1 - exp(lower - upper)), a product, so that no two nearly
        # equal numbers are subtracted
        first, last = images == 0, images == self.levels - 1
        return torch.where(last, 0, F.logsigmoid(upper)) + torch.where(first, 0, F.logsigmoid(-lower)) \
            + torch.where(first | last, 0, torch.log(-torch.expm1(-2 * half * rate)))

    def loss(self, params, images):
        return -self.log_prob(params, images).flatten(1).sum(1)

    def mean(self, params):
        """The expected level is the sum of P(above the edge) over all edges between levels → [B, C, H, W]"""
        mean, log_scale = self.mean_and_log_scale(params)
        edges = [(2 * level - 1) / (self.levels - 1) - 1 for level in range(1, self.levels)]
        return sum(torch.sigmoid((mean - edge) * torch.exp(-log_scale)) for edge in edges) / len(edges)

    def draw(self, params, generator=None):
        mean, log_scale = self.mean_and_log_scale(params)
        x = mean + log_scale.exp() * torch.logit(uniform(mean.shape, params, generator), eps=1e-7)
        return nearest_levels((x + 1) / 2, self.levels)


def uniform(shape, like, generator):
    """Uniform numbers on the device of `like`, from a generator of the CPU."""
    return torch.rand(shape, generator=generator).to(like.device)


def nearest_levels(images, levels):
    """[0, 1] → the nearest integer levels, uint8; values outside become the first or the last level."""
    return (images * (levels - 1)).round().clamp(0, levels - 1).byte()


LIKELIHOODS = {"mse": SquaredError, "bce": Bernoulli, "categorical": Categorical,
               "logistic": DiscretizedLogistic}
DEFAULT_LIKELIHOOD = {2: "bce", 16: "categorical", 256: "mse"}  # by the number of levels


# ------------------------------------------------------------------------------------------------------------
# Distributions of latents z: each is a map of N(0, I) noise, and what follows from that map

class StandardNormal(nn.Module):
    """N(0, I), the prior of a VAE (Kingma & Welling 2014)."""

    description = "the prior"

    def __init__(self, latent_size):
        super().__init__()
        self.latent_size = latent_size

    def transform(self, noise, labels=None):
        """N(0, I) → z, [n, D] → [n, D]"""
        return noise

    def inverse(self, z, labels=None):
        """z → N(0, I), [n, D] → [n, D]"""
        return z

    def log_prob(self, z, labels=None):
        """log p(z), nats, [..., D] → [...]"""
        return log_normal(z)

    def kl(self, mean, log_std, z=None, labels=None):
        """KL(q ‖ p) of q = N(mean, exp(log_std)²), in nats, [B, D] → [B]; the closed form needs no z"""
        return KLD(mean, log_std)

    def kl_by_dimension(self, mean, log_std):
        """The KL of each latent dimension, in nats, [B, D] → [B, D]"""
        return KLD(mean[..., None], log_std[..., None])

    def mean_and_std(self):
        """→ the mean [D] and standard deviation [D] of each latent dimension, on the CPU"""
        return torch.zeros(self.latent_size), torch.ones(self.latent_size)


class Gaussian(nn.Module):
    """A Gaussian with a full covariance, fitted to latents, so that images can be sampled from an AE."""

    description = "a Gaussian fitted to the training images' latents (an AE has no prior)"

    def __init__(self, latent_size):
        super().__init__()
        self.register_buffer("mean", torch.zeros(latent_size))
        self.register_buffer("scale", torch.eye(latent_size))  # the Cholesky factor of the covariance

    def fit(self, mean, covariance):
        """Fit to the mean [D] and the covariance [D, D] of latents."""
        # Without a ridge, cholesky fails at a constant dimension. Rounding errors grow with the mean.
        ridge = 1e-6 * covariance.diagonal().mean() + 1e-12 + 1e-14 * mean.square().sum()
        self.mean.copy_(mean)
        self.scale.copy_(torch.linalg.cholesky(covariance + ridge * torch.eye(len(mean)).to(mean)))

    def transform(self, noise, labels=None):
        return self.mean + noise @ self.scale.T

    def mean_and_std(self):
        return self.mean.cpu(), self.scale.norm(dim=1).cpu()


class Coupling(nn.Module):
    """A layer of a normalizing flow (Dinh et al. 2017). A network of one half of z and of the context
    scales and shifts the other half. The changed half comes first in the result, so the next layer changes
    the other one. The last weights begin at 0: a new layer only swaps the halves.
    """

    def __init__(self, latent_size, width=256):
        super().__init__()
        self.half = latent_size // 2
        changed = latent_size - self.half
        self.net = nn.Sequential(nn.Linear(self.half + latent_size, width), nn.SiLU(),
                                 nn.Linear(width, 2 * changed))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, z, context):
        """z, context [..., D] → z [..., D], the log determinant of the Jacobian [...]"""
        kept, changed = z[..., :self.half], z[..., self.half:]
        shift, log_scale = self.shift_and_log_scale(self.net.parameters(), kept, context)
        return torch.cat([changed * log_scale.exp() + shift, kept], -1), log_scale.sum(-1)

    def inverse(self, z, context):
        """Undo forward → z [..., D], the same log determinant [...]. The weights get no gradient."""
        changed, kept = z.tensor_split([z.shape[-1] - self.half], -1)
        weights = (weight.detach() for weight in self.net.parameters())
        shift, log_scale = self.shift_and_log_scale(weights, kept, context)
        return torch.cat([kept, (changed - shift) * (-log_scale).exp()], -1), log_scale.sum(-1)

    def shift_and_log_scale(self, weights, kept, context):
        """self.net with these weights, of one half [..., D/2] and the context [..., D] → two [..., D/2]"""
        weight, bias, last_weight, last_bias = weights
        hidden = F.silu(F.linear(torch.cat([kept, context], -1), weight, bias))
        shift, log_scale = F.linear(hidden, last_weight, last_bias).to(kept.dtype).chunk(2, -1)
        return shift, log_scale.tanh()  # scales within exp(±1) keep training stable


class PosteriorFlow(nn.ModuleList):
    """Pairs of coupling layers that turn a draw from a Gaussian into one from a more flexible posterior
    (Rezende & Mohamed 2015). The encoder gives a context [..., D] for each image. Without a pair, z stays z.
    """

    def __init__(self, latent_size, pairs):
        super().__init__(Coupling(latent_size) for _ in range(2 * pairs))

    def transform(self, z, context=None):
        """z of the Gaussian [..., D] → z of the posterior [..., D], the log determinant of the Jacobian [...]
        """
        log_det = torch.zeros_like(z[..., 0])
        for layer, coupling in enumerate(self):
            z, change = coupling(z, context.expand_as(z))
            log_det = log_det + change
            if layer % 2:  # both halves have changed; even and odd ones are the next halves
                z = torch.cat([z[..., 1::2], z[..., ::2]], -1)
        return z, log_det

    def inverse(self, z, context):
        """Undo transform → z of the Gaussian [..., D], the same log determinant [...]. The weights get no
        gradient.
        """
        log_det = torch.zeros_like(z[..., 0])
        for layer, coupling in reversed(list(enumerate(self))):
            if layer % 2:
                shuffled, z = z, torch.empty_like(z)
                z[..., 1::2], z[..., ::2] = shuffled.tensor_split([z.shape[-1] // 2], -1)
            z, change = coupling.inverse(z, context.expand_as(z))
            log_det = log_det + change
        return z, log_det
