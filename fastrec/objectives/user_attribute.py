"""User attribute prediction (UAP): UPRec section 3.3.2, eq. 8-12.

Legend: S users of a batch, D width.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from fastrec.data.attributes import EncodedAttribute


class UserAttributePrediction(nn.Module):
    """One linear layer from user vectors to all attributes.

    Numeric attributes: mean of huber(w u + b - a) with delta 1 over the users whose value a is
    known, a standardised (eq. 9-10). Discrete ones: mean of -log softmax(W u + b)[a] (eq. 11).

    Args:
        width: D.
        attributes: their order is that of the outputs; `scales` tells what these mean.
    """

    def __init__(self, width: int, attributes: list[EncodedAttribute]):
        super().__init__()
        self.names = [attribute.name for attribute in attributes]
        self.sizes = [attribute.outputs for attribute in attributes]
        self.scales = [attribute.scale for attribute in attributes]
        self.linear = nn.Linear(width, sum(self.sizes))
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def predict(self, users: Tensor) -> dict[str, Tensor]:
        """[S, D] to [S, 1] standardised values or [S, classes] logits of each attribute."""
        parts = self.linear(users).split(self.sizes, dim=1)
        return dict(zip(self.names, parts, strict=True))

    def forward(self, users: Tensor, columns: dict[str, Tensor]) -> dict[str, tuple]:
        """(mean loss, number of users with a value) of each attribute; eq. 12 is the sum.

        columns: the attributes of the same users, as `EncodedAttribute.values` holds them. A loss
        over no user is 0 with a live graph.
        """
        missing = [name for name in self.names if name not in columns]
        if missing:
            raise ValueError(f"the batch has no column {missing[0]!r}, it has {sorted(columns)}")
        losses = {}
        for name, output in self.predict(users).items():
            target = columns[name]
            if target.is_floating_point():
                known = ~target.isnan()
                value = output.squeeze(1).float()
                loss = F.huber_loss(value, target.nan_to_num(), reduction="none") * known
            else:
                known = target >= 0
                loss = F.cross_entropy(output.float(), target, ignore_index=-1, reduction="none")
            count = known.sum()
            losses[name] = loss.sum() / count.clamp_min(1), count
        return losses
