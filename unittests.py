"""Every test: `pytest unittests.py` or `python unittests.py`. They check against something independent:
closed forms, torch.distributions, numerical integration. Those that need real MNIST are skipped where
data/MNIST is absent.
"""

import csv
import functools
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
from PIL import Image
from torch import distributions as D

import benchmark
import data
import figures
import infer
import model
import submit
import train
import utils

HERE = Path(__file__).resolve().parent
SHAPES = [(1, 28, 28), (3, 32, 32), (1, 9, 21), (3, 64, 48), (1, 8, 8)]
LN2 = math.log(2)


def double(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def levels_like(shape, levels, n=5, seed=0):
    return torch.randint(levels, (n, *shape), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


def pixels(split):
    """All images of a split, as levels."""
    return split.batch(torch.arange(len(split)))[0]


def zeroed(network):
    for parameter in network.parameters():
        torch.nn.init.zeros_(parameter)
    return network


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """400 glyphs as PNG files, a folder a digit; training on them takes a second."""
    root = tmp_path_factory.mktemp("images")
    images, labels, _, _ = data.make_glyphs(train=400, test=1)
    for i, (image, label) in enumerate(zip(images[:, 0], labels)):
        (root / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(root / str(label) / f"{i:03d}.png")
    return root


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to run the scripts in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def curves():
    """For tests that look at curves.png or TensorBoard's events."""


@pytest.fixture(autouse=True)
def quick(request, monkeypatch):
    """Drawing and writing these takes most of the time of a short run."""
    if "curves" not in request.fixturenames:
        monkeypatch.setattr(utils, "draw_curves", lambda history, path: path.touch())
        monkeypatch.setattr(utils.RunLog, "events", lambda log, row: None)


def fit(folder, *flags, epochs=2):
    """Train in this process; → metrics.csv as rows, test.json."""
    argv = [f"--dataset={folder}", "--latent_size=4", "--hidden_dims=32", f"--epochs={epochs}",
            "--batch_size=32", "--log_dir=run", "--model=mlp", "--overwrite", *flags]
    train.main(argv)
    results = Path(*[flag.split("=")[1] for flag in flags if "results_dir" in flag] or ["results"]) / "run"
    with open(results / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads((results / "test.json").read_text())


def outcome(main, argv, capsys):
    """Exit status, stderr of a script's main in this process, as its __main__ runs it."""
    with pytest.raises(SystemExit) as stop:
        utils.call(lambda: main([str(word) for word in argv]))
    return stop.value.code, capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Mathematics

def test_kld_is_that_of_torch_distributions_and_of_integration():
    mean, log_std = 2 * double(7, 5), double(7, 5, seed=1)
    expected = D.kl_divergence(D.Normal(mean, log_std.exp()), D.Normal(torch.zeros(()).double(), 1.0)).sum(-1)
    torch.testing.assert_close(utils.KLD(mean, log_std), expected, rtol=1e-12, atol=1e-12)
    z = torch.linspace(-30, 30, 200_001, dtype=torch.float64)
    q = D.Normal(1.5, torch.tensor(0.3).double()).log_prob(z)
    p = D.Normal(0.0, torch.tensor(1.0).double()).log_prob(z)
    integral = torch.trapezoid(q.exp() * (q - p), z)
    assert utils.KLD(torch.tensor([1.5]).double(), torch.tensor([0.3]).double().log()).item() == \
        pytest.approx(integral.item(), rel=1e-9)


def test_kld_is_exactly_zero_at_the_prior_and_symmetric_in_the_mean():
    assert utils.KLD(torch.zeros(3, 4), torch.zeros(3, 4)).eq(0).all()
    mean, log_std = torch.randn(100, 8), torch.randn(100, 8)
    assert torch.equal(utils.KLD(mean, log_std), utils.KLD(-mean, log_std))


def test_sample_reparameterize():
    mean, std, noise = (double(50, 3, seed=s) for s in range(3))
    mean, std = mean.requires_grad_(), std.exp().detach().requires_grad_()
    z = utils.sample_reparameterize(mean, std, noise)
    z.sum().backward()
    assert torch.equal(z, mean + std * noise)
    assert mean.grad.eq(1).all() and torch.equal(std.grad, noise)
    torch.manual_seed(0)
    drawn = utils.sample_reparameterize(torch.full((200_000,), 3.0), torch.full((200_000,), 0.5))
    assert drawn.mean().item() == pytest.approx(3, abs=0.006)
    assert drawn.std().item() == pytest.approx(0.5, abs=0.004)


def test_elbo_to_bpd():
    assert utils.elbo_to_bpd(torch.tensor([784 * LN2, 784 * math.log(16)]), (2, 1, 28, 28)).tolist() == \
        pytest.approx([1, 4])
    assert utils.elbo_to_bpd(torch.tensor([3 * 8 * 8 * LN2]), [1, 3, 8, 8]).item() == pytest.approx(1)


def test_active_units_counts_variances_above_a_hundredth():
    means = double(5000, 4) * torch.tensor([1.0, 0.11, 0.09, 0.0]) + 7
    assert utils.active_units(means) == 2


def test_beta_schedules():
    assert [utils.beta_schedule("constant", 1.2, 20)(e) for e in (0, 7, 19)] == [1.2] * 3
    linear = utils.beta_schedule("linear", 1.2, 20)
    assert linear(0) == 0 and linear(5) == pytest.approx(0.3) and linear(20) == pytest.approx(1.2)
    cyclical = [utils.beta_schedule("cyclical", 2.0, 40)(e) for e in range(40)]
    assert cyclical[:10] == pytest.approx([0, 0.4, 0.8, 1.2, 1.6, 2, 2, 2, 2,
                                           2]) and cyclical == cyclical[:10] * 4
    for epochs in range(2, 40):  # no length of run is left without its KL, in its last epoch least of all
        betas = [utils.beta_schedule("cyclical", 1.0, epochs)(e) for e in range(epochs)]
        assert betas[0] == 0 and betas[-1] == max(betas) == 1


def test_learning_rate_schedules():
    assert [utils.lr_schedule("constant", 0.5, 10)(step) for step in (0, 9)] == [0.5, 0.5]
    cosine = utils.lr_schedule("cosine", 0.5, 1000)
    assert [cosine(step) for step in (0, 4, 9)] == pytest.approx([0.05, 0.25, 0.5], rel=1e-3)
    assert [cosine(step) for step in (250, 500, 1000)] == pytest.approx([0.25 + 0.25 * 0.5 ** 0.5, 0.25, 0])
    assert utils.lr_schedule("cosine", 0.5, 3)(0) == 0.5
    with pytest.raises(ValueError, match="cosine"):
        utils.lr_schedule("linear", 1, 1)


def test_moments_are_those_of_numpy():
    x = double(50, 4) + torch.arange(4)
    mean, covariance = utils.moments(x.float().split(20), 4)
    assert mean.numpy() == pytest.approx(x.numpy().mean(0), abs=1e-6)
    assert covariance.numpy() == pytest.approx(np.cov(x.numpy().T, bias=True), abs=1e-6)


def test_manifold_is_decoded_at_the_percentiles():
    seen = []

    def decoder(z):
        seen.append(z)
        return D.Normal(0.0, 1.0).cdf(z[:, :1, None, None]).expand(-1, 1, 2, 3)  # bright to the right
    image = utils.visualize_manifold(decoder, grid_size=5)
    assert image.shape == (3, 10, 15)
    grid = D.Normal(0.0, 1.0).cdf(torch.cat(seen)).view(5, 5, 2)
    percentiles = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    torch.testing.assert_close(grid[..., 0], percentiles.expand(5, 5))
    torch.testing.assert_close(grid[..., 1], percentiles.flip(0)[:, None].expand(5, 5))
    torch.testing.assert_close(image[0, 0], percentiles.repeat_interleave(3))
    utils.visualize_manifold(lambda z: torch.zeros(len(z), 3, 4, 4))


@pytest.mark.parametrize("n,channels,line", [(2, 1, 1), (4, 3, 1), (5, 3, 2), (7, 1, 0)])
def test_a_grid_is_torchvisions(n, channels, line):
    images = torch.rand(n, channels, 3, 4)
    theirs = utils.torchvision.utils.make_grid(images, nrow=3, padding=line, pad_value=utils.LINES)
    ours = utils.image_grid(images, 3, line)
    assert torch.equal(ours, theirs) and torch.equal(ours.mul_(2), theirs * 2)  # memory of its own
    assert utils.image_grid(images[:1], 3, line).shape == (3, 3 + 2 * line, 4 + 2 * line)


@pytest.mark.parametrize("n", [2, 3, 5, 6])
def test_each_reconstruction_is_below_its_image(n, nrow=3):
    above = (torch.arange(n) + 1) / 100
    image = utils.image_grid(utils.interleave(*((values[:, None, None, None].expand(n, 1, 2, 2))
                                                for values in (above, above + 0.5)), nrow), nrow)
    cells = image[0, 1::3, 1::3]  # a pixel of each
    for i in range(n):
        row, column = divmod(i, nrow)
        assert (cells[2 * row, column], cells[2 * row + 1, column]) == (above[i], above[i] + 0.5)
    assert (cells == utils.LINES).sum() == cells.numel() - 2 * n


def test_streams_depend_on_every_part_of_their_key_and_on_nothing_else():
    keys = [(seed, purpose, step) for seed in range(5) for purpose in ("noise", "order")
            for step in range(50)]
    assert len({utils.stream_seed(*key) for key in keys}) == len(keys)
    first = torch.randn(4, generator=utils.stream(1, "noise", 2))
    torch.manual_seed(99)
    assert torch.equal(first, torch.randn(4, generator=utils.stream(1, "noise", 2)))


# ------------------------------------------------------------------------------------------------------------
# Likelihoods and models

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
    torch.testing.assert_close(net.reconstruction_loss(params, images), expected.sum((1, 2, 3)))
    torch.testing.assert_close(net.mean_image(params), mean)


@pytest.mark.parametrize("scale", [1e-3, 0.02, 0.5, 1e3])
def test_the_discretised_logistic_is_a_distribution_over_the_levels(scale):
    net = model.VAE((1, 8, 32), 256, "mlp", 2, recon_loss="logistic", hidden_dims=[4]).double()
    image = torch.arange(256).byte().view(1, 1, 8, 32)
    base = D.TransformedDistribution(D.Uniform(0.0, 1.0), D.SigmoidTransform().inv)
    for mean in (-3.0, -1.0, -0.4, 0.013, 1.0, 2.5):
        params = torch.tensor([mean, math.log(scale)], dtype=torch.float64)[:, None, None].expand(1, 2, 8, 32)
        p = net.log_mass(params, image).exp().flatten()
        assert p.sum().item() == pytest.approx(1, abs=1e-9)
        edges = (torch.arange(1, 256, dtype=torch.float64) * 2 - 1) / 255 - 1
        below = torch.cat([torch.zeros(1), base.cdf((edges - mean) / scale), torch.ones(1)])
        torch.testing.assert_close(p, below.diff(), rtol=1e-6, atol=1e-12)
        expected = (p * torch.arange(256)).sum() / 255
        assert net.mean_image(params)[0, 0, 0, 0].item() == pytest.approx(expected.item(), abs=1e-9)
        params = params.float().clone().requires_grad_()
        loss = net.float().reconstruction_loss(params, image)
        (gradient,) = torch.autograd.grad(loss.sum(), params)
        assert loss.isfinite().all() and gradient.isfinite().all()
        net.double()


def test_draws_of_the_discretised_logistic_follow_it():
    net = model.VAE((1, 8, 8), 16, "mlp", 2, recon_loss="logistic", hidden_dims=[4])
    params = torch.tensor([0.2, -1.5])[:, None, None].expand(20_000, 2, 8, 8)
    draws = net.draw(params, torch.Generator().manual_seed(0))
    for level in range(16):
        image = torch.full((1, 1, 8, 8), level, dtype=torch.uint8)
        p = net.log_mass(params[:1], image).exp()[0, 0, 0, 0].item()
        n = draws.numel()
        assert (draws == level).sum().item() / n == pytest.approx(p, abs=5 * (p / n) ** 0.5 + 1e-6)


@pytest.mark.parametrize("k", [1, 7])
def test_the_importance_weighted_bound_is_that_of_torch_distributions(k):
    torch.manual_seed(0)
    net = model.ConditionalVAE((1, 8, 9), 2, "mlp", 3, hidden_dims=[16], iw_train=k, num_classes=2).double()
    images, labels, noise = levels_like((1, 8, 9), 2), torch.tensor([0, 1, 1, 0, 1]), double(5, k, 3)
    rec, reg, bpd = net(images, labels, noise)
    mean, log_std = (code.unsqueeze(1) for code in net.encode(images, labels))
    q, z = D.Normal(mean, log_std.exp()), mean + log_std.exp() * noise
    logits = torch.stack([net.decode(z[:, i], labels) for i in range(k)], 1)
    log_p = D.Bernoulli(logits=logits).log_prob(images[:, None].double()).sum((2, 3, 4))
    weights = log_p + (D.Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(2)
    expected = -weights.exp().mean(1).log().mean()
    assert rec.item() == pytest.approx(-log_p.mean().item()) and bpd.item() == \
        pytest.approx(expected.item() / 72 / LN2)
    torch.testing.assert_close(rec + reg, expected)
    for ours, theirs in zip(torch.autograd.grad(rec + reg, list(net.parameters())),
                            torch.autograd.grad(expected, list(net.parameters()))):
        torch.testing.assert_close(ours, theirs)


class LinearGaussian(model.VAE):
    """Probabilistic PCA: x = W z + noise of standard deviation 0.5; its encoder is near the true posterior,
    but not it.
    """
    is_likelihood = True

    def __init__(self, flow):
        torch.manual_seed(0)
        super().__init__((1, 8, 8), 256, "mlp", 3, hidden_dims=[4], flow=flow)
        self.double().w = 0.3 * double(64, 3)
        stir(self, 0.05)

    def encode(self, images, labels=None):
        precision = self.w.T @ self.w / 0.25 + torch.eye(3)
        mean = self.normalize(images).flatten(1) @ self.w / 0.25 @ precision.inverse()
        log_std = (1.3 * precision.inverse().diagonal().sqrt()).log().expand_as(mean)
        if not self.flow:
            return mean + 0.1, log_std
        order = [0, 2, 1]  # which the flow undoes
        return mean[:, order] + 0.1, log_std[:, order], mean

    def decode(self, z, labels=None):
        return (z @ self.w.T).view(-1, 1, 8, 8)

    def reconstruction_loss(self, params, images):
        return -D.Normal(params, 0.5).log_prob(self.normalize(images)).flatten(1).sum(1)


def stir(net, scale):
    """Weights for the flow, which begins without any effect."""
    for layer in net.flow:
        for parameter in layer.net[-1].parameters():
            torch.nn.init.normal_(parameter, std=scale)


@pytest.mark.parametrize("flow,most,n", [(0, 5000, 100), (1, 4000, 60)])
def test_importance_sampling_finds_the_likelihood_of_a_linear_gaussian_model(monkeypatch, flow, most, n):
    net, images = LinearGaussian(flow), levels_like((1, 8, 8), 256, n)
    split = data.Split(images, torch.arange(n), torch.zeros(n, dtype=torch.long), 256)
    everything = data.Data(split, split, split, (1, 8, 8), 256, [], 0)
    marginal = D.MultivariateNormal(torch.zeros(64).double(), net.w @ net.w.T + 0.25 * torch.eye(64))
    exact = -marginal.log_prob(net.normalize(images).flatten(1)).mean().item()
    found = [infer.evaluate(net, everything, Namespace(limit=None, iw_samples=k, device="cpu", seed=1))
             for k in (1, 10, 100, most)]
    bounds = [figures["iw_nll"] for figures in found]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > exact + 0.2
    assert abs(bounds[-1] - exact) < min(found[-1]["iw_nll_se"], 0.01)
    assert found[-1]["neg_elbo"] == pytest.approx(found[0]["neg_elbo"], abs=0.5) and \
        found[-1]["neg_elbo"] > exact + 0.2
    monkeypatch.setattr(infer, "DECODED", 64 * 300)  # so that the latents of an image come in parts
    part = infer.evaluate(net, everything, Namespace(limit=50, iw_samples=most, device="cpu", seed=1))
    chosen = torch.randperm(n, generator=utils.stream("evaluate"))[:50]
    exact = -marginal.log_prob(net.normalize(images[chosen]).flatten(1)).mean().item()
    assert part["images"] == 50 and part["iw_nll"] == pytest.approx(exact, abs=0.02)


def test_with_a_flow_the_gradient_vanishes_at_the_true_posterior():
    """There log p(x, z) - log q(z|x) is the same for each z, so its gradient through z is 0 in each draw."""
    net, images = LinearGaussian(1), levels_like((1, 8, 8), 256, 3)
    net.w = torch.linalg.svd(net.w, full_matrices=False)[0]  # for independent dimensions of the posterior
    mean, log_std, context = net.encode(images)  # which is off by 0.1 and a factor of 1.3
    for parameter in net.flow.parameters():
        parameter.data.zero_()  # an exchange of places, which encode undoes
    for off in (0, 1):
        codes = [mean - 0.1 * (1 - off), log_std - math.log(1.3), context]
        codes = [code.requires_grad_() for code in codes]
        net.encode = lambda images, labels: codes
        gradients = torch.autograd.grad(sum(net(images, noise=double(3, 3))[:2]),
                                        [*codes[:2], *net.flow.parameters()])
        assert (max(gradient.abs().max() for gradient in gradients) < 1e-12) == (not off)


@pytest.mark.parametrize("size", [1, 2])
def test_with_a_flow_the_gradient_is_unbiased(size):
    """Integrated over the noise (Gauss-Hermite) it is that of the ELBO."""
    torch.manual_seed(0)
    net = model.VAE((1, 8, 8), 2, "mlp", size, hidden_dims=[8], flow=1).double()
    stir(net, 0.1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    noise = torch.cartesian_prod(*[torch.tensor(nodes)] * size).view(-1, size)
    weights = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * size).view(-1, size).prod(1)
    images = levels_like((1, 8, 8), 2, 1).expand(len(noise), -1, -1, -1)

    def gradients(k):
        rec, ratio = net.weigh(images, None, noise[:, None].expand(-1, k, -1))
        loss = weights @ (rec + ratio).mean(1)
        return loss.item(), *torch.autograd.grad(loss, list(net.parameters()))
    for a, b in zip(gradients(1), gradients(2)):  # of two latents weigh gives the whole gradient
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_a_flow_has_the_density_of_its_jacobian(size):
    net = model.VAE((1, 8, 8), 2, "mlp", size, hidden_dims=[8], flow=2).double()
    images, noise = levels_like((1, 8, 8), 2, 3), double(3, size)
    # It begins as an exchange of places.
    assert torch.equal(net.embed(images).sort()[0], net.encode(images)[0].sort()[0])
    stir(net, 0.3)
    mean, log_std, context = net.encode(images)
    rec, reg, bpd = net(images, noise=noise)
    log_q, found = D.Normal(0, 1).log_prob(noise).sum(1), []
    for row in range(3):
        def posterior(noise):
            z = mean[row] + log_std[row].exp() * noise
            return net.transform(z[None], context[row:row + 1])[0][0]
        jacobian = torch.autograd.functional.jacobian(posterior, noise[row])
        assert size < 5 or (jacobian != 0).sum() > 2 * size
        torch.testing.assert_close(net.embed(images)[row], posterior(torch.zeros(size).double()))
        z = posterior(noise[row])
        log_p = D.Normal(0, 1).log_prob(z).sum()
        found.append((log_q[row] - jacobian.slogdet()[1] - log_p,
                      net.reconstruction_loss(net.decode(z[None]), images[row:row + 1])[0]))
    kl, distortion = (torch.stack(parts).mean().item() for parts in zip(*found))
    assert (reg.item(), rec.item()) == pytest.approx((kl, distortion))
    assert bpd.item() == pytest.approx((kl + distortion) / 64 / LN2)


def test_mse_is_the_summed_squared_error_on_minus_one_to_one():
    net = model.VAE((3, 8, 8), 256, latent_size=3, recon_loss="mse").double()
    images, params = levels_like((3, 8, 8), 256), double(5, 3, 8, 8) / 3
    target = images.numpy() / 255.0 * 2 - 1
    mean = np.tanh(params.numpy())
    expected = ((mean - target) ** 2).sum((1, 2, 3))
    assert net.reconstruction_loss(params, images).numpy() == pytest.approx(expected)
    assert net.mean_image(params).numpy() == pytest.approx((mean + 1) / 2)


@pytest.mark.parametrize("kind", list(model.NETWORKS))
@pytest.mark.parametrize("levels,bits", [(2, 1.0), (16, 4.0)])
def test_a_model_of_zeros_costs_the_uniform_code(kind, levels, bits):
    net = zeroed(model.VAE((1, 28, 28), levels, kind))
    rec, kl, bpd = net(levels_like((1, 28, 28), levels, 7))
    assert rec.item() == pytest.approx(784 * math.log(levels), rel=1e-6) and kl.item() == 0
    assert bpd.item() == pytest.approx(bits, rel=1e-6)


def test_a_residual_block_adds_to_its_input():
    block, x = model.Residual(torch.nn.Linear, 6).double(), torch.randn(5, 6).double()
    (w, b), (v, c) = ((layer.weight.detach().numpy(), layer.bias.detach().numpy())
                      for layer in (block.first, block.second))

    def silu(a):
        return a / (1 + np.exp(-a))
    assert block(x).detach().numpy() == pytest.approx(x.numpy() + silu(silu(x.numpy()) @ w.T + b) @ v.T + c)


def test_without_hidden_layers_an_mlp_is_linear():
    net = model.AE((3, 9, 8), 256, "mlp", latent_size=5, hidden_dims=[])
    x, y = torch.randn(2, 4, 3, 9, 8)
    torch.testing.assert_close(net.encoder(x) + net.encoder(y), net.encoder(x + y) + net.encoder(0 * x))
    x, y = torch.randn(2, 4, 5)
    torch.testing.assert_close(net.decoder(x) + net.decoder(y), net.decoder(x + y) + net.decoder(0 * x))
    net = model.VAE((3, 9, 8), 256, "resnet", latent_size=5, hidden_dims=[], num_filters=2)
    assert len(net.encoder.hidden) == len(net.decoder.hidden) == 0
    net(levels_like((3, 9, 8), 256, 2))[0].backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("recon_loss,levels,bits", [("mse", 256, False), ("mse", 2, False),
                                                    ("bce", 16, False), ("bce", 256, False), ("bce", 2, True),
                                                    ("categorical", 2, True), ("logistic", 256, True)])
def test_bits_per_dimension_only_for_likelihoods_of_discrete_pixels(recon_loss, levels, bits):
    images = levels_like((1, 8, 8), levels)
    assert (model.VAE((1, 8, 8), levels, "mlp", 2, recon_loss=recon_loss)(images)[2] is not None) == bits
    assert model.AE((1, 8, 8), levels, "mlp", 2, recon_loss=recon_loss)(images)[1:] == (0, None)


def test_bound_differs_from_the_likelihood_by_the_kl_to_the_true_posterior():
    """−ELBO = −log p(x) + KL(q(z|x) ‖ p(z|x)), with both integrated numerically over a 1-D latent."""
    torch.manual_seed(3)
    net = model.VAE((1, 8, 8), 2, "mlp", latent_size=1, hidden_dims=[16]).double()
    for parameter in net.parameters():
        parameter.data *= 2
    image = levels_like((1, 8, 8), 2, 1)
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        bernoulli = D.Bernoulli(logits=net.decode(z)).log_prob(image.double()).sum((1, 2, 3))
        joint = bernoulli + D.Normal(0.0, 1.0).log_prob(z[:, 0])
        evidence = torch.trapezoid(joint.exp(), z[:, 0]).log()
        mean, log_std = net.encode(image)
        q = D.Normal(mean[0], log_std[0].exp()).log_prob(z)[:, 0]
        gap = torch.trapezoid(q.exp() * (q - (joint - evidence)), z[:, 0])
        n = 100_000
        images, noise = image.expand(n, -1, -1, -1), double(n, 1)
        rec, kl, _ = net(images, noise=noise)
        spread = net.reconstruction_loss(net.decode(mean + log_std.exp() * noise), images).std() / n ** 0.5
    assert gap > 0.01
    assert (rec + kl).item() == pytest.approx((gap - evidence).item(), abs=5 * spread.item())


@pytest.mark.parametrize("free_bits", [0.05, 0.5])
def test_free_bits_have_the_gradient_of_the_clamped_kl_and_report_the_true_one(free_bits):
    torch.manual_seed(0)
    net = model.VAE((1, 8, 8), 2, "mlp", 6, hidden_dims=[16], free_bits=free_bits).double()
    images, noise = levels_like((1, 8, 8), 2, 20), double(20, 6)
    mean, log_std = net.encode(images)
    each = D.kl_divergence(D.Normal(mean, log_std.exp()), D.Normal(0.0, 1.0))
    assert 0 < (each < free_bits).sum() and ((each > free_bits).any() or free_bits > 0.1)
    clamped = torch.autograd.grad(each.clamp(min=free_bits).sum(1).mean(), net.encoder.parameters())
    kl = net(images, noise=noise)[1]
    assert kl.item() == pytest.approx(each.sum(1).mean().item())
    for ours, expected in zip(torch.autograd.grad(kl, net.encoder.parameters()), clamped):
        torch.testing.assert_close(ours, expected)


def test_losses_are_sums_over_pixels_and_latents_and_means_over_the_batch():
    net = model.VAE((1, 12, 10), 2, "cnn", 5).double()
    images, noise = levels_like((1, 12, 10), 2, 6), double(6, 5)
    each = torch.tensor([[t.item() for t in net(images[i:i + 1], noise=noise[i:i + 1])] for i in range(6)])
    assert [t.item() for t in net(images, noise=noise)] == pytest.approx(each.mean(0).tolist())


@pytest.mark.parametrize("kind", list(model.NETWORKS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["ae", "vae", "conditional"])
def test_any_shape_trains_a_step_and_comes_back(mode, kind, shape):
    torch.manual_seed(0)
    net = model.build({"loss_mode": "ae" if mode == "ae" else "vae", "conditional": mode == "conditional",
                       "model": kind, "latent_size": 3, "hidden_dims": [20, 10], "num_filters": 4,
                       "recon_loss": "categorical", "flow": 0, "free_bits": 0.0, "iw_train": 0},
                      {"shape": shape, "levels": 16, "classes": ["a", "b", "c"]}).double()
    images, labels = levels_like(shape, 16), torch.tensor([0, 1, 2, 1, 0])
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6)
    noise = double(5, 3)
    before, kl, _ = net(images, labels, noise)
    (before + kl).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    assert all(p.grad.any() for name, p in net.named_parameters() if name.endswith("weight"))
    optimizer.step()
    assert sum(net(images, labels, noise)[:2]) < before + kl
    drawn, mean = net.sample(5, labels)
    assert drawn.shape == mean.shape == net.reconstruct(images, labels).shape == (5, *shape)
    assert drawn.dtype == torch.uint8 and drawn.max() < 16 and 0 <= mean.min() and mean.max() <= 1
    assert net.decode(net.prior(5), labels).shape == (5, 16 * shape[0], *shape[1:])


@pytest.mark.parametrize("levels", [2, 16])
def test_draws_follow_the_likelihood(levels):
    net = model.VAE((1, 8, 8), levels, "mlp", 2)
    params = 2 * torch.randn(1, 1 if levels == 2 else levels, 8, 8)
    draws = net.draw(params.expand(20_000, -1, -1, -1), torch.Generator().manual_seed(0))
    probabilities = torch.cat([1 - params.sigmoid(), params.sigmoid()],
                              1) if levels == 2 else params.softmax(1)
    for level in range(levels):
        p = probabilities[0, level]
        frequency = (draws == level).float().mean(0)[0]
        assert ((frequency - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt() + 1e-4).all()


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0, 3e5])
def test_latents_that_never_change_still_give_a_prior(scale):
    torch.manual_seed(0)
    net = zeroed(model.AE((1, 8, 8), 2, "mlp", latent_size=32))
    torch.nn.init.normal_(net.encoder.net[-1].bias, std=scale)
    net.fit_prior(levels_like((1, 8, 8), 2, 1000).split(300))
    z = net.prior(5, 1.0, torch.Generator().manual_seed(0))
    bias = net.encoder.net[-1].bias.detach()
    assert ((z - bias).abs() <= 1e-6 * bias.norm() + 1e-5).all()


def test_an_ae_samples_from_the_gaussian_fitted_to_its_latents():
    torch.manual_seed(0)
    net = model.AE((1, 8, 8), 256, "mlp", 3, hidden_dims=[16])
    images = levels_like((1, 8, 8), 256, 1000)
    net.fit_prior(images.split(300))
    codes = net.embed(images).detach().numpy()
    drawn = net.prior(200_000, generator=torch.Generator().manual_seed(0)).numpy()
    assert drawn.mean(0) == pytest.approx(codes.mean(0), abs=5 * float(codes.std()) / 200_000 ** 0.5)
    assert np.cov(drawn.T) == pytest.approx(np.cov(codes.T), rel=0.03, abs=0.01 * float(codes.var()))
    assert model.VAE((1, 8, 8), 256, "mlp", 3).prior(50_000).std(0).tolist() == pytest.approx([1] * 3,
                                                                                              abs=0.02)


def test_temperature_scales_the_prior_and_a_generator_repeats_it():
    net = model.VAE((1, 8, 8), 256, "mlp", 3)
    one, half = (net.prior(9, t, torch.Generator().manual_seed(5)) for t in (1.0, 0.5))
    assert torch.equal(one / 2, half)
    assert torch.equal(net.sample(4, generator=utils.stream(1))[0],
                       net.sample(4, generator=utils.stream(1))[0])


@pytest.mark.parametrize("kind", list(model.NETWORKS))
def test_a_conditional_model_uses_the_class_in_encoder_and_decoder(kind):
    torch.manual_seed(0)
    net = model.ConditionalVAE((1, 9, 21), 2, kind, 4, num_classes=3)
    images = levels_like((1, 9, 21), 2, 1)
    a, b = torch.tensor([0]), torch.tensor([2])
    assert not torch.equal(net.embed(images, a), net.embed(images, b))
    z = net.prior(1)
    assert not torch.equal(net.decode(z, a), net.decode(z, b))


def test_log_std_stays_where_exp_is_finite():
    net = zeroed(model.VAE((1, 8, 8), 2, "mlp", 2))
    net.encoder.net[-1].bias.data[2:] = torch.tensor([1e6, -1e6])
    rec, kl, bpd = net(levels_like((1, 8, 8), 2))
    assert kl.isfinite()


# ------------------------------------------------------------------------------------------------------------
# Data

def test_stochastic_binarisation_keeps_black_and_white_and_is_right_between():
    ramp = torch.arange(256, dtype=torch.uint8).repeat(20_000, 1, 1, 1)
    frequency = sum(data.binarize(ramp.clone(), seed).double().mean(0).flatten() for seed in range(5)) / 5
    p = torch.arange(256).double() / 255
    assert ((frequency - p).abs() <= 5 * (p * (1 - p) / 100_000).sqrt()).all()  # exactly at 0 and 255
    # An end is wrong once in 65,536 draws where the comparison is off by one: look at millions.
    assert not data.binarize(torch.zeros(4001, 1, 1, 1003, dtype=torch.uint8), 1).any()
    assert data.binarize(torch.full((4001, 1, 1, 1003), 255, dtype=torch.uint8), 1).all()


def test_quantisation():
    stored = torch.arange(256, dtype=torch.uint8)
    as_stored, two, sixteen = (data.quantize(stored.clone(), levels) for levels in (256, 2, 16))
    assert torch.equal(as_stored, stored) and torch.equal(two, (stored.double() / 255 > 0.5).byte())
    # ⌊16 x⌋ with 16 → 15, for x = pixel / 256 (the 8-bit pixel as the lower end of its interval)
    assert torch.equal(sixteen, (16 * stored.double() / 256).floor().clamp(max=15).byte())


def test_glyphs(tmp_path):
    first = data.load("glyphs", tmp_path)
    assert [len(s) for s in (first.train, first.val, first.test)] == [54_000, 6_000, 10_000]
    assert first.shape == (1, 28, 28) and first.classes == list("0123456789") and first.levels == 256
    again = data.load("glyphs", tmp_path, levels=2, limit=100)  # from the cache
    assert torch.equal(pixels(again.train), (pixels(first.train)[:100] > 127).byte())
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(42))
    images, labels, _, _ = data.make_glyphs()
    assert torch.equal(pixels(first.val), torch.from_numpy(images)[order[54_000:]])
    assert torch.equal(first.train.labels, torch.from_numpy(labels)[order[:54_000]])
    assert (torch.bincount(first.train.labels) > 5000).all()
    means = pixels(first.train).float().flatten(1)
    centres = torch.stack([means[first.train.labels == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(pixels(first.test).float().flatten(1), centres).argmin(1)
    assert (nearest == first.test.labels).float().mean() > 0.5  # the labels are those of the pictures


def test_stochastic_val_and_test_are_one_fixed_draw_and_train_a_fresh_one(folder, tmp_path):
    a, b = (data.load(str(folder), tmp_path, levels=2, binarize="stochastic") for _ in range(2))
    assert torch.equal(pixels(a.val), pixels(b.val)) and pixels(a.val).max() == 1
    assert torch.equal(pixels(a.test), pixels(b.test)) and pixels(a.test).max() == 1
    index = torch.arange(50)
    first, second = (a.train.batch(index, 1, "binarize", step)[0] for step in (1, 2))
    assert first.max() == 1 and not torch.equal(first, second)
    assert torch.equal(first, a.train.batch(index, 1, "binarize", 1)[0])


def write_idx(root, n=(50, 20)):
    """MNIST's files, small, with images that tell their number."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in zip(("train", "t10k"), n):
        images = (np.arange(count * 784) + np.arange(count).repeat(784)).astype(np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28,
                                                                      28) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())


def test_mnist_is_read_split_and_resized(tmp_path):
    write_idx(tmp_path)
    mnist = data.load("mnist", tmp_path)
    assert [len(s) for s in (mnist.train, mnist.val, mnist.test)] == [45, 5, 20]
    assert mnist.classes == list("0123456789") and torch.equal(mnist.test.labels, torch.arange(20) % 10)
    assert len(data.load("mnist", tmp_path, limit=7).train) == 7
    small = data.load("mnist", tmp_path, image_size=(14, 21), transform="grayscale3")
    assert small.shape == (3, 14, 21) and torch.equal(pixels(small.val)[:, 0], pixels(small.val)[:, 2])
    assert [len(small.train), len(small.val)] == [45, 5]


def picture(path, size=(10, 8), mode="L", seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "P": (), "RGB": (3,), "RGBA": (4,), "CMYK": (4,), "I;16": ()}[mode]
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels)).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values if mode != "P" else np.stack([values] * 3, -1))
        image = image.convert("P") if mode == "P" else image if mode in ("L", "RGB", "RGBA") else \
            Image.frombytes("CMYK", size, values.tobytes())
    image.save(path, **options)
    return values


def test_a_folder_of_classes_keeps_its_labels(tmp_path):
    stored = {}
    for i in range(30):
        stored[picture(tmp_path / "in" / "abc"[i % 3] / f"{i}.png", seed=i).tobytes()] = i % 3
    picture(tmp_path / "in" / "a" / ".thumbnails" / "0.png", seed=30)  # what is hidden is no image
    picture(tmp_path / "in" / "a" / "__MACOSX" / "0.png", seed=31)
    read = data.load(str(tmp_path / "in"), tmp_path)
    assert read.classes == ["a", "b", "c"] and read.shape == (1, 8, 10)
    assert [len(s) for s in (read.train, read.val, read.test)] == [24, 3, 3]
    found = [(image.numpy().tobytes(), label.item()) for s in (read.train, read.val, read.test)
             for image, label in zip(pixels(s), s.labels)]
    assert dict(found) == stored and len(found) == 30


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "Testing")])
def test_a_flat_folder_and_one_with_train_and_test(tmp_path, names):
    for i in range(20):
        picture(tmp_path / "flat" / f"{i}.jpg", mode="RGB", seed=i)
        picture(tmp_path / "two" / names[0] / f"{i}.png", seed=i)
    test = picture(tmp_path / "two" / names[1] / "x.png", seed=99)
    flat, two = data.load(str(tmp_path / "flat"), tmp_path), data.load(str(tmp_path / "two"), tmp_path)
    assert flat.classes == [] and flat.shape == (3, 8, 10) and len(flat.test) == 2
    assert [len(s) for s in (two.train, two.val, two.test)] == [18, 2, 1]
    assert np.array_equal(pixels(two.test)[0, 0].numpy(), test)


def test_a_changed_folder_is_noticed(tmp_path):
    for i in range(20):
        picture(tmp_path / "in" / f"{i:02d}.png", seed=i)
    before = data.load(str(tmp_path / "in"), tmp_path)
    assert torch.equal(pixels(before.train), pixels(data.load(str(tmp_path / "in"), tmp_path).train))
    picture(tmp_path / "in" / "20.png", seed=20)
    assert sum(len(s) for s in vars(data.load(str(tmp_path / "in"), tmp_path)).values()
               if isinstance(s, data.Split)) == 21
    changed = picture(tmp_path / "in" / "20.png", seed=21)
    os.utime(tmp_path / "in" / "20.png", ns=(1, 1))
    after = data.load(str(tmp_path / "in"), tmp_path)
    assert any(np.array_equal(image[0], changed) for s in (after.train, after.val, after.test)
               for image in pixels(s))


def test_a_cache_that_is_damaged_is_made_again(tmp_path):
    for i in range(20):
        picture(tmp_path / "in" / f"{i:02d}.png", seed=i)
    (tmp_path / "in" / "20.png").touch()
    before = pixels(data.load(str(tmp_path / "in"), tmp_path).train)
    for damaged in sorted((tmp_path / "cache").rglob("*.npy")):
        damaged.unlink() if damaged.name == "2.npy" else damaged.write_bytes(
            b"PK\x03\x04" if damaged.name == "0.npy" else damaged.read_bytes()[:100])
        assert torch.equal(before, pixels(data.load(str(tmp_path / "in"), tmp_path).train))


def test_unreadable_files_are_named_each_time(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / "in" / f"{i:02d}.png", seed=i)
    (tmp_path / "in" / "20.png").touch()
    for _ in range(2):
        data.load(str(tmp_path / "in"), tmp_path)
        said = capsys.readouterr().err
        assert "20.png" in said and "1 of 21" in said


def test_downloaded_archives_go_and_the_users_own_stay(tmp_path, monkeypatch):
    class Stub:
        filename, classes, targets, made = "cifar-10-python.tar.gz", ["a", "b"], [0, 1] * 20, 0

        def __init__(self, root, train, download):
            Stub.made += train
            (root / self.filename).write_text("archive")
            unpacked = root / "cifar-10-batches-py/data_batch_1"
            if not unpacked.exists():
                unpacked.parent.mkdir()
                unpacked.write_bytes(b"1")
            self.data = np.full((40, 32, 32, 3), len(unpacked.read_bytes()), np.uint8)
    monkeypatch.setattr(utils.torchvision.datasets, "CIFAR10", Stub)
    (tmp_path / "backup.tar.gz").write_text("mine")
    for times, unpacked in enumerate((None, b"12"), 1):
        if unpacked:  # a file that changes is read anew
            (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(unpacked)
        for _ in range(2):  # the second time from the cache
            read = data.load("cifar10", tmp_path)
            assert read.shape == (3, 32, 32) and read.classes == ["a", "b"] and Stub.made == times
            assert (pixels(read.train) == times).all()
            assert {path.name for path in tmp_path.iterdir()} == {"backup.tar.gz", "cifar-10-batches-py",
                                                                  "cache"}


def test_grey_files_of_any_kind_are_one_channel(tmp_path):
    for i, mode in enumerate(("LA", "P", "L", "1")):
        image = Image.fromarray(np.full((8, 8), 40 * i, np.uint8)).convert(mode)
        image.save(tmp_path / "x.png")
        assert data.to_array(tmp_path / "x.png", None).shape == (8, 8)
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="32 bits"):
        data.to_array(tmp_path / "x.tiff", None)


def test_images_of_every_kind_in_one_folder(tmp_path, capsys):
    for i, (mode, suffix) in enumerate([("L", "png"), ("RGB", "png"), ("RGBA", "png"), ("P", "png"),
                                        ("CMYK", "jpg"),
                                        ("I;16", "png"), ("L", "jpeg"), ("RGB", "webp"), ("L", "bmp"),
                                        ("RGB", "tiff"), ("L", "png"), ("L", "png")]):
        picture(tmp_path / "in" / f"{i:02d}.{suffix}", mode=mode, seed=i)
    (tmp_path / "in" / "empty.png").touch()
    whole = (tmp_path / "in" / "06.jpeg").read_bytes()
    (tmp_path / "in" / "cut.jpg").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "in" / "notes.txt").write_text("no image")
    read = data.load(str(tmp_path / "in"), tmp_path)
    assert read.shape == (3, 8, 10) and len(read.train) + len(read.val) + len(read.test) == 12
    said = capsys.readouterr().err
    assert "empty.png" in said and "cut.jpg" in said and "2 of 14" in said
    sixteen = data.to_array(tmp_path / "in" / "05.png", None)
    assert np.array_equal(sixteen, np.random.default_rng(5).integers(0, 256, (8, 10)))
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert (data.to_array(tmp_path / "clear.png", None) == 255).all()  # transparent is white, not hidden red


def test_image_size_covers_and_crops_at_the_centre(tmp_path):
    wide = np.zeros((10, 40), np.uint8)
    wide[:, 15:25] = 200
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (data.to_array(tmp_path / "wide.png", (10, 10)) == 200).all()
    assert data.to_array(tmp_path / "wide.png", (12, 20)).shape == (12, 20)


def test_transforms(tmp_path):
    colour = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 10, 10]], np.uint8)[..., None, None]
    assert data.grey(colour, "grayscale").flatten().tolist() == [76, 150, 29, 10]  # ITU-R BT.601
    assert data.grey(colour, "grayscale3").shape == (4, 3, 1, 1)
    assert data.grey(colour[:, :1], "grayscale3").shape == (4, 3, 1, 1)
    for i in range(20):
        picture(tmp_path / "in" / f"{i}.png", mode="RGB", seed=i)
    read = {transform: pixels(data.load(str(tmp_path / "in"), tmp_path, transform=transform).train)
            for transform in ("none", "grayscale", "grayscale3")}
    luminance = torch.from_numpy(data.grey(read["none"].numpy(), "grayscale"))
    assert torch.equal(read["grayscale"], luminance)
    assert torch.equal(read["grayscale3"], luminance.expand(-1, 3, -1, -1))


def test_the_first_image_in_colour_turns_all_before_it_into_three_channels(tmp_path):
    stored = {picture(tmp_path / "in" / f"{i:04d}.png", size=(8, 8), seed=i).tobytes() for i in range(2100)}
    picture(tmp_path / "in" / "last.png", size=(8, 8), mode="RGB")
    read = data.load(str(tmp_path / "in"), tmp_path)
    everything = torch.cat([pixels(split) for split in (read.train, read.val, read.test)])
    grey = [image for image in everything.numpy() if (image == image[:1]).all()]
    assert everything.shape == (2101, 3, 8, 8) and {image[0].tobytes() for image in grey} == stored


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / "in" / f"{i}.png", seed=i)
    (tmp_path / "file").touch()  # where a folder would have to be
    a, b = data.load(str(tmp_path / "in"), tmp_path / "file"), data.load(str(tmp_path / "in"), tmp_path)
    assert "not cached" in capsys.readouterr().err
    assert torch.equal(pixels(a.train), pixels(b.train)) and a.about() == b.about()


# ------------------------------------------------------------------------------------------------------------
# Whole runs

def test_a_run_leaves_its_files(folder, workplace, curves):
    rows, test = fit(folder, "--levels=2", epochs=3)
    results = workplace / "results" / "run"
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and tuple(rows[0]) == utils.COLUMNS
    for name in ("curves.png", "samples_003.png", "reconstructions_003.png"):
        with Image.open(results / name) as image:
            assert min(image.size) > 100
    assert list(results.glob("events.out.*"))
    last, best = (utils.load_checkpoint(workplace / "checkpoints" / "run" / f"{n}.pt")
                  for n in ("last", "best"))
    assert last["epoch"] == 3 and last["step"] == 3 * 10 and len(last["history"]) == 3
    losses = [float(row["val_loss"]) for row in rows]
    assert best["epoch"] == 1 + losses.index(min(losses)) == test["epoch"] and best["best"] == min(losses)
    for row in rows:
        assert float(row["val_loss"]) == pytest.approx(float(row["val_rec"]) + float(row["val_kl"]))
        assert float(row["val_bpd"]) == pytest.approx(float(row["val_loss"]) / LN2 / 784)


def test_curves_are_drawn_in_training_at_most_every_ten_seconds(folder, workplace, curves, monkeypatch):
    now, drawn, draw = [0.0], [], utils.draw_curves
    monkeypatch.setattr(utils.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(utils, "draw_curves", lambda history, path: drawn.append(len(history))
                        or draw(history, path))
    draw_epoch = train.draw_epoch

    def four_seconds(*args):
        now[0] += 4
        draw_epoch(*args)
    monkeypatch.setattr(train, "draw_epoch", four_seconds)
    fit(folder, epochs=7)
    assert drawn == [3, 6, 7]  # after 12 and 24 seconds, and at the end


def test_curves_have_a_panel_for_each_metric_that_there_is(curves, monkeypatch):
    kept = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: kept.append(figure))

    def panels(*betas, **metrics):
        rows = [{"epoch": 1 + i, "beta": beta, **{f"{part}_{key}": value + i for key, value in metrics.items()
                                                  for part in ("train", "val")}}
                for i, beta in enumerate(betas)]
        utils.draw_curves(rows, None)
        axes = kept[-1].get_axes()
        places = [axis.get_window_extent() for axis in axes]
        assert not any(place.overlaps(other) for i, place in enumerate(places) for other in places[:i])
        assert all(kept[-1].bbox.contains(*corner) for place in places for corner in (place.p0, place.p1))
        return [(axis.get_title(), [list(line.get_ydata()) for line in axis.lines[:-1]])
                for axis in axes]
    assert panels(None, None, loss=3, rec=3) == [("loss at the target beta", [[3, 4]] * 2),
                                                 ("reconstruction", [[3, 4]] * 2)]
    assert [title for title, _ in panels(1.0, 1.0, loss=3, rec=2, kl=1, bpd=4)][2:] == ["KL", "bits/dim"]
    assert panels(0.0, 1.0, loss=3, rec=2, kl=1, bpd=4)[4] == ("beta", [[0, 1]])


def test_test_figures_are_those_of_the_best_checkpoint(folder, workplace):
    _, test = fit(folder, "--levels=2")
    net, state = infer.restore(workplace / "checkpoints" / "run" / "best.pt", "cpu")
    split = data.load(str(folder), "data", levels=2).test
    mean, log_std = net.encode(pixels(split))
    kl = D.kl_divergence(D.Normal(mean, log_std.exp()), D.Normal(0.0, 1.0)).sum(1).mean()
    assert test["test_kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert test["active_units"] == int((mean.var(0, correction=0) > 0.01).sum())


def test_the_best_epoch_need_not_be_the_last(folder, workplace, monkeypatch):
    weights, ranks = [], iter([3.0, 1.0, 2.0])
    run_epoch = train.run_epoch

    def ranked(net, *args):
        row = {**run_epoch(net, *args), "val_loss": next(ranks)}
        weights.append({name: value.clone() for name, value in net.state_dict().items()})
        return row
    monkeypatch.setattr(train, "run_epoch", ranked)
    _, test = fit(folder, "--levels=2", epochs=3)
    best = utils.load_checkpoint(Path("checkpoints/run/best.pt"))
    assert same(best["model"], weights[1]) and best["epoch"] == test["epoch"] == 2 and best["best"] == 1
    net, _ = infer.restore(Path("checkpoints/run/best.pt"), "cpu")
    mean, log_std = net.encode(pixels(data.load(str(folder), "data", levels=2).test))
    assert test["test_kl"] == pytest.approx(utils.KLD(mean, log_std).mean().item(), rel=1e-5)


def test_each_epoch_sees_each_image_once_in_a_new_order_and_new_noise(folder, workplace, monkeypatch):
    seen, forward = [], model.VAE.forward

    def watched(self, images, labels=None, noise=None):
        if self.training:
            seen.append((images.flatten(1).long() @ torch.arange(1, 785), noise))
        return forward(self, images, labels, noise)
    monkeypatch.setattr(model.VAE, "forward", watched)
    fit(folder)
    codes, noise = (torch.cat(part) for part in zip(*seen))
    first, second = codes.view(2, -1)
    assert len(first) == 320 and torch.equal(first.sort()[0], second.sort()[0]) and not torch.equal(first,
                                                                                                    second)
    assert len({row.numpy().tobytes() for row in noise}) == 640
    assert noise.mean().abs() < 0.1 and noise.std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 50, 20), (1, 16, 16)])
def test_orthogonalize_keeps_the_singular_vectors(shape):
    matrices = double(*shape)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ utils.orthogonalize(matrices) @ vh.mT  # diagonal, where the singular vectors are the same
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-9
    assert 0.6 < values.min() and values.max() < 1.3


def test_muon_is_that_of_torch_for_matrices_and_adamw_for_the_rest():
    torch.manual_seed(0)
    shapes = ((8, 12), (12, 8), (8, 12), (6, 2, 3, 3), (7,))
    ours = [torch.randn(shape) for shape in shapes]
    theirs = [torch.nn.Parameter(p.flatten(1).clone() if p.ndim > 1 else p.clone()) for p in ours]
    ours[3] = ours[3].to(memory_format=torch.channels_last)
    ours = [torch.nn.Parameter(p) for p in ours]
    options = {"lr": 0.05, "weight_decay": 0.1}
    muon = utils.Muon(ours, **options)
    others = (torch.optim.Muon(theirs[:4], adjust_lr_fn="match_rms_adamw", **options),
              torch.optim.AdamW(theirs[4:], **options))
    before = [p.detach().clone() for p in ours]
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.reshape(b.shape).clone()
        for optimizer in (muon, *others):
            optimizer.step()
    for a, b, was in zip(ours, theirs, before):
        moved = (a - was).abs().mean()  # torch's computes in bf16
        assert moved > 0.02 and (a.flatten() - b.flatten()).abs().max() < 0.1 * moved


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_torchs(fused):
    ours, theirs = (torch.nn.Parameter(double(5, 3)) for _ in range(2))
    options = {"lr": 0.05, "weight_decay": 0.1, "fused": fused}
    optimizers = utils.AdamW([ours], **options), torch.optim.AdamW([theirs], **options)
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            (parameter * double(5, 3, seed=step)).sum().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    assert str(optimizers[0].state_dict()["state"]) == str(optimizers[1].state_dict()["state"])
    assert torch.equal(ours, theirs) and not torch.equal(ours, double(5, 3))


def test_options_of_the_optimiser_reach_it(folder, workplace, monkeypatch):
    seen, adamw = [], utils.AdamW
    monkeypatch.setattr(train, "AdamW", lambda *args, **options: seen.append(options)
                        or adamw(*args, **options))
    fit(folder, "--lr=0.003", "--weight_decay=0.25", epochs=1)
    assert seen[0]["lr"] == 0.003 and seen[0]["weight_decay"] == 0.25
    muon = train.build_both(train.parse_args(["--optimizer=muon", "--lr=0.003", "--weight_decay=0.25"])[0],
                            {"shape": (1, 8, 8), "levels": 256, "classes": []})[1]
    assert isinstance(muon, utils.Muon)
    assert muon.defaults["lr"] == 0.003 and muon.defaults["weight_decay"] == 0.25


def test_the_schedule_reaches_the_optimiser_and_the_log(folder, workplace, monkeypatch):
    rates = []

    class Seen(utils.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()
    monkeypatch.setattr(train, "AdamW", Seen)
    rows, _ = fit(folder, "--lr_schedule=cosine", "--lr=0.01")
    expected = [0.005 * (1 + math.cos(math.pi * step / len(rates))) for step in range(len(rates))]
    assert len(rates) == 20 and rates == pytest.approx(expected)
    assert [float(row["lr"]) for row in rows] == [rates[9], rates[19]]


def test_the_moving_average_is_what_is_judged(folder, workplace, monkeypatch):
    seen, follow = [], train.follow
    monkeypatch.setattr(train, "follow", lambda ema, net, decay: seen.append(
        (decay, *[[p.detach().double().clone() for p in n.parameters()] for n in (ema, net)]))
        or follow(ema, net, decay))
    monkeypatch.setattr(train, "FOLLOW_EVERY", 4)
    rows, test = fit(folder, "--ema=0.6", "--lr=0.01")
    # of ten steps an epoch it follows after the 4th, the 8th and the last
    assert [decay for decay, _, _ in seen] == pytest.approx(
        [min(0.6, step / (step + 9)) ** since for step, since in
         ((4, 4), (8, 4), (10, 2), (14, 4), (18, 4), (20, 2))])
    state = utils.load_checkpoint(Path("checkpoints/run/last.pt"))
    net, _ = infer.restore(Path("checkpoints/run/last.pt"), "cpu")
    for i, (name, parameter) in enumerate(net.named_parameters()):
        average = seen[0][1][i]
        for decay, _, weights in seen:
            average = decay * average + (1 - decay) * weights[i]
        torch.testing.assert_close(parameter.double(), average, rtol=1e-4, atol=1e-6)
        assert not torch.equal(parameter, state["model"][name])
    args, everything = Namespace(**state["args"]), data.load(str(folder), "data")
    judged = train.test_epoch(net, everything.val, args, "val", lambda: None)
    assert float(rows[-1]["val_rec"]) == pytest.approx(judged["rec"], rel=1e-6)
    infer.main(["--evaluate"])
    measured = json.loads(Path("results/run/evaluation.json").read_text())
    assert measured["rec"] == pytest.approx(test["test_rec"], rel=0.02) and measured["psnr"] > 5
    assert measured["ckpt"] == "checkpoints/run/best.pt"


def test_evaluation_refuses_a_dataset_that_has_changed(folder, workplace, capsys):
    """The split of a plain folder is another with one image more: the test's were among the training's."""
    shutil.copytree(folder, "images")
    fit("images")
    shutil.copy("images/0/" + sorted(os.listdir("images/0"))[0], "images/0/zzz.png")
    status, error = outcome(infer.main, ["--evaluate"], capsys)
    assert status == 1 and "images has changed" in error
    infer.main(["--only", "nearest"])
    assert "images has changed" in capsys.readouterr().err and not Path("results/run/nearest.png").exists()
    assert not Path("results/run/evaluation.json").exists()


def test_several_models_are_measured_at_once_and_one_with_a_flow_is_drawn(folder, workplace, capsys):
    train.main([f"--dataset={folder}", "--model=mlp", "--latent_size=4", "--levels=2", "--epochs=2",
                "--flow=1", "--seeds", "1", "2", "--log_dir=run"])
    paths = [f"checkpoints/run/seed_{seed}/best.pt" for seed in (1, 2)]
    capsys.readouterr()
    infer.main(["--evaluate", "--iw_samples=20", "--ckpt", *paths])
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "json" not in line)
    found = [json.loads(Path(f"results/run/seed_{seed}/evaluation.json").read_text()) for seed in (1, 2)]
    for name in ("neg_elbo", "kl", "iw_nll", "active_units"):
        values = [measured[name] for measured in found]
        assert said[name] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    assert found[0]["neg_elbo"] != found[1]["neg_elbo"] and said["iw_samples"] == "20"
    for measured, seed in zip(found, (1, 2)):
        test = json.loads(Path(f"results/run/seed_{seed}/test.json").read_text())
        assert measured["neg_elbo"] == pytest.approx(test["test_loss"], rel=0.01)  # of 20 latents and of one
        assert measured["iw_nll"] < measured["neg_elbo"]
    infer.main(["--ckpt", paths[0], "--only", "reconstructions,latents,units,traversals"])
    drawn = {path.name for path in Path("results/run/seed_1").glob("[a-z]*s.png")}
    assert {"reconstructions.png", "latents.png", "traversals.png"} <= drawn and "units.png" not in drawn
    assert "left out units: the KL of an AE and with --flow" in capsys.readouterr().err


def test_an_ae_is_measured_against_pca(folder, workplace):
    fit(folder, "--loss_mode=ae", "--ema=0.9")
    infer.main(["--evaluate", "--limit", "30"])
    measured = json.loads(Path("results/run/evaluation.json").read_text())
    everything = data.load(str(folder), "data")
    x = pixels(everything.train).flatten(1).double().numpy() / 255
    chosen = torch.randperm(len(everything.test), generator=utils.stream("evaluate"))[:30]
    images, _ = everything.test.batch(chosen)
    y = images.flatten(1).double().numpy() / 255 - x.mean(0)
    basis = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
    left = ((y - y @ basis.T @ basis) ** 2).sum(1).mean()
    assert measured["pca_squared_error"] == pytest.approx(left, rel=1e-6)
    net, _ = infer.restore(Path("checkpoints/run/best.pt"), "cpu")
    assert not torch.equal(net.prior_scale, torch.eye(4))
    error = ((net.reconstruct(images).detach().numpy() - images.numpy() / 255) ** 2).sum((1, 2, 3)).mean()
    assert measured["squared_error"] == pytest.approx(error, rel=1e-5) and measured["images"] == 30
    assert measured["psnr"] == pytest.approx(10 * math.log10(784 / error), rel=1e-5)
    assert measured["kl"] is measured["iw_nll"] is measured["neg_elbo"] is None


def test_tensorboard_has_the_curves_and_the_pictures(folder, workplace, curves):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    rows, _ = fit(folder, "--levels=2")
    events = EventAccumulator("results/run").Reload()
    for name in ("val_loss", "train_kl", "val_bpd", "beta"):
        assert [e.value for e in events.Scalars(name.replace("_", "/", 1))] == \
            pytest.approx([float(row[name]) for row in rows])
    assert {"samples", "reconstructions"} <= set(events.Tags()["images"])


def test_overwrite_replaces_a_run_and_touches_nothing_else(folder, workplace, capsys):
    fit(folder, epochs=3)
    for name in ("results/run/holiday.png", "results/run/notes.txt", "results/photos/samples_001.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("mine")
    fit(folder, epochs=1)
    assert not Path("results/run/samples_002.png").exists()
    assert len(list(Path("results/run").glob("events*"))) == 1
    assert Path("results/run/holiday.png").read_text() == Path("results/run/notes.txt").read_text() == "mine"
    train.main(["--dataset", str(folder), "--model", "mlp", "--epochs", "1", "--log_dir", "photos",
                "--overwrite"])
    many = ["--dataset", str(folder), "--model", "mlp", "--hidden_dims", "8", "--epochs", "1", "--log_dir",
            "many"]
    train.main([*many, "--seeds", "1", "2"])
    train.main([*many, "--seeds", "2", "3", "--overwrite"])
    kept = {path.parent.name for path in Path("checkpoints/many").glob("*/best.pt")}
    assert kept == {"seed_2", "seed_3"}
    Path("flat").mkdir()
    for path in Path(folder, "0").iterdir():
        shutil.copy(path, "flat")
    again = [*many, "--seeds", "2", "--overwrite"]
    status, error = outcome(train.main, [*again, "--dataset", "flat", "--conditional"], capsys)
    assert status == 1 and "no classes" in error
    assert {path.parent.name for path in Path("checkpoints/many").glob("*/best.pt")} == kept
    with utils.locked(Path("checkpoints/many")):  # as if a run of that name trained
        status, error = outcome(train.main, again, capsys)
    assert status == 1 and "is being trained" in error and Path("checkpoints/many/seed_2/best.pt").exists()
    # one folder for everything
    for _ in range(2):
        train.main([*again, "--results_dir", "all", "--checkpoint_dir", "all"])
    assert {"test.json", "best.pt"} <= set(os.listdir("all/many/seed_2"))


def test_the_same_seed_gives_the_same_run_and_another_does_not(folder, workplace):
    def numbers(*flags):
        rows, test = fit(folder, "--levels=2", "--binarize=stochastic", *flags)
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows], test
    torch.manual_seed(123)
    first = numbers("--seed=7")
    torch.rand(10)
    assert first == numbers("--seed=7") and first != numbers("--seed=8")


def test_annealing(folder, workplace):
    rows, test = fit(folder, "--beta_mode=linear", "--target_beta_val=0.8", "--levels=2", epochs=4)
    assert [float(row["beta"]) for row in rows] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert rows[0]["beta"] == "0.0" and test["epoch"] > 1
    for row in rows:  # the loss that ranks epochs is always at the target
        for part in ("train", "val"):
            assert float(row[f"{part}_loss"]) == pytest.approx(
                float(row[f"{part}_rec"]) + 0.8 * float(row[f"{part}_kl"]))


def test_an_ae_reports_what_it_has(folder, workplace, curves, capsys):
    rows, test = fit(folder, "--loss_mode=ae")
    assert all(row[name] == "" for row in rows for name in ("beta", "train_kl", "val_kl", "train_bpd",
                                                            "val_bpd"))
    said = capsys.readouterr()
    assert set(test) == {"epoch", "test_loss", "test_rec"} and " kl " not in said.out and said.err == ""
    infer.main([])
    assert (workplace / "results" / "run" / "samples.png").exists()


def test_training_learns_and_grad_clip_bites(folder, workplace):
    rows, _ = fit(folder, "--levels=2", "--lr=3e-3", epochs=6)
    assert float(rows[-1]["val_loss"]) < 0.6 * 784 * LN2
    clipped, _ = fit(folder, "--levels=2", "--lr=3e-3", "--grad_clip=1e-9", epochs=2)
    assert clipped[1]["val_loss"] != rows[1]["val_loss"]


def test_collapse_is_reported(folder, workplace, capsys):
    fit(folder, "--target_beta_val=1000")
    said = capsys.readouterr().out
    assert "collapsed" in said and all(flag in said for flag in ("--beta_mode linear", "--target_beta_val",
                                                                 "--free_bits"))
    fit(folder, "--target_beta_val=1000", "--flow=1")
    said = capsys.readouterr().out
    assert "collapsed" in said and "--free_bits" not in said  # which does not go with it
    fit(folder, "--target_beta_val=0.01", "--free_bits=1", epochs=5)
    assert "collapsed" not in capsys.readouterr().out


def test_free_bits_keep_the_kl_up(folder, workplace):
    _, low = fit(folder, "--target_beta_val=20", "--levels=2", epochs=4)
    _, high = fit(folder, "--target_beta_val=20", "--levels=2", "--free_bits=0.5", epochs=4)
    assert high["test_kl"] > low["test_kl"] + 0.5


def test_several_seeds(folder, workplace, capsys):
    train.main([f"--dataset={folder}", "--model=mlp", "--hidden_dims=16", "--epochs=1", "--seeds", "1", "2",
                "3", "--log_dir=many", "--results_dir=out/results", "--checkpoint_dir=out/checkpoints"])
    values = [json.loads((workplace / f"out/results/many/seed_{s}/test.json").read_text())["test_loss"]
              for s in (1, 2, 3)]
    with open(workplace / "out/results/many/seeds.csv") as file:
        rows = {row["figure"]: row for row in csv.DictReader(file)}
    assert len(set(values)) == 3
    assert float(rows["test_loss"]["mean"]) == pytest.approx(np.mean(values))
    assert float(rows["test_loss"]["std"]) == pytest.approx(np.std(values, ddof=1))
    assert "±" in capsys.readouterr().out


def test_flip_mirrors_half_of_the_training_images_and_no_others(folder, tmp_path):
    args, _ = train.parse_args([f"--dataset={folder}", "--loss_mode=ae", "--flip"])
    split, order = data.load(str(folder), tmp_path).train, torch.randperm(320)

    def seen(*key):
        return torch.cat([batch[0] for batch in train.batches(split, order, args, *key)])
    stored, first, second = split.batch(order)[0], seen("train", 0), seen("train", 1)
    kept, mirrored = ((first == images).flatten(1).all(1) for images in (stored, stored.flip(-1)))
    assert (kept | mirrored).all() and 120 < kept.sum() < 200
    assert torch.equal(first, seen("train", 0)) and not torch.equal(first, second)
    assert torch.equal(seen("val"), stored)


def test_warp_slides_rows_and_columns_of_the_first_epochs_training_images(folder, tmp_path):
    side, n = 41, 300
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([y, x]).byte().expand(n, -1, -1, -1)  # where does a pixel come from?
    warped = data.warp(places, torch.Generator().manual_seed(1), n).long()
    from_y, from_x = warped[:, 0], warped[:, 1]
    down, along = (from_y - y)[:, side // 2], from_x - x  # a column slides as one …
    middle = slice(15, 26)                                # (where no border is met)
    assert torch.equal((from_y - y)[:, middle], down[:, None].expand(n, 11, side))
    rows = torch.full((n, side), 99).scatter(1, from_y[:, :, side // 2], along[:, :, side // 2])
    own = rows.gather(1, from_y[:, middle, middle].flatten(1)).view(n, 11, 11)
    assert torch.equal(along[:, middle, middle], own)     # … and so does a row
    t = np.linspace(-1, 1, side)
    parabola = np.polynomial.Polynomial.fit  # least squares, by whole pixels
    assert all(abs(parabola(t, shifts, 2)(t) - shifts).max() < 1 for shifts in down.numpy())
    for edge, reach in ((down[:, 0], 0.04), (along[:, 0, side // 2], 0.06)):
        assert edge.float().std().item() == pytest.approx(reach * side * math.hypot(1, 2 / 3), rel=0.2)
        assert abs(edge.float().mean()) < 0.5
    half = slice(100, 200)
    again = data.warp(places[half], torch.Generator().manual_seed(1), n, half)
    assert torch.equal(again.long(), warped[half])

    args, _ = train.parse_args([f"--dataset={folder}", "--epochs=4", "--warp=0.5"])
    split, order = data.load(str(folder), tmp_path).train, torch.randperm(320)

    def seen(*key):
        return torch.cat([batch[0] for batch in train.batches(split, order, args, *key)])
    stored = split.batch(order)[0]
    assert torch.equal(seen("train", 0), seen("train", 0)) and \
        not torch.equal(seen("train", 0), seen("train", 1)) and not torch.equal(seen("train", 1), stored)
    assert torch.equal(seen("train", 2), stored) and torch.equal(seen("val"), stored)


def test_names_are_numbered_when_taken(folder, workplace):
    for _ in range(2):
        train.main([f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=1"])
    name = f"vae_{folder.name}_mlp"
    assert {path.name for path in (workplace / "results").iterdir()} == {name, name + "_2"}


@pytest.mark.parametrize("flags", [["--loss_mode=ae", "--model=cnn"],
                                   ["--latent_size=2", "--levels=16", "--model=cnn"]], ids=str)
def test_infer_twice_is_the_same_to_the_byte(folder, workplace, flags):
    fit(folder, *flags)
    pictures = []
    for out in ("a", "b"):
        infer.main(["--results_dir", out])
        pictures.append({path.name: path.read_bytes() for path in (workplace / out / "run").iterdir()})
    assert pictures[0] == pictures[1]
    expected = {"samples.png", "reconstructions.png", "interpolations.png", "latents.png", "traversals.png",
                "nearest.png", "progress.gif"}
    expected |= set() if "--loss_mode=ae" in flags else {"units.png"}
    expected |= {"manifold.png"} if "--latent_size=2" in flags else set()
    expected |= {"samples_drawn.png"} if any("levels" in flag for flag in flags) else set()
    assert set(pictures[0]) == expected


def test_infer_conditional_draws_only_the_classes_asked_for(folder, workplace, capsys, monkeypatch):
    fit(folder, "--conditional")
    seen = []
    decode = model.ConditionalVAE.decode
    monkeypatch.setattr(model.ConditionalVAE, "decode", lambda self, z, labels: seen.append((z, labels)) or
                        decode(self, z, labels))
    infer.main(["--only", "classes", "--classes", "3", "7"])
    z, labels = seen[0]
    assert labels.view(2, -1).tolist() == [[3] * 10, [7] * 10] and torch.equal(z[:10], z[10:])
    infer.main(["--only", "samples", "--classes", "3", "7", "--num_samples", "9"])
    assert set(seen[1][1].tolist()) == {3, 7}
    infer.main([])
    capsys.readouterr()
    assert outcome(infer.main, ["--classes", "11"], capsys) == \
        (1, f"{Path(sys.argv[0]).name}: --classes: there is no 11, only 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n")


def test_infer_without_the_dataset_draws_what_needs_none(folder, workplace, capsys):
    copy = workplace / "images"
    shutil.copytree(folder, copy)
    fit(copy)
    shutil.rmtree(copy)
    infer.main(["--results_dir", "elsewhere"])
    assert {path.name for path in (workplace / "elsewhere/run").iterdir()} == {"samples.png", "progress.gif"}
    said = capsys.readouterr().err
    assert "left out reconstructions" in said and "images" in said


def test_infer_follows_its_flags(folder, workplace, capsys):
    fit(folder, "--results_dir=mine")
    shutil.move("mine", "results")
    infer.main(["--only", "samples", "--temperature", "0", "--num_samples", "4"])
    with Image.open("mine/run/samples.png") as image:  # beside the training's own results
        cells = np.asarray(image)[..., 0]
    half = image.width // 59 * 29  # two images of 28 pixels and three lines, enlarged
    # without variance all samples are one
    assert np.array_equal(cells[:half, :half], cells[:half, half:2 * half])
    infer.main(["--only", "reconstructions", "--dataset", str(folder / "0")])
    assert "left out reconstructions" in capsys.readouterr().err
    shutil.copytree(folder, "moved")
    infer.main(["--only", "reconstructions", "--dataset", "moved"])
    assert Path("mine/run/reconstructions.png").exists()


@pytest.fixture
def drawn(monkeypatch):
    """name of a function of figures.py → the arguments of its last call."""
    calls = {}
    for name in ("labelled_grid", "latents", "units", "compare"):
        draw = getattr(figures, name)
        monkeypatch.setattr(figures, name, lambda *args, name=name, draw=draw: calls.update({name: args})
                            or draw(*args))
    return calls


def encoded(folder, **options):
    """The model of the run, the dataset, and mean, log_std of its test images in their order."""
    net, _ = infer.restore(Path("checkpoints/run/best.pt"), "cpu")
    everything = data.load(str(folder), "data", **options)
    with torch.no_grad():
        return net, everything, net.encode(*everything.test.batch(torch.arange(len(everything.test))))


def test_latents_are_the_means_or_their_principal_components(folder, workplace, drawn):
    def rows(points):
        return sorted(np.round(np.abs(points.numpy()), 3).tolist())
    fit(folder, "--latent_size=2")
    infer.main(["--only", "latents"])
    points, labels, names, axes = drawn["latents"][2:]
    _, everything, (mean, _) = encoded(folder)
    assert rows(points) == rows(mean) and axes == ["z1", "z2"] and names == everything.classes
    i = int(points[:, 0].argmax())  # a point and its class
    assert labels[i] == everything.test.labels[int(mean[:, 0].argmax())]
    fit(folder)
    infer.main(["--only", "latents"])
    points, _, _, axes = drawn["latents"][2:]
    mean = encoded(folder)[2][0]
    centred = (mean - mean.mean(0)).double().numpy()
    singular, directions = np.linalg.svd(centred, full_matrices=False)[1:]
    assert np.allclose(rows(points), rows(torch.from_numpy(centred @ directions[:2].T)), atol=2e-3)
    shares = singular ** 2 / (singular ** 2).sum()
    assert [axis.split("(")[1].split("%")[0] for axis in axes] == [f"{100 * part:.0f}" for part in shares[:2]]


def test_units_are_in_the_order_of_their_kl(folder, workplace, drawn):
    fit(folder, "--levels=2", epochs=4)
    infer.main(["--only", "units"])
    kl, active, t, densities = drawn["units"][2:]
    mean, log_std = encoded(folder, levels=2)[2]
    posterior = D.Normal(mean, log_std.exp())
    expected = D.kl_divergence(posterior, D.Normal(0.0, 1.0)).mean(0)
    order = expected.argsort(descending=True)
    torch.testing.assert_close(kl, expected[order])
    assert active.tolist() == (mean[:, order].var(0, correction=0) > 0.01).tolist()
    assert list(densities) == [f"z{d + 1}" for d in order.tolist()]
    weights = D.Categorical(torch.ones(len(mean)))
    for d, density in zip(order.tolist(), densities.values()):
        mixture = D.MixtureSameFamily(weights, D.Normal(mean[:, d], log_std[:, d].exp()))
        torch.testing.assert_close(density, mixture.log_prob(t).exp(), rtol=1e-4, atol=1e-6)
        assert torch.trapezoid(density, t).item() == pytest.approx(1, abs=0.02)


def test_figures_show_the_numbers_that_they_are_given(monkeypatch):
    kept = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, *_, **__: kept.append(figure))
    kl, t = torch.tensor([2.0, 1.0, 0.5]), torch.linspace(-4, 4, 9)
    figures.units("", "", kl, torch.tensor([True, True, False]), t, {"z2": t ** 2, "z1": t + 4})
    bars, *panels = kept[0].get_axes()
    assert [bar.get_height() for bar in bars.containers[1]] == kl.tolist()
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars.containers[0]] == [3]  # inactive
    assert [panel.collections[0].get_paths()[0].vertices[:, 1].max() for panel in panels] == [16, 8]
    labels, names = torch.tensor([2, 0, 2, 1]), ["a", "b", "c"]
    figures.latents("", "", torch.arange(8.0).view(4, 2), labels, names, ["x", "y"])
    axis = kept[1].axes[0]
    key = {text.get_text(): line.get_color()
           for text, line in zip(axis.get_legend().get_texts(), axis.get_legend().get_lines())}
    assert len(set(key.values())) == 3 and axis.collections[0].get_offsets().tolist()[1] == [2, 3]
    for label, shown in zip(labels, axis.collections[0].get_facecolors()):
        assert tuple(shown[:3]) == key[names[label]][:3]


@pytest.mark.parametrize("mode", ["vae", "ae"])
def test_traversals_change_one_dimension_at_a_time(folder, workplace, drawn, monkeypatch, mode):
    fit(folder, f"--loss_mode={mode}", "--latent_size=3")
    seen, decode = [], model.AE.decode
    monkeypatch.setattr(model.AE, "decode", lambda self, z, labels: seen.append(z) or decode(self, z, labels))
    infer.main(["--only", "traversals"])
    _, title, images, columns, names, offsets = drawn["labelled_grid"]
    z = seen[-1].view(3, 11, 3)
    net, everything, code = encoded(folder)
    order = [int(name.split()[0][1:]) - 1 for name in names]
    assert columns == 11 and len(images) == 33 and offsets[0] == "-3.0" and offsets[5] == "0.0"
    centre, spread = torch.zeros(3), torch.ones(3)
    activity = code.var(0) if mode == "ae" else D.kl_divergence(
        D.Normal(code[0], code[1].exp()), D.Normal(0.0, 1.0)).mean(0)
    assert order == activity.argsort(descending=True).tolist()
    if mode == "ae":
        latents = net.embed(everything.train.batch(torch.arange(320))[0]).detach()
        centre, spread = latents.mean(0), latents.std(0, correction=0)
    for row, d in enumerate(order):
        torch.testing.assert_close(z[row, :, d], centre[d] + torch.linspace(-3, 3, 11) * spread[d], rtol=1e-3,
                                   atol=1e-3)
        others = [i for i in range(3) if i != d]
        assert (z[row][:, others] == z[row][0, others]).all()
        # which are those of one test image
        mean = code if mode == "ae" else code[0]
        assert ((mean[:, others] - z[row, 0, others]).abs().sum(1) < 1e-4).any()


def test_interpolations_go_between_classes_on_the_line_and_on_the_sphere(folder, workplace, monkeypatch):
    start, end = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0])
    arc = infer.slerp(start, end, torch.linspace(0, 1, 4)[:, None])
    angles = torch.tensor([0, math.pi / 6, math.pi / 3, math.pi / 2])
    torch.testing.assert_close(arc, 3 * torch.stack([angles.cos(), angles.sin(), 0 * angles], 1), atol=1e-5,
                               rtol=0)
    for other in (2 * start, -start, start):  # no arc, or more than one
        middle = infer.slerp(start, other, torch.tensor([[0.5]]))
        assert torch.equal(middle, torch.lerp(start, other, 0.5)[None])
    taken, lines = [], []
    monkeypatch.setattr(infer, "slerp", lambda a, b, w: lines.append((a, b)) or torch.lerp(a, b, w))
    images = infer.Subject.images
    monkeypatch.setattr(infer.Subject, "images", lambda it, index: taken.append(images(it, index))
                        or taken[-1])
    fit(folder)
    infer.main(["--only", "interpolations"])
    (_, z, labels), (_, ends, others) = taken
    assert len(lines) == 5 and (labels != others).all() and len(ends.unique(dim=0)) == 5
    for i, line in enumerate(lines):
        torch.testing.assert_close(line, (z[i], ends[i]))
    taken.clear()
    fit(folder, "--conditional")
    infer.main(["--only", "interpolations"])
    assert torch.equal(taken[0][2], taken[1][2]) and not torch.equal(taken[0][1], taken[1][1])
    taken.clear()
    lines.clear()
    fit(folder, "--loss_mode=ae")  # around the middle of its latents
    infer.main(["--only", "interpolations"])
    middle = encoded(folder)[0].prior_mean
    assert middle.abs().max() > 0.01
    torch.testing.assert_close(lines[0], (taken[0][1][0] - middle, taken[1][1][0] - middle))


def test_nearest_are_the_nearest_training_images(folder, workplace, drawn):
    fit(folder)
    infer.main(["--only", "nearest"])
    title, images, columns, distances, _ = drawn["labelled_grid"][1:]
    images = images.view(-1, columns, 784).double()
    train_images = pixels(encoded(folder)[1].train).flatten(1).double() / 255
    for row, distance in zip(images, distances):
        away = (train_images - row[0]).square().sum(1).sqrt().sort()[0]
        shown = (row[1:] - row[0]).square().sum(1).sqrt()
        torch.testing.assert_close(shown, away[:columns - 1], rtol=1e-3, atol=1e-3)
        assert float(distance) == pytest.approx(away[0].item(), abs=0.01)
    net, everything, _ = encoded(folder)  # all 40 test images are asked for
    unseen = net.reconstruct(pixels(everything.test)).detach().flatten(1).double()
    away = torch.stack([(train_images - image).square().sum(1).sqrt().min() for image in unseen])
    assert float(re.search(r"images: (.*)\)", title)[1]) == pytest.approx(away.median().item(), abs=0.01)
    fit(folder, "--levels=2", "--binarize=stochastic")
    infer.main(["--only", "nearest"])
    images, columns, distances, _ = drawn["labelled_grid"][2:]
    for row, distance in zip(images.view(-1, columns, 784), distances):  # what is shown is what was measured
        shown = (row[1:] - row[0]).square().sum(1).sqrt().tolist()
        assert shown == sorted(shown) and float(distance) == pytest.approx(shown[0], abs=0.006)


def test_progress_is_a_film_of_the_samples(folder, workplace, capsys):
    fit(folder, epochs=3)
    infer.main(["--only", "progress"])
    with Image.open("results/run/progress.gif") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
        for epoch in (1, 2, 3):
            film.seek(epoch - 1)
            with Image.open(f"results/run/samples_{epoch:03d}.png") as still:
                difference = np.asarray(film.convert("RGB"), float) - np.asarray(still.convert("RGB"), float)
            assert np.abs(difference).mean() < 4 and film.info["duration"] == (2000 if epoch == 3 else 300)
    figures.progress("few.gif", "", sorted(Path("results/run").glob("samples_00*.png")), most=2)
    with Image.open("few.gif") as film:
        assert film.n_frames == 2
    for path in Path("results/run").glob("samples_00[23].png"):
        path.unlink()
    infer.main(["--only", "progress"])
    assert "left out progress" in capsys.readouterr().err


def test_comparing_shows_in_what_models_differ(folder, workplace, drawn, capsys):
    for name, *flags in (("a", "--latent_size=2"), ("b", "--latent_size=6", "--seed=3"),
                         ("c", "--loss_mode=ae")):
        fit(folder, *flags)
        shutil.move("checkpoints/run", f"checkpoints/{name}")
    files = [f"checkpoints/{name}/best.pt" for name in "abc"]
    infer.main(["--compare", "--ckpt", *files])
    captions = [column[0][1:] for column in drawn["compare"][2]]
    assert captions == [[f"latent_size {size}", f"loss_mode {mode}", f"seed {seed}"]
                        for size, mode, seed in ((2, "vae", 1), (6, "vae", 3), (4, "ae", 1))]
    table = [column[3] for column in drawn["compare"][2]]
    for file, values in zip(files, table):
        net, state = infer.restore(Path(file), "cpu")
        assert values["val reconstruction"] == f"{state['history'][-1]['val_rec']:.2f}"
        images = data.load(str(folder), "data").test.batch(torch.arange(40))[0]
        error = (net.reconstruct(images) - images / 255).square().sum().item() / 40
        assert float(values["test squared error"]) == pytest.approx(error, abs=0.01)
        if file == files[1]:
            means = net.embed(images)
            assert values["active units"] == str(int((means.var(0, correction=0) > 0.01).sum()))
    assert table[2]["val KL, nats"] == table[2]["active units"] == "–" != table[0]["active units"]
    assert "val bits/dim" not in table[0] and [*table[0]] == [*table[2]]  # squared errors: none has them
    # the same test images in all of them, above the reconstructions
    grids = [column[2] for column in drawn["compare"][2]]
    assert torch.equal(grids[0][:, :29], grids[1][:, :29]) and not torch.equal(grids[0], grids[1])
    with Image.open("results/compare.png") as image:
        assert image.width > 900
    said = capsys.readouterr().out.splitlines()
    assert ["run", "run", "run"] in map(str.split, said) and any("parameters" in line for line in said)
    infer.main(["--evaluate", "--ckpt", *files])
    said = capsys.readouterr().out
    assert said.count("squared_error") == 2 * 3 and "±" not in said  # no mean of different models
    assert outcome(infer.main, ["--ckpt", *files], capsys)[0] == 2
    assert outcome(infer.main, ["--compare", "--ckpt", files[0]], capsys)[0] == 2


@pytest.mark.parametrize("flags", [["--conditional"], ["--loss_mode=ae"]], ids=str)
def test_the_explorer_follows_its_widgets(folder, workplace, monkeypatch, flags):
    import matplotlib
    from matplotlib.backend_bases import MouseEvent
    matplotlib.use("Agg")
    fit(folder, *flags)
    args = infer.parse_args(["--explore"])
    with torch.no_grad():
        subject = infer.open_checkpoint(args.ckpt[0], args)
        window = infer.explore(subject)

    def shown():
        return torch.from_numpy(np.array(window.picture.get_array()))[..., 0]

    def matches():  # what is seen is what the decoder makes of the latent
        label = None if window.label is None else torch.tensor([window.label])
        with torch.no_grad():
            image = subject.model.mean_image(subject.model.decode(window.z[None], label))[0, 0]
        return torch.allclose(image, shown(), atol=1e-5)
    first, start = shown(), window.z.clone()
    assert matches() and torch.equal(start, subject.codes.z[0])
    assert window.dimensions == subject.codes.order[:10].tolist()
    window.sliders[0].set_val(window.sliders[0].valmax)
    moved = window.z != start
    assert moved.nonzero().flatten().tolist() == [window.dimensions[0]] and matches()
    assert not torch.equal(shown(), first)
    window.buttons["random"]._observers.process("clicked", None)
    assert (window.z != start).all() and matches()
    assert float(window.sliders[-1].val) == pytest.approx(
        float(window.z[window.dimensions[-1]].clamp(window.sliders[-1].valmin, window.sliders[-1].valmax)))
    target = [0.3 * low + 0.7 * high for low, high in (window.map.get_xlim(), window.map.get_ylim())]
    x, y = window.map.transData.transform(target)
    window.figure.canvas.callbacks.process("button_press_event", MouseEvent("button_press_event",
                                                                            window.figure.canvas, x, y, 1))
    there = (window.z - window.origin) @ window.directions.T
    assert there.tolist() == pytest.approx(target, abs=1e-3) and matches()
    if window.chooser:
        before, label = shown(), (window.label + 1) % 10
        window.chooser.set_active(label)
        assert window.label == label and matches() and not torch.equal(shown(), before)
        assert window.class_axis.get_title() == f"class {label}"
    window.buttons["reset"]._observers.process("clicked", None)
    assert torch.equal(window.z, start) and torch.equal(shown(), first) and matches()
    subject.data = None  # where the dataset is not here, images that the model draws take its place
    del subject.codes
    with torch.no_grad():
        window = infer.explore(subject)
    assert matches() and len(subject.codes.z) == 1000
    assert len(subject.codes.labels.unique()) == (10 if window.chooser else 1)


def test_the_explorer_has_a_slider_for_many_classes():
    import matplotlib
    matplotlib.use("Agg")
    seen, names = [], [f"class number {i}" for i in range(30)]
    window = figures.Explorer("title", lambda z, label: seen.append(label) or torch.zeros(1, 8, 8),
                              lambda: torch.ones(2), (torch.zeros(2), 4), [1, 0], torch.zeros(2),
                              torch.ones(2), torch.zeros(5, 2), torch.zeros(5, dtype=torch.long), names,
                              torch.zeros(2), torch.eye(2), names)
    assert seen[-1] == 4
    window.chooser.set_val(17)
    assert seen[-1] == window.label == 17 and "17" in window.class_axis.get_title()
    window.buttons["reset"]._observers.process("clicked", None)
    assert seen[-1] == window.chooser.val == 4


def test_exploring_without_a_screen_says_what_to_do(folder, workplace, capsys, monkeypatch):
    fit(folder, epochs=1)
    script = [sys.executable, HERE / "infer.py", "--explore"]
    screenless = {key: value for key, value in os.environ.items() if "DISPLAY" not in key}
    backends = [subprocess.Popen(script, stderr=subprocess.PIPE, text=True,
                                 env={**screenless, "MPLBACKEND": backend})
                for backend in ("svg", "TkAgg", "nonsense")]
    for process in backends:
        error = process.communicate()[1]
        assert process.returncode == 1 and error.count("\n") == 1 and "MPLBACKEND=WebAgg" in error


def test_submission_holds_the_work_and_no_data(folder, workplace, monkeypatch, capsys):
    for path in HERE.glob("*"):
        if path.is_file() and path.suffix != ".zip":
            shutil.copy(path, path.name)
    shutil.copytree(folder, "data/images")
    fit("data/images", "--ema=0.9", "--save_every=0")
    for name in ("venv/lib/x.py", ".git/config", "data/cache/x.npy", "__pycache__/x.pyc", "mine.zip"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("not this")
    infer.main(["--only", "samples"])
    done = subprocess.run([sys.executable, "submit.py"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "checkpoints/run/best.pt" in done.stdout
    with zipfile.ZipFile("submission.zip") as archive:
        assert {info.date_time[0] for info in archive.infolist()} == {1980}  # repeated, the same to the byte
        names = archive.namelist()
        archive.extractall("unpacked")
    assert {"train.py", "infer.py", "README.md", "requirements.txt", "results/run/samples.png",
            "results/run/test.json", "results/run/curves.png", "results/run/metrics.csv",
            "checkpoints/run/best.pt"} <= set(names)
    assert not [name for name in names
                if re.search(r"data/|cache|venv|\.git|events|last\.pt|\.zip|lock", name)]
    state = utils.load_checkpoint(Path("unpacked/checkpoints/run/best.pt"))
    assert state["optimizer"] is None and len(list(utils.tensors(state["model"]))) > 4
    before = utils.load_checkpoint(Path("checkpoints/run/best.pt"))
    assert same(state["model"], before["ema"]) and not same(state["model"], before["model"])
    # drawn from the unpacked files in a fresh process, the samples are the same
    fresh = subprocess.run([sys.executable, "infer.py", "--only", "samples"], cwd="unpacked",
                           capture_output=True, text=True)
    assert fresh.returncode == 0 and fresh.stderr == ""
    drawn, again = (Path(place, "results/run/samples.png").read_bytes() for place in (".", "unpacked"))
    assert drawn == again
    status, error = outcome(train.main, ["--resume", "unpacked/checkpoints/run/best.pt"], capsys)
    assert status == 1 and "packed for drawing" in error
    Path("half.pt").write_bytes(submit.contents(Path("checkpoints/run/best.pt"), half=True)[1][
        "checkpoints/run/best.pt"])
    assert Path("half.pt").stat().st_size < 0.6 * Path("unpacked/checkpoints/run/best.pt").stat().st_size
    images = levels_like(state["data"]["shape"], 256)
    whole, half = (infer.restore(Path(path), "cpu")[0].reconstruct(images)
                   for path in ("unpacked/checkpoints/run/best.pt", "half.pt"))
    assert half.dtype == torch.float32 and 0 < (whole - half).abs().max() < 1 / 255


def test_submission_without_a_checkpoint_or_that_does_not_run(folder, workplace, capsys, monkeypatch):
    status, error = outcome(submit.main, [], capsys)
    assert status == 2 and "train one with python train.py" in error
    fit(folder, epochs=1)
    status, error = outcome(submit.main, ["--out", "x.tar"], capsys)
    assert status == 2 and "--out" in error
    checkpoint = Path("checkpoints/run/best.pt").read_bytes()
    fit(folder, "--seed=2", epochs=1)
    Path("old.pt").write_bytes(checkpoint)
    names = submit.contents(Path("old.pt"))[1]  # whose pictures are no longer there
    assert "checkpoints/run/best.pt" in names and not any("results/run" in name for name in names)
    assert "packed without pictures" in capsys.readouterr().err
    monkeypatch.setattr(submit, "CODE", ("infer.py", "data.py"))
    status, error = outcome(submit.main, [], capsys)
    assert status == 1 and "No module named 'figures'" in error and not Path("submission.zip").exists()


def test_classes_with_names_that_are_no_file_names(workplace, monkeypatch):
    for i in range(80):
        picture(workplace / "images" / ("a b", "t(1)")[i % 2] / f"{i}.png", seed=i)
    fit("images", "--conditional", "--latent_size=2", epochs=1)
    seen = []
    images = infer.Subject.images
    monkeypatch.setattr(infer.Subject, "images", lambda it, index: seen.append(images(it, index)[2])
                        or images(it, index))
    infer.main(["--classes", "1"])  # by number, since no class has a number for its name
    assert Path("results/run/manifold_t_1_.png").exists() and len(seen[0]) > 1 and seen[0].eq(1).all()


def test_a_class_without_test_images_and_a_name_with_a_dollar(workplace, capsys):
    for i in range(60):
        picture(workplace / "images" / "$x_{$" / f"{i}.png", seed=i)
    picture(workplace / "images" / "rare" / "a.png", seed=99)
    fit("images", "--conditional", epochs=1)
    infer.main(["--classes", "rare"])
    said = capsys.readouterr().err
    assert said.count("no test image is of these classes") == len(infer.NEED_DATA)
    assert {path.name for path in Path("results/run").glob("[c-z]*.png")} - {"curves.png"} == {
        "samples.png", "samples_001.png", "classes.png", "reconstructions_001.png"}
    infer.main([])
    assert Path("results/run/latents.png").exists()


def test_the_pictures_of_the_readme_are_there():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (HERE / "README.md").read_text())
    assert len(pictures) > 10 and [path for path in pictures if not (HERE / path).is_file()] == []


def test_scripts_start_as_commands_and_help_names_every_default(workplace, folder):
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    def script(*words):
        return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                              env=environment)
    with ThreadPoolExecutor(2) as together:
        helped, wrong = together.map(lambda words: script(HERE / "train.py", *words),
                                     (["--help"], ["--lr", "-1"]))
    assert helped.returncode == 0 and all(g in helped.stdout
                                          for g in ("data:", "model:", "objective:", "optimisation:"))
    options = [line for line in helped.stdout.splitlines() if line.startswith("  --")]
    assert len(options) > 25 and helped.stdout.count("(default: ") == len(options)
    made = script(HERE / "train.py", "--dataset", folder, "--epochs", "1", "--model", "mlp", "--limit", "64")
    # and no bar where no terminal is
    assert made.returncode == 0 and made.stderr == "" and "epoch 1/1" in made.stdout
    drawn = script(HERE / "infer.py", "--only", "samples")
    assert drawn.returncode == 0 and "samples.png" in drawn.stdout
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.count("\n") == 1 and "--lr" in wrong.stderr


# ------------------------------------------------------------------------------------------------------------
# Runs that are stopped

def same(a, b, leave_out=("elapsed", "seconds", "args")):
    """Whether two checkpoints are equal to the bit, but for times and arguments that change no number."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key not in leave_out)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_runs(a, b):
    """Two runs ended alike: a and b are (results, checkpoints) folders."""
    for name in ("best.pt", "last.pt"):
        first, second = (utils.load_checkpoint(run[1] / name) for run in (a, b))
        assert same(first, second) and len(list(utils.tensors(first))) > 10
        assert not same(first, {**first, "model": {key: value + 1 for key, value in first["model"].items()}})
    assert (a[0] / "test.json").read_bytes() == (b[0] / "test.json").read_bytes()
    first, second = ([line.split(",")[:-1] for line in (run[0] / "metrics.csv").read_text().splitlines()]
                     for run in (a, b))
    assert first == second and len(first) > 1
    assert {path.name for path in a[0].glob("*.png")} == {path.name for path in b[0].glob("*.png")}


def stop_at(monkeypatch, step, number=signal.SIGTERM):
    """Send this process a signal while it trains its step `step`, counted from its start."""
    seen, add_up = [], train.add_up

    def interrupted(sums, terms, n):
        seen.append(n)
        if len(seen) == step:
            signal.raise_signal(number)
        return add_up(sums, terms, n)
    monkeypatch.setattr(train, "add_up", interrupted)


@pytest.mark.parametrize("flags", [
    "--model=mlp --levels=2 --binarize=stochastic --precision=fp32 --flow=1 --warp=0.4",
    "--model=cnn --conditional --beta_mode=linear --precision=bf16 --lr_schedule=cosine --ema=0.9",
    "--model=resnet --loss_mode=ae --ema=0.99 --flip --optimizer=muon",
    "--model=mlp --free_bits=0.2 --beta_mode=cyclical --grad_clip=50 --weight_decay=0.01 --precision=bf16",
    "--model=cnn --levels=16 --precision=fp32 --iw_train=3",
    "--model=mlp --compile --precision=bf16"])
def test_stopped_within_an_epoch_and_resumed_is_never_stopped(flags, folder, workplace, monkeypatch, capsys):
    def argv(name):
        return [f"--dataset={folder}", "--latent_size=4", "--hidden_dims=32", "--num_filters=2", "--epochs=3",
                "--batch_size=32", f"--log_dir={name}", *flags.split()]
    train.main(argv("whole"))
    if "no compiler works here" in capsys.readouterr().err:
        pytest.skip("no compiler works here")
    # Of the 12 batches of an epoch 10 are for training. It stops in training; in validation, after the first
    # batch of two; in the validation of the last epoch; and in the test of the best checkpoint, when all is
    # trained.
    for stop in (13, 10, 14, 3):
        with monkeypatch.context() as patch:
            stop_at(patch, stop)
            status, _ = outcome(train.main, argv("cut") if stop == 13
                                else ["--resume", "checkpoints/cut/last.pt"], capsys)
            assert status == 143
    with open("results/cut/metrics.csv", "a") as file:
        file.write("4,a row of an epoch that was not saved\n")
    train.main(["--resume", "checkpoints/cut/last.pt"])
    assert_same_runs(*((workplace / "results" / name, workplace / "checkpoints" / name)
                       for name in ("whole", "cut")))


def test_more_epochs_continue_as_if_asked_for_at_once(folder, workplace, monkeypatch, capsys):
    fit(folder, epochs=3)
    os.rename("results/run", "results/long"), os.rename("checkpoints/run", "checkpoints/long")
    fit(folder, epochs=1)
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "3", "--save_every", "0"])
    assert_same_runs(*((workplace / "results" / name, workplace / "checkpoints" / name)
                       for name in ("long", "run")))


def test_several_seeds_go_on_where_they_were_stopped(folder, workplace, monkeypatch, capsys):
    def argv(name):
        return [f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=1", "--batch_size=32",
                "--seeds", "4", "5", "6", f"--log_dir={name}", "--overwrite"]
    train.main(argv("whole"))
    with monkeypatch.context() as patch:
        stop_at(patch, 20)
        assert outcome(train.main, argv("cut"), capsys)[0] == 143
    Path("results/cut/seed_6").mkdir()  # as if this one had been killed before its first save
    Path("results/cut/seed_6/metrics.csv").touch()
    before = Path("checkpoints/cut/seed_4/last.pt").stat().st_mtime_ns
    train.main(["--resume", "checkpoints/cut/seed_5/last.pt"])
    # What was trained was not trained again.
    assert Path("checkpoints/cut/seed_4/last.pt").stat().st_mtime_ns == before
    assert Path("results/cut/seeds.csv").read_text() == Path("results/whole/seeds.csv").read_text()
    # One of them, copied to where it is alone, goes on alone.
    shutil.copytree("checkpoints/cut/seed_5", "checkpoints/solo")
    train.main(["--resume", "checkpoints/solo/last.pt", "--epochs", "2"])
    assert utils.load_checkpoint(Path("checkpoints/solo/last.pt"))["epoch"] == 2
    assert {path.name for path in Path("checkpoints").iterdir()} == {"cut", "whole", "solo"}
    shutil.copytree("checkpoints/solo", "checkpoints/backup/seed_5")
    train.main(["--resume", "checkpoints/backup/seed_5/last.pt", "--epochs", "3"])
    assert [path.name for path in Path("checkpoints/backup").iterdir()] == ["seed_5"]
    assert Path("checkpoints/cut/seed_4/last.pt").stat().st_mtime_ns == before


def test_a_moved_run_goes_on_where_it_is(folder, workplace):
    fit(folder, epochs=1)
    os.rename("checkpoints", "moved")
    train.main(["--resume", "moved/run/last.pt", "--epochs", "2"])
    assert utils.load_checkpoint(Path("moved/run/last.pt"))["epoch"] == 2 and not Path("checkpoints").exists()
    Path("alone/run").mkdir(parents=True)
    shutil.copy("moved/run/last.pt", "alone/run/last.pt")  # without its best.pt
    train.main(["--resume", "alone/run/last.pt", "--epochs", "3"])
    assert train.is_whole(Path("alone/run/best.pt"))


def test_a_copied_run_leaves_the_original_alone(folder, workplace, capsys):
    fit(folder, epochs=1)
    shutil.copytree("checkpoints/run", "checkpoints/backup")
    before = {path: path.read_bytes() for path in workplace.rglob("run/*") if path.name != "lock"}
    shutil.copytree("checkpoints/run", "checkpoints/run (copy)")
    status, error = outcome(train.main, ["--resume", "checkpoints/run (copy)/last.pt"], capsys)
    assert status == 2 and "rename its folder" in error
    train.main(["--resume", "checkpoints/backup/last.pt", "--epochs", "2"])
    assert all(path.read_bytes() == content for path, content in before.items())
    assert utils.load_checkpoint(Path("checkpoints/backup/last.pt"))["epoch"] == 2
    assert len(Path("results/backup/metrics.csv").read_text().splitlines()) == 3


def test_a_lost_best_checkpoint_is_said_and_never_made_up(folder, workplace, capsys, monkeypatch):
    run_epoch, ranks = train.run_epoch, iter([1.0, 3.0, 1.0, 3.0, 2.0])
    monkeypatch.setattr(train, "run_epoch", lambda *args: {**run_epoch(*args), "val_loss": next(ranks)})
    fit(folder, epochs=2)  # the first epoch is the best
    fit(folder, "--warp=0.5", "--log_dir=annealed", epochs=2)
    damage(workplace / "checkpoints/run/best.pt", "a flipped bit")
    status, error = outcome(train.main, ["--resume", "checkpoints/run/last.pt"], capsys)
    assert status == 1 and "best.pt is missing or damaged" in error and "--epochs 3" in error
    damage(workplace / "checkpoints/annealed/best.pt", "a flipped bit")
    status, error = outcome(train.main, ["--resume", "checkpoints/annealed/last.pt"], capsys)
    assert status == 1 and "--epochs" not in error and "infer.py --ckpt checkpoints/annealed/last.pt" in error
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "3"])
    assert "looked for anew" in capsys.readouterr().err
    assert json.loads(Path("results/run/test.json").read_text())["epoch"] == 3


def test_stopped_in_the_final_test_keeps_the_last_weights(folder, workplace, monkeypatch, capsys):
    """The model then holds the best epoch's weights, which must not become those of last.pt."""
    run_epoch, ranks = train.run_epoch, iter([1.0, 3.0])
    monkeypatch.setattr(train, "run_epoch", lambda *args: {**run_epoch(*args), "val_loss": next(ranks)})
    stop_at(monkeypatch, 2 * 12 + 1)
    status, _ = outcome(train.main, ["--dataset", folder, "--model", "mlp", "--hidden_dims", "8",
                                     "--epochs", "2", "--batch_size", "32", "--save_every", "0",
                                     "--log_dir", "run"], capsys)
    last, best = (utils.load_checkpoint(Path(f"checkpoints/run/{name}.pt")) for name in ("last", "best"))
    assert status == 143 and (last["epoch"], best["epoch"]) == (2, 1)
    assert not same(last["model"], best["model"])


def test_killed_between_the_two_checkpoints_keeps_the_best(folder, workplace, monkeypatch):
    fit(folder, epochs=2)
    os.rename("results/run", "results/whole"), os.rename("checkpoints/run", "checkpoints/whole")
    fit(folder, epochs=1)
    save_checkpoint, saved = train.save_checkpoint, []

    def dies(path, state):
        saved.append(path.name)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save_checkpoint(path, state)
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "2"])
    assert saved == ["best.pt", "last.pt"]
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "2"])
    assert_same_runs(*((workplace / "results" / n, workplace / "checkpoints" / n) for n in ("whole", "run")))


def test_what_cannot_be_read_again_is_not_saved(folder, workplace, capsys):
    """Gradients whose squares overflow make the optimiser's moments infinite long before a weight is."""
    status, error = outcome(train.main, ["--dataset", folder, "--model", "mlp", "--hidden_dims", "8",
                                         "--epochs", "2",
                                         "--target_beta_val", "1e25", "--log_dir", "run"], capsys)
    assert status == 1 and "not finite" in error and "beta 1e+25" in error
    assert not list(workplace.rglob("*.pt"))


def test_epochs_cannot_grow_under_a_schedule(folder, workplace, capsys):
    fit(folder, "--beta_mode=linear")
    status, error = outcome(train.main, ["--resume", "checkpoints/run/last.pt", "--epochs", "3"], capsys)
    assert status == 2 and "--beta_mode" in error
    fit(folder, "--lr_schedule=cosine")
    status, error = outcome(train.main, ["--resume", "checkpoints/run/last.pt", "--epochs", "3"], capsys)
    assert status == 2 and "--lr_schedule" in error
    fit(folder, "--loss_mode=ae", "--beta_mode=linear")  # an AE has no beta
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "3"])
    assert len(Path("results/run/metrics.csv").read_text().splitlines()) == 1 + 3


def test_a_run_that_appeared_in_the_meantime_is_not_replaced(folder, workplace, monkeypatch, capsys):
    load = train.load

    def meanwhile(*args, **options):
        Path("results/run").mkdir(parents=True)
        Path("results/run/metrics.csv").write_text("another's")
        return load(*args, **options)
    monkeypatch.setattr(train, "load", meanwhile)
    status, error = outcome(train.main, ["--dataset", folder, "--log_dir", "run"], capsys)
    assert status == 1 and "holds a run already" in error
    assert Path("results/run/metrics.csv").read_text() == "another's" and not Path("checkpoints").exists()


def test_moments_that_do_not_fit_are_reported(trained, workplace, capsys):
    shutil.copytree(trained, workplace, dirs_exist_ok=True)
    last = workplace / "checkpoints/run/last.pt"
    state = utils.load_checkpoint(last)
    state["optimizer"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, last)
    status, error = outcome(train.main, ["--resume", last], capsys)
    assert status == 1 and "size mismatch for exp_avg" in error and "best.pt" in error


def test_means_that_are_not_finite_are_found_on_any_device():
    with pytest.raises(FloatingPointError):
        train.means(torch.tensor([1.0, math.nan]), 2)


def test_a_writer_that_fails_to_open_does_not_end_the_run(folder, workplace, capsys, monkeypatch):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", fails)
    fit(folder, epochs=1)
    assert capsys.readouterr().err.count("No space left") == 1


def test_training_does_not_wait_for_imports_that_nobody_needs(folder, workplace):
    argv = ["--dataset", str(folder), "--model", "mlp", "--epochs", "1", "--log_dir", "run"]
    script = f"import sys, train; train.main({argv}); print([name in sys.modules for name in " \
        "('train', 'torchvision', 'torch._dynamo', 'matplotlib.pyplot')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.stdout.endswith("[True, False, False, False]\n"), done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc")
def test_scripts_keep_the_memory_that_a_step_frees():
    script = """
import resource, torch, utils
def work():
    for _ in range(5):
        blocks = [torch.zeros(2**20) for _ in range(20)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
utils.call(lambda: print(-work() + work()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=HERE)
    assert int(done.stdout) < 5000, done.stderr  # of 100,000 pages


def test_a_reader_that_goes_away_does_not_end_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=3", "--log_dir=run"]
    process = subprocess.Popen([sys.executable, HERE / "train.py", *argv], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 0 and process.stderr.read() == ""
    assert utils.load_checkpoint(tmp_path / "checkpoints/run/last.pt")["epoch"] == 3


@functools.cache
def processes():
    """Makes processes, by a server that imports torch once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unittests", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE))
        forkserver.ensure_running()
    return context


def begin(said, main, *argv, most=None):
    """A process of one thread that runs main, its output going into the file `said` and its errors into one
    beside it, for files of at most so many bytes.
    """
    process = processes().Process(target=run_quietly, args=(said, main, [str(word) for word in argv], most))
    process.start()
    return process


def run_quietly(said, main, argv, most):
    for number, name in ((1, said), (2, f"{said}.err")):
        with open(name, "w") as out:
            os.dup2(out.fileno(), number)
    sys.argv = [f"{main.__module__}.py", *argv]
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that this one begins
    if most:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    utils.call(lambda: main(argv))


def wait_for(words, said, process):
    while not (Path(said).exists() and words in Path(said).read_text()):
        assert process.is_alive(), Path(f"{said}.err").read_text()
        time.sleep(0.01)


def ended(process, said):
    """Waits for a process of `begin` → exit status, output, errors."""
    process.join()
    return process.exitcode, *(Path(f"{said}{end}").read_text() for end in ("", ".err"))


def test_killed_twenty_times_at_random_moments_ends_as_if_never_killed(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", folder, "--model", "mlp", "--hidden_dims", "32", "--levels", "2", "--binarize",
            "stochastic", "--batch_size", "1", "--epochs", "8", "--save_every", "0.02"]

    def to_its_end(name, *words):
        assert ended(begin(f"{name}.txt", train.main, *words), f"{name}.txt")[::2] == (0, "")

    def killed_ten_times(name):
        moments, within, words = random.Random(name), 0, [*argv, "--log_dir", name]
        for turn in range(10):
            said = tmp_path / f"{name}_{turn}.txt"
            process = begin(said, train.main, *words)
            wait_for("parameters", said, process)  # it trains from there on
            time.sleep(moments.uniform(0, 0.4))
            process.kill()
            assert ended(process, said)[0] == -signal.SIGKILL, "the run is too short for so many kills"
            last = tmp_path / "checkpoints" / name / "last.pt"
            words = ["--resume", last] if last.exists() else [*argv, "--log_dir", name, "--overwrite"]
            assert all(map(train.is_whole, last.parent.glob("*.pt")))
            within += last.exists() and utils.load_checkpoint(last)["step"] % 320 > 0
        assert within > 0  # an epoch was cut in two
        to_its_end(name, "--resume", last)
        assert_same_runs(*((tmp_path / "results" / run, tmp_path / "checkpoints" / run)
                           for run in ("never", name)))
    to_its_end("never", *argv, "--log_dir", "never")
    with ThreadPoolExecutor(2) as both:
        list(both.map(killed_ten_times, ("a", "b")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(number, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = begin("said", train.main, f"--dataset={folder}", "--model=mlp", "--hidden_dims=8",
                    "--epochs=100000", "--log_dir=a b")
    wait_for("epoch ", "said", process)
    os.kill(process.pid, number)
    status, out, err = ended(process, "said")
    assert status == 128 + number and err == ""
    assert out.endswith("\npython train.py --resume 'checkpoints/a b/last.pt'\n")
    assert train.is_whole(tmp_path / "checkpoints/a b/last.pt")


def test_a_second_signal_ends_at_once(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with utils.Signals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM and not ended
        signal.raise_signal(signal.SIGTERM)
    assert ended == [143] and signal.getsignal(signal.SIGTERM) != signals.handle


def test_two_processes_cannot_train_into_one_folder(folder, workplace, capsys):
    fit(folder, epochs=1)
    with utils.locked(Path("checkpoints/run")):
        for argv in (["--resume", "checkpoints/run/last.pt"],
                     ["--dataset", folder, "--log_dir", "run", "--overwrite"]):
            status, error = outcome(train.main, argv, capsys)
            assert status == 1 and f"process {os.getpid()} on" in error
    dead = ended(begin("said", dies_locked), "said")
    assert dead[0] == -signal.SIGKILL and "process" in Path("checkpoints/run/lock").read_text()
    train.main(["--resume", "checkpoints/run/last.pt"])  # a dead process's lock is none


def dies_locked(_):
    with utils.locked(Path("checkpoints/run")):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(folder, tmp_path, monkeypatch):
    pytest.importorskip("resource")  # not on Windows
    monkeypatch.chdir(tmp_path)
    fit(folder, epochs=1)
    before = {path: path.read_bytes() for path in Path("checkpoints/run").glob("*.pt")}
    room = len(before[Path("checkpoints/run/last.pt")]) // 2
    status, _, err = ended(begin("said", train.main, "--resume", "checkpoints/run/last.pt", "--epochs", "2",
                                 most=room), "said")
    assert status == 1 and re.fullmatch(r"train.py: File too large: checkpoints/run/(best|last).pt\n", err)
    assert {path: path.read_bytes() for path in Path("checkpoints/run").glob("*.pt")} == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_pictures_that_cannot_be_written_do_not_end_the_run(folder, workplace, capsys):
    fit(folder, epochs=1)
    for name in ("samples_002.png", "samples_003.png", "metrics.csv.tmp"):
        Path("results/run", name).mkdir()
    train.main(["--resume", "checkpoints/run/last.pt", "--epochs", "3"])
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert utils.load_checkpoint(Path("checkpoints/run/last.pt"))["epoch"] == 3


def test_any_flipped_bit_is_found_or_harmless(tmp_path):
    path, moments = tmp_path / "x.pt", random.Random(0)
    state = {"args": {"log_dir": "x"}, "data": {}, "model": {"w": torch.randn(40, 10)}, "step": 3}
    utils.save_checkpoint(path, state)
    content, found = path.read_bytes(), 0
    for _ in range(400):
        flipped = bytearray(content)
        flipped[moments.randrange(len(content))] ^= 1 << moments.randrange(8)
        path.write_bytes(flipped)
        try:
            assert same({**utils.load_checkpoint(path)}, {"format": f"plain-vae {utils.VERSION}", **state})
        except utils.UserError:
            found += 1
    assert found > 100


def test_images_that_would_hurt_are_left_out(tmp_path, capsys):
    root = tmp_path / "in"
    for i in range(12):
        picture(root / f"{i}.png", seed=i)
    with open(root / "bomb.png", "wb") as file:  # a megabyte that unfolds to 400
        Image.new("1", (20_000, 20_000)).save(file)
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "self").symlink_to(root)
    os.mkfifo(root / "pipe.png")
    os.rename(root / "3.png", os.fsencode(root) + b"/\xff\xfe.png")
    read = data.load(str(root), tmp_path)
    said = capsys.readouterr().err
    assert len(read.train) + len(read.val) + len(read.test) == 12
    assert all(name in said for name in ("bomb.png", "loop.png", "gone.jpg", "pipe.png", "4 of 16"))
    odd = os.fsencode(tmp_path) + b"/classes/\xff"
    os.makedirs(odd)
    shutil.copytree(root, tmp_path / "classes" / "b",
                    ignore=lambda *_: ["bomb.png", "loop.png", "gone.jpg", "self", "pipe.png"])
    os.link(root / "1.png", odd + b"/1.png")
    (tmp_path / "classes" / "b" / "up").symlink_to(tmp_path / "classes")
    read = data.load(str(tmp_path / "classes"), tmp_path)
    assert len(read.train) + len(read.val) + len(read.test) == 13
    json.dumps(read.classes).encode(), "".join(read.classes).encode()  # as text


# ------------------------------------------------------------------------------------------------------------
# Precision, compilation, many processes

@pytest.mark.parametrize("kind", list(model.NETWORKS))
def test_in_bf16_only_the_networks_compute_in_bf16(kind):
    net = model.VAE((1, 28, 28), 2, kind, 4, hidden_dims=[32], num_filters=2)
    images, noise, inside = levels_like((1, 28, 28), 2), torch.randn(5, 4), {}
    for name in ("encoder", "decoder"):
        layer = getattr(net, name).net[-1] if kind == "mlp" else getattr(net, name).out
        layer.register_forward_hook(lambda _, inputs, output, name=name: inside.update({name: output}))
    with torch.autocast("cpu", torch.bfloat16):
        terms = net(images, None, noise)
    assert {value.dtype for value in inside.values()} == {torch.bfloat16} and len(inside) == 2
    assert all(term.dtype == torch.float32 for term in terms)
    (terms[0] + terms[1]).backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    # From the networks' outputs on, the loss is that of float64.
    mean, log_std = inside["encoder"].double().chunk(2, 1)
    q = D.Normal(mean, log_std.exp())
    assert terms[1].item() == pytest.approx(D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1).mean().item(),
                                            rel=1e-5)
    logits = inside["decoder"].double()
    logits = logits.view(images.shape) if kind == "mlp" else torch.nn.functional.pixel_shuffle(logits, 2)
    rec = -D.Bernoulli(logits=logits).log_prob(images.double()).flatten(1).sum(1).mean()
    assert terms[0].item() == pytest.approx(rec.item(), rel=1e-6)


def test_precision_is_chosen_once_and_reaches_training_alone(folder, workplace, monkeypatch):
    seen, forward = set(), model.AE.decode

    def watched(self, z, labels=None):
        seen.add((self.training, torch.is_autocast_enabled("cpu")))
        return forward(self, z, labels)
    monkeypatch.setattr(model.AE, "decode", watched)
    for precision in ("bf16", "fp32"):
        seen.clear()
        fit(folder, f"--precision={precision}", epochs=1)
        assert seen == {(True, precision == "bf16"), (False, False)}
    for native, chosen in ((True, "bf16"), (False, "fp32")):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda native=native: native)
        fit(folder, "--device=cpu", epochs=1)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: not native)
        train.main(["--resume", "checkpoints/run/last.pt", "--epochs=2"])
        assert utils.load_checkpoint(Path("checkpoints/run/last.pt"))["args"]["precision"] == chosen


def test_without_a_compiler_the_run_goes_on(folder, workplace, monkeypatch, capsys):
    class Missing(torch.nn.Module):  # it is looked for at the first call
        def forward(self, *args):
            raise RuntimeError("no C++ compiler")
    plain = fit(folder)
    monkeypatch.setattr(torch, "compile", lambda *args, **options: Missing())
    assert fit(folder, "--compile")[1] == plain[1]
    assert capsys.readouterr().err.count("no C++ compiler") == 1


WORKER = """
import dataclasses, os, signal, sys
from argparse import Namespace
import torch
sys.path.insert(0, {here!r})
import data, model, train, utils

def gradients(case, n, beta=0.7):
    # of the one step, in float64, that a pass over n images is
    torch.manual_seed(0)
    args = Namespace(seed=3, batch_size=max(n, 2), latent_size=3, device="cpu", precision="fp32", grad_clip=0,
                     warp=1, progress_bar=False, compile=False, epochs=1,
                     loss_mode="ae" if case == "ae" else "vae",
                     lr_schedule="constant", lr=0, iw_train=4 if case == "weighted" else 0, ema=0,
                     flip=case == "resnet")
    pixels = torch.randint(256, (n, 1, 9, 11), dtype=torch.uint8)
    split = data.Split(pixels, torch.arange(n), torch.arange(n) % 2, 2, stochastic=case == "stochastic")
    kind = dict(ae=model.AE, conditional=model.ConditionalVAE).get(case, model.VAE)
    net = kind(
        (1, 9, 11), 2, case if case in model.NETWORKS else "cnn", 3, hidden_dims=[16], num_filters=2,
        **dict(num_classes=2) if case == "conditional" else {{}}, **dict(flow=1) if case == "flow" else {{}},
        **dict(iw_train=4) if case == "weighted" else {{}}).double()
    everything = data.Data(split, split, split, (1, 9, 11), 2, ["a", "b"], 0)
    trained = train.prepared(net, everything, args)
    state = dict(epoch=0, step=0, sums=train.no_sums("cpu"))
    sgd = torch.optim.SGD(net.parameters(), 0.0)
    means = train.train_epoch(trained, everything, sgd, args, state, beta, lambda: None)
    tested = train.test_epoch(net, split, args, "val", lambda: None)
    return [p.grad.clone() for p in net.parameters()], means, tested

def all_gradients(file):
    with utils.processes():
        cases = ("mlp", "cnn", "resnet", "ae", "conditional", "stochastic", "weighted", "flow")
        found = {{f"{{case}} {{n}}": gradients(case, n) for case in cases for n in (8, 7, 1)}}
    if utils.RANK == 0:
        torch.save(found, file)

def main():
    what, rest = sys.argv[1], sys.argv[2:]
    if what == "gradients":
        return all_gradients(*rest)
    add_up, seen = train.add_up, []
    def interrupted(sums, terms, n):
        seen.append(n)
        if what != "run" and utils.RANK == 1 and len(seen) == 25:
            if what == "fail":
                raise utils.UserError("this one has failed")
            os.kill(os.getpid(), dict(stop=signal.SIGTERM, kill=signal.SIGKILL)[what])
        return add_up(sums, terms, n)
    train.add_up = interrupted
    if what == "differ" and utils.RANK:
        load = train.load
        train.load = lambda *args, **options: dataclasses.replace(load(*args, **options), crc32=1)
    train.main(rest)

if __name__ == "__main__":
    utils.call(main)
"""


@pytest.fixture
def torchrun(tmp_path, monkeypatch):
    """Runs WORKER in n processes of one thread → exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER.format(here=str(HERE)))
    runs = itertools.count()

    def run(n, *words):
        said = tmp_path / f"run_{next(runs)}.txt"
        return ended(begin(said, torch.distributed.run.main, "--standalone", f"--nproc_per_node={n}",
                           "worker.py", *words), said)
    return run


def test_gradients_of_two_and_three_processes_are_those_of_one(torchrun):
    runpy.run_path("worker.py")["all_gradients"]("1.pt")
    with ThreadPoolExecutor(2) as together:
        for status, _, err in together.map(lambda n: torchrun(n, "gradients", f"{n}.pt"), (2, 3)):
            assert status == 0, err
    one, *others = (torch.load(f"{n}.pt") for n in (1, 2, 3))
    assert len(one) == 24
    for other in others:
        for case, (grads, *found) in one.items():
            assert sum(grad.abs().sum() for grad in grads) > 1e-3
            for a, b in zip(grads, other[case][0]):
                torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)
            assert list(other[case][1:]) == [pytest.approx(figure, rel=1e-10) for figure in found]


def test_processes_train_as_one_and_stop_and_go_on_together(torchrun, folder, capsys):
    def argv(name):
        return [f"--dataset={folder}", "--latent_size=4", "--hidden_dims=32", "--model=mlp",
                "--batch_size=30", "--epochs=4", "--lr=3e-3", f"--log_dir={name}", "--levels=2",
                "--binarize=stochastic", "--flip", "--precision=fp32", "--optimizer=muon", "--grad_clip=100"]
    train.main(argv("one"))
    with ThreadPoolExecutor(2) as together:  # in the second, only one process is told to stop
        whole, cut = together.map(lambda words: torchrun(2, words[0], *argv(words[1])),
                                  (("run", "whole"), ("stop", "cut")))
    status, out, err = whole
    assert status == 0 and out.count("epoch 4/4") == 1, err
    rows = {}
    for name in ("one", "whole"):
        with open(f"results/{name}/metrics.csv") as file:
            rows[name] = [float(row["val_loss"]) for row in csv.DictReader(file)]
    assert len(rows["one"]) == 4 and rows["whole"] == pytest.approx(rows["one"], rel=1e-4)
    status, out, err = cut
    assert status and out.count("stopped after step") == 1, err
    assert "Error" not in err.split("ChildFailedError")[0].replace("error_file", ""), err
    shutil.copytree("checkpoints/cut", "checkpoints/alone")
    status, _, err = torchrun(2, "run", "--resume", "checkpoints/cut/last.pt")
    assert status == 0, err
    assert_same_runs(*((Path("results", name), Path("checkpoints", name)) for name in ("whole", "cut")))
    train.main(["--resume", "checkpoints/alone/last.pt"])
    assert "2 processes, not 1" in capsys.readouterr().err
    with open("results/alone/metrics.csv") as file:
        last = [float(row["val_loss"]) for row in csv.DictReader(file)]
    assert last == pytest.approx(rows["one"], rel=1e-4)


def test_a_process_that_fails_ends_the_job_with_its_message(torchrun, folder):
    argv = [f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=100", "--batch_size=32"]
    with ThreadPoolExecutor(4) as together:
        (failed, _, err), (killed, _, _), (wrong, _, usage), (differs, _, said) = together.map(
            lambda words: torchrun(2, words[0], *argv, words[1]),
            (("fail", "--log_dir=a"), ("kill", "--log_dir=b"), ("run", "--latent_size=0"),
             ("differ", "--log_dir=c")))
    assert failed and err.count("process 1 of 2: this one has failed") == 1 and "another process" not in err
    assert killed and wrong and usage.count("argument --latent_size") == 1
    assert differs and said.count("is not the same on all machines") == 1


def test_the_benchmark_prints_its_rows(workplace, capsys):
    write_idx(workplace / "data", (512, 50))
    benchmark.main(["--model", "mlp", "--batch_size", "16", "--images", "448", "--repeats", "1", "--json",
                    "--binarize", "stochastic", "--hidden_dims", "16"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["model"], row["batch_size"]) == ("mlp", 16) and 0 < row["flop_share"] < 1
    assert row["images_per_second"] > 0 and 0.1 < row["floor_ratio"] < 2 and row["startup_seconds"] > 0.5
    assert sys.platform != "linux" or 100 < row["peak_rss_mb"] < 2000


def test_the_plain_way_of_the_benchmark_trains_the_same_network(workplace):
    write_idx(workplace / "data", (640, 50))
    argv = ["--dataset=mnist", "--levels=2", "--model=mlp", "--hidden_dims=16", "--latent_size=4",
            "--lr=0.01"]
    torch.manual_seed(0)
    net, adam, images, tests, args = benchmark.plain_parts(*argv, limit=128)
    first, *_, last = [benchmark.plain_epoch(net, images, args, adam) for _ in range(20)]
    assert (len(images.dataset), len(tests.dataset)) == (128, 50) and last < 0.95 * first
    assert net.shape == (1, 28, 28) and benchmark.plain_seconds(argv, 128) > 0
    for other in (["--dataset=glyphs"], ["--dataset=mnist", "--image_size=16"]):
        with pytest.raises(utils.UserError, match="goes with a dataset of torchvision"):
            benchmark.plain_parts(*other)


# ------------------------------------------------------------------------------------------------------------
# A user's mistakes: one line, an exit status, and nothing left behind

WRONG = [  # (script, its arguments, what the line says)
    *((train, *row) for row in [
        ("--latent_size 0", "--z_dim: '0'"), ("--lr -1", "--lr: '-1'"), ("--lr nan", "--lr: 'nan'"),
        ("--lr 0", "--lr"),
        ("--epochs 0", "--epochs"), ("--epochs 1.5", "whole number"), ("--batch_size 0", "--batch_size"),
        ("--target_beta_val -1", "--target_beta_val: '-1'"), ("--target_beta_val inf", "finite"),
        ("--seed -1", "--seed"),
        ("--grad_clip -1", "--grad_clip"), ("--levels 3", "--levels"), ("--hidden_dims 0", "--hidden_dims"),
        ("--hidden_dims 64 x", "--hidden_dims"), ("--free_bits -1", "--free_bits"), ("--limit 0", "--limit"),
        ("--beta_mode cosine", "'cyclical'"), ("--dataset nosuch", "glyphs, mnist, fashion_mnist, kmnist, "
                                                                   "cifar10"),
        ("--log_dir ../x", "../x"), ("--log_dir /x", "/x"), ("--log_dir a//b", "a//b"),
        ("--log_dir .", "'.'"),
        ("--num_filters 0", "--num_filters"), ("--weight_decay -1", "--weight_decay"),
        ("--save_every -1", "--save_every"),
        ("--image_size 4", "--image_size"), ("--image_size 8 8 8", "--image_size"),
        ("--seeds 1 1", "--seeds"),
        ("--device tpu", "cpu"), ("--binarize stochastic", "--levels 2"),
        ("--loss_mode ae --conditional", "--conditional"),
        ("--loss_mode ae --free_bits 1", "--free_bits"), ("--nosuch 1", "--nosuch"),
        ("--latent 3", "--latent"),
        ("--iw_train 5 --beta_mode linear", "--beta_mode"), ("--iw_train 5 --free_bits 1", "--free_bits"),
        ("--iw_train 5 --target_beta_val 2", "--target_beta_val"), ("--iw_train -1", "--iw_train"),
        ("--loss_mode ae --iw_train 5", "--iw_train"), ("--ema 1", "--ema: 1"),
        ("--loss_mode ae --flow 2", "--flow"), ("--flow 2 --free_bits 1", "--free_bits"),
        ("--warp 1.5", "--warp: 1.5"), ("--warp -1", "--warp"),
        ("--lr_schedule step", "cosine"), ("--recon_loss l1", "mse"), ("--model vit", "mlp"),
        ("--transform sepia", "grayscale3"),
        ("surplus", "surplus"),
        ("--batch_size 99999999999999999999", "--batch_size"), ("--seed 1" + 400 * "0", "--seed"),
        ("--device meta", "cpu"),
        ("--dataset .", "--results_dir"), ("--resume nosuch.pt", "nosuch.pt"), ("--resume .", "a folder")]),
    *((infer, *row) for row in [
        ("", "--ckpt"), ("--ckpt nosuch.pt", "nosuch.pt"), ("--ckpt .", "a folder"),
        ("--num_samples 0", "--num_samples"), ("--iw_samples 0", "--iw_samples"), ("--limit 5", "--evaluate"),
        ("--iw_samples 50", "with --evaluate"), ("--evaluate --only samples", "not with --evaluate"),
        ("--compare --num_samples 9", "not with --compare"), ("--dataset nosuch", "nor a folder"),
        ("--temperature -1", "--temperature"), ("--only nosuch", "samples, reconstructions"),
        ("--seed x", "--seed")])]

BAD_FOLDERS = {  # what is in it → what the line says
    "nothing": "holds no images", "text files": "holds no images",
               "unreadable images": "none of its 1 image files",
    "too few images": "ten or more", "two sizes": "9x9 and 9x10", "no classes": "no classes",
               "tiny images": "too small",
    "other classes in test": "different classes", "train without test": "look like splits",
    "more loose than in folders": "are these classes", "an unreadable test": "in test/ can be read"}

BAD_CHECKPOINTS = {
    "a text file": "cut short", "a checkpoint of another program": "this project",
    "pickled code": "this project",
    "a flipped bit": "checksum", "a cut file": "cut short", "an empty file": "cut short",
    "a newer format": "newer version",
    "a tensor that is missing": "Missing key", "a tensor of another shape": "size mismatch",
    "a nan": "not finite",
    "no arguments": "this project",
    "a name that leads elsewhere": "this project"}

BAD_RESUMES = {"--lr 1": "--lr", "--seed 3": "--seed", "--epochs 1": "2 or more",
               "--log_dir other": "--log_dir",
               "--overwrite": "--overwrite", "--dataset mnist": "--dataset"}


def fill(root, what):
    root.mkdir()
    if what == "text files":
        (root / "a.txt").write_text("a")
    elif what == "unreadable images":
        (root / "a.png").write_text("a")
    elif what == "other classes in test":
        picture(root / "train" / "a" / "1.png"), picture(root / "test" / "b" / "1.png")
    elif what in ("train without test", "an unreadable test"):
        for i in range(20):
            picture(root / "train" / f"{i}.png", seed=i)
        (root / "test").mkdir()
        picture(root / "val" / "1.png") if what == "train without test" else (root / "test" / "1.png").touch()
        (root / "test").rmdir() if what == "train without test" else None
    else:
        if what == "more loose than in folders":
            picture(root / "a" / "1.png")
        for i in range({"nothing": 0, "too few images": 1}.get(what, 20)):
            picture(root / f"{i}.png", (5 if what == "tiny images" else 9, 10 if what == "two sizes" and i % 2
                                        else 9))


def damage(path, what):
    """Write a bad checkpoint from a good one."""
    state, content = utils.load_checkpoint(path), bytearray(path.read_bytes())
    weights = state["model"]
    name = next(key for key in weights if key.endswith("weight"))
    if what == "a text file":
        content = b"not a checkpoint"
    elif what in ("a cut file", "an empty file"):
        content = content[:len(content) // 2 if what == "a cut file" else 0]
    elif what == "a flipped bit":
        content[len(content) // 2] ^= 1
    else:
        if what == "a checkpoint of another program":
            state = {"state_dict": weights}
        elif what == "pickled code":
            state["args"] = os.getcwd
        elif what == "a newer format":
            state["format"] = f"{utils.FORMAT} {utils.VERSION + 1}"
        elif what == "a name that leads elsewhere":
            state["args"]["log_dir"] = "../../elsewhere"
        elif what == "no arguments":
            del state["args"]
        elif what == "a tensor that is missing":
            del weights[name], state["ema"][name]
        elif what == "a tensor of another shape":
            weights[name] = state["ema"][name] = weights[name][:, :-1]
        elif what == "a nan":
            weights[name].view(-1)[0] = math.nan
        torch.save(state, path)
        return
    path.write_bytes(content)


@pytest.fixture(scope="session")
def trained(folder, tmp_path_factory):
    """A small run of two epochs, to be copied."""
    root = tmp_path_factory.mktemp("trained")
    train.main([f"--dataset={folder}", "--model=mlp", "--hidden_dims=8", "--epochs=2", "--log_dir=run",
                f"--data_dir={root / 'data'}", f"--results_dir={root / 'results'}",
                f"--checkpoint_dir={root / 'checkpoints'}"])
    return root


ROWS = [*(("line", *row, 2) for row in WRONG), *(("folder", train, *row, 1) for row in BAD_FOLDERS.items()),
        *(("checkpoint", infer, *row, 1) for row in BAD_CHECKPOINTS.items()),
        *(("checkpoint", train, *row, 1) for row in BAD_CHECKPOINTS.items()),
        *(("resume", train, *row, 2) for row in BAD_RESUMES.items()),
        ("other", train, "no network", "KMNIST/raw", 1),
        ("other", train, "results below a file", "cannot be written", 1),
        ("other", train, "a changed dataset", "has changed", 1),
        ("other", train, "a name that is taken", "--overwrite", 2),
        ("other", infer, "an unknown class", "only 0, 1, 2", 1),
        ("other", infer, "classes without a class", "--classes", 1)]


@pytest.mark.parametrize("kind,script,what,said,expected", ROWS,
                         ids=[f"{r[0]}-{r[1].__name__}-{r[2]}" for r in ROWS])
def test_bad_input(kind, script, what, said, expected, folder, trained, workplace, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError("Network is unreachable")
    monkeypatch.setattr("socket.socket.connect", refuse)  # also where there is a network
    argv, last = what.split(), workplace / "checkpoints/run/last.pt"
    if kind in ("checkpoint", "resume") or what in ("a changed dataset", "a name that is taken",
                                                    "classes without a class"):
        shutil.copytree(trained, workplace, dirs_exist_ok=True)
    if kind == "folder":
        fill(workplace / "images", what)
        argv = ["--dataset", workplace / "images", *["--conditional"] * (what == "no classes")]
    elif kind == "checkpoint":
        damage(last, what)
        argv = ["--resume" if script is train else "--ckpt", last]
    elif kind == "resume":
        argv = ["--resume", last, *argv]
    elif what == "no network":
        argv = ["--dataset", "kmnist"]
    elif what == "results below a file":
        (workplace / "file").write_text("")
        argv = ["--dataset", folder, "--results_dir", "file/results"]
    elif what == "a changed dataset":
        state = utils.load_checkpoint(last)
        state["data"]["images"][0] += 1
        torch.save(state, last)
        argv = ["--resume", last]
    elif what == "a name that is taken":
        argv = ["--dataset", folder, "--log_dir", "run"]
    elif what in ("an unknown class", "classes without a class"):
        if what == "an unknown class":
            fit(folder, "--conditional", epochs=1)
        argv = ["--classes", "11"]
    before = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()}
    capsys.readouterr()
    status, error = outcome(script.main, argv, capsys)
    assert status == expected and said in error and "Traceback" not in error
    assert error.count("\n") == 1 or what == "an unreadable test"  # which is named too
    after = {path: path.read_bytes() for path in workplace.rglob("*") if path.is_file()
             and path.name != "lock"}
    assert {path for path in after if "cache" not in path.parts} <= set(before)
    assert all(after[path] == content for path, content in before.items() if path.name != "lock")


def test_a_damaged_checkpoint_is_reported_with_what_else_there_is(trained, workplace, capsys):
    shutil.copytree(trained, workplace, dirs_exist_ok=True)
    damage(workplace / "checkpoints/run/last.pt", "a cut file")
    assert "checkpoints/run/best.pt" in outcome(train.main, ["--resume", "checkpoints/run/last.pt"],
                                                capsys)[1]
    damage(workplace / "checkpoints/run/best.pt", "a flipped bit")
    assert "nothing else" in outcome(train.main, ["--resume", "checkpoints/run/last.pt"], capsys)[1]


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(folder, workplace, capsys):
    status, error = outcome(train.main, ["--dataset", folder, "--lr", "1e30", "--model", "mlp", "--epochs",
                                         "2", "--log_dir", "run"], capsys)
    assert status == 1 and all(part in error for part in ("epoch 1", "after step", "not finite", "--lr",
                                                          "1e+30", "beta 1"))
    # it ended before there was anything to keep
    assert {path.name for path in workplace.iterdir()} <= {"data"}
    fit(folder, epochs=1)
    before = utils.load_checkpoint(Path("checkpoints/run/last.pt"))
    before["model"]["encoder.net.3.bias"][0] = 3e38  # the mean's, whose square is in the KL
    utils.save_checkpoint(Path("checkpoints/run/last.pt"),
                          {**before, "args": {**before["args"], "epochs": 2}})
    status, error = outcome(train.main, ["--resume", "checkpoints/run/last.pt", "--save_every", "0"], capsys)
    assert status == 1 and "not finite" in error and "checkpoints/run/last.pt" in error
    assert train.is_whole(Path("checkpoints/run/last.pt"))


# ------------------------------------------------------------------------------------------------------------
# Real data

@pytest.mark.skipif(not (HERE / "data/MNIST/raw/train-images-idx3-ubyte").exists(),
                    reason="data/MNIST is not here")
@pytest.mark.parametrize("kind,epochs,bound", [("mlp", 1, 130), ("cnn", 2, 112)])
def test_mnist_in_an_epoch_or_two(kind, epochs, bound, workplace):
    train.main(["--dataset=mnist", f"--data_dir={HERE / 'data'}", "--levels=2", f"--model={kind}",
                f"--epochs={epochs}", "--log_dir=run"])
    best = utils.load_checkpoint(workplace / "checkpoints/run/best.pt")
    assert best["best"] < bound and best["data"]["shape"] == [1, 28, 28]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__, *sys.argv[1:]]))
