# SPDX-License-Identifier: Apache-2.0
"""The next item of a model that reads the texts of items. Legend: N users, V items, D width."""

from torch import Tensor

from fastrec.data.item_texts import TextData
from fastrec.evaluation.next_item import NextItemJudge
from fastrec.evaluation.protocol import Protocol
from fastrec.nn.text_model import TextModel


class TextJudge:
    """Ranks targets as `NextItemJudge` does, by the vectors of the texts.

    These are encoded where the first users are asked, and kept until `metrics` ends a validation.
    """

    def __init__(self, texts: TextData, users: Tensor, split: str, protocol: Protocol):
        self.texts = texts
        self.ranking = NextItemJudge(texts.dataset, users, split, protocol)
        self.metric_names = self.ranking.metric_names

    def __len__(self) -> int:
        return len(self.ranking)

    def score(self, model, objective, rows: slice) -> Tensor:
        """float64, the ranks of the targets of some users, on the CPU."""
        return self.ranking.score(TextModel(model, self.texts), objective, rows)

    def metrics(self, scores: Tensor, objective=None) -> dict[str, float]:
        return self.ranking.metrics(scores)
