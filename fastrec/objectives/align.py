# SPDX-License-Identifier: Apache-2.0
"""Two views of a user predict each other, without negatives: CLUE (Cheng et al., 2021, section
IV-A) after SimSiam (Chen and He, 2021).

Legend: B users, D width, W width of the projections, K width of the predictor's bottleneck.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.settings import check_pair
from fastrec.data.side import SideData
from fastrec.nn.batch_norm import BatchNorm
from fastrec.nn.pool import Encoded, Pool, Pooling, real_in
from fastrec.nn.sphere import alignment, feature_std, uniformity
from fastrec.random import Rng


@dataclass(frozen=True)
class Align:
    """The projection of one view of a user is predicted from that of the other.

    Attributes:
        views: two views of the same users.
        weight: in the joint loss.
        pool: the user vector.
        width: of the projections; that of the model if None.
        bottleneck: width inside the predictor; a quarter of `width` if None.
        stop_gradient: hold what is predicted constant. Without it all users become one vector.
        predictor: predict by a network of its own; false compares the projections themselves.
    """

    views: list[str]
    weight: float = 1.0
    pool: Pooling = "ur"
    width: int | None = None
    bottleneck: int | None = None
    stop_gradient: bool = True
    predictor: bool = True

    def __post_init__(self):
        check_pair("align", self.views)
        for name in ("width", "bottleneck"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"align.{name} must be at least 1, got {value}")
        if self.bottleneck is not None and not self.predictor:
            raise ValueError("align.bottleneck has no effect: predictor is false")

    def build(self, model, side: SideData) -> "ViewAlignment":
        model.check_pool(self.pool)
        return ViewAlignment(self, model.config.width)


class _Layer(nn.Module):
    """Linear, batch normalisation and, but for the last layer, ReLU."""

    def __init__(self, inputs: int, outputs: int, last: bool = False):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)  # the normalisation subtracts a bias
        self.norm, self.last = BatchNorm(outputs), last

    def forward(self, x: Tensor, real: Tensor | None) -> Tensor:
        x = self.norm(self.linear(x), real)
        return x if self.last else F.relu(x)


class ViewAlignment(nn.Module):
    """With u the user vectors of a view, z = f(u) and p = h(z), the mean over the users of

        L = D(p_1, sg(z_2)) / 2 + D(p_2, sg(z_1)) / 2,   D(p, z) = -p.z / (|p| |z|)     (eq. 4-7)

    f, the projector: three linear layers W wide, each with batch normalisation, ReLU behind the
    first two. h, the predictor: linear to K, batch normalisation, ReLU, linear to W. The paper
    names the layers; where the ReLUs are, and K = W / 4, is SimSiam's. The statistics of each
    normalisation are those of one view, of the users of all processes.

    A step needs 2 users: `BatchNorm`.
    """

    backend: str | None = None
    least_users = 2

    def __init__(self, settings: Align, width: int):
        super().__init__()
        self.settings = settings
        self.pool = Pool(settings.pool, width)
        wide = settings.width or width
        narrow = settings.bottleneck or max(1, wide // 4)
        self.projector = nn.ModuleList(
            [_Layer(width, wide), _Layer(wide, wide), _Layer(wide, wide, last=True)]
        )
        self.predictor = self.out = None
        if settings.predictor:
            self.predictor, self.out = _Layer(wide, narrow), nn.Linear(narrow, wide)

    def forward(self, model, rng: Rng, first: Encoded, second: Encoded) -> dict[str, tuple]:
        """{"align": (loss, B)} and numbers to look at: see `losses`."""
        a, b = self.pool(model, first), self.pool(model, second)
        return self.losses(a, b, real_in(first, second))

    def losses(self, a: Tensor, b: Tensor, real: Tensor | None = None) -> dict[str, tuple]:
        """From user vectors [B, D] of both views. Beside the loss, of z / |z| of the users of this
        process, to see a collapse by: "alignment", "uniformity" and "std", the last two of the
        first view. A healthy std is near W^-0.5; that of a collapse is 0.

        real: bool [B], who is not padding.
        """
        if real is not None:  # what padding holds meets no weight, whose gradient would be NaN
            a, b = (torch.where(real.unsqueeze(1), users, 0.0) for users in (a, b))
        z1, z2 = self.project(a, real), self.project(b, real)
        p1, p2 = self.predict(z1, real), self.predict(z2, real)
        loss = (self._distance(p1, z2) + self._distance(p2, z1)) / 2
        count: Tensor | int = len(a)
        if real is None:
            mean = loss.sum() / max(len(a), 1)
        else:
            count = real.sum()
            mean = torch.where(real, loss, 0.0).sum() / count.clamp_min(1)
        with torch.no_grad():
            z1, z2 = (F.normalize(z.detach(), dim=1) for z in (z1, z2))
            seen = {
                "alignment": alignment(z1, z2, real),
                "uniformity": uniformity(z1, real, self.backend),
                "std": feature_std(z1, real),
            }
        return {"align": (mean, count), **{name: (value, None) for name, value in seen.items()}}

    def project(self, users: Tensor, real: Tensor | None = None) -> Tensor:
        """z [B, W] of user vectors [B, D]."""
        for layer in self.projector:
            users = layer(users, real)
        return users

    def predict(self, z: Tensor, real: Tensor | None = None) -> Tensor:
        """p [B, W] of z [B, W]; z itself without a predictor."""
        if self.predictor is None or self.out is None:
            return z
        return self.out(self.predictor(z, real)).to(z.dtype)

    def _distance(self, p: Tensor, z: Tensor) -> Tensor:
        """[B]: the negative cosine of each user."""
        return -F.cosine_similarity(p, z.detach() if self.settings.stop_gradient else z)
