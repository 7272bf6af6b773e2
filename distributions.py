"""Likelihoods p(x|z) of an image's pixels, and priors p(z): the standard normal, a trained flow, a fitted
mixture.

A likelihood says how many numbers the decoder gives for a pixel (the params), and what they mean. To add one,
write a class with the members of SquaredError (an nn.Module if it has parameters, as Gaussian) and put its
name into LIKELIHOODS; besides, only the help of --recon_loss names it.

Below, images are integer levels [B, C, H, W], and params are [B, channels(C), H, W] from the decoder.
"""

import math

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
        """The number of params of a pixel, for images with `image_channels` channels."""
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

        generator: on the CPU; all random numbers must come from it
        """
        return nearest_levels(self.mean(params), self.levels)


class Gaussian(nn.Module):
    """`gaussian`: a Gaussian on [-1, 1] around tanh(params), with one standard deviation for all pixels,
    learned (Dai & Wipf 2019; Rybkin et al. 2021). It is a density of continuous values, so −log p(x|z) may
    be negative.
    """

    is_discrete = False

    def __init__(self, levels):
        super().__init__()
        self.levels = levels
        self.log_scale = nn.Parameter(torch.tensor(-1.0))

    @property
    def bounded_log_scale(self):
        """The log of a scale between 1 / (2 levels) and e³ (about 20), so that exp neither overflows nor
        vanishes. The gradient ignores the bounds, or a parameter beyond them would never come back.
        """
        bounded = self.log_scale.clamp(-math.log(2 * self.levels), 3)
        return self.log_scale + (bounded - self.log_scale).detach()

    def channels(self, image_channels):
        return image_channels

    def loss(self, params, images):
        log_scale = self.bounded_log_scale
        squares = (params.tanh() - normalize(images, self.levels, params.dtype)) ** 2
        return (0.5 * torch.exp(-2 * log_scale) * squares + log_scale
                + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def mean(self, params):
        return (params.tanh() + 1) / 2

    def draw(self, params, generator=None):
        noise = torch.randn(params.shape, generator=generator).to(params.device)
        x = params.tanh() + self.bounded_log_scale.exp() * noise
        return nearest_levels((x + 1) / 2, self.levels)


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


LIKELIHOODS = {"mse": SquaredError, "gaussian": Gaussian, "bce": Bernoulli, "categorical": Categorical,
               "logistic": DiscretizedLogistic}


def default_likelihood(levels, is_vae):
    """The name of the likelihood for images of this number of levels, 2, 16 or 256"""
    return {2: "bce", 16: "categorical", 256: "gaussian" if is_vae else "mse"}[levels]


# ------------------------------------------------------------------------------------------------------------
# Priors p(z). Each maps N(0, I) noise [n, noise_size] to z; its inverse, density and KL follow from that map.
# To add one, write a class with the members of StandardNormal and put its name into PRIORS.

class StandardNormal(nn.Module):
    """N(0, I), the prior of a VAE (Kingma & Welling 2014)."""

    wants_mixture = True  # whether samples are better from a mixture that is fitted after training
    description = "the prior N(0, I)"
    base_name = "in the latent space"  # how captions name the space in which the prior is N(0, I)

    def __init__(self, latent_size, layers=0, num_classes=0):
        super().__init__()
        self.noise_size = latent_size

    def transform(self, noise, labels=None):
        """N(0, I) → z, [n, D] → [n, D]"""
        return noise

    def inverse(self, z, labels=None):
        """z → N(0, I), [n, D] → [n, D]"""
        return z

    def log_prob(self, z, labels=None):
        """log p(z), nats, [n, D] → [n]"""
        return log_normal(z)

    def kl(self, mean, log_std, z, labels=None):
        """KL(q ‖ p) of q = N(mean, exp(log_std)²), in nats, [B, D] → [B]; z, a draw from q, is unused here"""
        return KLD(mean, log_std)

    def kl_by_dimension(self, mean, log_std):
        """The KL of each latent dimension in closed form, in nats, [B, D] → [B, D]; None if there is none"""
        return KLD(mean[..., None], log_std[..., None])


class Coupling(nn.Module):
    """A layer of a flow (Dinh et al. 2017). A network of one half of z, and of the class, scales and shifts
    the other half. The changed half comes first in the result, so the next layer changes the other one. The
    last weights begin at 0: a new layer only swaps the halves.
    """

    def __init__(self, latent_size, num_classes, width=256):
        super().__init__()
        self.kept = latent_size // 2
        self.changed = latent_size - self.kept
        self.net = nn.Sequential(nn.Linear(self.kept + num_classes, width), nn.SiLU(),
                                 nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * self.changed))
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def shift_and_log_scale(self, kept, classes):
        """→ two [n, ⌈D/2⌉]; scales within exp(±1) keep training stable"""
        shift, log_scale = self.net(torch.cat([kept, classes], 1)).to(kept.dtype).chunk(2, 1)
        return shift, log_scale.tanh()

    def forward(self, z, classes):
        """z [n, D], one-hot classes [n, C] → z [n, D]"""
        kept, changed = z.split([self.kept, self.changed], 1)
        shift, log_scale = self.shift_and_log_scale(kept, classes)
        return torch.cat([changed * log_scale.exp() + shift, kept], 1)

    def inverse(self, z, classes):
        """Undo forward → z [n, D], the log determinant of the Jacobian of the inverse [n]"""
        changed, kept = z.split([self.changed, self.kept], 1)
        shift, log_scale = self.shift_and_log_scale(kept, classes)
        return torch.cat([kept, (changed - shift) * (-log_scale).exp()], 1), -log_scale.sum(1)


class Flow(nn.Module):
    """A prior that is trained with the model: coupling layers turn N(0, I) into p(z) (Dinh et al. 2017; as a
    prior of a VAE, Chen et al. 2017). After every second layer the even dimensions and the odd ones become
    the two halves. With one latent dimension it is a Gaussian with a learned mean and scale.

    num_classes: of a conditional model, which has a prior for each class; 0 for any other
    """

    wants_mixture = False
    description = "the trained flow prior"
    base_name = "in the flow's base space"

    def __init__(self, latent_size, layers, num_classes=0):
        super().__init__()
        self.noise_size, self.num_classes = latent_size, max(1, num_classes)
        self.couplings = nn.ModuleList(Coupling(latent_size, self.num_classes) for _ in range(layers))
        order = torch.cat([torch.arange(1, latent_size, 2), torch.arange(0, latent_size, 2)])
        self.register_buffer("order", order, persistent=False)

    def classes(self, labels, z):
        """One-hot numbers [n, C] of labels [n], which are ignored if the model is not conditional"""
        labels = labels if self.num_classes > 1 else torch.zeros(len(z), dtype=torch.long, device=z.device)
        return F.one_hot(labels, self.num_classes).to(z)

    def transform(self, noise, labels=None):
        z, classes = noise, self.classes(labels, noise)
        for layer, coupling in enumerate(self.couplings):
            z = coupling(z, classes)
            if layer % 2:
                z = z[:, self.order]
        return z

    def inverse(self, z, labels=None):
        return self.inverse_and_log_det(z, labels)[0]

    def inverse_and_log_det(self, z, labels):
        """z [n, D] → noise [n, D], the log determinant of the Jacobian [n]"""
        log_det, classes, undone = torch.zeros_like(z[:, 0]), self.classes(labels, z), self.order.argsort()
        for layer, coupling in reversed(list(enumerate(self.couplings))):
            if layer % 2:
                z = z[:, undone]
            z, change = coupling.inverse(z, classes)
            log_det = log_det + change
        return z, log_det

    def log_prob(self, z, labels=None):
        noise, log_det = self.inverse_and_log_det(z, labels)
        return log_normal(noise) + log_det

    def kl(self, mean, log_std, z, labels=None):
        """log q(z|x) − log p(z) at z, an unbiased estimate of the KL, in nats, [B, D] → [B]; may be negative.

        The gradient of log q flows only through z. The rest of it is 0 in expectation, so it would only add
        noise (Roeder et al. 2017).
        """
        mean, log_std = mean.detach(), log_std.detach()
        log_q = log_normal((z - mean) * (-log_std).exp()) - log_std.sum(1)
        return log_q - self.log_prob(z, labels)

    def kl_by_dimension(self, mean, log_std):
        return None


PRIORS = {"normal": StandardNormal, "flow": Flow}


# ------------------------------------------------------------------------------------------------------------
# A mixture that is fitted after training, to draw samples from

class Mixture(nn.Module):
    """A mixture of K Gaussians with full covariances, fitted to latents; a mixture for each of C classes.

    weights: [C, K]; means: [C, K, D]; scales: [C, K, D, D], the Cholesky factors of the covariances
    It has no inverse. The last number of its noise chooses the component, so noise_size is D + 1.
    """

    base_name = "after scaling the latents to variance 1"  # see AE.to_base

    def __init__(self, weights, means, scales):
        super().__init__()
        for name, value in (("weights", weights), ("means", means), ("scales", scales)):
            self.register_buffer(name, value, persistent=False)  # a checkpoint has them as `fitted`
        self.noise_size = means.shape[-1] + 1

    @classmethod
    def standard(cls, latent_size):
        """N(0, I)"""
        return cls(torch.ones(1, 1), torch.zeros(1, 1, latent_size), torch.eye(latent_size)[None, None])

    @classmethod
    def gaussian(cls, mean, covariance):
        """One Gaussian with a mean [D] and a covariance [D, D]"""
        scale = cholesky(covariance, mean)
        return cls(torch.ones(1, 1), mean.float()[None, None], scale.float()[None, None])

    @property
    def description(self):
        return "a Gaussian fitted to training latents" if self.weights.shape[1] == 1 else \
            f"a mixture of {self.weights.shape[1]} Gaussians fitted to training latents"

    def transform(self, noise, labels=None):
        """N(0, I) → z, [n, D + 1] → [n, D]"""
        labels = noise.new_zeros(len(noise)) if len(self.weights) == 1 else labels
        labels = labels.to(noise.device, torch.long)
        edges = self.weights.cumsum(1)[:, :-1]
        # the last component of a class that has fewer than K takes what rounding has left of the sum
        edges = edges.where(self.weights.flip(1).cumsum(1).flip(1)[:, 1:] > 0, torch.inf)
        u = torch.special.ndtr(noise[:, -1:])
        component = (u > edges[labels]).sum(1)
        z = torch.empty_like(noise[:, :-1])
        for label, k in set(zip(labels.tolist(), component.tolist())):
            here = (labels == label) & (component == k)
            z[here] = self.means[label, k] + noise[here, :-1] @ self.scales[label, k].T
        return z

    def mean_and_std(self):
        """→ the mean [D] and the standard deviation [D] of each latent dimension, over all classes alike"""
        weights = (self.weights / len(self.weights))[..., None]
        mean = (weights * self.means).sum((0, 1))
        variance = (weights * (self.scales.square().sum(-1) + (self.means - mean).square())).sum((0, 1))
        return mean, variance.sqrt()


def cholesky(covariance, mean):
    """The Cholesky factor of a covariance [D, D], with a ridge, without which it fails at a constant
    dimension. The ridge's last term covers rounding errors, which grow with the mean [D].
    """
    ridge = 1e-6 * covariance.diagonal().mean() + 1e-12 + 1e-14 * mean.square().sum()
    return torch.linalg.cholesky(covariance + ridge * torch.eye(len(mean)).to(covariance))


def fit_mixture(latents, labels=None, num_classes=1, components=50):
    """Fit a mixture of up to `components` Gaussians to the latents of each class, by
    expectation-maximisation.

    latents: [N, D], on the CPU; labels: [N], of a conditional model; computed in float64
    A class of M latents has at most M / (10 D) components, and at least one; above 128 dimensions always one.
    A class with fewer than 10 D latents gets one Gaussian with the pooled covariance within the classes.
    → a Mixture in float32, on the CPU. Raises FloatingPointError if a latent is not finite.
    """
    (n, size), z = latents.shape, latents.double()
    if not z.isfinite().all():
        raise FloatingPointError
    labels = torch.zeros(n, dtype=torch.long) if labels is None else labels
    classes = [z[labels == label] for label in range(num_classes)]
    most = 1 if size > 128 else max(1, min(components, max(map(len, classes)) // (10 * size)))
    mixture = Mixture(torch.zeros(num_classes, most), torch.zeros(num_classes, most, size),
                      torch.eye(size).repeat(num_classes, most, 1, 1))
    # a class without an image gets the mean of all
    centres = [own.mean(0) if len(own) else z.mean(0) for own in classes]
    centred = [own - centre for own, centre in zip(classes, centres)]
    common = cholesky(sum(own.T @ own for own in centred) / n, z.mean(0))
    for label, (centre, own) in enumerate(zip(centres, centred)):
        few = len(own) < 10 * size
        k = min(most, max(1, len(own) // (10 * size)))
        scale = common if few else cholesky(own.T @ own / len(own), centre)
        weights, means, scales = torch.ones(1), torch.zeros(1, size), torch.eye(size, dtype=z.dtype)[None]
        if k > 1:  # in coordinates in which the covariance of all latents of the class is the identity
            whitened = torch.linalg.solve_triangular(scale.T, own, upper=True, left=False)
            weights, means, scales = expectation_maximisation(whitened, k)
        mixture.weights[label, :k] = weights
        mixture.means[label, :k] = centre + means.to(scale) @ scale.T
        mixture.scales[label, :k] = scale @ scales
    return mixture


def enough_latents(size):
    """The number of latents of `size` dimensions to which the mixture of a class is fitted: 20 for each
    dimension, or more as long as the fit takes seconds only.
    """
    return max(int(2**17 / (2 * size) ** 0.5), 20 * size)


def expectation_maximisation(z, components, steps=15, gain=1e-3):
    """Fit a mixture of K Gaussians to whitened z [N, D], float64 (Dempster et al. 1977), from the clusters of
    k-means, until a step gains less than `gain` nats per latent. Deterministic.

    → weights [K], means [K, D], Cholesky factors of the covariances [K, D, D]

    A Gaussian's log density is linear in the numbers 1, zᵢ and zᵢ zⱼ, and so are the sums of a step: both
    halves of a step are matrix products with these numbers.
    """
    n, size = z.shape
    rows, columns = torch.tril_indices(size, size)
    twice = torch.where(rows == columns, 1.0, 2.0).double()  # zᵢ zⱼ stands for zⱼ zᵢ too
    means = z[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:components]]
    for _ in range(10):  # k-means; a centre without a latent stays where it is
        nearest = torch.cdist(z, means).argmin(1)
        counts = nearest.bincount(minlength=components)[:, None]
        means = torch.where(counts > 0, torch.zeros_like(means).index_add_(0, nearest, z) / counts, means)
    parameters, before = None, -torch.inf
    for _ in range(steps):
        sums, log_likelihood = 0, 0
        for first in range(0, n, 2048):
            part = z[first:first + 2048]
            numbers = torch.cat([part[:, rows] * part[:, columns], part, torch.ones_like(part[:, :1])], 1)
            if parameters is None:
                share = F.one_hot(nearest[first:first + 2048], components).double()
            else:
                log_joint = numbers @ parameters                                             # [n, K]
                total = log_joint.logsumexp(1, keepdim=True)
                share, log_likelihood = (log_joint - total).exp(), log_likelihood + total.sum().item() / n
            sums = sums + share.T @ numbers
        if parameters is not None and log_likelihood - before < gain:
            break
        before = log_likelihood if parameters is not None else before
        counts = sums[:, -1:].clamp_min(1e-9)
        weights, means = counts[:, 0] / n, sums[:, -1 - size:-1] / counts
        covariances = z.new_zeros(components, size, size)
        covariances[:, rows, columns] = covariances[:, columns, rows] = sums[:, :-1 - size] / counts
        covariances -= means[:, :, None] * means[:, None]
        scales = torch.stack([cholesky(covariance, mean) for covariance, mean in zip(covariances, means)])
        precisions = torch.cholesky_inverse(scales)
        linear = (precisions @ means[..., None])[..., 0]
        constant = weights.log() - 0.5 * (linear * means).sum(1) \
            - scales.diagonal(dim1=1, dim2=2).log().sum(1)
        parameters = torch.cat([-0.5 * twice * precisions[:, rows, columns], linear, constant[:, None]], 1).T
    return weights, means, scales
