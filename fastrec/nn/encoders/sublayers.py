# SPDX-License-Identifier: Apache-2.0
"""What the layers of a transformer are made of. Legend: T events of B sequences, D width,
H heads."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch
from fastrec.nn.plain import apply_linear, is_plain
from fastrec.nn.pool import softmax_of_sequences, weighted_sum
from fastrec.ops.common.arguments import accumulate_dtype
from fastrec.ops.dropout_add_layer_norm import DropoutAddLayerNorm, dropout_add_layer_norm
from fastrec.ops.gelu_ffn import gelu_ffn
from fastrec.ops.jagged_attention import jagged_attention, split_packed
from fastrec.ops.jagged_embedding import jagged_embedding
from fastrec.ops.linear import linear
from fastrec.random import Rng

PatchForm = Literal["serial", "parallel"]
MOST_LAYERS = 255  # the number of a layer is a byte of the key of its dropout


class EventDropout:
    """Dropout of [T, D] activations by the Philox contract: the key of an element is that of its
    sequence, its position there and its feature. Without `rng` it is the identity."""

    def __init__(self, batch: JaggedBatch, p: float, rng: Rng | None):
        self.rng = rng.pinned(batch.offsets.device) if rng and p > 0.0 else None
        self.p = p if self.rng else 0.0
        self.positions = batch.positions()
        self.keys = batch.keys[batch.segment_ids()] if self.rng else None

    def at(self, site: str, layer: int = 0) -> dict:
        """The dropout arguments of a fused op."""
        return dict(
            dropout_p=self.p,
            rng=self.rng,
            keys=self.keys,
            positions=self.positions,
            site=site,
            layer=layer,
        )

    def __call__(self, x: Tensor, site: str, layer: int) -> Tensor:
        """Where no op takes the dropout with it."""
        return jagged_embedding(None, x, **self.at(site, layer)) if self.p else x


class Patch(nn.Module):
    """x + up(GELU(down(x))): a model patch of PeterRec (Yuan et al., 2020, section 3.3). `up`
    starts at 0, so it starts as x."""

    def __init__(self, width: int, inner: int, form: PatchForm = "serial"):
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)
        self.form = form

    def reset(self) -> None:
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        down, up = self.down, self.up
        if is_plain(down, nn.Linear) and is_plain(up, nn.Linear):
            return x + gelu_ffn(x, down.weight, down.bias, up.weight, up.bias)
        return x + up(F.gelu(down(x)))


def patches_of(width: int, inner: int, form: PatchForm) -> nn.ModuleList:
    """Two, one for each sublayer or convolution of a block, or none."""
    return nn.ModuleList(Patch(width, inner, form) for _ in range(2 if inner else 0))


def patched(
    patches: nn.ModuleList, number: int, input: Tensor, output: Tensor, rows: Tensor | None = None
) -> Tensor:
    """What a sublayer gives, `output` of `input`, with its patch: patch(output) where these are
    serial, output + patch(input) where they are parallel. rows: the events of `input` that `output`
    is of, all for None."""
    if not patches:
        return output
    patch = patches[number]
    if patch.form == "serial":
        return patch(output)
    return output + patch(input if rows is None else input.index_select(0, rows)).to(output.dtype)


def check_patch(patch: int, form: str) -> None:
    """Raise ValueError for settings of patches that cannot be."""
    if patch < 0:
        raise ValueError(f"patch must be at least 0, got {patch}")
    if form != "serial" and not patch:
        raise ValueError(f"patch_form {form} has no effect: patch is 0")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: JaggedBatch,
    causal: bool,
    dropout: EventDropout,
    layer: int,
) -> Tensor:
    """[T, D] of query, key and value [T, H, D / H], dropout on the probabilities."""
    return jagged_attention(
        query,
        key,
        value,
        batch.offsets,
        max_seq_len=batch.max_seq_len,
        causal=causal,
        dropout_p=dropout.p,
        rng=dropout.rng,
        keys=batch.keys,
        layer=layer,
    ).flatten(1)


# Of so few events in all, those of a request for one user, the attention of all costs less than the
# dozen small operations of `attend_at`.
FEW_EVENTS = 256


def some_pay(x: Tensor) -> bool:
    """Whether the attention of some events of x [T, D] alone costs less than that of all. A program
    that is exported has one form for every T: that of many events."""
    return torch.compiler.is_exporting() or x.shape[0] > FEW_EVENTS


def self_attend(
    project: nn.Module,
    x: Tensor,
    heads: int,
    batch: JaggedBatch,
    causal: bool,
    dropout: EventDropout,
    layer: int,
    rows: Tensor | None = None,
) -> Tensor:
    """`attend` of x [T, D] to itself, `project` to queries, keys and values: [T, D], or [B, D] of
    the events `rows` alone."""
    if rows is not None and some_pay(x) and is_plain(project, nn.Linear):
        weight, bias = project.weight.chunk(3), project.bias.chunk(3)
        query = linear(x.index_select(0, rows), weight[0], bias[0]).unflatten(1, (heads, -1))
        return attend_at(rows, query, x, weight[1], weight[2], bias[2], batch, causal)
    packed = apply_linear(project, x).unflatten(1, (3, heads, -1))
    out = attend(*split_packed(packed), batch, causal, dropout, layer)
    return out if rows is None else out.index_select(0, rows)


def attend_at(
    rows: Tensor,
    query: Tensor,
    x: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    batch: JaggedBatch,
    causal: bool,
) -> Tensor:
    """[B, D] of `attend` for the events `rows` int64 [B], one of each sequence, without dropout and
    without the keys and values of any event. With keys W_k x + b_k and values W_v x + b_v:

        q . (W_k x + b_k) = (W_k^T q) . x + q . b_k, and the softmax does not see q . b_k
        sum_j p_j (W_v x_j + b_v) = W_v (sum_j p_j x_j) + b_v

    Args:
        query: [B, H, D / H], of these events.
        x: [T, D], what keys and values are made of.
        key_weight, value_weight: [D, D]. value_bias: [D].
    """
    heads, size = query.shape[1:]
    scale = size**-0.5
    x = x.to(accumulate_dtype(x))
    segment = batch.segment_ids()
    hidden = None
    if causal:
        event = torch.arange(x.shape[0], device=x.device)
        hidden = event > rows.index_select(0, segment)
    parts = []
    for head in range(heads):  # one at a time: [T, D] is stored, not [T, H, D]
        part = slice(head * size, (head + 1) * size)
        asked = linear(query[:, head], key_weight[part].T * scale).to(x.dtype)
        scores = torch.linalg.vecdot(x, asked.index_select(0, segment))
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        mean = weighted_sum(x, softmax_of_sequences(scores, batch), batch)
        parts.append(linear(mean.to(query.dtype), value_weight[part], value_bias[part]))
    return torch.cat(parts, 1)


def join(
    input: Tensor, residual: Tensor | None, norm: nn.Module, dropout: dict
) -> DropoutAddLayerNorm:
    """(LayerNorm of the sum, the sum) of the residual and the input after dropout."""
    if is_plain(norm, nn.LayerNorm):
        return dropout_add_layer_norm(
            input, residual, norm.weight, norm.bias, eps=norm.eps, **dropout
        )
    sum = dropout_add_layer_norm(input, residual, None, None, **dropout).sum
    return DropoutAddLayerNorm(norm(sum), sum)


def first_norm(
    x: Tensor, pending: Tensor | None, norm: nn.Module, dropout: EventDropout, layer: int
) -> DropoutAddLayerNorm:
    """(LayerNorm of the residual stream, the stream), with what layer - 1 left pending."""
    if pending is None:
        return join(x, None, norm, {})
    return join(pending, x, norm, dropout.at("ffn_output", layer - 1))
