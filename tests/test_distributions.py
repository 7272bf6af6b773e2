"""Tests of distributions.py."""

import math

import numpy as np
import pytest
import torch
from torch import distributions as D

import distributions
import model
from tests.conftest import double, levels_like
from tests.test_model import stir


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


def test_the_gaussian_is_that_of_torch_and_its_best_scale_is_the_error():
    net = model.VAE((2, 8, 9), 256, "mlp", 3, recon_loss="gaussian", hidden_dims=[4]).double()
    assert any(parameter is net.likelihood.log_scale for parameter in net.parameters())
    images, params = levels_like((2, 8, 9), 256), double(5, 2, 8, 9)
    x = images.double() / 127.5 - 1
    for scale in (0.01, 0.3, 1.0):
        net.likelihood.log_scale.data.fill_(math.log(scale))
        expected = -D.Normal(params.tanh(), scale).log_prob(x).sum((1, 2, 3))
        torch.testing.assert_close(net.likelihood.loss(params, images), expected)
    net.likelihood.log_scale.data.fill_((params.tanh() - x).square().mean().sqrt().log())
    loss = net.likelihood.loss(params, images).sum()
    assert torch.autograd.grad(loss, net.likelihood.log_scale)[0].abs() < 1e-9
    for beyond, side in ((-9.0, 1), (9.0, -1)):  # from beyond its bounds the scale finds back
        net.likelihood.log_scale.data.fill_(beyond)
        loss = net.likelihood.loss(params, images).mean()
        assert loss.isfinite() and side * torch.autograd.grad(loss, net.likelihood.log_scale)[0] < 0
    net.likelihood.log_scale.data.fill_(math.log(0.1))
    drawn = net.likelihood.draw(torch.zeros(20, 2, 50, 50), torch.Generator().manual_seed(0)) / 127.5 - 1
    assert drawn.std().item() == pytest.approx(0.1, rel=0.02) and drawn.mean().item() == \
        pytest.approx(0, abs=1e-3)
    assert torch.equal(net.likelihood.mean(params), (params.tanh() + 1) / 2)


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


def flow(size, layers, num_classes=0, scale=0.3):
    torch.manual_seed(0)
    prior = distributions.Flow(size, layers, num_classes).double()
    stir(prior, scale)
    return prior


@pytest.mark.parametrize("size", [1, 2, 5, 8])
@pytest.mark.parametrize("layers", [1, 5])
def test_a_flow_has_the_density_of_its_jacobian(size, layers):
    prior, noise = flow(size, layers, 3), double(6, size)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    z = prior.transform(noise, labels)
    torch.testing.assert_close(prior.inverse(z, labels), noise, rtol=0, atol=1e-9)
    for row, label in enumerate(labels):
        jacobian = torch.autograd.functional.jacobian(
            lambda noise: prior.transform(noise[None], label[None])[0], noise[row])
        assert size < 5 or layers == 1 or (jacobian != 0).sum() > 2 * size
        expected = D.Normal(0, 1).log_prob(noise[row]).sum() - jacobian.slogdet()[1]
        torch.testing.assert_close(prior.log_prob(z, labels)[row], expected)
    assert not torch.allclose(prior.log_prob(z, labels), prior.log_prob(z, labels.flip(0)))
    single = prior.float()
    torch.testing.assert_close(single.inverse(single.transform(noise.float(), labels), labels), noise.float(),
                               rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_flow_integrates_to_one_and_begins_as_the_standard_normal():
    t = torch.linspace(-30, 30, 6001).double()
    assert torch.trapezoid(flow(1, 3).log_prob(t[:, None]).exp(), t).item() == pytest.approx(1, abs=1e-6)
    t = torch.linspace(-14, 14, 401).double()
    density = flow(2, 3).log_prob(torch.cartesian_prod(t, t)).exp().view(401, 401)
    assert torch.trapezoid(torch.trapezoid(density, t), t).item() == pytest.approx(1, abs=1e-4)
    z = double(7, 5)
    new = distributions.Flow(5, 4).double()
    torch.testing.assert_close(new.log_prob(z), D.Normal(0, 1).log_prob(z).sum(1))
    assert torch.equal(new.transform(z).sort(1)[0], z.sort(1)[0])


@torch.no_grad()
def test_samples_of_a_flow_have_its_density():
    prior, n = flow(1, 3, scale=0.5), 100_000
    z = prior.transform(torch.randn(n, 1, generator=torch.Generator().manual_seed(0)).double())[:, 0]
    edges = z.quantile(torch.linspace(0, 1, 21).double()[1:-1])
    t = torch.linspace(-40, 40, 80_001).double()
    cumulative = torch.cumulative_trapezoid(prior.log_prob(t[:, None]).exp(), t)
    shares = cumulative[torch.searchsorted(t, edges) - 1]
    torch.testing.assert_close(shares, torch.linspace(0, 1, 21).double()[1:-1], rtol=0,
                               atol=5 * 0.5 / n ** 0.5)


def blobs(n, seed=0):
    """Latents of three far clusters in 3-D with known parameters."""
    generator = torch.Generator().manual_seed(seed)
    weights, means = torch.tensor([0.5, 0.3, 0.2]), 20 * torch.eye(3)
    scales = torch.tril(torch.randn(3, 3, 3, generator=generator)) + 2 * torch.eye(3)
    which = torch.multinomial(weights, n, True, generator=generator)
    z = means[which] + (scales[which] @ torch.randn(n, 3, 1, generator=generator))[..., 0]
    return z, weights, means, scales


def test_the_mixture_finds_clusters_and_its_samples_have_their_moments():
    z, weights, means, scales = blobs(20_000)
    fitted = distributions.fit_mixture(z, components=3)
    order = [int((mean - fitted.means[0]).norm(dim=1).argmin()) for mean in means]
    assert sorted(order) == [0, 1, 2]
    torch.testing.assert_close(fitted.weights[0, order], weights, rtol=0, atol=0.015)
    torch.testing.assert_close(fitted.means[0, order], means, rtol=0, atol=0.2)
    found = fitted.scales[0, order]
    torch.testing.assert_close(found @ found.mT, scales @ scales.mT, rtol=0.05, atol=0.3)
    assert torch.equal(found, found.tril()) and repr(fitted.weights) == repr(
        distributions.fit_mixture(z, components=3).weights)
    noise = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(1))
    drawn = fitted.transform(noise)
    torch.testing.assert_close(drawn.mean(0), z.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.T.cov(), z.T.cov(), rtol=0.02, atol=0.5)
    mean, std = fitted.mean_and_std()
    torch.testing.assert_close(mean, z.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(std, z.std(0), rtol=0.01, atol=0.01)
    # at temperature 0 a sample is the mean of its component
    noise[:, :3] = 0
    shares = (fitted.transform(noise)[:, None] == fitted.means[0]).all(2).float().mean(0)
    torch.testing.assert_close(shares, fitted.weights[0], rtol=0, atol=0.01)


def test_expectation_maximisation_ends_where_no_step_changes_anything():
    """The fixed point, with the responsibilities of torch.distributions: overlapping clusters."""
    torch.manual_seed(0)
    z = torch.cat([torch.randn(3000, 2), torch.randn(2000, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.5]]) + 1.5])
    weights, means, scales = distributions.expectation_maximisation(z.double(), 2, steps=2000, gain=1e-12)
    mixture = D.MixtureSameFamily(D.Categorical(weights), D.MultivariateNormal(means, scale_tril=scales))
    part = mixture.component_distribution.log_prob(z.double()[:, None]) + weights.log()
    share = part.softmax(1)
    torch.testing.assert_close(share.mean(0), weights, rtol=0, atol=1e-4)
    for k in range(2):
        mean = (share[:, k] @ z.double()) / share[:, k].sum()
        torch.testing.assert_close(mean, means[k], rtol=0, atol=1e-4)
        centred = z.double() - mean
        covariance = (share[:, k, None] * centred).T @ centred / share[:, k].sum()
        torch.testing.assert_close(covariance, scales[k] @ scales[k].T, rtol=0, atol=1e-4)
    one = distributions.fit_mixture(z, components=1)
    assert mixture.log_prob(z.double()).mean() > D.MultivariateNormal(
        one.means[0, 0], scale_tril=one.scales[0, 0]).log_prob(z).mean() + 0.01
    torch.testing.assert_close(one.means[0, 0], z.mean(0))
    torch.testing.assert_close(one.scales[0, 0] @ one.scales[0, 0].T, z.T.cov(correction=0), rtol=1e-5,
                               atol=1e-5)


def test_the_mixture_has_as_many_components_as_the_latents_of_a_class_allow():
    z, labels = torch.randn(900, 3), torch.tensor([0] * 600 + [1] * 300)
    fitted = distributions.fit_mixture(z, labels, 2, components=15)
    assert (fitted.weights > 0).sum(1).tolist() == [15, 10]
    assert fitted.weights.sum(1).tolist() == pytest.approx([1, 1])
    # a class with few latents, and one without any: a Gaussian each, with the covariance within all classes
    z[labels == 1] += 5
    labels[-280:] = 0
    mixed = distributions.fit_mixture(z, labels, 3)
    assert (mixed.weights > 0).sum(1).tolist() == [29, 1, 1]
    few = distributions.fit_mixture(z, labels, 3, components=1)
    assert few.weights.shape == (3, 1) and torch.equal(few.scales[2], few.scales[1])
    assert torch.equal(few.scales[1, 0], mixed.scales[1, 0])
    torch.testing.assert_close(few.means[1, 0], z[labels == 1].mean(0))
    torch.testing.assert_close(few.means[2, 0], z.mean(0))
    within = torch.cat([z[labels == label] - z[labels == label].mean(0) for label in (0, 1)])
    torch.testing.assert_close(few.scales[1, 0] @ few.scales[1, 0].T, within.T @ within / 900, rtol=1e-4,
                               atol=1e-5)
    # what rounding leaves of the sum of weights is no component of a class that has fewer
    mixed.weights[1] *= 0.9
    assert (mixed.transform(torch.full((1, 4), 5.0), torch.tensor([1])) > 4).all()
    assert distributions.fit_mixture(torch.randn(3000, 130)).weights.shape == (1, 1)
    with pytest.raises(FloatingPointError):
        distributions.fit_mixture(torch.tensor([[1.0], [math.nan]]))
    labels = torch.tensor([1, 0, 1])
    noise = torch.randn(3, 4)
    assert not torch.equal(fitted.transform(noise, labels), fitted.transform(noise, 1 - labels))
