# SPDX-License-Identifier: Apache-2.0
"""Entries of in_batch_cross_entropy: softmax over the candidates of a batch against PyTorch's ways.

Legend: B queries and candidates, D width; a pair is one (query, candidate) logit.
Cases: a similarity ("weighted_l2" is UPRec's), and what it leaves out: nothing, "groups" (every id
is shared by 2 on average) or "lists" (8 listed candidates a query on average).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Entry, errors_against
from fastrec import in_batch_cross_entropy

TEMPERATURE = 0.5
CHUNK = 1024  # queries of a float64 block


def _entry(b: int, d: int, case: str, **options) -> Entry:
    return Entry("in_batch_cross_entropy", dict(B=b, D=d), case=case, **options)


ENTRIES = (
    _entry(768, 64, "weighted_l2 lists", rounds=15),
    _entry(768, 64, "weighted_l2 groups", rounds=15),
    _entry(4096, 64, "weighted_l2 lists", only=("fastrec", "eager", "torch.compile")),
    _entry(4096, 64, "dot", only=("fastrec", "eager", "torch.compile")),
    _entry(8192, 64, "weighted_l2 lists", rounds=5, only=("fastrec", "eager", "torch.compile")),
    _entry(32768, 64, "weighted_l2 lists", rounds=2, only=("fastrec", "eager")),
)
SMOKE = (
    _entry(19, 16, "dot", rounds=2),
    _entry(19, 16, "dot groups", rounds=2),
    _entry(19, 16, "dot lists", rounds=2),
    _entry(19, 16, "weighted_l2 groups", dtype="bfloat16", rounds=2),
)
QUICK = (ENTRIES[0],)
ELEMENT = "pair"
PASSES = ("forward", "both")
PEERS = {
    "eager": ("eager",),
    "`torch.compile`": ("torch.compile",),
    "broadcast": ("broadcast",),
}
GRADIENT_LIMIT = {"float32": 1e-4, "bfloat16": 5e-2}


def problem(entry: Entry, device: str = "cpu") -> tuple:
    """(query, candidate, ids or None, listed values or None, their offsets or None)."""
    generator = torch.Generator(device).manual_seed(0)
    options, dtype = {"generator": generator, "device": device}, getattr(torch, entry.dtype)
    b, d = entry.sizes.values()
    q, c = (torch.randn(b, d, **options).mul_(d**-0.25).to(dtype) for _ in range(2))
    ids = torch.randint(max(b // 2, 1), (b,), **options) if "groups" in entry.case else None
    values = offsets = None
    if "lists" in entry.case:
        counts = torch.randint(0, min(17, b), (b,), **options)
        offsets = F.pad(counts.cumsum(0), (1, 0))
        owner = torch.repeat_interleave(counts)
        values = torch.randint(b, owner.shape, **options)
        values = (owner * b + values).sort().values % b
    return q.requires_grad_(), c.requires_grad_(), ids, values, offsets


def _broadcast(q: Tensor, c: Tensor) -> Tensor:
    return -(q[:, None] - c).square().sum(2) / TEMPERATURE


def _logits(entry: Entry, q: Tensor, c: Tensor) -> Tensor:
    """The small operands are divided by the temperature, not the B x B logits."""
    if "weighted_l2" in entry.case:
        return (q * (2 / TEMPERATURE)) @ c.T - c.square().sum(1) / TEMPERATURE
    return (q / TEMPERATURE) @ c.T


def _left_out(rows: slice, size: int, device, ids, values, offsets) -> Tensor | None:
    """[rows, B] bool, without the positives; the lists are those of the rows."""
    if ids is None and values is None:
        return None
    if ids is not None:
        out = ids[rows, None] == ids
    else:
        owner = torch.repeat_interleave(offsets.diff(), output_size=len(values))
        out = torch.zeros(len(offsets) - 1, size, dtype=torch.bool, device=device)
        out[owner, values] = True
    out.diagonal(rows.start).fill_(False)
    return out


def implementations(entry: Entry, compiler: str) -> dict[str, Callable]:
    """Name -> mean loss(query, candidate, ids, values, offsets)."""
    similarity = entry.case.split()[0]

    def fastrec(q, c, ids, values, offsets):
        return in_batch_cross_entropy(
            q,
            c,
            similarity=similarity,
            temperature=TEMPERATURE,
            query_group=ids,
            candidate_group=ids,
            exclude=None if values is None else (values, offsets),
        )

    def masked(logits, q, ids, values, offsets):
        out = _left_out(slice(0, len(q)), len(q), q.device, ids, values, offsets)
        if out is not None:
            logits = logits.masked_fill_(out, -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device))

    def eager(q, c, *left_out):
        return masked(_logits(entry, q, c).float(), q, *left_out)

    table = {
        "fastrec": fastrec,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False, backend=compiler),
    }
    if similarity == "weighted_l2":
        table["broadcast"] = lambda q, c, *left_out: masked(_broadcast(q, c).float(), q, *left_out)
    return table


def work(entry: Entry) -> dict[str, int]:
    """The products of the scores and of the gradients; both operands and their gradients once."""
    b, d = entry.sizes.values()
    item = getattr(torch, entry.dtype).itemsize
    return {
        "elements": b * b,
        "exps": b * b,
        "bytes": 4 * b * d * item,
        "materialised": 4 * b * b,
        "forward": 2 * b * b * d,
        "both": 6 * b * b * d,
    }


def errors(
    entry: Entry, inputs: tuple, results: dict[str, tuple[Tensor, ...]]
) -> dict[str, dict[str, float]]:
    """Against float64, in blocks of queries."""
    q, c, ids, values, offsets = inputs
    q, c = (x.detach().double().requires_grad_() for x in (q, c))
    total, grads = 0.0, [torch.zeros_like(q), torch.zeros_like(c)]
    for start in range(0, len(q), CHUNK):
        rows = slice(start, min(start + CHUNK, len(q)))
        logits = _logits(entry, q[rows], c)
        listed = (None, None)
        if values is not None:
            bounds = offsets[rows.start : rows.stop + 1]
            listed = values[bounds[0] : bounds[-1]], bounds
        out = _left_out(rows, len(q), q.device, ids, *listed)
        if out is not None:
            logits = logits.masked_fill(out, -torch.inf)
        target = torch.arange(rows.start, rows.stop, device=q.device)
        loss = F.cross_entropy(logits, target, reduction="sum") / len(q)
        for sum, part in zip(grads, torch.autograd.grad(loss, (q, c)), strict=True):
            sum += part
        total += loss.detach()
    return errors_against((total, *grads), results)
