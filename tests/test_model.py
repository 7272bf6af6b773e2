"""Tests of model.py."""

import math

import numpy as np
import pytest
import torch
from torch import distributions as D

import distributions
import model
import networks
import randomness
import utils
from tests.conftest import LN2, SHAPES, double, levels_like, zeroed


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


class GaussianOfFixedScale:
    is_discrete = True

    def loss(self, params, images):
        return -D.Normal(params, 0.5).log_prob(utils.normalize(images, 256, params.dtype)).flatten(1).sum(1)


class LinearGaussian(model.VAE):
    """Probabilistic PCA: x = W z + noise of standard deviation 0.5; its encoder is near the true posterior,
    but not it. With the prior "flow", z = `mean` + `std` · noise, by the biases of its couplings.
    """
    def __init__(self, prior):
        torch.manual_seed(0)
        super().__init__((1, 8, 8), 256, "mlp", 3, hidden_dims=[4], recon_loss="mse", prior=prior,
                         prior_layers=2)
        self.likelihood = GaussianOfFixedScale()
        self.double().w = 0.3 * double(64, 3)
        self.mean, self.std = torch.zeros(3).double(), torch.ones(3).double()
        if prior == "flow":
            for coupling in self.prior.couplings:
                torch.nn.init.normal_(coupling.net[-1].bias)
            self.mean = self.prior.transform(torch.zeros(1, 3).double())[0].detach()
            self.std = self.prior.transform(torch.eye(3).double()).sub(self.mean).abs().sum(0).detach()

    def encode(self, images, labels=None):
        precision = self.w.T @ self.w / 0.25 + torch.diag(1 / self.std ** 2)
        mean = (self.normalize(images).flatten(1) @ self.w / 0.25 + self.mean / self.std ** 2) \
            @ precision.inverse()
        return mean + 0.1, (1.3 * precision.inverse().diagonal().sqrt()).log().expand_as(mean)

    def decode(self, z, labels=None):
        return (z @ self.w.T).view(-1, 1, 8, 8)


def stir(prior, scale):
    """Weights for a flow, which begins without any effect."""
    for coupling in prior.couplings:
        for parameter in coupling.net[-1].parameters():
            torch.nn.init.normal_(parameter, std=scale)


def test_with_a_flow_prior_the_gradient_vanishes_at_the_true_posterior():
    """There log p(x, z) - log q(z|x) is the same for each z, so its gradient through z is 0 in each draw."""
    net, images = LinearGaussian("flow"), levels_like((1, 8, 8), 256, 3)
    net.w = torch.linalg.svd(net.w, full_matrices=False)[0]  # for independent dimensions of the posterior
    mean, log_std = net.encode(images)  # which is off by 0.1 and a factor of 1.3
    for off in (0, 1):
        codes = [(mean - 0.1 * (1 - off)).detach(), (log_std - math.log(1.3)).detach()]
        codes = [code.requires_grad_() for code in codes]
        net.encode = lambda images, labels: codes
        gradients = torch.autograd.grad(sum(net(images, noise=double(3, 3))[:2]), codes)
        assert (max(gradient.abs().max() for gradient in gradients) < 1e-12) == (not off)


@pytest.mark.parametrize("size", [1, 2])
def test_with_a_flow_prior_the_gradient_is_unbiased(size):
    """Integrated over the noise (Gauss-Hermite) it is that of the ELBO."""
    torch.manual_seed(0)
    net = model.VAE((1, 8, 8), 2, "mlp", size, hidden_dims=[8], prior="flow", prior_layers=2).double()
    stir(net.prior, 0.1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    noise = torch.cartesian_prod(*[torch.tensor(nodes)] * size).view(-1, size)
    weights = torch.cartesian_prod(*[torch.tensor(weights / weights.sum())] * size).view(-1, size).prod(1)
    images = levels_like((1, 8, 8), 2, 1).expand(len(noise), -1, -1, -1)

    def gradients(whole):
        mean, log_std = net.encode(images)
        z = mean + log_std.exp() * noise
        kl = D.Normal(mean, log_std.exp()).log_prob(z).sum(1) - net.prior.log_prob(z) if whole else \
            net.prior.kl(mean, log_std, z)
        loss = weights @ (net.likelihood.loss(net.decode(z), images) + kl)
        return loss.item(), *torch.autograd.grad(loss, list(net.parameters()))
    for a, b in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", list(networks.NETWORKS))
@pytest.mark.parametrize("levels,bits", [(2, 1.0), (16, 4.0)])
def test_a_model_of_zeros_costs_the_uniform_code(kind, levels, bits):
    net = zeroed(model.VAE((1, 28, 28), levels, kind))
    rec, kl, bpd = net(levels_like((1, 28, 28), levels, 7))
    assert rec.item() == pytest.approx(784 * math.log(levels), rel=1e-6) and kl.item() == 0
    assert bpd.item() == pytest.approx(bits, rel=1e-6)


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
        spread = net.likelihood.loss(net.decode(mean + log_std.exp() * noise), images).std() / n ** 0.5
    assert gap > 0.01
    assert (rec + kl).item() == pytest.approx((gap - evidence).item(), abs=5 * spread.item())


@pytest.mark.parametrize("other", [{"prior": "flow"}, {"iw_train": 3}])
def test_free_bits_without_a_kl_by_dimension_are_refused(other):
    with pytest.raises(ValueError, match="KL by dimension"):
        model.VAE((1, 8, 8), 2, "mlp", 6, hidden_dims=[16], free_bits=0.1, **other)


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


@pytest.mark.parametrize("kind", list(networks.NETWORKS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["ae", "vae", "conditional"])
def test_any_shape_trains_a_step_and_comes_back(mode, kind, shape):
    torch.manual_seed(0)
    net = model.build({"loss_mode": "ae" if mode == "ae" else "vae", "conditional": mode == "conditional",
                       "model": kind, "latent_size": 3, "hidden_dims": [20, 10], "num_filters": 4,
                       "recon_loss": "categorical", "prior": "flow", "prior_layers": 2, "free_bits": 0.0,
                       "iw_train": 0},
                      {"shape": shape, "levels": 16, "classes": ["a", "b", "c"]}).double()
    images, labels = levels_like(shape, 16), torch.tensor([0, 1, 2, 1, 0])
    if mode != "ae":
        stir(net.prior, 0.1)  # a new flow has no effect, so most of its weights get no gradient
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
    assert net.decode(net.sample_latents(5, labels), labels).shape == (5, 16 * shape[0], *shape[1:])


@pytest.mark.parametrize("scale", [0.0, 1.0, 300.0, 3e5])
def test_latents_that_never_change_still_give_samples(scale):
    torch.manual_seed(0)
    net = zeroed(model.AE((1, 8, 8), 2, "mlp", latent_size=32))
    torch.nn.init.normal_(net.encoder.net[-1].bias, std=scale)
    net.fit_gaussian(levels_like((1, 8, 8), 2, 1000).split(300))
    z = net.sample_latents(5, generator=torch.Generator().manual_seed(0))
    bias = net.encoder.net[-1].bias.detach()
    assert ((z - bias).abs() <= 1e-6 * bias.norm() + 1e-5).all()


def test_an_ae_samples_from_the_gaussian_fitted_to_its_latents():
    torch.manual_seed(0)
    net = model.AE((1, 8, 8), 256, "mlp", 3, hidden_dims=[16])
    images = levels_like((1, 8, 8), 256, 1000)
    net.fit_gaussian(images.split(300))
    codes = net.embed(images).detach().numpy()
    drawn = net.sample_latents(200_000, generator=torch.Generator().manual_seed(0)).numpy()
    assert drawn.mean(0) == pytest.approx(codes.mean(0), abs=5 * float(codes.std()) / 200_000 ** 0.5)
    assert np.cov(drawn.T) == pytest.approx(np.cov(codes.T), rel=0.03, abs=0.01 * float(codes.var()))
    z = model.VAE((1, 8, 8), 256, "mlp", 3).sample_latents(50_000)
    assert z.std(0).tolist() == pytest.approx([1] * 3, abs=0.02)


def test_temperature_scales_the_prior_and_a_generator_repeats_it():
    net = model.VAE((1, 8, 8), 256, "mlp", 3)
    one, half = (net.sample_latents(9, None, t, torch.Generator().manual_seed(5)) for t in (1.0, 0.5))
    assert torch.equal(one / 2, half)
    with pytest.raises(ValueError, match="no mixture"):
        net.sample(1, fitted=True)
    assert torch.equal(net.sample(4, generator=randomness.stream(1))[0],
                       net.sample(4, generator=randomness.stream(1))[0])


@pytest.mark.parametrize("kind", list(networks.NETWORKS))
def test_a_conditional_model_uses_the_class_in_encoder_and_decoder(kind):
    torch.manual_seed(0)
    net = model.ConditionalVAE((1, 9, 21), 2, kind, 4, num_classes=3)
    images = levels_like((1, 9, 21), 2, 1)
    a, b = torch.tensor([0]), torch.tensor([2])
    assert not torch.equal(net.embed(images, a), net.embed(images, b))
    z = net.sample_latents(1, a)
    assert not torch.equal(net.decode(z, a), net.decode(z, b))


def test_log_std_stays_where_exp_is_finite():
    net = zeroed(model.VAE((1, 8, 8), 2, "mlp", 2))
    net.encoder.net[-1].bias.data[2:] = torch.tensor([1e6, -1e6])
    rec, kl, bpd = net(levels_like((1, 8, 8), 2))
    assert kl.isfinite()


@pytest.mark.parametrize("kind", list(networks.NETWORKS))
def test_in_bf16_only_the_networks_compute_in_bf16(kind):
    net = model.VAE((1, 28, 28), 2, kind, 4, hidden_dims=[32], num_filters=2)
    images, noise, inside = levels_like((1, 28, 28), 2), torch.randn(5, 4), {}
    last = {"mlp": lambda part: part.net[-1], "resnet": lambda part: part.out,
            "cnn": lambda part: part.out or part.convs[-1].linear}[kind]
    layers = {"encoder": last(net.encoder), "decoder": last(net.decoder), "logits": net.decoder}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, inputs, output, name=name: inside.update({name: output}))
    with torch.autocast("cpu", torch.bfloat16):
        terms = net(images, None, noise)
    assert inside["encoder"].dtype == inside["decoder"].dtype == torch.bfloat16
    assert all(term.dtype == torch.float32 for term in terms)
    (terms[0] + terms[1]).backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    # From the networks' outputs on, the loss is that of float64.
    mean, log_std = inside["encoder"].double().chunk(2, 1)
    q = D.Normal(mean, log_std.exp())
    assert terms[1].item() == pytest.approx(D.kl_divergence(q, D.Normal(0.0, 1.0)).sum(1).mean().item(),
                                            rel=1e-5)
    rec = -D.Bernoulli(logits=inside["logits"].double()).log_prob(images.double()).flatten(1).sum(1).mean()
    assert terms[0].item() == pytest.approx(rec.item(), rel=1e-6)


def test_one_wild_output_of_the_encoder_does_not_make_the_kl_explode():
    net, images = model.VAE((1, 8, 8), 2, "mlp", 3, hidden_dims=[4]), levels_like((1, 8, 8), 2, 5)
    with torch.no_grad():
        net.encoder.net[-1].bias[3:] = 20.0
        net.encoder.net[-1].weight[3:] = 0
    _, kl, _ = net(images, noise=torch.zeros(5, 3))
    assert kl < 3 * 0.5 * math.exp(4) + net.encode(images)[0].square().sum(1).mean()
    assert net.encode(images)[1].eq(2).all()


@pytest.mark.parametrize("prior", ["normal", "flow"])
def test_a_conditional_model_asks_for_its_labels(prior):
    net = model.ConditionalVAE((1, 9, 8), 2, "mlp", latent_size=3, hidden_dims=[8], num_classes=4,
                               prior=prior)
    net.fitted = distributions.fit_mixture(double(80, 3), torch.arange(80) % 4, 4)
    images = levels_like((1, 9, 8), 2)
    for call in (lambda: net.sample(2), lambda: net.sample(2, fitted=True), lambda: net.sample_latents(2),
                 lambda: net.to_base(torch.zeros(2, 3)), lambda: net.from_base(torch.zeros(2, 3)),
                 lambda: net.embed(images), lambda: net(images)):
        with pytest.raises(ValueError, match="give labels"):
            call()
