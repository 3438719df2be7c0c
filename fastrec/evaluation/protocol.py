# SPDX-License-Identifier: Apache-2.0
"""Evaluation protocols: which items a user's targets are ranked against.

`full`: all items. `sampled`: 99 negatives, items of the user's whole sequence rejected, without
replacement, drawn by popularity (UPRec, section 4.2), uniformly (S3-Rec, section 5.1.2), or listed
in a file.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from fastrec.data.settings import check_fields, from_values
from fastrec.evaluation.judges import JUDGES

ELSEWHERE = ("friend_negatives", "seed")  # what judges read that rank no items


@dataclass(frozen=True)
class Protocol:
    """How a target is ranked.

    Attributes:
        candidates: "full" (all items) or "sampled" (1 target + `negatives`).
        negatives: drawn per user, for "sampled"; 99 if None.
        negatives_by: "popularity" (if None) or "uniform".
        negatives_file: of "sampled": a line `user item item ..` for each user, in original ids.
        seen: "none" keeps items of the input in a full ranking, "exclude" leaves them out, "zero"
            sets their scores to 0, as S3-Rec's program and those that follow it do: for parity with
            models whose scores have a meaning around 0, such as those of BCE. Targets of the user
            are never left out.
        cutoffs: k of HR@k and NDCG@k.
        logit_adjustment: tau of `adjustment`; 0 ranks by the scores of the model.
        friend_negatives: others beside the friend, of the judge "friends"; 99 if None.
        seed: of sampled negatives.
    """

    candidates: Literal["full", "sampled"] = "full"
    negatives: int | None = None
    negatives_by: Literal["popularity", "uniform"] | None = None
    negatives_file: str | None = None
    seen: Literal["none", "exclude", "zero"] = "none"
    cutoffs: list[int] = field(default_factory=lambda: [1, 5, 10])
    logit_adjustment: float = 0.0
    friend_negatives: int | None = None
    seed: int = 0

    def __post_init__(self):
        check_fields(self)
        for name in ("negatives", "friend_negatives"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"evaluation.{name} must be at least 1, got {value}")
        for name in ("negatives", "negatives_by", "negatives_file"):
            if getattr(self, name) is not None and self.candidates == "full":
                raise ValueError(f"evaluation.{name} has no effect: candidates is full")
        if self.negatives_file is not None:
            for name in ("negatives", "negatives_by"):
                if getattr(self, name) is not None:
                    raise ValueError(f"evaluation.{name} has no effect: negatives_file lists them")
        if not self.cutoffs or min(self.cutoffs) < 1:
            raise ValueError(f"evaluation.cutoffs must be at least 1, got {self.cutoffs}")
        if self.seen != "none" and self.candidates == "sampled":
            raise ValueError(
                "evaluation.seen has no effect: sampled candidates are never items that were seen;"
                " set it to none"
            )

    @property
    def others(self) -> int:
        """Negatives beside a target."""
        return 99 if self.negatives is None else self.negatives

    @property
    def drawn_by(self) -> Literal["popularity", "uniform"]:
        """How negatives are drawn."""
        return self.negatives_by or "popularity"

    @property
    def other_friends(self) -> int:
        """Users beside a friend."""
        return 99 if self.friend_negatives is None else self.friend_negatives

    def __str__(self) -> str:
        """As a sentence."""
        text = "the target ranked among all items"
        if self.candidates == "sampled":
            law = "uniformly" if self.drawn_by == "uniform" else "by popularity"
            text = f"the target ranked among {self.others} items sampled {law} (seed {self.seed})"
            if self.negatives_file is not None:
                text = f"the target ranked among the items of {self.negatives_file}"
        elif self.seen == "exclude":
            text += " but those of the user's history"
        elif self.seen == "zero":
            text += ", scores of the user's history set to 0"
        else:
            text += ", those of the user's history included"
        if self.logit_adjustment:
            text += f", scores less {self.logit_adjustment:g} log of the popularity"
        return text

    def check_used(self, judges: set[str]) -> None:
        """Raise ValueError for a key that none of the judges of a recipe reads."""
        if judges and self.friend_negatives is not None and "friends" not in judges:
            raise ValueError("evaluation.friend_negatives has no effect: no stage judges friends")
        if judges and not any(JUDGES[name].ranks_items for name in judges):
            for key in fields(self):
                default = key.default if key.default_factory is MISSING else key.default_factory()
                if key.name not in ELSEWHERE and getattr(self, key.name) != default:
                    raise ValueError(f"evaluation.{key.name} has no effect: no stage ranks items")
        if judges and self.logit_adjustment and "next_item" not in judges:
            raise ValueError("evaluation.logit_adjustment has no effect: no stage ranks all items")
        if judges and self.seed and self.candidates == "full" and "friends" not in judges:
            raise ValueError("evaluation.seed has no effect: candidates is full")


def protocol_of(model) -> Protocol | None:
    """The protocol that a model was chosen by; None of one that `fit` has not trained."""
    if model.recipe is None:
        return None
    return from_values(Protocol, model.recipe.get("evaluation", {}), "evaluation")
