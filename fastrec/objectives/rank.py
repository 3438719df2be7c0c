# SPDX-License-Identifier: Apache-2.0
"""Self-supervised ranking of the views of a user (AdaptSSR, Yu et al., 2023).

Legend: B users of this process, D width, R ranks.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrec.data.settings import check_fields
from fastrec.data.side import SideData
from fastrec.nn.pool import Encoded, Pool, Pooling, real_in
from fastrec.ops.common.arguments import accumulate_dtype
from fastrec.ops.in_batch_hardest import in_batch_hardest
from fastrec.random import Rng


@dataclass(frozen=True)
class Rank:
    """A view of a user is nearest to itself with another dropout, then to the other view of the
    user, then to other users.

    Attributes:
        views: two augmented views and each of them `again`: [a, b, a_again, b_again].
        weight: in the joint loss.
        pool: the user vector.
        fusion: what weighs the two comparisons against each other: "sample", each user by how alike
            the augmented views are, or "batch", one number for all of them, as the authors' program
            has it.
    """

    views: list[str]
    weight: float = 1.0
    pool: Pooling = "attention"
    fusion: Literal["sample", "batch"] = "sample"

    def __post_init__(self):
        check_fields(self)
        if len(self.views) != 4 or len(set(self.views)) != 4:
            raise ValueError(
                "rank compares four views, two and each of them again with another dropout, got"
                f" {self.views}"
            )

    def build(self, model, side: SideData) -> "ViewRanking":
        model.check_pool(self.pool)
        if model.config.dropout == 0:
            raise ValueError("rank has no effect without dropout: a view and its copy are the same")
        return ViewRanking(self, model.config.width)


class ViewRanking(nn.Module):
    """With unit vectors a, a' of one view and b, b' of the other, the mean over the anchors a and b
    of all users of

        -log sigmoid(l (a.a' - max(a.b, a.b')) + (1 - l) (min(a.b, a.b') - max_w a.w)),

    w the 4 (B - 1) vectors of other users; for the anchor b the same with a and b exchanged. a' and
    b' are no anchors. With several processes w runs over the users of all of them.

    l, no gradient: "sample" 1 - mean of max(s, 0) over s in {a.b, a.b', a'.b, a'.b'}, of each user;
    "batch" 1 - mean over all users of (a.b + a.b') / 2, of the anchor b of (a.b + a'.b) / 2.

    The similarities with others are never stored: of each anchor `in_batch_hardest` finds the
    largest, and its gradient goes to that pair.
    """

    backend: str | None = None
    tells_apart = True

    def __init__(self, settings: Rank, width: int):
        super().__init__()
        self.settings = settings
        self.pool = Pool(settings.pool, width)

    def forward(self, model, rng: Rng, *views: Encoded) -> dict[str, tuple]:
        """{"rank": (loss, number of anchors that have another user)}."""
        a, b, a_again, b_again = (self.pool(model, view) for view in views)
        ids = views[0].batch.sample_ids
        return {"rank": self.loss(a, b, a_again, b_again, ids, real_in(*views))}

    def loss(
        self,
        a: Tensor,
        b: Tensor,
        a_again: Tensor,
        b_again: Tensor,
        ids: Tensor,
        real: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(loss, number of anchors) from user vectors [B, D] of the four views. 0 with a live graph
        where nobody else is in the batch.

        ids: int64 [B], of the users. real: bool [B], who is not padding.
        """
        vectors = [v.to(accumulate_dtype(v)) for v in (a, b, a_again, b_again)]
        a, b, a_again, b_again = (F.normalize(v, dim=1) for v in vectors)
        a_b, a_b2, a2_b, a2_b2 = (
            (x * y).sum(1) for x, y in ((a, b), (a, b_again), (a_again, b), (a_again, b_again))
        )
        same = torch.cat([(a * a_again).sum(1), (b * b_again).sum(1)])  # [2B], of anchors a, b
        other = torch.stack([torch.cat([a_b, a_b]), torch.cat([a_b2, a2_b])])  # [2, 2B]
        if self.settings.fusion == "sample":
            alike = torch.stack([a_b, a_b2, a2_b, a2_b2]).detach().clamp_min(0).mean(0).repeat(2)
        else:
            alike = _mean_of_users(other.detach().mean(0).unflatten(0, (2, -1)), real)
            alike = alike.repeat_interleave(len(ids))
        everyone = torch.cat([a, b, a_again, b_again])
        hardest, index = self._hardest(torch.cat([a, b]), everyone, ids, real)
        counted = index >= 0
        if real is not None:
            counted = counted & real.repeat(2)
        # Where nobody else is there the maximum is -inf: 0 in its place has a finite gradient.
        hardest = torch.where(counted, hardest, 0.0)
        margin = (1 - alike) * (same - other.amax(0)) + alike * (other.amin(0) - hardest)
        count = counted.sum()
        return -(F.logsigmoid(margin) * counted).sum() / count.clamp_min(1), count

    def _hardest(self, anchors: Tensor, vectors: Tensor, ids: Tensor, real: Tensor | None):
        """Largest similarity and its position, [2B], of the anchors among the vectors [4B, D] of
        other users, of all processes; -inf and -1 where there are none."""
        query_group, candidate_group = ids.repeat(2), ids.repeat(4)
        if real is None and torch.distributed.is_initialized():
            real = torch.ones_like(ids, dtype=torch.bool)  # elsewhere somebody may be left out
        if real is not None:
            # A second id leaves padding out: everyone asks as 0, and who is real is 1.
            query_group = torch.stack([query_group, torch.zeros_like(query_group)], 1)
            candidate_group = torch.stack([candidate_group, real.to(ids.dtype).repeat(4)], 1)
        if torch.distributed.is_initialized():
            from fastrec.ops.common.collectives import gather, gather_rows, process_group

            world = process_group(torch.distributed.group.WORLD)
            own = torch.tensor([len(vectors)], device=vectors.device)
            sizes = gather(own, world).flatten().tolist()
            vectors = gather_rows(vectors, sizes, world)
            candidate_group = gather_rows(candidate_group, sizes, world)
        if len(vectors) == 0:
            return anchors.sum(1), anchors.new_full((len(anchors),), -1, dtype=torch.int64)
        return in_batch_hardest(
            anchors,
            vectors,
            query_group=query_group,
            candidate_group=candidate_group,
            backend=self.backend,
        )


def _mean_of_users(values: Tensor, real: Tensor | None) -> Tensor:
    """[2] from [2, B]: the mean over the users of all processes who are not padding."""
    if real is not None:
        values = values * real
    count = torch.ones_like(values[:1]) if real is None else real.to(values.dtype).unsqueeze(0)
    sums = torch.cat([values, count]).sum(1)
    if torch.distributed.is_initialized():
        from fastrec.ops.common.collectives import process_group, sum_over

        sums = sum_over(sums, process_group(torch.distributed.group.WORLD))
    return sums[:2] / sums[2].clamp_min(1)
