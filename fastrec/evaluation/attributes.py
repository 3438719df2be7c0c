# SPDX-License-Identifier: Apache-2.0
"""User profile prediction: accuracy of categories, squared error of numbers (UPRec section 4.3).

Legend: N users, A attributes.
"""

import torch
from torch import Tensor

from fastrec.data.attributes import EncodedAttribute
from fastrec.evaluation.blocks import finite
from fastrec.objectives.user_attributes import UserAttributePrediction


class AttributesJudge:
    """Predicts the attributes of a user set from their sequences.

    attributes: encoded with the training users, whose mean and most frequent class are the
        baseline.
    split: input of the users, see `SequenceDataset`.
    """

    def __init__(
        self,
        dataset,
        users: Tensor,
        split: str,
        attributes: list[EncodedAttribute],
        training_users: Tensor,
    ):
        self.dataset, self.users, self.split, self.attributes = dataset, users, split, attributes
        self.majority = [
            attribute.values[training_users][attribute.known(training_users)].mode().values.double()
            if attribute.labels
            else torch.tensor(0.0, dtype=torch.float64, device="cpu")
            for attribute in attributes
        ]
        for attribute in attributes:
            if not attribute.known(users).any():
                raise ValueError(f"no evaluated user has a value of {attribute.name!r}")

    def __len__(self) -> int:
        return len(self.users)

    def score(self, model, objective, rows: slice) -> Tensor:
        """float64 [N, A]: predicted standardised values and class indices, on the CPU."""
        head = objective.require(UserAttributePrediction, "attributes", "user_attributes")
        with torch.no_grad():
            batch = model.inputs(self.dataset, self.users[rows], self.split)
            encoded = model.encode(batch.to(model.device))
            outputs = head.predict(head.pool(model, encoded))
            outputs = {name: finite(each, "predictions") for name, each in outputs.items()}
        columns = [
            outputs[a.name].argmax(1) if a.labels else outputs[a.name].squeeze(1)
            for a in self.attributes
        ]
        return torch.stack([column.double().cpu() for column in columns], dim=1)

    def baseline(self) -> Tensor:
        """The predictions of the constant: the mean, and the most frequent class, of training."""
        return torch.stack(self.majority).expand(len(self.users), -1)

    @property
    def metric_names(self) -> list[str]:
        return list(self.metrics(self.baseline()))

    def metrics(self, scores: Tensor, objective=None) -> dict[str, float]:
        """Per attribute "NAME accuracy" or "NAME MSE" (in the unit of its `range`), over the users
        whose value is known; "score" is the mean over attributes of accuracy and of
        1 - MSE / MSE of the constant.

        scores: what `score` gives for all rows.
        """
        metrics, parts = {}, []
        for attribute, predicted in zip(self.attributes, scores.unbind(1), strict=True):
            known = attribute.known(self.users)
            target = attribute.values[self.users][known].double()
            if attribute.labels:
                value = (predicted[known] == target).double().mean().item()
                metrics[f"{attribute.name} accuracy"] = value
                parts.append(value)
            else:
                error = (predicted[known] - target).square().mean()
                metrics[f"{attribute.name} MSE"] = error.item() * attribute.unit**2
                parts.append((1 - error / target.square().mean().clamp_min(1e-12)).item())
        return {"score": sum(parts) / len(parts), **metrics}
