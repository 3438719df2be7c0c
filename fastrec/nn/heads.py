"""Heads: what turns encoder states into scores. Legend: N rows, V items, D width."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.ops.linear_cross_entropy import linear_cross_entropy
from fastrec.ops.sampled_linear_cross_entropy import sampled_linear_cross_entropy


class ItemHead(nn.Module):
    """Scores of all items for a state: LN(GELU(W h)) . E_j + b_j, with the tied item table E.

    The dense-GELU-LayerNorm transform is BERT's; `transform=False` scores the state itself. `bias`
    is where b starts; None: b stays 0.
    """

    def __init__(
        self, width: int, num_items: int, transform: bool = True, bias: float | None = 0.0
    ):
        super().__init__()
        self.dense = nn.Linear(width, width) if transform else None
        self.norm = nn.LayerNorm(width) if transform else None
        self.bias = nn.Parameter(
            torch.full((num_items,), bias or 0.0), requires_grad=bias is not None
        )

    def query(self, states: Tensor) -> Tensor:
        """[N, D] states to the [N, D] vectors that are compared with the item table."""
        if self.dense is None or self.norm is None:
            return states
        return self.norm(F.gelu(self.dense(states)))

    def loss(self, states: Tensor, table: Tensor, targets: Tensor, backend=None) -> Tensor:
        """Mean cross-entropy over all items; 0 with a live graph when there are no rows.

        Rows of `table` after the V items, an embedding's special tokens, take no part. The backward
        pass of a slice without them would fill and copy a second gradient of the table's size.
        """
        special = table.shape[0] - self.bias.shape[0]
        bias = F.pad(self.bias, (0, special), value=-torch.inf) if special else self.bias
        return linear_cross_entropy(
            self.query(states), table, targets, linear_bias=bias, backend=backend
        )

    def sampled_loss(
        self, states: Tensor, item_table: Tensor, targets: Tensor, negatives: Tensor, **options
    ) -> Tensor:
        """The same over the targets and sampled `negatives`, int64 [K] or [N, K]; `options` as in
        `sampled_linear_cross_entropy`."""
        return sampled_linear_cross_entropy(
            self.query(states), item_table, targets, negatives, linear_bias=self.bias, **options
        )
