# SPDX-License-Identifier: Apache-2.0
"""The random number contract, version 2: test vectors, uniformity, independence of the batch."""

import pytest
import torch

from fastrec.random import SITES, Rng, draws, keep_mask, philox, threshold

SEED = 0x0123456789ABCDEF
RNG, KEY = Rng(SEED, 7), torch.tensor(1 << 32 | 42)  # view 1 of sample 42
VECTOR = dict(site="attention", layer=1, head=1)


def words(values):
    return [int(value) for value in values]


def test_philox_of_zero():
    assert words(philox((0, 0), (0, 0, 0, 0))) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_philox_words_of_the_contract():
    counter = (0x00030001, 0x00010101, 0x0000002A, 0x00000007)
    assert words(philox((0x88A3CDEF, 0x01234567), counter)) == [
        0xAC641BB0,
        0xD59BDC65,
        0x530D7E92,
        0x344B35DF,
    ]
    # 16 bits, columns 16-23: group 2 of row 3.
    counter = (0x00030002, 0x00010101, 0x0000002A, 0x00000007)
    assert words(philox((0x88BBCDEF, 0x01234567), counter)) == [
        0x72C9CFA3,
        0x52B7BA9C,
        0xE5E1E2E5,
        0x8583BBD7,
    ]


def test_draws_of_8_bits():
    got = draws(RNG, KEY, 3, torch.arange(16, 32), bits=8, **VECTOR)
    assert got.tolist() == [
        176,
        27,
        100,
        172,
        101,
        220,
        155,
        213,
        146,
        126,
        13,
        83,
        223,
        53,
        75,
        52,
    ]
    keep = got >= threshold(0.2, 8)
    assert "".join(str(int(k)) for k in keep) == "1011111111011111"


def test_draws_of_16_bits():
    got = draws(RNG, KEY, 3, torch.arange(16, 24), bits=16, **VECTOR)
    assert got.tolist() == [53155, 29385, 47772, 21175, 58085, 58849, 48087, 34179]


def test_keep_mask_is_the_same_stream():
    keep, scale = keep_mask(RNG, 0.2, KEY[None], torch.tensor([3]), 32, **VECTOR)
    assert "".join(str(int(k)) for k in keep[0, 16:]) == "1011111111011111"
    assert scale == 256 / (256 - 51)
    with pytest.raises(ValueError, match="leaves nothing"):
        keep_mask(RNG, 1.0, KEY[None], torch.tensor([3]), 32, site="attention")


@pytest.mark.parametrize(
    "p, expected", [(0.0, 0), (0.1, 26), (0.15, 38), (0.2, 51), (0.3, 77), (0.5, 128), (1.0, 256)]
)
def test_threshold_of_8_bits(p, expected):
    assert threshold(p, 8) == expected


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.15, 1 / 3, 0.5, 0.999, 1.0])
def test_threshold_of_16_bits_is_the_nearest(p):
    assert abs(threshold(p) / 65536 - p) <= 2**-17


@pytest.mark.parametrize("bits", [8, 16])
def test_few_draws_on_the_host_are_those_of_tensors(bits, monkeypatch):
    """Arrays of numpy in their place, for speed: the same bits, at the ends of all ranges."""
    keys = torch.tensor([0, 1, 7 << 32, 0xFFFFFFFF, 0xFFFE << 32 | 0xFFFFFFFF, -1])
    cols, rows = torch.tensor([[0], [5], [15], [16], [65535]]), torch.tensor([[[0]], [[65535]]])
    calls = [
        (Rng(seed, step), keys, row, col)
        for seed, step in ((0, 0), (-1, -1), (2**63 - 1, 2**32 + 5), (torch.tensor(-5), 3))
        for row, col in ((0, cols), (rows, cols), (9, keys % 7), (rows, torch.arange(6)))
    ]
    calls.append((Rng(1, 2), keys[:0], 0, cols[:0, 0]))
    options = {"site": "crop", "bits": bits, "layer": 3, "head": 2}
    found = [draws(*call, **options) for call in calls]
    wrapped = torch.vmap(lambda key: draws(Rng(1, 2), key, 0, torch.arange(9), **options))
    assert wrapped(keys[:, None]).shape == (6, 9), "torch.func has tensors that numpy cannot read"
    monkeypatch.setattr("fastrec.random._readable", lambda value: False)
    for got, call in zip(found, calls, strict=True):
        expected = draws(*call, **options)
        assert torch.equal(got, expected) and got.dtype == torch.int64


@pytest.mark.parametrize("bits", [8, 16])
def test_a_position_in_32_bits_is_the_same_position(bits, monkeypatch):
    keys, row, col = (
        torch.tensor([3, 4, 5]),
        torch.tensor([7, 32768, 65535]),
        torch.tensor([9, 1, 2]),
    )
    wide = draws(Rng(1, 2), keys, row, col, site="mask_item", bits=bits)
    narrow = draws(Rng(1, 2), keys, row.int(), col.int(), site="mask_item", bits=bits)
    assert torch.equal(narrow, wide), "on the host"
    monkeypatch.setattr("fastrec.random._readable", lambda value: False)
    narrow = draws(Rng(1, 2), keys, row.int(), col.int(), site="mask_item", bits=bits)
    assert torch.equal(narrow, wide), "by tensors"
    mask, _ = keep_mask(Rng(1, 2), 0.5, keys, row, 40, site="embedding")
    assert torch.equal(keep_mask(Rng(1, 2), 0.5, keys, row.int(), 40, site="embedding")[0], mask)


def test_sites_are_part_of_the_contract():
    assert {name: SITES[name] for name in list(SITES)[:5]} == {
        "attention": 1,
        "embedding": 2,
        "attention_output": 3,
        "ffn_inner": 4,
        "ffn_output": 5,
    }
    assert list(SITES.values()) == sorted(set(SITES.values())), "once each, in their order"
    assert max(SITES.values()) < 128


def test_parts_of_ones_own_have_sites_that_are_numbers():
    keys, col = torch.arange(5), torch.arange(5)
    one, other = (draws(Rng(1, 2), keys, 0, col, site=site) for site in (128, 255))
    assert not torch.equal(one, other)
    for wrong in (127, 256, "mine"):
        with pytest.raises(ValueError, match="site must be one of .* or a number from 128 to 255"):
            draws(Rng(1, 2), keys, 0, col, site=wrong)


@pytest.mark.parametrize("bits", [8, 16])
def test_uniform(bits):
    """Chi-square of 256 classes of the high byte, and of the low byte for 16 bits; the bounds are
    the 1e-6 quantiles of 255 degrees of freedom on either side."""
    ids = torch.arange(512)[:, None, None]
    rows, cols = torch.arange(32)[None, :, None], torch.arange(64)[None, None, :]
    got = draws(Rng(1234, 5), ids, rows, cols, site="embedding", bits=bits).flatten()
    for part in (got >> (bits - 8), got & 255):
        count = torch.bincount(part, minlength=256).double()
        expected = got.numel() / 256
        chi2 = ((count - expected).square() / expected).sum()
        assert 161.6 < chi2 < 377.1


@pytest.mark.parametrize(
    "change",
    [
        dict(rng=Rng(4, 4)),
        dict(rng=Rng(3 + (1 << 40), 4)),
        dict(rng=Rng(3, 5)),
        dict(keys=torch.tensor(1 << 32 | 6)),
        dict(keys=torch.tensor(2 << 32 | 5)),
        dict(keys=torch.tensor(5)),
        dict(row=7),
        dict(layer=2),
        dict(head=2),
    ],
    ids=str,
)
def test_every_field_changes_the_stream(change):
    cols = torch.arange(256)
    base = dict(rng=Rng(3, 4), keys=torch.tensor(1 << 32 | 5), row=6, layer=1, head=1)
    other = base | change
    first, second = (draws(col=cols, site="attention", **fields) for fields in (base, other))
    assert (first == second).float().mean() < 0.02
    sites = {name: draws(col=cols, site=name, **base) for name in SITES}
    assert len({tuple(stream.tolist()) for stream in sites.values()}) == len(SITES)


def test_independent_of_batch_order_size_and_shape():
    ids = torch.arange(100)
    cols = torch.arange(20)
    rows = torch.arange(3)[:, None]
    whole = draws(Rng(9, 2), ids[:, None, None], rows, cols, site="attention", bits=8)
    order = torch.randperm(100)
    shuffled = draws(Rng(9, 2), ids[order][:, None, None], rows, cols, site="attention", bits=8)
    assert torch.equal(shuffled, whole[order])
    one = draws(Rng(9, 2), torch.tensor(17), 2, torch.tensor(19), site="attention", bits=8)
    assert one == whole[17, 2, 19]
    assert torch.equal(
        draws(Rng(9, 2), ids[:7, None, None], rows, cols[5:11], site="attention", bits=8),
        whole[:7, :, 5:11],
    )


def test_seed_and_step_may_be_tensors():
    ids, cols = torch.arange(4)[:, None], torch.arange(9)
    expected = draws(RNG, ids, 0, cols, site="attention")
    got = draws(Rng(torch.tensor(SEED), torch.tensor(7)), ids, 0, cols, site="attention")
    assert torch.equal(got, expected)


def test_steps_count_modulo_2_to_the_32_and_views_modulo_2_to_the_16():
    cols, key = torch.arange(9), torch.tensor(65535 << 32 | 5)
    expected = draws(Rng(1, 7), key, 0, cols, site="attention")
    assert torch.equal(draws(Rng(1, 7 + 2**32), key, 0, cols, site="attention"), expected)
    for same in (key + 2**48, torch.tensor(5 - 2**32)):
        assert torch.equal(draws(Rng(1, 7), same, 0, cols, site="attention"), expected)


def test_the_global_generator_is_neither_read_nor_advanced():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = draws(Rng(1, 2), torch.tensor(3), 4, torch.arange(50), site="attention")
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(
        draws(Rng(1, 2), torch.tensor(3), 4, torch.arange(50), site="attention"), first
    )


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bits=4), "bits must be 8 or 16, got 4"),
        (dict(layer=256), "layer 256"),
        (dict(head=256), "head 256"),
        (dict(row=65536), r"row must be in \[0, 65536\), got 65536"),
        (dict(row=torch.tensor([0, -1])), r"row must be in \[0, 65536\), got -1"),
        (dict(col=torch.tensor([3, 70000])), r"col must be in \[0, 65536\), got 70000"),
    ],
)
def test_out_of_range(change, message):
    fields = dict(rng=Rng(1, 0), keys=torch.tensor(0), row=0, col=torch.arange(2), site="attention")
    with pytest.raises(ValueError, match=message):
        draws(**(fields | change))


@pytest.mark.parametrize("p", [-0.1, 1.1])
def test_probability_out_of_range(p):
    with pytest.raises(ValueError, match="probability must be in"):
        threshold(p)


def test_a_pinned_key_is_a_copy():
    seed, step = torch.tensor(2**40 + 3), torch.tensor([7], dtype=torch.int32)
    rng = Rng(seed, step)
    pinned = rng.pinned(seed.device)
    step += 1
    assert pinned.key(seed.device).tolist() == [2**40 + 3, 7]
    assert rng.key(seed.device).tolist() == [2**40 + 3, 8]
    assert pinned.pinned(seed.device).words is pinned.words, "nothing is copied twice"
    assert pinned.key(torch.device("meta")).device.type == "meta", "another device has its own"
    assert Rng(-5, 2**62).key(seed.device).tolist() == [-5, 2**62]
