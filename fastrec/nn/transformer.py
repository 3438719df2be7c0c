"""Transformer encoder on jagged sequences: post-norm (BERT, UPRec) or pre-norm, any length.

Legend: T events of a batch, D width, H heads.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch
from fastrec.ops.jagged_attention import jagged_attention, split_packed
from fastrec.random import Rng, keep_mask


class EventDropout:
    """Dropout of [T, D] activations by the Philox contract: the key of an element is its sample id,
    its position in the sequence and its feature. Without `rng` it is the identity."""

    def __init__(self, batch: JaggedBatch, p: float, rng: Rng | None):
        self.rng = rng if p > 0.0 else None
        self.p = p if self.rng else 0.0
        if self.rng:
            self.positions = batch.positions()
            self.sample_ids = batch.sample_ids[batch.segment_ids()]

    def __call__(self, x: Tensor, site: str, layer: int = 0) -> Tensor:
        if self.rng is None:
            return x
        keep, scale = keep_mask(
            self.rng, self.p, self.sample_ids, self.positions, x.shape[1], site=site, layer=layer
        )
        return x * (keep * scale).to(x.dtype)


class TransformerLayer(nn.Module):
    """Self-attention and a position-wise feed-forward network, with residuals and LayerNorm."""

    def __init__(self, width: int, heads: int, ffn_width: int, pre_norm: bool):
        super().__init__()
        self.heads, self.pre_norm = heads, pre_norm
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.ffn_inner = nn.Linear(width, ffn_width)
        self.ffn_output = nn.Linear(ffn_width, width)
        self.ffn_norm = nn.LayerNorm(width)

    def attention(self, x: Tensor, batch: JaggedBatch, causal, dropout: EventDropout, layer: int):
        packed = self.query_key_value(x).unflatten(1, (3, self.heads, -1))
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
            sample_ids=batch.sample_ids,
            layer=layer,
        )
        return dropout(self.attention_output(out.flatten(1)), "attention_output", layer)

    def ffn(self, x: Tensor, dropout: EventDropout, layer: int):
        return dropout(self.ffn_output(F.gelu(self.ffn_inner(x))), "ffn_output", layer)

    def forward(self, x: Tensor, batch: JaggedBatch, causal, dropout: EventDropout, layer: int):
        if self.pre_norm:
            x = x + self.attention(self.attention_norm(x), batch, causal, dropout, layer)
            return x + self.ffn(self.ffn_norm(x), dropout, layer)
        x = self.attention_norm(x + self.attention(x, batch, causal, dropout, layer))
        return self.ffn_norm(x + self.ffn(x, dropout, layer))


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
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by heads {heads}")
        self.dropout, self.causal = dropout, causal
        self.positions = nn.Embedding(max_positions, width)
        self.embedding_norm = nn.Identity() if pre_norm else nn.LayerNorm(width)
        self.final_norm = nn.LayerNorm(width) if pre_norm else nn.Identity()
        self.layers = nn.ModuleList(
            TransformerLayer(width, heads, ffn_width or 4 * width, pre_norm) for _ in range(layers)
        )

    def forward(self, embedded: Tensor, batch: JaggedBatch, rng: Rng | None = None) -> Tensor:
        """[T, D] item embeddings to [T, D] states. `rng` turns dropout on and is its key.

        Raises ValueError when a sequence is longer than `max_positions`.
        """
        if batch.max_seq_len > self.positions.num_embeddings:
            raise ValueError(
                f"a sequence has {batch.max_seq_len} positions, the encoder was built for"
                f" {self.positions.num_embeddings}"
            )
        dropout = EventDropout(batch, self.dropout, rng)
        x = self.embedding_norm(embedded + self.positions(batch.positions()))
        x = dropout(x, "embedding")
        for layer, block in enumerate(self.layers):
            x = block(x, batch, self.causal, dropout, layer)
        return self.final_norm(x)
