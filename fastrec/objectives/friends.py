# SPDX-License-Identifier: Apache-2.0
"""Social relation detection (SRD): UPRec section 3.3.3, eq. 13-14.

Legend: S sequences of this process, B queries, C candidates of all processes, D width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastrec.data.pairs import Pairs
from fastrec.data.side import SideData
from fastrec.nn.pool import Encoded, Pool, Pooling
from fastrec.ops.in_batch_cross_entropy import in_batch_cross_entropy
from fastrec.random import Rng


@dataclass(frozen=True)
class Friends:
    """Finding a user's friend among the drawn friends of a batch.

    Attributes:
        views: a view with the step `friend`.
        weight: in the joint loss.
        pool: the user vector.
        initial: where the weights of the similarity start; None is 1 / D.
    """

    views: list[str] = field(default_factory=lambda: ["main"])
    weight: float = 1.0
    pool: Pooling = "max"
    initial: float | None = None

    def build(self, model, side: SideData) -> "SocialRelationDetection":
        model.check_pool(self.pool)
        return SocialRelationDetection(model.config.width, self.initial, self.pool)


class SocialRelationDetection(nn.Module):
    """Mean over the queries of -log softmax_j(s(u_query, u_j))[friend], j over the drawn friends of
    the batch that are allowed as negatives, s(q, c) = -(sum_d w_d (q_d - c_d)^2 + b).

    w may take any sign, as in the paper; b cancels in the softmax, so its gradient is 0. The paper
    does not say where w starts. At 1 the first logits are sums over D features of normalised
    states, far from each other; the loss starts at many times log C and its gradient first draws
    all users together. 1 / D starts near log C.

    Args:
        width: D.
        initial: the first value of all w; None is 1 / D.
        pool: see `Friends`.
    """

    backend: str | None = None

    def __init__(self, width: int, initial: float | None = None, pool: Pooling = "max"):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1 / width if initial is None else initial))
        self.bias = nn.Parameter(torch.zeros(()))
        self.pool = Pool(pool, width)

    def forward(self, model, rng: Rng, view: Encoded) -> dict[str, tuple]:
        """{"friends": (loss, B)} and the mean number of negatives, which is only looked at."""
        pairs = view.batch.pairs
        if pairs is None:
            raise ValueError("the view of the objective friends has no pairs: it needs friend")
        loss = self.loss(self.pool(model, view), pairs)
        return {
            "friends": (loss, len(pairs.positive)),
            "negatives": (torch.tensor(pairs.negatives, device="cpu"), None),
        }

    def loss(self, users: Tensor, pairs: Pairs) -> Tensor:
        """A scalar from user vectors [S, D]; 0 with a live graph when no user has a friend.

        With several processes the candidates of all of them take part: the loss is the mean over
        the queries of this process, and candidates collect gradients from all processes.
        """
        bias = None
        if pairs.real is not None:
            bias = torch.where(pairs.real[1], 0.0, -torch.inf)
        group, profile, counts = None, pairs.candidate_profile, pairs.candidates_per_rank
        if len(counts) > 1:
            group = torch.distributed.group.WORLD
            before = sum(counts[: torch.distributed.get_rank()])
            if profile is not None:
                profile = profile[before : before + len(pairs.candidate_rows)]
        loss = in_batch_cross_entropy(
            users[pairs.query_rows],
            users[pairs.candidate_rows],
            similarity="weighted_l2",
            weight=self.weight,
            candidate_bias=bias,
            positive=pairs.positive,
            query_group=pairs.query_profile,
            candidate_group=profile,
            exclude=pairs.exclude,
            group=group,
            candidates_per_rank=None if group is None else counts,
            reduction="mean" if pairs.real is None else "none",
            backend=self.backend,
        )
        if pairs.real is not None:
            loss = (loss * pairs.real[0]).sum() / pairs.real[0].sum().clamp_min(1)
        return loss + 0.0 * self.bias
