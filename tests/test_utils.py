"""Tests of utils.py."""

import math

import numpy as np
import pytest
import torch
from torch import distributions as D

import datasets
import utils
from tests.conftest import LN2, double


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
        assert betas.count(0) == max(1, min(4, epochs // 2))  # each cycle starts at 0
    assert [utils.beta_schedule("cyclical", 3.0, 10)(e) for e in range(10)] == pytest.approx(
        [0, 2, 3, 0, 3, 0, 2, 3, 0, 3])


def test_moments_are_those_of_numpy():
    x = double(50, 4) + torch.arange(4)
    mean, covariance = utils.mean_and_covariance(x.float().split(20), 4)
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
    make_grid = datasets.import_torchvision().utils.make_grid
    theirs = make_grid(images, nrow=3, padding=line, pad_value=utils.GRID_GREY)
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
    assert (cells == utils.GRID_GREY).sum() == cells.numel() - 2 * n
