"""Tests of networks.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import networks
from tests.conftest import double, levels_like


def test_a_residual_block_adds_to_its_input():
    block, x = networks.Residual(torch.nn.Linear, 6).double(), torch.randn(5, 6).double()
    (w, b), (v, c) = ((layer.weight.detach().numpy(), layer.bias.detach().numpy())
                      for layer in (block.first, block.second))

    def silu(a):
        return a / (1 + np.exp(-a))
    assert block(x).detach().numpy() == pytest.approx(x.numpy() + silu(silu(x.numpy()) @ w.T + b) @ v.T + c)


@pytest.mark.parametrize("stride", [2, 4])
def test_strided_convolutions_are_those_of_torch(stride):
    torch.manual_seed(0)
    x = torch.randn(2, 21, 9, 3).double()
    size = [-(-side // stride) for side in (21, 9)]
    padding = (0, stride * size[1] - 9, 0, stride * size[0] - 21)
    conv = networks.StridedConv(3, 5, stride).double()
    back = networks.StridedConvTranspose(5, 3, stride).double()
    torch.nn.init.normal_(back.bias)

    def kernel(weight, order):  # […, 2, 2, stride, stride, …] → […, …, 2 stride, 2 stride]
        return weight.permute(order).reshape(*(weight.shape[i] for i in order[:2]), 2 * stride, 2 * stride)
    weight = kernel(conv.linear.weight.view(5, 2, 2, stride, stride, 3), (0, 5, 1, 3, 2, 4))
    expected = F.conv2d(F.pad(x.permute(0, 3, 1, 2), padding), weight, conv.linear.bias, stride, stride // 2)
    torch.testing.assert_close(conv(x).permute(0, 3, 1, 2), expected)
    z = torch.randn(2, *size, 5).double()
    weight = kernel(back.linear.weight.view(2, 2, stride, stride, 3, 5), (5, 4, 0, 2, 1, 3))
    expected = F.conv_transpose2d(z.permute(0, 3, 1, 2), weight, back.bias, stride, stride // 2)[..., :21, :9]
    torch.testing.assert_close(back(z, (21, 9)).permute(0, 3, 1, 2), expected)


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


def test_the_cnns_decoder_lets_every_latent_dimension_through():
    """Also of a latent wider than its other layers, and however far from 0 the layer's inputs are."""
    net = model.AE((1, 28, 28), 256, "cnn", latent_size=100, num_filters=2).double()
    for shift in (0, -2):
        torch.nn.init.constant_(net.decoder.hidden.bias, shift)
        jacobian = torch.func.jacrev(lambda z: net.decode(z[None]).flatten())(double(100))
        assert torch.linalg.matrix_rank(jacobian) == 100
