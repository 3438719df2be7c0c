# SPDX-License-Identifier: Apache-2.0
"""Social relation detection (SRD): UPRec section 3.3.3, eq. 13-14.

Legend: S sequences of this process, B queries, C candidates of all processes, D width.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastrec.data.pairs import Pairs
from fastrec.data.settings import check_one
from fastrec.data.side import SideData
from fastrec.nn.pool import Encoded, Pool, Pooling
from fastrec.nn.sphere import left_out
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

    def __post_init__(self):
        check_one("friends", self.views)

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
    tells_apart = True

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
        return {
            "friends": self.loss(self.pool(model, view), pairs, view.batch.real),
            "negatives": (torch.tensor(pairs.negatives, device="cpu"), None),
        }

    def loss(
        self, users: Tensor, pairs: Pairs, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor | int]:
        """(loss, B) from user vectors [S, D]; 0 with a live graph when no user has a friend.

        real: bool [S], who counts, as a query, as a friend that is asked for and as a negative.

        With several processes the candidates of all of them take part: the loss is the mean over
        the queries of this process, and candidates collect gradients from all processes.
        """
        group, profile, counts = None, pairs.candidate_profile, pairs.candidates_per_rank
        if len(counts) > 1:
            group = torch.distributed.group.WORLD
            before = sum(counts[: torch.distributed.get_rank()])
            if profile is not None:
                profile = profile[before : before + len(pairs.candidate_rows)]
        counted = self._counted(users, pairs, real, group)
        loss = in_batch_cross_entropy(
            users[pairs.query_rows],
            users[pairs.candidate_rows],
            similarity="weighted_l2",
            weight=self.weight,
            candidate_bias=None if counted is None else left_out(~counted[1]),
            positive=pairs.positive,
            query_group=pairs.query_profile,
            candidate_group=profile,
            exclude=pairs.exclude,
            group=group,
            candidates_per_rank=None if group is None else counts,
            reduction="mean" if counted is None else "none",
            backend=self.backend,
        )
        count: Tensor | int = len(pairs.positive)
        if counted is not None:
            count = counted[0].sum()
            loss = (loss * counted[0]).sum() / count.clamp_min(1)
        return loss + 0.0 * self.bias, count

    def _counted(
        self, users: Tensor, pairs: Pairs, real: Tensor | None, group
    ) -> tuple[Tensor, Tensor] | None:
        """(bool [B], bool [C]), the queries and candidates of this process that count; None: all
        of them. A query counts where its friend does, whichever process has that one."""
        if real is None and pairs.real is None and group is None:
            return None
        if real is None:  # in another process somebody may be left out
            real = torch.ones(len(users), dtype=torch.bool, device=users.device)
        queries, candidates = real[pairs.query_rows], real[pairs.candidate_rows]
        if pairs.real is not None:
            queries, candidates = queries & pairs.real[0], candidates & pairs.real[1]
        friends = candidates
        if group is not None:
            from fastrec.ops.common.collectives import gather_rows

            friends = gather_rows(candidates, pairs.candidates_per_rank, group)
        return queries & friends[pairs.positive], candidates
