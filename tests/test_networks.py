"""Tests of networks.py."""

import numpy as np
import pytest
import torch

import model
import networks
from tests.conftest import levels_like


def test_a_residual_block_adds_to_its_input():
    block, x = networks.Residual(torch.nn.Linear, 6).double(), torch.randn(5, 6).double()
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
