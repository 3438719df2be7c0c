"""What the layers of a transformer are made of. Legend: T events of a batch, D width, H heads."""

from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch
from fastrec.nn.plain import is_plain
from fastrec.ops.dropout_add_layer_norm import DropoutAddLayerNorm, dropout_add_layer_norm
from fastrec.ops.jagged_attention import jagged_attention
from fastrec.ops.jagged_embedding import jagged_embedding
from fastrec.random import Rng


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
    """x + up(GELU(down(x))): a model patch of PeterRec. `up` starts at 0, so it starts as x."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)

    def reset(self) -> None:
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(F.gelu(self.down(x)))


def patches_of(width: int, inner: int) -> nn.ModuleList:
    """Two, one behind each sublayer or convolution of a block, or none."""
    return nn.ModuleList(Patch(width, inner) for _ in range(2 if inner else 0))


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
