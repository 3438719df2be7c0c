# SPDX-License-Identifier: Apache-2.0
"""Entries of jagged_attention: dropout on the probabilities, against padded attention of PyTorch.

Legend: B sequences, T events, N padded length, H heads, D head width; an element is a probability.
Cases: "yelp" has the lengths of the Yelp recipe (3 to N, mean about 9), "full" has B times N;
"plain" and "causal" have B times N without dropout, for which PyTorch has a kernel that stores no
probabilities.
The peers pad inside the measured function and take the events back, as a jagged model would.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Entry, both, errors_against
from fastrec.ops.jagged_attention import jagged_attention, jagged_attention_ref, split_packed
from fastrec.random import Rng

P = 0.5
PLAIN = ("plain", "causal")


def _entry(b: int, n: int, case: str, h: int = 2, d: int = 32, **options) -> Entry:
    return Entry("jagged_attention", dict(B=b, N=n, H=h, D=d), case=case, **options)


ENTRIES = (
    _entry(768, 30, "yelp", rounds=15),
    _entry(768, 30, "yelp", dtype="bfloat16", rounds=5),
    _entry(256, 50, "full"),
    _entry(256, 200, "full", rounds=3),
    *(
        _entry(b, n, case, h, d, rounds=rounds, only=("fastrec", "sdpa"))
        for b, n, rounds in ((8, 1000, 7), (1, 10000, 2))
        for h, d in ((2, 32), (1, 64))
        for case in PLAIN
    ),
)
SMOKE = (
    _entry(5, 9, "yelp", d=8, rounds=2),
    _entry(3, 20, "full", d=8, rounds=2, only=("fastrec", "sdpa")),
    _entry(3, 20, "causal", d=8, rounds=2, only=("fastrec", "sdpa")),
)
QUICK = (_entry(768, 30, "yelp"),)
ELEMENT = "probability"
STORED = "attention probabilities"
PASSES = ("forward", "both")
PEERS = {"padded SDPA": ("sdpa",), "`torch.compile`": ("torch.compile",)}
GRADIENT_LIMIT = {"float32": 1e-5, "bfloat16": 5e-2}


def lengths_of(entry: Entry) -> Tensor:
    b, n = entry.sizes["B"], entry.sizes["N"]
    if entry.case != "yelp":
        return torch.full((b,), n)
    generator = torch.Generator().manual_seed(0)
    return (3 + torch.empty(b).exponential_(1 / 6.3, generator=generator)).long().clamp_max(n)


def work(entry: Entry) -> dict[str, int]:
    """Two products of the probabilities forward, five more backward (S again); q, k, v, out and in
    the backward pass q, k, v, dO, dq, dk, dv are read or written once."""
    lengths, (_, _, h, d) = lengths_of(entry), entry.sizes.values()
    seen = lengths * (lengths + 1) // 2 if entry.case == "causal" else lengths.square()
    elements = int(seen.sum()) * h
    item = getattr(torch, entry.dtype).itemsize
    return {
        "elements": elements,
        "exps": 2 * elements,
        "bytes": 11 * int(lengths.sum()) * h * d * item,
        "materialised": 3 * item * entry.sizes["B"] * entry.sizes["N"] ** 2 * h,
        "forward": 4 * elements * d,
        "both": 14 * elements * d,
    }


def _sdpa(
    packed: Tensor,
    offsets: Tensor,
    slots: Tensor,
    longest: int,
    p: float = P,
    causal: bool = False,
) -> Tensor:
    events, _, heads, width = packed.shape
    padded = packed.new_zeros((len(offsets) - 1) * longest, 3, heads, width)
    padded = padded.index_copy(0, slots, packed).unflatten(0, (-1, longest))
    q, k, v = padded.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None
    if events < padded.shape[0] * longest:
        valid = torch.arange(longest, device=packed.device) < offsets.diff()[:, None]
        mask = valid[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, mask, p, causal)
    return out.transpose(1, 2).flatten(0, 1).index_select(0, slots)


def _fastrec(function: Callable, p: float = P, **options) -> Callable:
    def run(packed: Tensor, offsets: Tensor, slots: Tensor, longest: int) -> Tensor:
        return function(
            *split_packed(packed),
            offsets,
            max_seq_len=longest,
            dropout_p=p,
            rng=Rng(5, 7),
            keys=torch.arange(len(offsets) - 1, device=offsets.device),
            **options,
        )

    return run


def implementations(entry: Entry, compiler: str) -> dict[str, Callable]:
    """Name -> out(packed, offsets, slots of the events in the padded batch, N)."""
    if entry.case in PLAIN:
        options = dict(p=0.0, causal=entry.case == "causal")
        return {
            "fastrec": _fastrec(jagged_attention, **options),
            "sdpa": functools.partial(_sdpa, **options),
        }
    return {
        "fastrec": _fastrec(jagged_attention),
        "sdpa": _sdpa,
        "torch.compile": torch.compile(_sdpa, dynamic=False, backend=compiler),
        "reference": _fastrec(jagged_attention_ref),
    }


def problem(entry: Entry, device: str = "cpu") -> tuple:
    lengths, (_, n, h, d) = lengths_of(entry), entry.sizes.values()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    slots = (torch.arange(n) < lengths[:, None]).flatten().nonzero().squeeze(1).to(device)
    generator = torch.Generator(device).manual_seed(0)
    packed = torch.randn(len(slots), 3, h, d, generator=generator, device=device)
    return packed.to(getattr(torch, entry.dtype)).requires_grad_(), offsets, slots, n


def errors(
    entry: Entry, inputs: tuple, results: dict[str, tuple[Tensor, ...]]
) -> dict[str, dict[str, float]]:
    """Against float64 with the same masks. The masks of the peers are others: theirs is the error
    of the same function without dropout."""
    packed, *rest = inputs
    double = (packed.detach().double().requires_grad_(), *rest)
    if entry.case in PLAIN:  # the probabilities of 10,000 events take gigabytes
        exact = functools.partial(_sdpa, p=0.0, causal=entry.case == "causal")
        return errors_against(both(exact, double), results)
    own = {name: r for name, r in results.items() if name in ("fastrec", "reference")}
    found = errors_against(both(_fastrec(jagged_attention_ref), double), own)
    exact = both(_fastrec(jagged_attention_ref, 0.0), double)
    plain = both(lambda *x: _sdpa(*x, p=0.0), inputs)
    return found | errors_against(exact, {n: plain for n in results if n not in own})
