# SPDX-License-Identifier: Apache-2.0
"""Contrast of two views of the same users (NT-Xent, InfoNCE).

Legend: B users, D width, R ranks.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastrec.data.settings import check_choices
from fastrec.data.side import SideData
from fastrec.nn.pool import Encoded, Pool, Pooling
from fastrec.ops.in_batch_cross_entropy import in_batch_cross_entropy
from fastrec.random import Rng


@dataclass(frozen=True)
class Contrast:
    """The two views of a user are near each other and far from other users' views.

    Attributes:
        views: two views of the same users.
        weight: in the joint loss.
        pool: the user vector.
        similarity: "dot" or "cosine".
        temperature: similarities are divided by it.
        anchors: "both" views look for their partner, or the "first" alone (CCL).
    """

    views: list[str]
    weight: float = 1.0
    pool: Pooling = "last"
    similarity: Literal["dot", "cosine"] = "dot"
    temperature: float = 1.0
    anchors: Literal["both", "first"] = "both"

    def __post_init__(self):
        check_choices(self)
        if len(self.views) != 2:
            raise ValueError(f"contrast compares two views, got {self.views}")
        if not self.temperature > 0:
            raise ValueError(f"contrast.temperature must be above 0, got {self.temperature}")

    def build(self, model, side: SideData) -> "ViewContrast":
        model.check_pool(self.pool)
        return ViewContrast(self, model.config.width)


class ViewContrast(nn.Module):
    """With z the 2B user vectors of both views, the mean over the anchors i of

        -log exp(s(z_i, z_i+) / t) / sum over j != i of exp(s(z_i, z_j) / t),

    z_i+ the other view of the same user (CL4SRec, Xie et al., 2022, eq. 4: SimCLR's NT-Xent). With
    several processes j runs over the users of all of them. Neither 2B x 2B similarities nor masks
    are stored.
    """

    backend: str | None = None

    def __init__(self, settings: Contrast, width: int):
        super().__init__()
        self.settings = settings
        self.pool = Pool(settings.pool, width)

    def forward(self, model, rng: Rng, first: Encoded, second: Encoded) -> dict[str, tuple]:
        """{"contrast": (loss, number of anchors)}; 0 for a user alone."""
        a, b = self.pool(model, first), self.pool(model, second)
        if len(a) != len(b):
            raise ValueError(f"views of the same users have {len(a)} and {len(b)} sequences")
        ids = first.batch.sample_ids
        loss, count = self.loss(a, b, ids, first.batch.real)
        return {"contrast": (loss, count)}

    def loss(
        self, a: Tensor, b: Tensor, ids: Tensor, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor | int]:
        """(loss, number of anchors) from user vectors [B, D] of both views.

        ids: int64 [B], of the users: vectors of the same user are no negatives of each other.
        real: bool [B], who is not padding.
        """
        how, several = self.settings, torch.distributed.is_initialized()
        # Candidate i is the other view of anchor i.
        query = torch.cat([a, b]) if how.anchors == "both" else a
        candidate, owner = torch.cat([b, a]), torch.cat([ids, ids])
        bias = positive = None
        if real is not None:
            bias = torch.where(torch.cat([real, real]), 0.0, -torch.inf)
            real = torch.cat([real, real])[: len(query)]
            # The partner of padding is out: it looks for somebody who is not.
            positive = torch.arange(len(query), device=a.device).masked_fill(~real, 0)
        loss = in_batch_cross_entropy(
            query,
            candidate,
            similarity=how.similarity,
            temperature=how.temperature,
            candidate_bias=bias,
            positive=positive,
            query_group=owner[: len(query)],
            candidate_group=owner,
            group=torch.distributed.group.WORLD if several else None,
            reduction="mean" if real is None else "none",
            backend=self.backend,
        )
        if real is None:
            return loss, len(query)
        count = real.sum()
        return (loss * real).sum() / count.clamp_min(1), count
