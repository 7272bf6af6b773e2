"""Encoders, from normalised images [B, C, H, W] to numbers [B, outputs], and decoders, from z [B,
latent_size] to a likelihood's params [B, channels, H, W]. For images of any size from 8×8 up.

There is no batch normalisation and no dropout: both break exact resume and evaluation with averaged weights.
"""

import math

import torch.nn.functional as F
from torch import nn


class MLPEncoder(nn.Module):
    """Linear layers of the widths hidden_dims, with ReLU; no hidden layer makes it linear."""

    def __init__(self, shape, outputs, hidden_dims=(512,)):
        super().__init__()
        widths = [math.prod(shape), *hidden_dims]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], outputs))

    def forward(self, x):
        return self.net(x)


class MLPDecoder(nn.Module):
    """The encoder's widths in reverse."""

    def __init__(self, shape, channels, latent_size, hidden_dims=(512,)):
        super().__init__()
        self.shape = (channels, *shape[1:])
        widths = [latent_size, *reversed(hidden_dims)]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(self.shape)))

    def forward(self, z):
        return self.net(z).view(-1, *self.shape)


def pyramid(shape, num_filters, growth=(1, 4, 8)):
    """Sizes and widths of the levels of a convolutional network. Each level halves both sides (rounding up),
    until neither is above 8, at least once. Level i has num_filters · growth[i] channels; later levels have
    the last growth.

    → [(H, W), (⌈H/2⌉, ⌈W/2⌉), …], [channels of the first halving, …]
    """
    sizes = [tuple(shape[1:])]
    while len(sizes) == 1 or max(sizes[-1]) > 8:
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    return sizes, [num_filters * growth[min(level, 2)] for level in range(len(sizes) - 1)]


class CNNEncoder(nn.Module):
    """A 3×3 convolution of stride 2 for each level, then a linear layer."""

    def __init__(self, shape, outputs, num_filters=8):
        super().__init__()
        sizes, widths = pyramid(shape, num_filters)
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, stride=2, padding=1)
                                   for i, o in zip([shape[0], *widths], widths))
        self.out = nn.Linear(widths[-1] * math.prod(sizes[-1]), outputs)

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.out(x.permute(0, 2, 3, 1).flatten(1))  # channels last, as in memory: no copy


class CNNDecoder(nn.Module):
    """For each level a 3×3 convolution, then twice the size: nearest neighbours inside the network, and a
    pixel shuffle (Shi et al. 2016) at its end, whose convolution runs at half the size and so costs a
    quarter.
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
        # a side of odd length comes out one pixel too long
        return F.pixel_shuffle(self.out(x), 2)[..., :height, :width]


class Residual(nn.Module):
    """x + f(x), where f is two layers that keep the width, non-linearities first (He et al. 2016)."""

    def __init__(self, layer, width):
        super().__init__()
        self.first, self.second = layer(width, width), layer(width, width)

    def forward(self, x):
        return x + self.second(F.silu(self.first(F.silu(x))))


def conv3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def residual_layers(widths):
    """For each width after the first: a linear layer to it, a residual block and a SiLU."""
    return nn.Sequential(*(layer for i, o in zip(widths, widths[1:])
                           for layer in (nn.Linear(i, o), Residual(nn.Linear, o), nn.SiLU())))


class ResNetEncoder(nn.Module):
    """For each level a convolution of stride 2 and residual blocks, one at the first level and two at the
    others; then residual layers of the widths hidden_dims.
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
    """The encoder in reverse, without residual blocks at the largest size; each level ends with a pixel
    shuffle.
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
            x = level(x)[..., :height, :width]  # a side of odd length comes out one pixel too long
        height, width = self.sizes[-1]
        return F.pixel_shuffle(self.out(F.silu(x)), 2)[..., :height, :width]


# name → encoder, decoder, their arguments besides sizes
NETWORKS = {"mlp": (MLPEncoder, MLPDecoder, ["hidden_dims"]),
            "cnn": (CNNEncoder, CNNDecoder, ["num_filters"]),
            "resnet": (ResNetEncoder, ResNetDecoder, ["hidden_dims", "num_filters"])}
