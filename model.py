"""Encoders, decoders and likelihoods; the autoencoder, the variational autoencoder and the conditional one.

Outside a model an image is integer levels (uint8, 0 … levels - 1); inside, the network's input is normalised
to [-1, 1]; mean images come out in [0, 1]. Every loss is a sum over pixels or latent dimensions, in nats an
image (for mse: squared error on the scale [-1, 1]), so that beta means the same at any image size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from networks import NETWORKS
from utils import KLD, elbo_to_bpd, moments, sample_reparameterize

DEFAULT_LOSS = {2: "bce", 16: "categorical", 256: "mse"}  # by levels


class Coupling(nn.Module):
    """A layer of a normalizing flow (Dinh et al. 2017): one half of z is scaled and shifted by what a network
    makes of the other half and of the context, and comes out in front, so that the next layer takes the
    other. It begins as that exchange alone.
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
        """z, context [..., D] → z [..., D], the log determinant of the Jacobian [...]."""
        kept, changed = z[..., :self.half], z[..., self.half:]
        shift, log_scale = self.amounts(self.net.parameters(), kept, context)
        return torch.cat([changed * log_scale.exp() + shift, kept], -1), log_scale.sum(-1)

    def inverse(self, z, context):
        """What forward made z of, and the same log determinant; no gradient reaches the weights."""
        changed, kept = z.tensor_split([z.shape[-1] - self.half], -1)
        weights = (weight.detach() for weight in self.net.parameters())
        shift, log_scale = self.amounts(weights, kept, context)
        return torch.cat([kept, (changed - shift) * (-log_scale).exp()], -1), log_scale.sum(-1)

    def amounts(self, weights, kept, context):
        """What the network, with these weights of its two layers, makes of its half of z and the context."""
        weight, bias, last_weight, last_bias = weights
        hidden = F.silu(F.linear(torch.cat([kept, context], -1), weight, bias))
        shift, log_scale = F.linear(hidden, last_weight, last_bias).to(kept.dtype).chunk(2, -1)
        return shift, log_scale.tanh()


# ------------------------------------------------------------------------------------------------------------
# Models

def exact(network, x):
    """network(x) in x's own precision. Under autocast the network computes in bf16; what follows it, the
    likelihoods and the KL, does not.
    """
    return network(x).to(x.dtype)


class AE(nn.Module):
    """An autoencoder. With it, the likelihood of an image given z, which the other models share.

    shape: (C, H, W), any from 8×8 up; levels: how many values a pixel has
    recon_loss: mse, bce (Bernoulli, with soft targets where levels > 2), categorical (a softmax over the
        levels), logistic (discretised, its scale learned), or None for the one that fits the levels
    num_classes: for ConditionalVAE
    """

    codes = 1  # numbers that the encoder gives for each latent dimension: z
    prior_name = "a Gaussian fitted to the training images' latents (an AE has no prior)"

    def __init__(self, shape, levels=256, model="cnn", latent_size=32, hidden_dims=(512,), num_filters=8,
                 recon_loss=None, num_classes=0):
        super().__init__()
        self.shape, self.levels, self.latent_size = tuple(shape), levels, latent_size
        self.recon_loss = recon_loss or DEFAULT_LOSS[levels]
        self.channels = shape[0] * {"categorical": levels, "logistic": 2}.get(self.recon_loss, 1)
        seen = (shape[0] + bool(num_classes), *shape[1:])
        outputs, inputs = self.codes * latent_size, latent_size + num_classes
        encoder, decoder, names = NETWORKS[model]
        widths = {name: {"hidden_dims": hidden_dims, "num_filters": num_filters}[name] for name in names}
        self.encoder = encoder(seen, outputs, **widths)
        self.decoder = decoder(shape, self.channels, inputs, **widths)
        self.to(memory_format=torch.channels_last)  # of convolutions
        if self.codes == 1:  # no prior: the Gaussian that fit_prior finds
            self.register_buffer("prior_mean", torch.zeros(latent_size))
            self.register_buffer("prior_scale", torch.eye(latent_size))

    # ---- images → z

    def normalize(self, images):
        """Integer levels → [-1, 1]."""
        return (images.to(next(self.parameters()).dtype) * (2 / (self.levels - 1))).sub_(1)

    def encode(self, images, labels=None):
        """Integer levels [B, C, H, W] → z [B, D]."""
        return exact(self.encoder, self.normalize(images))

    embed = encode  # the one z that stands for an image

    # ---- z → images

    def decode(self, z, labels=None):
        """z [B, D] → the likelihood's parameters [B, K·C, H, W], K-major."""
        return exact(self.decoder, z)

    def reconstruction_loss(self, params, images):
        """-log p(x|z) of each image in nats (for mse the squared error on the scale [-1, 1]), summed over
        pixels.

        params: [B, K·C, H, W], logits (for mse the mean is their tanh; for logistic they are means and log
        scales on [-1, 1]); images: integer levels [B, C, H, W] → [B]
        """
        if self.recon_loss == "mse":
            loss = (params.tanh() - self.normalize(images)) ** 2
        elif self.recon_loss == "bce":
            targets = images.to(params.dtype) / (self.levels - 1)
            loss = F.binary_cross_entropy_with_logits(params, targets, reduction="none")
        elif self.recon_loss == "logistic":
            loss = -self.log_mass(params, images)
        else:
            loss = F.cross_entropy(self.by_level(params), images.long(), reduction="none")
        return loss.flatten(1).sum(1)

    def logistic(self, params):
        """→ mean, log scale, each [B, C, H, W]; scales stay within 0.0009 … 1097."""
        mean, log_scale = params.chunk(2, dim=1)
        return mean, log_scale.clamp(-7, 7)

    def log_mass(self, params, images):
        """log P(level) of a logistic distribution that is cut into bins around the levels; the first and the
        last bin reach to infinity (Salimans et al. 2017, eq. 2, one component).
        """
        mean, log_scale = self.logistic(params)
        centre, half, rate = self.normalize(images) - mean, 1 / (self.levels - 1), torch.exp(-log_scale)
        upper, lower = rate * (centre + half), rate * (centre - half)
        # σ(upper) - σ(lower) = σ(upper) σ(-lower) (1 - exp(lower - upper)), where nothing cancels
        first, last = images == 0, images == self.levels - 1
        return torch.where(last, 0, F.logsigmoid(upper)) + torch.where(first, 0, F.logsigmoid(-lower)) \
            + torch.where(first | last, 0, torch.log(-torch.expm1(-2 * half * rate)))

    def by_level(self, params):
        """[B, K·C, H, W] → [B, K, C, H, W]."""
        return params.view(-1, self.levels, *self.shape)

    @property
    def is_likelihood(self):
        """Whether the reconstruction loss is a likelihood of discrete pixels, so that bits/dim mean
        something.
        """
        return self.recon_loss in ("categorical", "logistic") or (self.recon_loss == "bce" and
                                                                  self.levels == 2)

    def mean_image(self, params):
        """The expected pixels in [0, 1], [B, C, H, W]."""
        if self.recon_loss == "mse":
            return (params.tanh() + 1) / 2
        if self.recon_loss == "bce":
            return params.sigmoid()
        if self.recon_loss == "logistic":  # the sum over all edges between levels of P(above the edge)
            mean, log_scale = self.logistic(params)
            edges = [(2 * level - 1) / (self.levels - 1) - 1 for level in range(1, self.levels)]
            return sum(torch.sigmoid((mean - edge) * torch.exp(-log_scale)) for edge in edges) / len(edges)
        levels = torch.linspace(0, 1, self.levels, dtype=params.dtype, device=params.device)
        return torch.einsum("bkchw,k->bchw", self.by_level(params).softmax(1), levels)

    def draw(self, params, generator=None):
        """Integer levels drawn from the likelihood, uint8 [B, C, H, W]; where it is none, the mean's nearest
        levels.
        """
        if not self.is_likelihood:
            return (self.mean_image(params) * (self.levels - 1)).round().byte()
        uniform = torch.rand(len(params), 1, *self.shape, generator=generator).to(params.device)
        if self.recon_loss == "bce":
            return (uniform[:, 0] < params.sigmoid()).byte()
        if self.recon_loss == "logistic":
            mean, log_scale = self.logistic(params)
            x = mean + log_scale.exp() * torch.logit(uniform[:, 0], eps=1e-7)
            return ((x + 1) / 2 * (self.levels - 1)).round().clamp(0, self.levels - 1).byte()
        below = self.by_level(params).softmax(1).cumsum(1)[:, :-1]  # inverse of the cumulative distribution
        return (uniform > below).sum(1).byte()

    def reconstruct(self, images, labels=None):
        """Integer levels → mean images in [0, 1] of the one z that stands for each image."""
        return self.mean_image(self.decode(self.embed(images, labels), labels))

    # ---- sampling

    def prior(self, n, temperature=1.0, generator=None):
        """z [n, D] from the prior (of an AE: the fitted Gaussian), its standard deviation times
        `temperature`.
        """
        noise = torch.randn(n, self.latent_size, generator=generator)
        return self.to_prior(temperature * noise.to(next(self.parameters())))

    def to_prior(self, noise):
        """N(0, I) → the prior, [n, D] → [n, D]."""
        return self.prior_mean + noise @ self.prior_scale.T

    @torch.no_grad()
    def fit_prior(self, batches, total=lambda sums: sums):
        """Fit a Gaussian to the z of images, so that an AE can be sampled from; batches of integer levels.

        total: adds up a tensor over processes, each of which has its own batches
        Raises FloatingPointError where a z is not finite.
        """
        mean, covariance = moments((self.embed(images) for images in batches), self.latent_size, total)
        # Unused dimensions have no variance; what rounding leaves of it grows with their mean.
        ridge = 1e-6 * covariance.diagonal().mean() + 1e-12 + 1e-14 * mean.square().sum()
        self.prior_mean.copy_(mean)
        self.prior_scale.copy_(torch.linalg.cholesky(covariance + ridge * torch.eye(len(mean)).to(mean)))

    @torch.no_grad()
    def sample(self, n, labels=None, temperature=1.0, generator=None):
        """n images from the prior, of the classes `labels` [n] where the model is conditional.

        generator: a CPU torch.Generator, for the same images again
        → (x_samples: integer levels uint8 [n, C, H, W]; x_mean: mean images in [0, 1], [n, C, H, W])
        """
        params = self.decode(self.prior(n, temperature, generator), labels)
        return self.draw(params, generator), self.mean_image(params)

    # ---- the objective

    def forward(self, images, labels=None, noise=None):
        """images: integer levels [B, C, H, W]; labels: [B]; noise ~ N(0, I): [B, D]

        → (L_rec, L_reg, bpd), each a mean over the batch of sums over pixels or latent dimensions. L_rec,
        L_reg: nats an image; bpd: bits/dim of the negative ELBO at beta = 1, None where the loss is no
        likelihood of discrete pixels. An AE has no L_reg (it is 0), no bpd, and no use for noise.
        """
        rec = self.reconstruction_loss(self.decode(self.encode(images, labels), labels), images)
        return rec.mean(), rec.new_zeros(()), None


class VAE(AE):
    """A variational autoencoder with a Gaussian posterior and the prior N(0, I) (Kingma & Welling 2014).

    flow: how many pairs of coupling layers take the Gaussian to the posterior (Rezende & Mohamed 2015); with
        any, L_reg is the KL as z itself estimates it, unbiased, and may be negative
    free_bits: the nats below which an image's KL in a latent dimension is not pushed any further (Kingma et
        al. 2016, here for each image)
    iw_train: K of the importance-weighted bound of Burda et al. 2016, which `forward` then gives in place of
        the ELBO; 0 for the ELBO
    """

    codes = 2  # mean and log_std
    prior_name = "the prior"

    def __init__(self, *args, flow=0, free_bits=0.0, iw_train=0, **kwargs):
        self.codes = VAE.codes + bool(flow)
        super().__init__(*args, **kwargs)
        self.free_bits, self.iw_train = free_bits, iw_train
        self.flow = nn.ModuleList(Coupling(self.latent_size) for _ in range(2 * flow))

    def encode(self, images, labels=None):
        """Integer levels [B, C, H, W] → mean, log_std of q(z|x), each [B, D]; with a flow those of the
        Gaussian that it begins from, and its context, [B, D].
        """
        codes = exact(self.encoder, self.encoder_input(images, labels))
        mean, log_std, *context = codes.chunk(self.codes, dim=1)
        # exp(2 log_std) is infinite in float32 from 44.4 on; no posterior that is of use comes near ±20.
        # hardtanh is a clamp whose gradient takes one operation instead of four.
        return mean, F.hardtanh(log_std, -20, 20), *context

    def encoder_input(self, images, labels):
        return self.normalize(images)

    def embed(self, images, labels=None):
        mean, _, *context = self.encode(images, labels)
        return self.transform(mean, *context)[0]

    def transform(self, z, context=None):
        """The flow: z of the Gaussian [..., D] → z of the posterior [..., D], the log determinant of the
        Jacobian [...].
        """
        log_det = torch.zeros_like(z[..., 0])
        for layer, coupling in enumerate(self.flow):
            z, change = coupling(z, context.expand_as(z))
            log_det = log_det + change
            if layer % 2:  # each half has changed: the next pair has others, the even places and the odd
                z = torch.cat([z[..., 1::2], z[..., ::2]], -1)
        return z, log_det

    def inverse(self, z, context):
        """Undo transform: z of the posterior → z of the Gaussian, the same log determinant; no gradient
        reaches the flow's weights.
        """
        log_det = torch.zeros_like(z[..., 0])
        for layer, coupling in reversed(list(enumerate(self.flow))):
            if layer % 2:
                shuffled, z = z, torch.empty_like(z)
                z[..., 1::2], z[..., ::2] = shuffled.tensor_split([self.latent_size // 2], -1)
            z, change = coupling.inverse(z, context.expand_as(z))
            log_det = log_det + change
        return z, log_det

    def to_prior(self, noise):
        return noise

    def weigh(self, images, labels, noise):
        """Of K latents of each image, noise ~ N(0, I) [B, K, D]: -log p(x|z) and log q(z|x) - log p(z), in
        nats, each [B, K]. Minus their sum is the log of an importance weight.

        With a flow and K = 1 the gradient reaches q through z alone: what is left out is 0 in expectation,
        and noise otherwise (Roeder et al. 2017). In the bound of many latents it would not be 0.
        """
        mean, log_std, *context = (code[:, None] for code in self.encode(images, labels))
        z, k = sample_reparameterize(mean, log_std.exp(), noise), noise.shape[1]
        z, log_det = self.transform(z, *context)
        if self.flow and k == 1 and torch.is_grad_enabled():
            log_std, *context = (code.detach() for code in (log_std, *context))
            start, log_det = self.inverse(z, *context)
            noise = noise + (start - start.detach()) * (-log_std).exp()  # its value is noise
        params = self.decode(z.flatten(0, 1), None if labels is None else labels.repeat_interleave(k))
        rec = self.reconstruction_loss(params, images.repeat_interleave(k, 0)).view(-1, k)
        return rec, ((z ** 2 - noise ** 2) / 2 - log_std).sum(-1) - log_det

    def forward(self, images, labels=None, noise=None):
        """As AE.forward. With iw_train the noise is [B, K, D], L_rec + L_reg the negative bound of K latents,
        and bpd of that; L_rec is the mean over them, and L_reg, which may be negative, is no KL but what the
        bound adds.
        """
        if self.iw_train or self.flow:
            rec, ratio = self.weigh(images, labels, noise if self.iw_train else noise[:, None])
            bound = math.log(rec.shape[1]) - torch.logsumexp(-rec - ratio, 1)  # of one latent: the ELBO
            rec, bound = rec.mean(), bound.mean()
            return rec, bound - rec, elbo_to_bpd(bound.detach(), images.shape) if self.is_likelihood else None
        mean, log_std = self.encode(images, labels)
        z = sample_reparameterize(mean, log_std.exp(), noise)
        rec = self.reconstruction_loss(self.decode(z, labels), images)  # [B]
        if not self.free_bits:
            kl = KLD(mean, log_std)                                     # [B]
        else:
            kl = KLD(mean[..., None], log_std[..., None])               # [B, D], a row each: KL by dimension
            # max(kl, free_bits) has the gradient of kl above free_bits and none below; so has this, and its
            # value stays the true KL.
            kl = torch.where(kl < self.free_bits, kl.detach(), kl).sum(1)
        rec, kl = rec.mean(), kl.mean()
        return rec, kl, elbo_to_bpd((rec + kl).detach(), images.shape) if self.is_likelihood else None


class ConditionalVAE(VAE):
    """A VAE given the class (Sohn et al. 2015): the encoder sees it as one more channel, an image learned for
    each class; the decoder as one-hot numbers beside z. It needs labels [B] wherever they are an argument.
    """

    def __init__(self, *args, num_classes, **kwargs):
        super().__init__(*args, num_classes=num_classes, **kwargs)
        self.num_classes = num_classes
        self.class_image = nn.Embedding(num_classes, math.prod(self.shape[1:]))

    def encoder_input(self, images, labels):
        planes = self.class_image(labels).view(-1, 1, *self.shape[1:])
        return torch.cat([self.normalize(images), planes], dim=1)

    def decode(self, z, labels=None):
        return exact(self.decoder, torch.cat([z, F.one_hot(labels, self.num_classes).to(z)], dim=1))


def build(args, data):
    """The model that the arguments ask for.

    args: train.py's arguments as a dictionary; data: a dictionary with shape, levels and classes. A
    checkpoint keeps both, so that the same model can be built again.
    """
    common = {name: args[name] for name in ("model", "latent_size", "hidden_dims", "num_filters",
                                            "recon_loss")}
    common |= {"shape": data["shape"], "levels": data["levels"]}
    if args["loss_mode"] == "ae":
        return AE(**common)
    common |= {name: args[name] for name in ("flow", "free_bits", "iw_train")}
    if args["conditional"]:
        return ConditionalVAE(**common, num_classes=len(data["classes"]))
    return VAE(**common)
