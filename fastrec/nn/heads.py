# SPDX-License-Identifier: Apache-2.0
"""Heads: what turns encoder states into scores.

Legend: N rows, V items, D width, P width of a user vector.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.ops.common.arguments import accumulate_dtype
from fastrec.ops.common.linear_cross_entropy_update import Pending, pending_loss
from fastrec.ops.linear_cross_entropy import linear_cross_entropy
from fastrec.ops.sampled_linear_cross_entropy import sampled_linear_cross_entropy


class ItemHead(nn.Module):
    """Scores of all items for a state h of a user p: LN(GELU(W [h; p])) . E_j + b_j.

    The dense-GELU-LayerNorm transform is BERT's; `transform=False` scores [h; p] itself. `bias` is
    where b starts; None: b stays 0. E is the item embedding [V, D], whose vectors come with a call,
    or, with `own`, `table` [V, D + P] of the head.

    With `user_width` P > 0 every one of `num_users` users has a vector p (Caser, Tang and Wang,
    2018, section 3.3), of an unknown user it is 0. It starts at 0, so that somebody who was never
    trained is unknown. `similarity` and `temperature` are of what is in front of b.
    """

    def __init__(
        self,
        width: int,
        num_items: int,
        transform: bool = True,
        bias: float | None = 0.0,
        *,
        own: bool = False,
        num_users: int = 0,
        user_width: int = 0,
        similarity: Literal["dot", "cosine"] = "dot",
        temperature: float = 1.0,
    ):
        super().__init__()
        self.similarity, self.temperature = similarity, temperature
        whole = width + user_width
        scored = whole if own else width
        self.dense = nn.Linear(whole, scored) if transform else None
        self.norm = nn.LayerNorm(scored) if transform else None
        self.bias = nn.Parameter(
            torch.full((num_items,), bias or 0.0), requires_grad=bias is not None
        )
        self.table = nn.Embedding(num_items, scored) if own else None
        self.users = nn.Embedding(num_users, user_width) if user_width else None
        # Where rows are updated in the place of a gradient of all items, see `training.rows`.
        self.pending: list[Pending] | None = None

    def reset(self) -> None:
        """User vectors as they start."""
        if self.users is not None:
            nn.init.zeros_(self.users.weight)

    def with_users(self, states: Tensor, users: Tensor | None) -> Tensor:
        """[N, D + P]: states [N, D] beside the vectors of their users, int64 [N]: 0 for -1, an
        unknown user, and for None, where all are. Without user vectors the states themselves."""
        if self.users is None:
            return states
        if users is None:
            return F.pad(states, (0, self.users.embedding_dim))
        vectors = self.users(users.clamp_min(0)).masked_fill(users[:, None] < 0, 0)
        return torch.cat([states, vectors.to(states.dtype)], 1)

    def query(self, states: Tensor) -> Tensor:
        """[N, D + P] of `with_users` to the vectors that are compared with the item table, by their
        dot product: of unit length for cosines, and over the temperature."""
        if self.dense is not None and self.norm is not None:
            states = self.norm(F.gelu(self.dense(states)))
        if self.similarity == "cosine":
            # Not in the states' dtype, which autocast may have lowered, but in that of the table.
            states = F.normalize(states.to(accumulate_dtype(states)), dim=1).to(self.bias.dtype)
        return states if self.temperature == 1.0 else states / self.temperature

    def compared(self, table: Tensor) -> Tensor:
        """Item vectors [V, D] as queries are compared with them: of unit length for cosines."""
        return F.normalize(table, dim=1) if self.similarity == "cosine" else table

    def loss(self, states: Tensor, table: Tensor, targets: Tensor, backend=None) -> Tensor:
        """Mean cross-entropy over all items; 0 with a live graph when there are no rows.

        Rows of `table` after the V items, an embedding's special tokens, take no part. The backward
        pass of a slice without them would fill and copy a second gradient of the table's size.
        """
        if self.pending is not None and torch.is_grad_enabled():
            query, items = self.query(states), table[: self.bias.shape[0]]
            how: dict[str, Any] = dict(pending=self.pending, backend=backend)
            return pending_loss(query, items, targets, linear_bias=self.bias, **how)
        special = table.shape[0] - self.bias.shape[0]
        bias = F.pad(self.bias, (0, special), value=-torch.inf) if special else self.bias
        return linear_cross_entropy(
            self.query(states), table, targets, linear_bias=bias, backend=backend
        )

    def sampled_loss(
        self,
        states: Tensor,
        item_table: Tensor,
        targets: Tensor,
        negatives: Tensor,
        bias: Tensor | None = None,
        **options,
    ) -> Tensor:
        """The same over the targets and sampled `negatives`, int64 [K] or [N, K]; `options` as in
        `sampled_linear_cross_entropy`. Rows of the table after the V items may be negatives, and
        count nothing. bias: of the rows of the table; None: those of the items."""
        if bias is None:
            special = item_table.shape[0] - self.bias.shape[0]
            # Not -inf, of which all negatives of a block would make a maximum.
            bias = F.pad(self.bias, (0, special), value=-1e30) if special else self.bias
        return sampled_linear_cross_entropy(
            self.query(states), item_table, targets, negatives, linear_bias=bias, **options
        )
