# SPDX-License-Identifier: Apache-2.0
"""jagged_attention: what the reference cannot express. Masks, invariance, limits, statistics."""

import sys

import pytest
import torch
from backends import backends, needs

from fastrec.ops.jagged_attention import jagged_attention, split_packed
from fastrec.random import Rng, draws, keep_mask

each_backend = backends("jagged_attention", "reference", "cpp", "triton")
needs_cpp = needs("cpp", "jagged_attention")
LENGTHS = [5, 0, 17, 1, 33]


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0)


def inputs(lengths, heads=2, width=16, dtype=torch.float32):
    events = sum(lengths)
    return tuple(torch.randn(events, heads, width, dtype=dtype) for _ in range(3))


def masks(backend, lengths, keys, rng, p, layer=0, heads=2, grad=False):
    """[H, L, L] keep mask of each sequence: with q = 0 and v one-hot, out_id is P_ij or 0; as the
    gradient of v for a one-hot gradient, likewise."""
    longest = max(lengths)
    zero = torch.zeros(sum(lengths), heads, longest)
    position = torch.cat([torch.arange(length) for length in lengths])
    one_hot = zero.clone()
    one_hot[torch.arange(len(position)), :, position] = 1.0
    value = torch.zeros_like(zero).requires_grad_() if grad else one_hot
    out = jagged_attention(
        zero,
        zero,
        value,
        offsets_of(lengths),
        max_seq_len=longest,
        dropout_p=p,
        rng=rng,
        keys=torch.tensor(keys),
        layer=layer,
        backend=backend,
    )
    if grad:
        (out,) = torch.autograd.grad(out, value, one_hot)
    parts = [part[..., : len(part)].transpose(0, 1) for part in out.split(lengths)]
    return [(part != 0).transpose(1, 2) if grad else part != 0 for part in parts]


@each_backend
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_masks_are_those_of_the_contract(backend, grad):
    keys = [12, 3 << 32 | 3, -9, 2**33 + 1, 65535 << 32 | 2**32 - 1]
    rng, p = Rng(0x0123456789ABCDEF, 7), 0.3
    for b, got in enumerate(masks(backend, LENGTHS, keys, rng, p, layer=2, grad=grad)):
        length = LENGTHS[b]
        if length == 0:
            continue
        expected, _ = keep_mask(
            rng,
            p,
            torch.tensor(keys[b]).view(1, 1),
            torch.arange(length).view(1, -1),
            length,
            site="attention",
            layer=2,
            head=torch.arange(2).view(-1, 1),
        )
        assert torch.equal(got, expected)


@each_backend
def test_every_part_of_the_key_changes_the_mask(backend):
    def mask(seed=1, step=2, view=0, sample=3, layer=0):
        return masks(backend, [20], [view << 32 | sample], Rng(seed, step), 0.5, layer)[0]

    base = mask()
    assert torch.equal(base, mask())
    assert not torch.equal(base[0], base[1]), "the heads share a mask"
    changes = (dict(seed=9), dict(step=3), dict(view=1), dict(sample=4), dict(layer=1))
    for change in changes[: 5 if backend != "triton" else 2]:
        assert 0.3 < (mask(**change) == base).float().mean() < 0.7, change


@each_backend
def test_equal_keys_share_masks_and_views_do_not(backend):
    first, second, other = masks(backend, [9, 9, 9], [5, 5, 6], Rng(1, 2), 0.5)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not torch.equal(first, masks(backend, [9], [1 << 32 | 5], Rng(1, 2), 0.5)[0])


@each_backend
@pytest.mark.parametrize("lengths", [[3, 40, 17, 1], [481, 3, 963, 480]], ids=["short", "long"])
@pytest.mark.parametrize("causal", [False, True])
def test_independent_of_the_batch(backend, causal, lengths):
    """A sequence alone, and the batch in another order, gives the same bits as the batch."""
    if backend == "triton" and max(lengths) > 40:
        pytest.skip("long sequences are for the tiles of cpp")
    ids = torch.tensor([8, 1, 5, 2])
    q, k, v = inputs(lengths)
    rng = Rng(torch.tensor(4), torch.tensor(5))

    def run(order):
        parts = [torch.cat([x.split(lengths)[i] for i in order]) for x in (q, k, v)]
        leaves = [part.requires_grad_() for part in parts]
        chosen = [lengths[i] for i in order]
        out = jagged_attention(
            *leaves,
            offsets_of(chosen),
            max_seq_len=max(lengths),
            causal=causal,
            dropout_p=0.5,
            rng=rng,
            keys=ids[order],
            backend=backend,
        )
        grads = torch.autograd.grad(out, leaves, torch.cos(out.detach()))
        return {
            i: [x.detach().split(chosen)[at] for x in (out, *grads)] for at, i in enumerate(order)
        }

    whole = run([0, 1, 2, 3])
    same = torch.equal if backend != "reference" else torch.allclose
    for order in ([2], [1, 3, 0, 2]):
        for i, tensors in run(order).items():
            assert all(same(x, y) for x, y in zip(tensors, whole[i], strict=True))


@each_backend
def test_equals_padded_attention_with_the_same_mask(backend):
    lengths, p, rng = [4, 9, 1], 0.5, Rng(3, 4)
    ids, size = torch.tensor([10, 20, 30]), 9
    q, k, v = inputs(lengths, dtype=torch.float32)
    got = jagged_attention(
        q,
        k,
        v,
        offsets_of(lengths),
        max_seq_len=size,
        dropout_p=p,
        rng=rng,
        keys=ids,
        backend=backend,
    )
    valid = torch.arange(size) < torch.tensor(lengths)[:, None]
    padded = []
    for x in (q, k, v):
        full = torch.full((3, size, 2, 16), 7.0)
        full[valid] = x
        padded.append(full.transpose(1, 2))
    scores = padded[0] @ padded[1].transpose(2, 3) / 4
    probabilities = scores.masked_fill(~valid[:, None, None], float("-inf")).softmax(-1)
    draw = draws(
        rng,
        ids[:, None, None],
        torch.arange(size)[:, None],
        torch.arange(size),
        site="attention",
        bits=8,
    )
    other = draws(
        rng,
        ids[:, None, None],
        torch.arange(size)[:, None],
        torch.arange(size),
        site="attention",
        bits=8,
        head=1,
    )
    keep = torch.stack([draw, other], 1) >= 128
    expected = ((probabilities * keep * 2) @ padded[2]).transpose(1, 2)[valid]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@each_backend
def test_step_may_be_advanced_in_place_before_the_backward_pass(backend):
    lengths = [9, 20]

    def grads(bump):
        torch.manual_seed(0)
        q, k, v = (x.requires_grad_() for x in inputs(lengths))
        seed, step = torch.tensor(11), torch.tensor(0)
        out = jagged_attention(
            q,
            k,
            v,
            offsets_of(lengths),
            max_seq_len=20,
            dropout_p=0.5,
            rng=Rng(seed, step),
            keys=torch.arange(2),
            backend=backend,
        )
        if bump:
            step += 1
            seed += 5
        return torch.autograd.grad(out.square().sum(), (q, k, v))

    for kept, bumped in zip(grads(False), grads(True), strict=True):
        assert torch.equal(kept, bumped)


@each_backend
def test_a_single_event_returns_its_value(backend):
    q, k, v = inputs([1, 0, 1])
    got = jagged_attention(q, k, v, offsets_of([1, 0, 1]), max_seq_len=1, backend=backend)
    assert torch.equal(got, v)


@each_backend
def test_autocast_takes_inputs_of_both_dtypes(backend):
    """LayerNorm gives float32 there and a projection bfloat16."""
    q, k, v = inputs([3, 2])
    low = [x.bfloat16() for x in (q, k, v)]
    expected = jagged_attention(*low, offsets_of([3, 2]), max_seq_len=3, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = jagged_attention(low[0], k, v, offsets_of([3, 2]), max_seq_len=3, backend=backend)
    assert got.dtype == torch.bfloat16 and got.equal(expected)


@each_backend
def test_hand_computed(backend):
    """Two events: scores (0, ln 3) and (0, 0), so P = (1/4, 3/4) and (1/2, 1/2)."""
    log3 = 1.0986122886681098
    q = torch.tensor([1.0, 0.0]).view(2, 1, 1)
    k = torch.tensor([0.0, log3]).view(2, 1, 1)
    v = torch.tensor([4.0, 8.0]).view(2, 1, 1)
    got = jagged_attention(q, k, v, torch.tensor([0, 2]), max_seq_len=2, backend=backend)
    torch.testing.assert_close(got.flatten(), torch.tensor([7.0, 6.0]))


@needs_cpp
def test_many_sequences():
    """B = 80,000 (a CUDA grid has 65,535 rows on y): spot checks against single sequences."""
    lengths = torch.arange(80_000) % 4 + 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    q, k, v = inputs([int(offsets[-1])], heads=1, width=8)
    options = dict(max_seq_len=4, dropout_p=0.5, rng=Rng(1, 2))
    got = jagged_attention(q, k, v, offsets, keys=torch.arange(80_000), **options)
    for b in (0, 3, 65_535, 65_536, 79_999):
        rows = slice(int(offsets[b]), int(offsets[b + 1]))
        alone = jagged_attention(
            q[rows],
            k[rows],
            v[rows],
            torch.tensor([0, int(lengths[b])]),
            keys=torch.tensor([b]),
            backend="reference",
            **options,
        )
        torch.testing.assert_close(got[rows], alone)


def test_packed_gradient_is_not_copied_and_is_that_of_unbind():
    packed = torch.randn(7, 3, 2, 4, requires_grad=True)
    offsets = torch.tensor([0, 3, 7])

    def grads(split, extra=0.0):
        q, k, v = split(packed)
        out = jagged_attention(q, k, v, offsets, max_seq_len=4) + extra * q
        return torch.autograd.grad(out, packed, torch.ones_like(out))[0]

    for extra in (0.0, 2.0):
        expected = grads(lambda x: x.unbind(1), extra)
        assert torch.equal(grads(split_packed, extra), expected)
    out = jagged_attention(*split_packed(packed), offsets, max_seq_len=4)
    (grad,) = torch.autograd.grad(out.sum(), packed)
    assert grad.is_contiguous() and grad.shape == packed.shape


@needs_cpp
@pytest.mark.parametrize("rows, groups", [(1, 1), (9, 1), (30, 2), (7, 3), (5, 13)])
def test_cpp_generator_has_the_bits_of_the_reference(rows, groups):
    for seed, step in ((0x0123456789ABCDEF, 7), (-5, 2**40 + 1), (2**63 - 1, -1)):
        keys = torch.tensor([42, -7, 2**33 + 9, 65535 << 32 | 2**31])
        got = torch.ops.fastrec.philox_draws(
            torch.tensor([seed, step]), keys, rows, groups, 4, 255, 17
        )
        expected = draws(
            Rng(torch.tensor(seed), torch.tensor(step)),
            keys[:, None, None],
            torch.arange(rows)[:, None],
            torch.arange(16 * groups),
            site="ffn_inner",
            layer=255,
            head=17,
            bits=8,
        )
        assert torch.equal(got.long(), expected)


@needs_cpp
def test_statistics_of_1e8_draws():
    """Chi-square of 256 classes, keep rate, and correlation of neighbouring columns, rows and
    samples, each within 5 standard deviations."""
    count, cells = torch.zeros(256, dtype=torch.int64), 0
    sums = dict.fromkeys(("column", "row", "sample"), 0.0)
    pairs = dict.fromkeys(sums, 0)
    for chunk in range(10):
        ids = torch.arange(chunk * 250, chunk * 250 + 250)
        got = torch.ops.fastrec.philox_draws(torch.tensor([99, 3]), ids, 200, 13, 1, 0, 0)
        count += torch.bincount(got.flatten(), minlength=256)
        cells += got.numel()
        x = got.float() - 127.5
        for name, (a, b) in {
            "column": (x[:, :, 1:], x[:, :, :-1]),
            "row": (x[:, 1:], x[:, :-1]),
            "sample": (x[1:], x[:-1]),
        }.items():
            sums[name] += (a * b).double().sum().item()
            pairs[name] += a.numel()
    assert cells >= 10**8
    expected = cells / 256
    chi2 = ((count - expected).double().square() / expected).sum().item()
    assert abs(chi2 - 255) < 5 * (2 * 255) ** 0.5
    for threshold in (26, 51, 128):
        rate, p = count[threshold:].sum().item() / cells, 1 - threshold / 256
        assert abs(rate - p) < 5 * (p * (1 - p) / cells) ** 0.5
    variance = (256**2 - 1) / 12
    for name, total in sums.items():
        assert abs(total) < 5 * variance * pairs[name] ** 0.5, name


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(max_seq_len=2), ValueError, "at most max_seq_len = 2"),
        (dict(keys=None), ValueError, "needs rng and keys"),
        (dict(rng=None), ValueError, "needs rng and keys"),
        (dict(dropout_p=0.999), ValueError, "leaves nothing to keep"),
    ],
)
def test_errors_name_the_problem(change, error, message):
    zero = torch.zeros(6, 2, 4)
    arguments = dict(
        query=zero,
        key=zero,
        value=zero,
        offsets=torch.tensor([0, 4, 6]),
        max_seq_len=4,
        dropout_p=0.5,
        rng=Rng(1, 2),
        keys=torch.arange(2),
    )
    with pytest.raises(error, match=message):
        jagged_attention(**(arguments | change))


@each_backend
def test_events_of_no_sequence_get_zeros(backend, poisoned_memory, monkeypatch):
    """Where the values of offsets are not looked at (a GPU, torch.compile), events behind the last
    one have an output and gradients of 0, whatever lay in their memory."""
    module = sys.modules["fastrec.ops.jagged_attention"]
    monkeypatch.setattr(module, "_check", lambda q, k, v, offsets, longest: offsets)
    tensors = [x.requires_grad_() for x in inputs([70, 3, 40])]
    offsets = torch.tensor([0, 70, 73])
    out = jagged_attention(*tensors, offsets, max_seq_len=70, backend=backend)
    grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    own = [x.detach()[:73].requires_grad_() for x in tensors]
    expected = jagged_attention(*own, offsets, max_seq_len=70, backend="reference")
    wanted = torch.autograd.grad(expected, own, torch.ones_like(expected))
    for got, want in zip((out, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(got[:73], want, rtol=1e-4, atol=1e-5)
        assert torch.equal(got[73:], torch.zeros_like(got[73:]))


@each_backend
@pytest.mark.parametrize("bound", [0, 40_000_000])
def test_a_bound_of_the_lengths_that_says_nothing(backend, bound, poisoned_memory, monkeypatch):
    """0 where all events are behind the last offset; more than an axis of a grid has room for."""
    module = sys.modules["fastrec.ops.jagged_attention"]
    monkeypatch.setattr(module, "_check", lambda q, k, v, offsets, longest: offsets)
    tensors = [x.requires_grad_() for x in inputs([5])]
    offsets = torch.tensor([0, 5 if bound else 0])
    out = jagged_attention(*tensors, offsets, max_seq_len=bound, backend=backend)
    grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    expected = jagged_attention(*tensors, offsets_of([5]), max_seq_len=5, backend="reference")
    wanted = torch.autograd.grad(expected, tensors, torch.ones_like(expected))
    for got, want in zip((out, *grads), (expected, *wanted), strict=True):
        torch.testing.assert_close(got, want if bound else want * 0, rtol=1e-4, atol=1e-5)


@each_backend
def test_nan_stays_nan_in_the_gradients(backend):
    query, key, value = (x.requires_grad_() for x in inputs([5, 20]))
    with torch.no_grad():
        query[7] = torch.nan
    out = jagged_attention(query, key, value, offsets_of([5, 20]), max_seq_len=20, backend=backend)
    for grad in torch.autograd.grad(out.sum(), (query, key, value)):
        assert grad[:5].isfinite().all()
    _, grad_key, grad_value = torch.autograd.grad(
        jagged_attention(query, key, value, offsets_of([5, 20]), max_seq_len=20, backend=backend),
        (query, key, value),
        torch.ones_like(out),
    )
    assert grad_key[5:].isnan().all() and grad_value[5:].isnan().all()
