"""Tests of randomness.py."""


import torch

import randomness


def test_streams_depend_on_every_part_of_their_key_and_on_nothing_else():
    keys = [(seed, purpose, step) for seed in range(5) for purpose in ("noise", "order")
            for step in range(50)]
    assert len({randomness.stream_seed(*key) for key in keys}) == len(keys)
    first = torch.randn(4, generator=randomness.stream(1, "noise", 2))
    torch.manual_seed(99)
    assert torch.equal(first, torch.randn(4, generator=randomness.stream(1, "noise", 2)))
