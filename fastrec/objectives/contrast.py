# SPDX-License-Identifier: Apache-2.0
"""Contrast of two views of the same users (NT-Xent, InfoNCE).

Legend: B users, D width, G id columns, R ranks.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fastrec.data.batch import JaggedBatch
from fastrec.data.settings import check_fields, check_pair
from fastrec.data.side import SideData
from fastrec.nn.pool import Encoded, Pool, Pooling, last_event, real_in
from fastrec.nn.sphere import left_out
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
        candidates: an anchor looks among "both" views of the other users, or the "other" view alone
            (UniSRec).
        false_negatives: who is no negative of a user beside the user: those with the same "target",
            the item that the first view predicts last (DuoRec), or the same "profile", all discrete
            attributes (UPRec).
    """

    views: list[str]
    weight: float = 1.0
    pool: Pooling = "last"
    similarity: Literal["dot", "cosine"] = "dot"
    temperature: float = 1.0
    anchors: Literal["both", "first"] = "both"
    candidates: Literal["both", "other"] = "both"
    false_negatives: list[Literal["target", "profile"]] = field(default_factory=list)

    def __post_init__(self):
        check_fields(self)
        check_pair("contrast", self.views)
        if not self.temperature > 0:
            raise ValueError(f"contrast.temperature must be above 0, got {self.temperature}")

    def build(self, model, side: SideData) -> "ViewContrast":
        model.check_pool(self.pool)
        if "profile" in self.false_negatives:
            if side.profile_ids is None:
                raise ValueError(
                    "contrast.false_negatives: profile has no effect, no attribute is discrete"
                )
            side.user_columns["profile"] = torch.from_numpy(side.profile_ids)
        return ViewContrast(self, model.config.width)


class ViewContrast(nn.Module):
    """With z the 2B user vectors of both views, the mean over the anchors i of

        -log exp(s(z_i, z_i+) / t) / sum over j != i of exp(s(z_i, z_j) / t),

    z_i+ the other view of the same user (CL4SRec, Xie et al., 2022, eq. 4: SimCLR's NT-Xent). False
    negatives, and with `candidates: other` the view of i, are left out of the sum over j. With
    several processes j runs over the users of all of them. Neither 2B x 2B similarities nor masks
    are stored.
    """

    backend: str | None = None
    tells_apart = True

    def __init__(self, settings: Contrast, width: int):
        super().__init__()
        self.settings = settings
        self.pool = Pool(settings.pool, width)

    def forward(self, model, rng: Rng, first: Encoded, second: Encoded) -> dict[str, tuple]:
        """{"contrast": (loss, number of anchors)}; 0 for a user alone."""
        a, b = self.pool(model, first), self.pool(model, second)
        batch, ids = first.batch, [first.batch.sample_ids]
        if "target" in self.settings.false_negatives:
            ids.append(last_target(batch))
        if "profile" in self.settings.false_negatives:
            ids.append(batch.users["profile"])
        loss, count = self.loss(a, b, torch.stack(ids, dim=1), real_in(first, second))
        return {"contrast": (loss, count)}

    def loss(
        self, a: Tensor, b: Tensor, ids: Tensor, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor | int]:
        """(loss, number of anchors) from user vectors [B, D] of both views.

        ids: int64 [B] or [B, G], of the users: those with an id in common, in the same column, are
            no negatives of each other; a negative id is none.
        real: bool [B], who counts.
        """
        how = self.settings
        twice = how.anchors == "both" or how.candidates == "both"
        # Candidate i is the other view of anchor i.
        query = torch.cat([a, b]) if how.anchors == "both" else a
        candidate = torch.cat([b, a]) if twice else b
        owner = ids[:, None] if ids.dim() == 1 else ids
        anchor_ids = torch.cat([owner, owner])[: len(query)]
        ids = torch.cat([owner, owner])[: len(candidate)]
        if twice and how.candidates == "other":
            # One more column, of views: the anchors of one and the candidates of the same one.
            view = torch.arange(len(ids), device=a.device).unsqueeze(1) // max(len(a), 1)
            anchor_ids, ids = torch.cat([anchor_ids, view], 1), torch.cat([ids, 1 - view], 1)
        return partner_loss(
            query,
            candidate,
            None if real is None else torch.cat([real, real]),
            similarity=how.similarity,
            temperature=how.temperature,
            query_group=anchor_ids,
            candidate_group=ids,
            backend=self.backend,
        )


def partner_loss(
    query: Tensor, candidate: Tensor, real: Tensor | None, **settings
) -> tuple[Tensor, Tensor | int]:
    """(mean, number) of the cross-entropies of queries [N, D] whose partner is the candidate of the
    same number, among the candidates [M, D] of all processes.

    real: bool, the first N of the queries, the first M of the candidates: who counts.
    settings: of `in_batch_cross_entropy`.
    """
    several = torch.distributed.is_initialized()
    group = torch.distributed.group.WORLD if several else None
    if real is None and not several:
        return in_batch_cross_entropy(query, candidate, **settings), len(query)
    if real is None:  # in another process somebody may be left out
        most = max(len(query), len(candidate))
        real = torch.ones(most, dtype=torch.bool, device=query.device)
    rows = in_batch_cross_entropy(
        query,
        candidate,
        candidate_bias=left_out(~real[: len(candidate)]),
        group=group,
        reduction="none",
        **settings,
    )
    real = real[: len(query)]
    count = real.sum()
    return (rows * real).sum() / count.clamp_min(1), count


def last_target(batch: JaggedBatch) -> Tensor:
    """int64 [B]: the item that each sequence predicts last, the first one of several for an event,
    -1 where it predicts none. Raises ValueError for a view without targets."""
    target = batch.events.get("target")
    if target is None:
        raise ValueError(
            "contrast.false_negatives: target needs targets in the first view, next_item for one"
        )
    target = target[:, 0] if target.dim() > 1 else target
    padded = torch.cat([target, target.new_full((1,), -1)])  # what last_event's -1 points to
    return padded[last_event(target >= 0, batch)]
