"""The autoencoder, the variational autoencoder (VAE) and the conditional VAE.

A model is an encoder and a decoder (networks.py), a likelihood p(x|z) and a prior p(z) (distributions.py).
Outside a model, images hold integer levels (uint8, 0 … levels - 1); the networks see [-1, 1]; mean images are
in [0, 1]. Every loss is a sum over pixels or latent dimensions and a mean over the batch, so that beta = 1 is
the ELBO at every image size.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from distributions import LIKELIHOODS, PRIORS, Mixture, default_likelihood
from networks import NETWORKS
from utils import elbo_to_bpd, log_normal, mean_and_covariance, normalize, sample_reparameterize

# numbers that decode_in_parts makes at a time, to bound the memory
MAX_DECODER_OUTPUTS, MAX_DECODER_OUTPUTS_CUDA = 2**20, 2**24


class AE(nn.Module):
    """An autoencoder. It has no prior, so its samples come from a mixture of Gaussians fitted to latents.

    shape: (C, H, W), any from 8×8 up; levels: the number of values of a pixel, 2, 16 or 256
    model: a name in NETWORKS; hidden_dims, num_filters: the widths of its layers
    recon_loss: a name in LIKELIHOODS; None for the one that fits the levels
    num_classes: the number of classes of a ConditionalVAE; 0 for any other model
    """

    outputs_per_latent = 1  # of the encoder: here z itself

    def __init__(self, shape, levels=256, model="cnn", latent_size=32, hidden_dims=(512,), num_filters=8,
                 recon_loss=None, num_classes=0):
        super().__init__()
        self.shape, self.levels, self.latent_size = tuple(shape), levels, latent_size
        self.likelihood = LIKELIHOODS[recon_loss or default_likelihood(levels, isinstance(self, VAE))](levels)
        self.channels = self.likelihood.channels(shape[0])
        encoder, decoder, width_names = NETWORKS[model]
        widths = {"hidden_dims": hidden_dims, "num_filters": num_filters}
        widths = {name: widths[name] for name in width_names}
        # A conditional encoder sees the class as one more channel.
        self.encoder = encoder((shape[0] + bool(num_classes), *shape[1:]),
                               self.outputs_per_latent * latent_size, **widths)
        self.decoder = decoder(shape, self.channels, latent_size + num_classes, **widths)
        self.to(memory_format=torch.channels_last)  # the convolutions of the residual network are faster
        self.prior = None  # the prior of the loss; an AE has none
        self.fitted = Mixture.standard(latent_size)  # to be fitted to latents; a VAE has none before that

    # ---- images → z

    def normalize(self, images):
        """Integer levels → [-1, 1], in the precision of the weights."""
        return normalize(images, self.levels, next(self.parameters()).dtype)

    def encode(self, images, labels=None):
        """Integer levels [B, C, H, W] → z [B, D]"""
        x = self.normalize(images)
        return self.encoder(x).to(x.dtype)  # only the networks compute in bf16, never the losses

    def embed(self, images, labels=None):
        """The one z that stands for an image: integer levels [B, C, H, W] → [B, D]"""
        return self.encode(images, labels)

    def sample_posterior(self, images, labels=None, noise=None):
        """A z for each image, of a VAE drawn from q(z|x): integer levels [B, C, H, W] → [B, D]"""
        return self.encode(images, labels)

    # ---- z → images

    def decode(self, z, labels=None):
        """z [B, D] → the likelihood's params [B, channels, H, W]"""
        return self.decoder(z).to(z.dtype)

    def decode_in_parts(self, z, labels=None):
        """As decode, for any number of latents in bounded memory: yields (part, params of z[part]), part a
        slice. Copy results into a tensor that was made before the loop: small tensors kept between large ones
        that are freed would fragment the memory.
        """
        for first in range(0, len(z), self.max_batch):
            part = slice(first, first + self.max_batch)
            yield part, self.decode(z[part], None if labels is None else labels[part])

    @property
    def max_batch(self):
        """The number of images that the decoder makes at a time in bounded memory."""
        cuda = next(self.parameters()).is_cuda
        return max(1, (MAX_DECODER_OUTPUTS_CUDA if cuda else MAX_DECODER_OUTPUTS)
                   // (self.channels * math.prod(self.shape[1:])))

    def mean_images(self, z, labels=None):
        """z [n, D] → mean images in [0, 1], [n, C, H, W]; in bounded memory"""
        images = z.new_empty(len(z), *self.shape)
        for part, params in self.decode_in_parts(z, labels):
            images[part] = self.likelihood.mean(params)
        return images

    def reconstruct(self, images, labels=None):
        """Integer levels [B, C, H, W] → mean images in [0, 1] of their z, [B, C, H, W]"""
        return self.mean_images(self.embed(images, labels), labels)

    # ---- sampling

    def sampling_prior(self, fitted=False):
        """The distribution that samples come from: the prior, or the mixture fitted to latents. An AE has
        only the mixture. Raises ValueError if the mixture is asked for and there is none.
        """
        if (fitted or self.prior is None) and self.fitted is None:
            raise ValueError("no mixture is fitted to this model's latents; fitted=False samples its prior")
        return self.fitted if fitted or self.prior is None else self.prior

    def sample_latents(self, n, labels=None, temperature=1.0, generator=None, fitted=False):
        """z [n, D] from the distribution that samples come from

        temperature: scales the noise; of a mixture only the noise within a component
        generator: a torch.Generator on the CPU; the same seed gives the same latents
        """
        prior = self.sampling_prior(fitted)
        noise = torch.randn(n, prior.noise_size, generator=generator)
        noise[:, :self.latent_size] *= temperature  # a mixture's last column chooses the component
        return prior.transform(noise.to(next(self.parameters())), labels)

    @torch.no_grad()
    def sample(self, n, labels=None, temperature=1.0, generator=None, fitted=False):
        """Draw n images, of the classes `labels` [n] if the model is conditional.

        temperature, generator: as for sample_latents; fitted: from the mixture, not from the prior
        → (x_samples: integer levels, uint8 [n, C, H, W]; x_mean: mean images in [0, 1], [n, C, H, W])
        """
        z = self.sample_latents(n, labels, temperature, generator, fitted)
        mean = z.new_empty(n, *self.shape)
        drawn = torch.empty_like(mean, dtype=torch.uint8)
        for part, params in self.decode_in_parts(z, labels):
            drawn[part], mean[part] = self.likelihood.draw(params, generator), self.likelihood.mean(params)
        return drawn, mean

    @torch.no_grad()
    def fit_gaussian(self, batches, all_reduce_sum=lambda sums: sums):
        """Fit one Gaussian to the z of images, for the samples of an AE during training.

        batches: of integer levels; all_reduce_sum: adds up a tensor over processes with batches of their own
        Raises FloatingPointError if a z is not finite.
        """
        latents = (self.embed(images) for images in batches)
        moments = mean_and_covariance(latents, self.latent_size, all_reduce_sum)
        self.fitted = Mixture.gaussian(*moments).to(next(self.parameters()))

    # ---- the base space, in which the prior is N(0, I)

    def to_base(self, z, labels=None):
        """z [n, D] → the noise that the prior turns into it, [n, D]. An AE has no prior: its z is moved and
        scaled to mean 0 and standard deviation 1 of the fitted mixture.
        """
        mean, std = self.fitted.mean_and_std()
        return (z - mean) / std.clamp_min(1e-12)

    def from_base(self, base, labels=None):
        """Undo to_base."""
        mean, std = self.fitted.mean_and_std()
        return mean + std * base

    # ---- the objective

    def forward(self, images, labels=None, noise=None):
        """The terms of the loss, L_rec + beta · L_reg.

        images: integer levels [B, C, H, W]; labels: [B]; noise ~ N(0, I): [B, D]
        → (L_rec, L_reg, bpd), each a mean over the batch. L_rec: −log p(x|z), nats per image (for mse the
        squared error on [-1, 1]); L_reg: the KL of q(z|x) from the prior, nats per image; bpd: bits/dim of
        the negative ELBO at beta = 1, or None if the likelihood is not one of discrete pixels. An AE needs no
        noise; its L_reg is 0 and its bpd None.
        """
        rec = self.likelihood.loss(self.decode(self.encode(images, labels), labels), images)
        return rec.mean(), rec.new_zeros(()), None


class VAE(AE):
    """A variational autoencoder (Kingma & Welling 2014) with a Gaussian posterior.

    prior: a name in PRIORS. With "flow", of prior_layers coupling layers, L_reg is an estimate of the KL from
        the z that was drawn: unbiased, and it may be negative.
    free_bits: in nats. If the KL of an image in a latent dimension is below this, it gets no gradient (Kingma
        et al. 2016, here for each image). The reported KL is the true one.
    iw_train: the number K of latents of the importance-weighted bound (Burda et al. 2016), whose terms
        `forward` then returns; 0 for the ELBO.
    """

    outputs_per_latent = 2  # mean and log_std

    def __init__(self, *args, prior="normal", prior_layers=8, free_bits=0.0, iw_train=0, num_classes=0,
                 **kwargs):
        super().__init__(*args, num_classes=num_classes, **kwargs)
        if free_bits and (prior != "normal" or iw_train):
            raise ValueError("free_bits need a KL by dimension: the prior \"normal\", without iw_train")
        self.free_bits, self.iw_train = free_bits, iw_train
        self.prior, self.fitted = PRIORS[prior](self.latent_size, prior_layers, num_classes), None

    def encode(self, images, labels=None):
        """Integer levels [B, C, H, W] → mean, log_std of the Gaussian q(z|x), each [B, D]"""
        x = self.encoder_input(images, labels)
        mean, log_std = self.encoder(x).to(x.dtype).chunk(2, dim=1)
        # A posterior much wider than the prior is of no use, but the KL grows as exp(2 log_std): one large
        # output would end a run in an explosion. Beyond a bound an output has no gradient, but the gradients
        # of other images can bring it back. hardtanh is a clamp with a cheaper gradient.
        return mean, F.hardtanh(log_std, -20, 2)

    def encoder_input(self, images, labels):
        """Integer levels [B, C, H, W] → what the encoder sees, on [-1, 1]"""
        return self.normalize(images)

    def embed(self, images, labels=None):
        """The one z that stands for an image, the posterior's mean: integer levels [B, C, H, W] → [B, D]"""
        return self.encode(images, labels)[0]

    def sample_posterior(self, images, labels=None, noise=None):
        mean, log_std = self.encode(images, labels)
        return sample_reparameterize(mean, log_std.exp(), noise)

    def to_base(self, z, labels=None):
        return self.prior.inverse(z, labels)

    def from_base(self, base, labels=None):
        return self.prior.transform(base, labels)

    def forward(self, images, labels=None, noise=None):
        """As AE.forward. With iw_train, noise is [B, K, D]: L_rec is the mean over the K latents, L_reg is
        the negative bound minus L_rec (it is not a KL, and may be negative), and bpd is that of the bound.
        """
        if noise is None:
            k = [self.iw_train] if self.iw_train else []
            noise = torch.randn(len(images), *k, self.latent_size).to(next(self.parameters()))
        if self.iw_train:
            rec, log_ratio = self.log_weights(images, labels, noise)
            bound, mean_rec = self.neg_bound(rec, log_ratio).mean(), rec.mean()
            return mean_rec, bound - mean_rec, self.bits_per_dim(bound)
        mean, log_std = self.encode(images, labels)
        z = sample_reparameterize(mean, log_std.exp(), noise)
        rec = self.likelihood.loss(self.decode(z, labels), images)          # [B]
        if self.free_bits:
            kl = self.prior.kl_by_dimension(mean, log_std)                  # [B, D]
            # This has the gradient of max(kl, free_bits), but its value stays the true KL.
            kl = torch.where(kl < self.free_bits, kl.detach(), kl).sum(1)   # [B]
        else:
            kl = self.prior.kl(mean, log_std, z, labels)                    # [B]
        rec, kl = rec.mean(), kl.mean()
        return rec, kl, self.bits_per_dim(rec + kl)

    def exact_kl(self, images, labels=None):
        """The KL of q(z|x) from the prior in closed form, nats [B]; None if the prior has none"""
        kl = self.prior.kl_by_dimension(*self.encode(images, labels))
        return None if kl is None else kl.sum(1)

    def bits_per_dim(self, neg_elbo):
        """Nats per image → bits/dim, without a gradient; None if pixels are not discrete"""
        return elbo_to_bpd(neg_elbo.detach(), (1, *self.shape)) if self.likelihood.is_discrete else None

    @staticmethod
    def neg_bound(rec, log_ratio):
        """The terms of `log_weights` [B, K] → the negative bound on log p(x) of K latents, nats [B]
        (Burda et al. 2016, eq. 8); for K = 1 it is the negative ELBO.
        """
        return math.log(rec.shape[1]) - torch.logsumexp(-rec - log_ratio, 1)

    def log_weights(self, images, labels, noise):
        """The terms of the log importance weights of K latents of each image, noise ~ N(0, I) [B, K, D].

        → −log p(x|z) and log q(z|x) − log p(z), in nats, each [B, K]; a log weight is minus their sum
        """
        k = noise.shape[1]
        mean, log_std = (tensor[:, None] for tensor in self.encode(images, labels))
        z = sample_reparameterize(mean, log_std.exp(), noise).flatten(0, 1)
        log_q = log_normal(noise) - log_std.sum(-1)
        labels = None if labels is None else labels.repeat_interleave(k)
        rec = self.likelihood.loss(self.decode(z, labels), images.repeat_interleave(k, 0))
        return rec.view(-1, k), log_q - self.prior.log_prob(z, labels).view(-1, k)


class ConditionalVAE(VAE):
    """A VAE conditioned on the class (Sohn et al. 2015). The encoder sees the class as one more channel, an
    image that is learned for each class; the decoder sees it as one-hot numbers beside z. Labels [B] are
    needed wherever they are an argument; without them it raises ValueError.
    """

    def __init__(self, *args, num_classes, **kwargs):
        super().__init__(*args, num_classes=num_classes, **kwargs)
        self.num_classes = num_classes
        self.class_image = nn.Embedding(num_classes, math.prod(self.shape[1:]))

    @staticmethod
    def check(labels):
        if labels is None:
            raise ValueError("this model is conditional: give labels, the index of each image's class")

    def sample_latents(self, n, labels=None, temperature=1.0, generator=None, fitted=False):
        self.check(labels)
        return super().sample_latents(n, labels, temperature, generator, fitted)

    def to_base(self, z, labels=None):
        self.check(labels)
        return super().to_base(z, labels)

    def from_base(self, base, labels=None):
        self.check(labels)
        return super().from_base(base, labels)

    def encoder_input(self, images, labels):
        self.check(labels)
        planes = self.class_image(labels).view(-1, 1, *self.shape[1:])
        return torch.cat([self.normalize(images), planes], dim=1)

    def decode(self, z, labels=None):
        self.check(labels)
        return super().decode(torch.cat([z, F.one_hot(labels, self.num_classes).to(z)], dim=1))


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
    common |= {name: args[name] for name in ("prior", "prior_layers", "free_bits", "iw_train")}
    if args["conditional"]:
        return ConditionalVAE(**common, num_classes=len(data["classes"]))
    return VAE(**common)
