"""Encoders, from normalised images [B, C, H, W] to numbers [B, outputs], and decoders, from z [B,
latent_size] to a likelihood's params [B, channels, H, W]. For images of any size from 8×8 up.

There is no batch normalisation and no dropout: both break exact resume and evaluation with averaged weights.
"""

import math

import torch
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


class StridedConv(nn.Module):
    """A convolution whose kernel is twice as long as its stride. The image is cut into overlapping patches,
    and all patches go through one matrix product. On a CPU that is faster than nn.Conv2d of so few channels,
    and on a busy one by far: the threads of a convolution wait for each other within it.
    """

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.stride, self.linear = stride, nn.Linear(4 * stride ** 2 * inputs, outputs)

    def forward(self, x):
        """[B, H, W, inputs] → [B, ⌈H / stride⌉, ⌈W / stride⌉, outputs]"""
        s, (height, width) = self.stride, x.shape[1:3]
        x = F.pad(x, (0, 0, s // 2, -width % s + s // 2, s // 2, -height % s + s // 2))
        x = x.unflatten(2, (-1, s)).unflatten(1, (-1, s)).transpose(2, 3).flatten(3)  # blocks of the stride
        height, width = x.shape[1] - 1, x.shape[2] - 1
        patches = [x[:, i:height + i, j:width + j] for i in (0, 1) for j in (0, 1)]  # of 2x2 blocks
        return self.linear(torch.cat(patches, 3))


class StridedConvTranspose(nn.Module):
    """StridedConv in reverse: a matrix product gives overlapping patches, which are added up."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.stride, self.linear = stride, nn.Linear(inputs, 4 * stride ** 2 * outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x, size):
        """[B, ⌈H / stride⌉, ⌈W / stride⌉, inputs], (H, W) → [B, H, W, outputs]"""
        s, places = self.stride, [(i, j) for i in (0, 1) for j in (0, 1)]
        x = sum(F.pad(blocks, (0, 0, j, 1 - j, i, 1 - i))
                for (i, j), blocks in zip(places, self.linear(x).chunk(4, 3)))
        x = x.unflatten(3, (s, s, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, s // 2:s // 2 + size[0], s // 2:s // 2 + size[1]] + self.bias.to(x.dtype)


def cnn_levels(shape, num_filters):
    """The levels of the CNN: a stride of 4, then of 2 until neither side is above 8.

    → [(H, W), (⌈H/4⌉, ⌈W/4⌉), …], [channels of the image, of the first level, …], [4, 2, …]
    """
    sizes, widths, strides = [tuple(shape[1:])], [shape[0]], []
    while not strides or max(sizes[-1]) > 8:
        strides.append(2 if strides else 4)
        sizes.append(tuple(-(-side // strides[-1]) for side in sizes[-1]))
        widths.append(8 * num_filters * min(len(strides), 2))
    return sizes, widths, strides


class CNNEncoder(nn.Module):
    """A strided convolution for each level, then a linear layer."""

    def __init__(self, shape, outputs, num_filters=8):
        super().__init__()
        sizes, widths, strides = cnn_levels(shape, num_filters)
        self.convs = nn.ModuleList(map(StridedConv, widths, widths[1:], strides))
        self.out = nn.Linear(widths[-1] * math.prod(sizes[-1]), outputs)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)  # channels last
        for conv in self.convs:
            x = F.silu(conv(x))
        return self.out(x.flatten(1))


class CNNDecoder(nn.Module):
    """Two linear layers, then the encoder's convolutions in reverse. More channels than num_filters (a
    softmax has one for each level) are made at each pixel of num_filters features, which costs less.

    Non-linearities are SiLUs: while beta is 0, most ReLUs of the first layer would die and never come back.
    """

    def __init__(self, shape, channels, latent_size, num_filters=8):
        super().__init__()
        sizes, widths, strides = cnn_levels((min(channels, num_filters), *shape[1:]), num_filters)
        # No narrower than a usual latent. Thousands of classes, one-hot beside z, need no such width.
        self.sizes, width = sizes[::-1], max(min(latent_size, 1024), 16 * num_filters)
        self.hidden = nn.Linear(latent_size, width)
        self.stem = nn.Linear(width, math.prod(sizes[-1]) * widths[-1])
        self.convs = nn.ModuleList(map(StridedConvTranspose, widths[:0:-1], widths[-2::-1], strides[::-1]))
        self.out = nn.Linear(num_filters, channels) if channels > num_filters else None

    def forward(self, z):
        x = self.stem(F.silu(self.hidden(z))).view(len(z), *self.sizes[0], -1)
        for conv, size in zip(self.convs, self.sizes[1:]):
            x = conv(F.silu(x), size)
        return (self.out(F.silu(x)) if self.out else x).permute(0, 3, 1, 2)


def pyramid(shape, num_filters):
    """The levels of the residual network. Each halves both sides (rounding up), until neither is above 8, at
    least once. They have num_filters, 2 num_filters and then always 4 num_filters channels.

    → [(H, W), (⌈H/2⌉, ⌈W/2⌉), …], [channels of the first halving, …]
    """
    sizes = [tuple(shape[1:])]
    while len(sizes) == 1 or max(sizes[-1]) > 8:
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    return sizes, [num_filters * 2 ** min(level, 2) for level in range(len(sizes) - 1)]


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
        sizes, widths = pyramid(shape, num_filters)
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
        sizes, widths = pyramid(shape, num_filters)
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
