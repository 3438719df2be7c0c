# SPDX-License-Identifier: Apache-2.0
"""Layers of other transformers: the original SASRec's and LiGR's. Attention, dropout, LayerNorm and
linear layers are the fused ops; ReLU, SwiGLU and the gates are plain PyTorch.

Both are pre-norm. A layer maps (x, pending) to the same: the residual stream, and what is to be
added to it, after dropout, where the next LayerNorm reads it; None if nothing is. With `rows`,
int64 [B], it is the last layer, of the events `rows` alone, one of each sequence, and without
dropout.

Legend: T events of a batch of B sequences, D width, F inner width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch
from fastrec.nn.encoders.sublayers import (
    EventDropout,
    attend,
    attend_at,
    first_norm,
    join,
    patched,
    patches_of,
    self_attend,
    some_pay,
)
from fastrec.nn.plain import apply_linear, is_plain


class SASRecLayer(nn.Module):
    """The block of the original SASRec, as its authors' program has it:

        q = LN(x)     a = q + attention(q W_q, x W_k, x W_v)     f = LN(a)
        output = f + dropout(W_2 dropout(ReLU(W_1 f)))

    Keys and values are not normalised, both residuals are, and the heads have no projection behind
    them.
    """

    def __init__(self, settings, width: int):
        super().__init__()
        ffn_width, norm_eps = settings.inner(width), settings.norm_eps
        self.heads = settings.heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.attention_norm = nn.LayerNorm(width, norm_eps)
        self.ffn_inner = nn.Linear(width, ffn_width)
        self.ffn_output = nn.Linear(ffn_width, width)
        self.ffn_norm = nn.LayerNorm(width, norm_eps)
        self.patches = patches_of(width, settings.patch, settings.patch_form)

    @property
    def second_norm(self) -> nn.Module:
        """What `init.second_norm` trains."""
        return self.ffn_norm

    def forward(
        self,
        x: Tensor,
        batch: JaggedBatch,
        causal: bool,
        dropout: EventDropout,
        layer: int,
        pending: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        normed, x = first_norm(x, pending, self.attention_norm, dropout, layer)
        attended = self._attention(normed, x, batch, causal, dropout, layer, rows)
        if rows is not None:
            normed = normed.index_select(0, rows)
        attended = patched(self.patches, 0, normed, attended)
        normed = join(attended, normed, self.ffn_norm, {}).output
        inner = F.relu(apply_linear(self.ffn_inner, normed))
        out = apply_linear(self.ffn_output, dropout(inner, "ffn_inner", layer))
        return normed, patched(self.patches, 1, normed, out)

    def _attention(self, normed: Tensor, x: Tensor, batch, causal, dropout, layer, rows):
        if rows is not None and some_pay(x) and is_plain(self.key_value, nn.Linear):
            query = apply_linear(self.query, normed.index_select(0, rows))
            query = query.unflatten(1, (self.heads, -1))
            key_weight, value_weight = self.key_value.weight.chunk(2)
            bias = self.key_value.bias.chunk(2)[1]
            return attend_at(rows, query, x, key_weight, value_weight, bias, batch, causal)
        query = apply_linear(self.query, normed).unflatten(1, (self.heads, -1))
        packed = apply_linear(self.key_value, x).unflatten(1, (2, self.heads, -1))
        key, value = packed.unbind(1)
        out = attend(query, key, value, batch, causal, dropout, layer)
        return out if rows is None else out.index_select(0, rows)


class LiGRLayer(nn.Module):
    """The layer of LiGR (Borisyuk et al., 2025) as eSASRec has it, gates on both residuals:

        x = x + sigmoid(G_1 x) * dropout(attention(LN(x)))
        x = x + sigmoid(G_2 x) * dropout(W_3 dropout(silu(W_1 n) * W_2 n))     n = LN(x)

    W_1 to W_3 have no bias; W_1 and W_2 are the rows of one matrix.
    """

    def __init__(self, settings, width: int):
        super().__init__()
        ffn_width, norm_eps = settings.inner(width), settings.norm_eps
        self.heads = settings.heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, norm_eps)
        self.attention_gate = nn.Linear(width, width)
        self.ffn_inner = nn.Linear(width, 2 * ffn_width, bias=False)
        self.ffn_output = nn.Linear(ffn_width, width, bias=False)
        self.ffn_norm = nn.LayerNorm(width, norm_eps)
        self.ffn_gate = nn.Linear(width, width)
        self.patches = patches_of(width, settings.patch, settings.patch_form)

    @property
    def second_norm(self) -> nn.Module:
        """What `init.second_norm` trains."""
        return self.ffn_norm

    def forward(
        self,
        x: Tensor,
        batch: JaggedBatch,
        causal: bool,
        dropout: EventDropout,
        layer: int,
        pending: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        normed = join(x, None, self.attention_norm, {}).output
        project = self.query_key_value
        out = self_attend(project, normed, self.heads, batch, causal, dropout, layer, rows)
        x = x if rows is None else x.index_select(0, rows)
        out = apply_linear(self.attention_output, out)
        out = patched(self.patches, 0, normed, out, rows)
        gate = apply_linear(self.attention_gate, x).sigmoid()
        x = x + gate * dropout(out, "attention_output", layer)

        normed = join(x, None, self.ffn_norm, {}).output
        silu, other = apply_linear(self.ffn_inner, normed).chunk(2, 1)
        out = dropout(F.silu(silu) * other, "ffn_inner", layer)
        out = apply_linear(self.ffn_output, out)
        out = patched(self.patches, 1, normed, out)
        gate = apply_linear(self.ffn_gate, x).sigmoid()
        return x + gate * dropout(out, "ffn_output", layer), None
