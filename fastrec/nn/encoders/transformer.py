# SPDX-License-Identifier: Apache-2.0
"""Transformer encoder on jagged sequences: post-norm (BERT, UPRec) or pre-norm, any length.

Legend: T events of a batch, D width, H heads.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import check_fields
from fastrec.nn.encoders.layers import LiGRLayer, SASRecLayer
from fastrec.nn.encoders.sublayers import (
    MOST_LAYERS,
    EventDropout,
    PatchForm,
    check_patch,
    first_norm,
    join,
    patched,
    patches_of,
    self_attend,
)
from fastrec.nn.items import ItemRows
from fastrec.nn.plain import apply_linear, embedding_table, is_plain
from fastrec.ops.gelu_ffn import gelu_ffn
from fastrec.ops.jagged_attention import MOST_HEAD_WIDTH
from fastrec.ops.jagged_embedding import jagged_embedding
from fastrec.random import Rng


@dataclass(frozen=True)
class Transformer:
    """Self-attention layers: BERT4Rec and UPRec as they are, SASRec with `causal` and `pre_norm`.

    Attributes:
        layers, heads: how many.
        ffn_width: inner width of the feed-forward network; if None 4 D, of the layer sasrec D.
        causal: left-to-right instead of bidirectional attention.
        pre_norm: LayerNorm before the sublayers instead of after.
        norm_eps: added to the variance in the LayerNorms.
        patch: width of a bottleneck at each sublayer, 0 for none: what is trained beside a frozen
            encoder (PeterRec, Yuan et al., 2020, section 3.3).
        patch_form: "serial", behind the sublayer, or "parallel", of its input and added to what it
            gives, the input itself too.
        layer: "standard", or of those that are always pre-norm "sasrec", the original's (ReLU, the
            normalised input in the residuals), or "ligr", that of eSASRec (gates, SwiGLU).
        final_norm: of ligr, a LayerNorm behind the last layer, which other pre-norm layers always
            have and its authors have not.
    """

    layers: int = 2
    heads: int = 2
    ffn_width: int | None = None
    causal: bool = False
    pre_norm: bool = False
    norm_eps: float = 1e-5
    patch: int = 0
    patch_form: PatchForm = "serial"
    layer: Literal["standard", "sasrec", "ligr"] = "standard"
    final_norm: bool = False

    reads_positions = True

    def __post_init__(self):
        check_fields(self)
        if self.layer != "standard" and not self.pre_norm:
            raise ValueError(f"pre_norm must be true for the layer {self.layer}")
        if self.final_norm and self.layer != "ligr":
            raise ValueError("final_norm is of the layer ligr: the others have a LayerNorm there")
        for name in ("layers", "heads", "ffn_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_patch(self.patch, self.patch_form)
        if self.layers > MOST_LAYERS:
            raise ValueError(f"layers must be at most {MOST_LAYERS}, got {self.layers}")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps must be positive and finite, got {self.norm_eps}")

    @property
    def normed_at_the_end(self) -> bool:
        """Whether a LayerNorm stands behind the last layer."""
        return self.pre_norm and (self.layer != "ligr" or self.final_norm)

    def inner(self, width: int) -> int:
        """F, the inner width of the feed-forward network."""
        return self.ffn_width or (width if self.layer == "sasrec" else 4 * width)

    def num_parameters(self, width: int, max_positions: int) -> int:
        """How many numbers the encoder has."""
        square, inner = width * width, self.inner(width)
        layer = {
            "standard": 4 * square + 9 * width + 2 * width * inner + inner,
            "sasrec": 3 * square + 8 * width + 2 * width * inner + inner,
            "ligr": 6 * square + 10 * width + 3 * width * inner,
        }[self.layer]
        if self.patch:
            layer += 2 * (2 * width * self.patch + self.patch + width)
        norms = 2 * width * (self.normed_at_the_end + (not self.pre_norm))  # that of the embedding
        return self.layers * layer + max_positions * width + norms

    def build(self, width: int, max_positions: int, dropout: float) -> "TransformerEncoder":
        return TransformerEncoder(self, width, max_positions, dropout)


class TransformerLayer(nn.Module):
    """Self-attention and a position-wise feed-forward network, with residuals and LayerNorm.

    The states of a layer are a pair (x, pending). Post-norm: the output and None. Pre-norm: the
    residual stream and the output of the last feed-forward network, whose dropout and addition are
    one operation with the LayerNorm that comes next, in whichever module that is. With `rows` see
    `layers`.
    """

    def __init__(self, settings: Transformer, width: int):
        super().__init__()
        ffn_width, norm_eps = settings.inner(width), settings.norm_eps
        self.heads, self.pre_norm = settings.heads, settings.pre_norm
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, norm_eps)
        self.ffn_inner = nn.Linear(width, ffn_width)
        self.ffn_output = nn.Linear(ffn_width, width)
        self.ffn_norm = nn.LayerNorm(width, norm_eps)
        self.patches = patches_of(width, settings.patch, settings.patch_form)

    @property
    def second_norm(self) -> nn.Module:
        """What `init.second_norm` trains."""
        return self.ffn_norm

    def attention(self, x: Tensor, batch, causal, dropout: EventDropout, layer: int, rows):
        project = self.query_key_value
        out = self_attend(project, x, self.heads, batch, causal, dropout, layer, rows)
        out = apply_linear(self.attention_output, out)
        return patched(self.patches, 0, x, out, rows)

    def ffn(self, x: Tensor):
        inner, output = self.ffn_inner, self.ffn_output
        if is_plain(inner, nn.Linear) and is_plain(output, nn.Linear):
            out = gelu_ffn(x, inner.weight, inner.bias, output.weight, output.bias)
        else:
            out = apply_linear(output, F.gelu(apply_linear(inner, x)))
        return patched(self.patches, 1, x, out)

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
        if self.pre_norm:
            normed, x = first_norm(x, pending, self.attention_norm, dropout, layer)
            attended = self.attention(normed, batch, causal, dropout, layer, rows)
            x = x if rows is None else x.index_select(0, rows)
            normed, x = join(attended, x, self.ffn_norm, dropout.at("attention_output", layer))
            return x, self.ffn(normed)
        attended = self.attention(x, batch, causal, dropout, layer, rows)
        x = x if rows is None else x.index_select(0, rows)
        x = join(attended, x, self.attention_norm, dropout.at("attention_output", layer)).output
        return join(self.ffn(x), x, self.ffn_norm, dropout.at("ffn_output", layer)).output, None


LAYERS = {"standard": TransformerLayer, "sasrec": SASRecLayer, "ligr": LiGRLayer}


class TransformerEncoder(nn.Module):
    """Position embedding and `layers` transformer layers, jagged in and out.

    Defaults are UPRec's encoder (section 3.2): post-norm, bidirectional, erf GELU, FFN width 4 D,
    dropout on embeddings, attention probabilities and both sublayer outputs.

    Args:
        settings: of the layers.
        width: D, divisible by the number of heads, at most 256 for each.
        max_positions: longest sequence, special tokens included.
        dropout: probability at every site, applied only where `forward` receives an `rng`.
    """

    def __init__(self, settings: Transformer, width: int, max_positions: int, dropout: float):
        super().__init__()
        if width % settings.heads:
            raise ValueError(f"width {width} is not divisible by heads {settings.heads}")
        if width // settings.heads > MOST_HEAD_WIDTH:
            raise ValueError(
                f"width {width} with heads {settings.heads}: a head may have {MOST_HEAD_WIDTH}"
            )
        self.dropout, self.causal = dropout, settings.causal
        pre_norm, norm_eps = settings.pre_norm, settings.norm_eps
        self.max_positions = max_positions
        self.positions = nn.Embedding(max_positions, width)
        self.embedding_norm = nn.Identity() if pre_norm else nn.LayerNorm(width, norm_eps)
        last = settings.normed_at_the_end
        self.final_norm = nn.LayerNorm(width, norm_eps) if last else nn.Identity()
        self.layers = nn.ModuleList(
            LAYERS[settings.layer](settings, width) for _ in range(settings.layers)
        )

    takes_rows = True

    def forward(
        self,
        embedded: ItemRows,
        batch: JaggedBatch,
        rng: Rng | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """[T, D] states of the events. `rng` turns dropout on and is its key.

        rows: int64 [B], an event of each sequence: [B, D] states of these alone, without dropout.
            The last layer computes no others, and no keys and values.

        Raises ValueError when a sequence is longer than `max_positions`.
        """
        if batch.max_seq_len > self.max_positions:
            raise ValueError(
                f"a sequence has {batch.max_seq_len} positions, the encoder was built for"
                f" {self.max_positions}"
            )
        if rows is not None and rng is not None:
            raise ValueError("states of some rows are without dropout: give rows or rng, not both")
        dropout = EventDropout(batch, self.dropout, rng)
        x = self._embed(embedded, dropout, batch.events.get("position"))
        pending, last = None, len(self.layers) - 1
        for layer, block in enumerate(self.layers):
            asked = rows if layer == last else None
            x, pending = block(x, batch, self.causal, dropout, layer, pending, asked)
        if type(self.final_norm) is nn.Identity:
            return x
        return first_norm(x, pending, self.final_norm, dropout, len(self.layers)).output

    def _embed(self, embedded: ItemRows, dropout: EventDropout, given: Tensor | None) -> Tensor:
        """[T, D]: dropout of the LayerNorm, if the encoder is post-norm, of items + positions, the
        places in the sequences or int64 [T] that are `given`."""
        places = embedding_table(self.positions, self.max_positions)
        norm, key = self.embedding_norm, dropout.at("embedding")
        sparse = embedded.sparse
        if given is not None:  # a mask is that of the place in the sequence
            summed = jagged_embedding(embedded.values, embedded.table, places, given, sparse=sparse)
            summed = summed if type(norm) is nn.Identity else norm(summed)
            return jagged_embedding(None, summed, **key)
        if type(norm) is nn.Identity:
            return jagged_embedding(embedded.values, embedded.table, places, **key, sparse=sparse)
        if is_plain(norm, nn.LayerNorm):
            return jagged_embedding(
                embedded.values,
                embedded.table,
                places,
                norm_weight=norm.weight,
                norm_bias=norm.bias,
                eps=norm.eps,
                **key,
                sparse=sparse,
            )
        summed = jagged_embedding(
            embedded.values, embedded.table, places, dropout.positions, sparse=sparse
        )
        return jagged_embedding(None, norm(summed), **key)
