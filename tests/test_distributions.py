"""Tests of distributions.py."""

import math

import numpy as np
import pytest
import torch
from torch import distributions as D

import model
from tests.conftest import double, levels_like


@pytest.mark.parametrize("levels", [2, 16])
@pytest.mark.parametrize("recon_loss", ["bce", "categorical"])
def test_reconstruction_loss_is_that_of_torch_distributions(levels, recon_loss):
    net = model.VAE((2, 8, 9), levels, latent_size=3, recon_loss=recon_loss).double()
    images, params = levels_like((2, 8, 9), levels), double(5,
                                                            2 * (levels if recon_loss == "categorical"
                                                                 else 1), 8, 9)
    if recon_loss == "categorical":
        logits = params.view(5, levels, 2, 8, 9).permute(0, 2, 3, 4, 1)
        expected = -D.Categorical(logits=logits).log_prob(images.long())
        mean = (D.Categorical(logits=logits).probs * torch.arange(levels)).sum(-1) / (levels - 1)
    else:
        target = images.double() / (levels - 1)
        expected = -D.Bernoulli(logits=params, validate_args=False).log_prob(target)
        mean = D.Bernoulli(logits=params).mean
    torch.testing.assert_close(net.likelihood.loss(params, images), expected.sum((1, 2, 3)))
    torch.testing.assert_close(net.likelihood.mean(params), mean)


@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.5, 1e3])
def test_the_discretised_logistic_is_a_distribution_over_the_levels(scale):
    net = model.VAE((1, 8, 32), 256, "mlp", 2, recon_loss="logistic", hidden_dims=[4]).double()
    image = torch.arange(256).byte().view(1, 1, 8, 32)
    base = D.TransformedDistribution(D.Uniform(0.0, 1.0), D.SigmoidTransform().inv)
    for mean in (-3.0, -1.0, -0.4, 0.013, 1.0, 2.5):
        params = torch.tensor([mean, math.log(scale)], dtype=torch.float64)[:, None, None].expand(1, 2, 8, 32)
        p = net.likelihood.log_prob(params, image).exp().flatten()
        assert p.sum().item() == pytest.approx(1, abs=1e-9)
        edges = (torch.arange(1, 256, dtype=torch.float64) * 2 - 1) / 255 - 1
        below = torch.cat([torch.zeros(1), base.cdf((edges - mean) / scale), torch.ones(1)])
        torch.testing.assert_close(p, below.diff(), rtol=1e-6, atol=1e-12)
        expected = (p * torch.arange(256)).sum() / 255
        assert net.likelihood.mean(params)[0, 0, 0, 0].item() == pytest.approx(expected.item(), abs=1e-9)
        params = params.float().clone().requires_grad_()
        loss = net.float().likelihood.loss(params, image)
        (gradient,) = torch.autograd.grad(loss.sum(), params)
        assert loss.isfinite().all() and gradient.isfinite().all()
        net.double()


def test_draws_of_the_discretised_logistic_follow_it():
    net = model.VAE((1, 8, 8), 16, "mlp", 2, recon_loss="logistic", hidden_dims=[4])
    params = torch.tensor([0.2, -1.5])[:, None, None].expand(20_000, 2, 8, 8)
    draws = net.likelihood.draw(params, torch.Generator().manual_seed(0))
    for level in range(16):
        image = torch.full((1, 1, 8, 8), level, dtype=torch.uint8)
        p = net.likelihood.log_prob(params[:1], image).exp()[0, 0, 0, 0].item()
        n = draws.numel()
        assert (draws == level).sum().item() / n == pytest.approx(p, abs=5 * (p / n) ** 0.5 + 1e-6)


def test_mse_is_the_summed_squared_error_on_minus_one_to_one():
    net = model.VAE((3, 8, 8), 256, latent_size=3, recon_loss="mse").double()
    images, params = levels_like((3, 8, 8), 256), double(5, 3, 8, 8) / 3
    target = images.numpy() / 255.0 * 2 - 1
    mean = np.tanh(params.numpy())
    expected = ((mean - target) ** 2).sum((1, 2, 3))
    assert net.likelihood.loss(params, images).numpy() == pytest.approx(expected)
    assert net.likelihood.mean(params).numpy() == pytest.approx((mean + 1) / 2)


@pytest.mark.parametrize("recon_loss,levels,bits", [("mse", 256, False), ("mse", 2, False),
                                                    ("bce", 16, False), ("bce", 256, False), ("bce", 2, True),
                                                    ("categorical", 2, True), ("logistic", 256, True)])
def test_bits_per_dimension_only_for_likelihoods_of_discrete_pixels(recon_loss, levels, bits):
    images = levels_like((1, 8, 8), levels)
    assert (model.VAE((1, 8, 8), levels, "mlp", 2, recon_loss=recon_loss)(images)[2] is not None) == bits
    assert model.AE((1, 8, 8), levels, "mlp", 2, recon_loss=recon_loss)(images)[1:] == (0, None)


@pytest.mark.parametrize("levels", [2, 16])
def test_draws_follow_the_likelihood(levels):
    net = model.VAE((1, 8, 8), levels, "mlp", 2)
    params = 2 * torch.randn(1, 1 if levels == 2 else levels, 8, 8)
    draws = net.likelihood.draw(params.expand(20_000, -1, -1, -1), torch.Generator().manual_seed(0))
    probabilities = torch.cat([1 - params.sigmoid(), params.sigmoid()],
                              1) if levels == 2 else params.softmax(1)
    for level in range(levels):
        p = probabilities[0, level]
        frequency = (draws == level).float().mean(0)[0]
        assert ((frequency - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()
