# SPDX-License-Identifier: Apache-2.0
"""Legend: B sequences, T events, D input width, H width of a state."""

from collections.abc import Iterator

import torch

from fastrec.ops.jagged_gru import jagged_gru, jagged_gru_ref
from op_db.case import TYPES, Op, Sample, Types, generator

NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _samples(device: str, types: Types, interpret_small: bool) -> Iterator[Sample]:
    def problem(name, lengths, d=18, h=20, biases=NAMES[2:], scale=1.0):
        g = generator(name, device)

        def random(*size):
            return torch.randn(*size, generator=g, device=device).to(types.input)

        offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
        case = dict(input=random(int(offsets[-1]), d) * scale, offsets=offsets)
        case |= dict(weight_ih=random(3 * h, d) / d**0.5, weight_hh=random(3 * h, h) / h**0.5)
        case |= {bias: random(3 * h) for bias in biases}
        return Sample(name, case)

    # Small: every element of every argument is moved for a numerical gradient.
    short = [2, 0, 4, 1] if interpret_small else [3, 0, 9, 16, 17, 1, 30, 8, 33, 7, 12, 50]
    d, h = (4, 5) if interpret_small else (18, 20)
    yield problem("everything", short, d, h)
    yield problem("no_bias", short, d, h, biases=())
    yield problem("input_bias", short, d, h, biases=NAMES[2:3])
    yield problem("state_bias", short, d, h, biases=NAMES[3:])
    yield problem("whole_vectors", short, d=64, h=64)
    yield problem("no_sequence", [])
    yield problem("no_event", [0, 0, 0])
    yield problem("one_event", [1])
    yield problem("empty_sequences", [0, 5, 0, 0, 3, 0])
    yield problem("long_and_tiny", [20, 1, 2] if interpret_small else [507, 1, 63, 2])
    yield problem("equal", [5] * 13)
    yield problem("ascending", range(14))
    yield problem("many", [2, 1, 3] * 10 if interpret_small else [9, 1, 4, 30] * 60)
    for width in (1, 7, 16, 17, 33):
        yield problem(f"input_width_{width}", short, d=width)
        yield problem(f"state_width_{width}", short, h=width)
    yield problem("one_number", [1], d=1, h=1)
    # More than one block of columns, or chain of additions.
    yield problem("wide", [2, 1, 3], d=40, h=40 if interpret_small else 150)
    # Every gate is 0, 1 or -1 to the last bit, and lets no gradient through.
    closed = problem("closed_gates", short, d=1)
    closed.kwargs["input"].sign_().mul_(1e4)
    closed.kwargs["weight_ih"].sign_()
    yield closed
    yield problem("small_numbers", short, biases=(), scale=1e-4)  # tanh keeps its digits


def _private(device: str, op: str) -> Iterator[tuple]:
    g, h = generator(op, device), 18
    offsets = torch.tensor([0, 3, 3, 7], device=device)
    x, w, b, states, up, gates = (
        torch.randn(size, generator=g, device=device)
        for size in ((7, 3 * h), (3 * h, h), (3 * h,), (7, h), (7, h), (7, 4 * h))
    )
    if op.endswith("_fwd"):
        yield x, offsets, w, b, True
        yield x, offsets, w, None, False
    else:
        yield up, states, gates, offsets, w


OP = Op(
    "jagged_gru",
    jagged_gru,
    jagged_gru_ref,
    _samples,
    differentiable=("input", *NAMES),
    private=("jagged_gru_fwd", "jagged_gru_bwd"),
    private_samples=_private,
    representative=("everything", "no_bias"),
    complete=("everything",),
    many_tasks=("many", "ascending", "long_and_tiny"),
    types=TYPES[:4],
    compiles=("cpp",),
    refuses={("triton", "float64"): "no float64 triton kernel"},
)
