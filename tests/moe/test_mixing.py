"""Numbers from integers: published values, ranges, independence of the parts of a key."""

from __future__ import annotations

import torch

from megatron_moe.model.reference.queues import split_mix
from megatron_moe.moe.mixing import mix, uniform_bits

CPU = torch.device("cpu")


def test_the_stream_is_split_mix_64() -> None:
    """The first numbers of SplitMix64 from seed 1234567, as other implementations list them."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert uniform_bits(5, 1234567, CPU).tolist() == [number >> 32 for number in published]


def test_keys_agree_with_the_reference() -> None:
    for key in [(0,), (0, 0), (1, 2, 3), (2**31, 10**6, 31)]:
        assert uniform_bits(50, mix(*key), CPU).tolist() == split_mix(*key, count=50).tolist()


def test_every_part_of_a_key_matters_and_so_does_its_place() -> None:
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 0)]
    assert len({mix(*key) for key in keys}) == len(keys)


def test_numbers_fill_their_range_evenly() -> None:
    numbers = uniform_bits(1 << 16, mix(5), CPU)
    assert numbers.min() >= 0
    assert numbers.max() < 2**32
    counts = (numbers >> 24).bincount(minlength=256).double()
    # Chi-squared of 255 degrees of freedom: its 1e-6 quantiles are 155 and 377.
    chi = ((counts - 256).square() / 256).sum()
    assert 155 < chi < 377
