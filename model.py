"""Encoders, decoders and likelihoods; the autoencoder, the variational autoencoder and the conditional one.

Outside a model an image is integer levels (uint8, 0 … levels - 1); inside, the network's input is normalised
to [-1, 1]; mean images come out in [0, 1]. Every loss is a sum over pixels or latent dimensions, in nats an
image (for mse: squared error on the scale [-1, 1]), so that beta means the same at any image size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from utils import KLD, elbo_to_bpd, moments, sample_reparameterize

DEFAULT_LOSS = {2: "bce", 16: "categorical", 256: "mse"}  # by levels


# ------------------------------------------------------------------------------------------------------------
# Networks: no batch normalisation and no dropout, which would make a step depend on more than its own images.

class MLPEncoder(nn.Module):
    """Normalised images [B, C, H, W] → [B, outputs]."""

    def __init__(self, shape, outputs, hidden_dims=(512,)):
        super().__init__()
        widths = [math.prod(shape), *hidden_dims]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], outputs))

    def forward(self, x):
        return self.net(x)


class MLPDecoder(nn.Module):
    """z [B, latent_size] → the likelihood's parameters [B, channels, H, W]; the encoder's widths in reverse.
    """

    def __init__(self, shape, channels, latent_size, hidden_dims=(512,)):
        super().__init__()
        self.shape = (channels, *shape[1:])
        widths = [latent_size, *reversed(hidden_dims)]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(self.shape)))

    def forward(self, z):
        return self.net(z).view(-1, *self.shape)


def pyramid(shape, num_filters, growth=(1, 4, 8)):
    """Sizes and widths of the levels: halved (rounding up) until neither side is above 8, at least once.

    The first level has num_filters channels, the others `growth` times as many: four times in the second
    holds as many activations. → [(H, W), (⌈H/2⌉, ⌈W/2⌉), …], [channels of the first halving, …]
    """
    sizes = [tuple(shape[1:])]
    while len(sizes) == 1 or max(sizes[-1]) > 8:
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    return sizes, [num_filters * growth[min(level, 2)] for level in range(len(sizes) - 1)]


class CNNEncoder(nn.Module):
    """Normalised images [B, C, H, W] → [B, outputs]; a 3×3 convolution of stride 2 a level."""

    def __init__(self, shape, outputs, num_filters=8):
        super().__init__()
        sizes, widths = pyramid(shape, num_filters)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1)
                                   for i, o in zip([shape[0], *widths], widths))
        self.out = nn.Linear(widths[-1] * math.prod(sizes[-1]), outputs)

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.out(x.permute(0, 2, 3, 1).flatten(1))  # channels last, as they lie in memory: no copy


class CNNDecoder(nn.Module):
    """z [B, latent_size] → the likelihood's parameters [B, channels, H, W].

    At each level a 3×3 convolution, then twice the size: nearest neighbours inside, and at the end a pixel
    shuffle (Shi et al. 2016), whose convolution runs at half the size and so costs a quarter.
    """

    def __init__(self, shape, channels, latent_size, num_filters=8):
        super().__init__()
        sizes, widths = pyramid(shape, num_filters)
        self.sizes, self.widths = sizes[::-1], widths[::-1]
        self.stem = nn.Linear(latent_size, self.widths[0] * math.prod(self.sizes[0]))
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1)
                                   for i, o in zip(self.widths, self.widths[1:]))
        self.out = nn.Conv2d(self.widths[-1], 4 * channels, 3, padding=1)

    def forward(self, z):
        x = F.relu(self.stem(z)).view(-1, *self.sizes[0], self.widths[0]).permute(0, 3, 1, 2)
        for conv, size in zip(self.convs, self.sizes[1:]):
            x = F.interpolate(F.relu(conv(x)), size)
        height, width = self.sizes[-1]
        # an odd side came out one pixel too long
        return F.pixel_shuffle(self.out(x), 2)[..., :height, :width]


class Residual(nn.Module):
    """x + f(x), where f is two layers of x's width, non-linearities first (He et al. 2016)."""

    def __init__(self, layer, width):
        super().__init__()
        self.first, self.second = layer(width, width), layer(width, width)

    def forward(self, x):
        return x + self.second(F.silu(self.first(F.silu(x))))


def conv3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def residual_layers(widths):
    """For each width but the first a linear layer to it, a residual block and a SiLU."""
    return nn.Sequential(*(layer for i, o in zip(widths, widths[1:])
                           for layer in (nn.Linear(i, o), Residual(nn.Linear, o), nn.SiLU())))


class ResNetEncoder(nn.Module):
    """Normalised images [B, C, H, W] → [B, outputs]: at each level a convolution of stride 2 and residual
    blocks, one at the first level and two at the others; then residual layers of the widths hidden_dims.
    """

    def __init__(self, shape, outputs, hidden_dims=(512,), num_filters=8):
        super().__init__()
        sizes, widths = pyramid(shape, num_filters, growth=(1, 2, 4))
        layers = []
        for level, (i, o) in enumerate(zip([shape[0], *widths], widths)):
            layers += [conv3(i, o, stride=2), *(Residual(conv3, o) for _ in range(min(level + 1, 2)))]
        self.convs = nn.Sequential(*layers, nn.Conv2d(widths[-1], num_filters, 1))
        widths = [num_filters * math.prod(sizes[-1]), *hidden_dims]
        self.hidden, self.out = residual_layers(widths), nn.Linear(widths[-1], outputs)

    def forward(self, x):
        x = F.silu(self.convs(x)).permute(0, 2, 3, 1).flatten(1)  # channels last: no copy
        return self.out(self.hidden(x))


class ResNetDecoder(nn.Module):
    """z [B, latent_size] → the likelihood's parameters [B, channels, H, W]: the encoder in reverse, without
    residual blocks at the level of the largest images; each level ends with a pixel shuffle.
    """

    def __init__(self, shape, channels, latent_size, hidden_dims=(512,), num_filters=8):
        super().__init__()
        sizes, widths = pyramid(shape, num_filters, growth=(1, 2, 4))
        self.sizes, widths = sizes[::-1], widths[::-1]
        dense = [latent_size, *reversed(hidden_dims)]
        self.hidden = residual_layers(dense)
        self.stem = nn.Linear(dense[-1], num_filters * math.prod(self.sizes[0]))
        self.widen = nn.Conv2d(num_filters, widths[0], 1)
        self.levels = nn.ModuleList(
            nn.Sequential(Residual(conv3, i), Residual(conv3, i), conv3(i, 4 * o), nn.PixelShuffle(2))
            for i, o in zip(widths, widths[1:]))
        self.out = conv3(widths[-1], 4 * channels)

    def forward(self, z):
        x = self.stem(self.hidden(z)).view(len(z), *self.sizes[0], -1).permute(0, 3, 1, 2)
        x = self.widen(x)
        for level, (height, width) in zip(self.levels, self.sizes[1:]):
            x = level(x)[..., :height, :width]  # an odd side came out one pixel too long
        height, width = self.sizes[-1]
        return F.pixel_shuffle(self.out(F.silu(x)), 2)[..., :height, :width]


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


NETWORKS = {"mlp": (MLPEncoder, MLPDecoder, ["hidden_dims"]),
            "cnn": (CNNEncoder, CNNDecoder, ["num_filters"]),
            "resnet": (ResNetEncoder, ResNetDecoder, ["hidden_dims", "num_filters"])}


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
