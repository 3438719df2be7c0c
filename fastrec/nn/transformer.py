"""Transformer encoder on jagged sequences: post-norm (BERT, UPRec) or pre-norm, any length.

Legend: T events of a batch, D width, H heads.
"""

from torch import Tensor, nn

from fastrec.data.batch import JaggedBatch
from fastrec.ops.dropout_add_layer_norm import DropoutAddLayerNorm, dropout_add_layer_norm
from fastrec.ops.gelu_ffn import gelu_ffn
from fastrec.ops.jagged_attention import jagged_attention, split_packed
from fastrec.ops.jagged_embedding import jagged_embedding
from fastrec.ops.linear import linear
from fastrec.random import Rng, keep_mask


class EventDropout:
    """Dropout of [T, D] activations by the Philox contract: an element is known by the key of its
    sequence, its position there and its feature. Without `rng` it is the identity.
    """

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

    def __call__(self, x: Tensor, site: str, layer: int = 0) -> Tensor:
        if self.rng is None or self.keys is None:
            return x
        keep, scale = keep_mask(
            self.rng, self.p, self.keys, self.positions, x.shape[1], site=site, layer=layer
        )
        return x * (keep * scale).to(x.dtype)


def _join(
    input: Tensor,
    residual: Tensor,
    norm: nn.LayerNorm,
    dropout: EventDropout,
    site: str,
    layer: int,
) -> DropoutAddLayerNorm:
    return dropout_add_layer_norm(
        input, residual, norm.weight, norm.bias, eps=norm.eps, **dropout.at(site, layer)
    )


class TransformerLayer(nn.Module):
    """Self-attention and a position-wise feed-forward network, with residuals and LayerNorm.

    The states of a layer are a pair (x, pending). Post-norm: the output and None. Pre-norm: the
    residual stream and the output of the last feed-forward network, whose dropout and addition are
    one operation with the LayerNorm that comes next, in whichever module that is.
    """

    def __init__(
        self, width: int, heads: int, ffn_width: int, pre_norm: bool, norm_eps: float = 1e-5
    ):
        super().__init__()
        self.heads, self.pre_norm = heads, pre_norm
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, norm_eps)
        self.ffn_inner = nn.Linear(width, ffn_width)
        self.ffn_output = nn.Linear(ffn_width, width)
        self.ffn_norm = nn.LayerNorm(width, norm_eps)

    def attention(self, x: Tensor, batch: JaggedBatch, causal, dropout: EventDropout, layer: int):
        projection, output = self.query_key_value, self.attention_output
        packed = linear(x, projection.weight, projection.bias).unflatten(1, (3, self.heads, -1))
        query, key, value = split_packed(packed)
        out = jagged_attention(
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
        )
        return linear(out.flatten(1), output.weight, output.bias)

    def ffn(self, x: Tensor):
        inner, output = self.ffn_inner, self.ffn_output
        return gelu_ffn(x, inner.weight, inner.bias, output.weight, output.bias)

    def forward(
        self,
        x: Tensor,
        batch: JaggedBatch,
        causal: bool,
        dropout: EventDropout,
        layer: int,
        pending: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if self.pre_norm:
            normed, x = _first_norm(x, pending, self.attention_norm, dropout, layer)
            attended = self.attention(normed, batch, causal, dropout, layer)
            normed, x = _join(attended, x, self.ffn_norm, dropout, "attention_output", layer)
            return x, self.ffn(normed)
        attended = self.attention(x, batch, causal, dropout, layer)
        x = _join(attended, x, self.attention_norm, dropout, "attention_output", layer).output
        return _join(self.ffn(x), x, self.ffn_norm, dropout, "ffn_output", layer).output, None


def _first_norm(
    x: Tensor, pending: Tensor | None, norm: nn.LayerNorm, dropout: EventDropout, layer: int
) -> DropoutAddLayerNorm:
    """(LayerNorm of the residual stream, the stream), with what layer - 1 left pending."""
    if pending is None:
        return dropout_add_layer_norm(x, None, norm.weight, norm.bias, eps=norm.eps)
    return _join(pending, x, norm, dropout, "ffn_output", layer - 1)


class TransformerEncoder(nn.Module):
    """Position embedding and `layers` transformer layers, jagged in and out.

    Defaults are UPRec's encoder (section 3.2): post-norm, bidirectional, erf GELU, FFN width 4 D,
    dropout on embeddings, attention probabilities and both sublayer outputs.

    Args:
        width: D, divisible by `heads`.
        max_positions: longest sequence, special tokens included.
        dropout: probability at every site, applied only where `forward` receives an `rng`.
        causal: each event sees itself and earlier events.
        pre_norm: LayerNorm before each sublayer and once at the end, instead of after each sum.
        norm_eps: added to the variance in every LayerNorm.
    """

    def __init__(
        self,
        width: int,
        max_positions: int,
        layers: int = 2,
        heads: int = 2,
        ffn_width: int | None = None,
        dropout: float = 0.5,
        causal: bool = False,
        pre_norm: bool = False,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        self.dropout, self.causal = dropout, causal
        self.positions = nn.Embedding(max_positions, width)
        self.embedding_norm = nn.Identity() if pre_norm else nn.LayerNorm(width, norm_eps)
        self.final_norm = nn.LayerNorm(width, norm_eps) if pre_norm else nn.Identity()
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, ffn_width or 4 * width, pre_norm, norm_eps)
            for _ in range(layers)
        )

    def forward(
        self,
        embedded: Tensor,
        batch: JaggedBatch,
        rng: Rng | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """[T, D] item embeddings to [T, D] states. `rng` turns dropout on and is its key.

        With `values` int64 [T], `embedded` is a table [V, D] and event t has its row values_t.
        The states of a sequence do not depend on the others in the batch: those of
        `batch.as_views(n)` are, bit for bit, those of n calls with a view each.
        Raises ValueError when a sequence is longer than `max_positions`.
        """
        if batch.max_seq_len > self.positions.num_embeddings:
            raise ValueError(
                f"a sequence has {batch.max_seq_len} positions, the encoder was built for"
                f" {self.positions.num_embeddings}"
            )
        dropout = EventDropout(batch, self.dropout, rng)
        norm = self.embedding_norm if isinstance(self.embedding_norm, nn.LayerNorm) else None
        x = jagged_embedding(
            values,
            embedded,
            self.positions.weight,
            norm_weight=norm.weight if norm else None,
            norm_bias=norm.bias if norm else None,
            eps=norm.eps if norm else 0.0,
            **dropout.at("embedding"),
        )
        pending = None
        for layer, block in enumerate(self.layers):
            x, pending = block(x, batch, self.causal, dropout, layer, pending)
        if isinstance(self.final_norm, nn.LayerNorm):
            return _first_norm(x, pending, self.final_norm, dropout, len(self.layers)).output
        return x
