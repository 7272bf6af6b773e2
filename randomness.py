"""Random numbers as a pure function: each draw of training comes from a generator that is seeded by the
run's seed, the purpose, the epoch, and the block of batches (see train.batches). So a run can stop and resume
anywhere, and many processes draw what one would.
"""

import hashlib

import torch


def stream_seed(*key):
    """63 bits that depend on every part of the key. A hash, because seed + step would overlap between seeds.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def stream(*key, device="cpu"):
    """A new generator for one purpose, such as stream(seed, "order", epoch); on the CPU unless the device is
    CUDA.
    """
    device = torch.device(device)
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(stream_seed(*key))


def normal(shape, device, *key):
    """N(0, 1) numbers from the stream of that key, on the device."""
    generator = stream(*key, device=device)
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def draw_noise(n, args, *key):
    """The noise of n images for the reparameterisation, from N(0, I), in the shape of noise_shape.

    args: of training; key: such as ("train", epoch, block)
    """
    return normal(noise_shape(n, args), args.device, args.seed, "noise", *key)


def noise_shape(n, args):
    """The shape of the noise of n images: for one latent each, or for K of them with --iw_train K."""
    return (n, args.iw_train, args.latent_size) if args.iw_train else (n, args.latent_size)
