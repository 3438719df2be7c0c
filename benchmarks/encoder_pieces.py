# SPDX-License-Identifier: Apache-2.0
"""Entries of the elementwise ops of the encoder against eager PyTorch and its compiler.

Legend: T events, D width (of the tensor that is read), V items of the table of the embedding.
The case is the name of the op; dropout 0.5, and none in the pooling.
"""

from collections.abc import Callable
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Entry, both, errors_against
from fastrec.random import Rng

P = 0.5
LENGTH = 16  # events of a sequence
NORM, GELU, EMBEDDING = "dropout_add_layer_norm", "bias_gelu_dropout", "jagged_embedding"
POOL = "jagged_max_pool"


def entry(case: str, t: int, d: int, v: int = 0, **options) -> Entry:
    return Entry("encoder_pieces", dict(T=t, D=d, V=v), case=case, **options)


SMOKE = tuple(
    entry(case, 37, 20, 50 * (case == EMBEDDING)) for case in (NORM, GELU, EMBEDDING, POOL)
)
ELEMENT = "element"
PASSES = ("forward", "both")
GRADIENT_LIMIT = {"float32": 1e-4, "bfloat16": 5e-2}


def problem(entry: Entry, device: str = "cpu") -> tuple:
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    t, d, v = entry.sizes.values()

    def tensor(*shape):
        return torch.randn(shape, **options).to(getattr(torch, entry.dtype)).requires_grad_()

    if entry.case == POOL:
        ends = torch.arange(LENGTH, t + LENGTH, LENGTH, device=device).clamp_max(t)
        return tensor(t, d), torch.cat([ends.new_zeros(1), ends])
    index = torch.arange(t, device=device)
    places = index // LENGTH, index % LENGTH
    if entry.case == GELU:
        return tensor(t, d), tensor(d), *places
    if entry.case == NORM:
        return tensor(t, d), tensor(t, d), tensor(d), tensor(d), *places
    ids = torch.randint(v, (t,), **options)
    return ids, tensor(v, d), tensor(LENGTH, d), tensor(d), tensor(d), *places


def _call(case: str, reference: bool = False, p: float = P) -> Callable:
    """The op, or its reference, with the masks of sequences of LENGTH events. The last two inputs
    are the sequence of an event and its place there, which a model has at hand."""
    function = getattr(import_module(f"fastrec.ops.{case}"), case + "_ref" * reference)

    if case == POOL:
        return function

    def run(*inputs):
        *inputs, keys, positions = inputs
        options = dict(dropout_p=p, rng=Rng(5, 7), keys=keys, positions=positions)
        if case == EMBEDDING:
            values, weight, position_weight, norm_weight, norm_bias = inputs
            return function(
                values, weight, position_weight, norm_weight=norm_weight, norm_bias=norm_bias,
                **options,
            )  # fmt: skip
        out = function(*inputs, **options)
        return out.output if case == NORM else out

    return run


def _eager(case: str, p: float = P) -> Callable:
    def norm(x, residual, weight, bias, keys, positions):
        return F.layer_norm(residual + F.dropout(x, p), x.shape[1:], weight, bias)

    def gelu(x, bias, keys, positions):
        return F.dropout(F.gelu(x + bias), p)

    def embedding(values, weight, position_weight, norm_weight, norm_bias, keys, positions):
        z = F.embedding(values, weight) + F.embedding(positions, position_weight)
        return F.dropout(F.layer_norm(z, z.shape[1:], norm_weight, norm_bias), p)

    def pool(values, offsets):
        index = torch.arange(len(offsets) - 1, device=values.device)
        owner = torch.repeat_interleave(index, offsets.diff(), output_size=len(values))
        lowest = values.new_full((len(index), values.shape[1]), -torch.inf)
        owner = owner.unsqueeze(1).expand_as(values)
        return lowest.scatter_reduce(0, owner, values, "amax")

    return {NORM: norm, GELU: gelu, EMBEDDING: embedding, POOL: pool}[case]


def implementations(entry: Entry, compiler: str) -> dict[str, Callable]:
    eager = _eager(entry.case)
    return {
        "fastrec": _call(entry.case),
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False, backend=compiler),
    }


def work(entry: Entry) -> dict[str, int]:
    """Forward reads its operands and writes its results; backward reads the gradient and what was
    saved and writes the gradients, that of a table as a whole."""
    t, d, v = entry.sizes.values()
    item = getattr(torch, entry.dtype).itemsize
    tensors = {NORM: 8, GELU: 5, EMBEDDING: 4, POOL: 2}[entry.case]
    return {
        "elements": t * d,
        "exps": 0,
        "bytes": (tensors * t + v) * d * item,
        "materialised": t * d * item,
        "forward": 0,
        "both": 0,
    }


def errors(
    entry: Entry, inputs: tuple, results: dict[str, tuple[Tensor, ...]]
) -> dict[str, dict[str, float]]:
    """Against float64 with the same masks. The masks of the peers are others: theirs is the error
    of the same function without dropout."""

    def double(x):
        return x.detach().double().requires_grad_() if x.is_floating_point() else x

    exact = tuple(map(double, inputs))
    own = {name: result for name, result in results.items() if name == "fastrec"}
    found = errors_against(both(_call(entry.case, reference=True), exact), own)
    plain = both(_eager(entry.case, 0.0), inputs)
    exact = both(_eager(entry.case, 0.0), exact)
    return found | errors_against(exact, {name: plain for name in results if name not in own})
