# SPDX-License-Identifier: Apache-2.0
"""Entries of in_batch_hardest: the largest similarity to an allowed candidate, against PyTorch.

Legend: B queries, C candidates, D width; a pair is one (query, candidate) similarity. Pairs with
equal ids are left out ("groups"); an id is shared by 2 queries and 4 candidates on average.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench import Entry, both, errors_against
from fastrec import in_batch_hardest

CHUNK = 1024  # queries of a float64 block


def _entry(b: int, c: int, d: int, case: str, **options) -> Entry:
    return Entry("in_batch_hardest", dict(B=b, C=c, D=d), case=case, **options)


ENTRIES = (
    _entry(768, 1536, 64, "dot groups", rounds=15),
    _entry(4096, 8192, 64, "dot groups"),
    _entry(4096, 8192, 64, "weighted_l2 groups"),
)
SMOKE = (_entry(19, 31, 16, "weighted_l2 groups", rounds=2),)
QUICK = (ENTRIES[0],)
ELEMENT = "pair"
PASSES = ("forward", "both")
PEERS = {"eager": ("eager",), "`torch.compile`": ("torch.compile",)}
GRADIENT_LIMIT = {"float32": 1e-4}


def problem(entry: Entry, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(query, candidate, ids of the queries, ids of the candidates)."""
    generator = torch.Generator(device).manual_seed(0)
    options, dtype = {"generator": generator, "device": device}, getattr(torch, entry.dtype)
    b, c, d = entry.sizes.values()
    q, k = (torch.randn(rows, d, **options).mul_(d**-0.25).to(dtype) for rows in (b, c))
    ids = (torch.randint(max(b // 2, 1), (rows,), **options) for rows in (b, c))
    return q.requires_grad_(), k.requires_grad_(), *ids


def implementations(entry: Entry, compiler: str) -> dict[str, Callable]:
    """Name -> largest similarities [B] of (query, candidate, ids, ids)."""
    similarity = entry.case.split()[0]

    def fastrec(q, c, own, others):
        options = dict(similarity=similarity, query_group=own, candidate_group=others)
        return in_batch_hardest(q, c, **options).values

    def eager(q, c, own, others):
        left_out = own[:, None] == others
        if similarity == "dot":
            return (q @ c.T).masked_fill_(left_out, -torch.inf).max(1).values
        scores = 2 * q @ c.T - c.square().sum(1)
        # |q|^2 is the same for all candidates: it is subtracted from the largest alone.
        return scores.masked_fill_(left_out, -torch.inf).max(1).values - q.square().sum(1)

    compiled = torch.compile(eager, dynamic=False, backend=compiler)
    return {"fastrec": fastrec, "eager": eager, "torch.compile": compiled}


def work(entry: Entry) -> dict[str, int]:
    """One product; the gradient of a maximum is two rows."""
    b, c, d = entry.sizes.values()
    item = getattr(torch, entry.dtype).itemsize
    return {
        "elements": b * c,
        "exps": 0,
        "bytes": 2 * (b + c) * d * item,
        "materialised": item * b * c,
        "forward": 2 * b * c * d,
        "both": 2 * b * c * d,
    }


def errors(
    entry: Entry, inputs: tuple, results: dict[str, tuple[Tensor, ...]]
) -> dict[str, dict[str, float]]:
    """Against float64, in blocks of queries."""
    q, c, own, others = inputs
    q, c = (x.detach().double().requires_grad_() for x in (q, c))
    table = implementations(entry, "eager")

    def blocks(q, c, own, others):
        return torch.cat(
            [
                table["eager"](q[rows : rows + CHUNK], c, own[rows : rows + CHUNK], others)
                for rows in range(0, len(q), CHUNK)
            ]
        )

    return errors_against(both(blocks, (q, c, own, others)), results)
