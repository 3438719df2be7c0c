# SPDX-License-Identifier: Apache-2.0
"""A recipe: everything that names a system. The command line turns every field into a flag."""

import dataclasses
from dataclasses import dataclass, field
from typing import get_args, get_type_hints

from fastrec import recipes
from fastrec.data.attributes import Attribute
from fastrec.data.cold_items import ColdItems
from fastrec.data.item_texts import Texts
from fastrec.data.settings import from_values
from fastrec.data.steps.baskets import Baskets
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.mask_rating import MaskRating
from fastrec.data.views import Again
from fastrec.evaluation.protocol import Protocol
from fastrec.nn.encoders.bag import Bag
from fastrec.nn.encoders.parts import settings_of
from fastrec.nn.model_config import ModelConfig
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.training.checks import check_stage
from fastrec.training.stage import STAGE_KEYS, Stage


@dataclass(frozen=True)
class Users:
    """The users that are trained and evaluated. The others are held out: they test the judges
    "attributes" and "friends".

    Attributes:
        fraction: of all users, drawn at random.
        seed: of the draw.
    """

    fraction: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"users.fraction must be in (0, 1], got {self.fraction}")


@dataclass(frozen=True)
class Recipe:
    """A system: a model and the stages that train it.

    Attributes:
        model: sizes of the user model.
        texts: its events are the tokens of the texts of items; None: its events are items.
        pretraining: the first stage.
        ranking: pre-training that goes on from the first stage with another objective (AdaptSSR).
        recommendation: fine-tuning for the next item.
        profile: fine-tuning for user attributes.
        relation: fine-tuning for friends.
        cold_start: fine-tuning for items of another catalogue.
        click: fine-tuning for whether items are clicked.
        attributes: of the users that are predicted; an empty list takes all columns that have a
            type for it.
        evaluation: how a next item is ranked.
        users: who is trained on.
        cold_items: which cold-start rows train, validate and test.
        seed: of initialisation, order, steps of views and dropout.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    texts: Texts | None = None
    pretraining: Stage | None = None
    ranking: Stage | None = None
    recommendation: Stage | None = None
    profile: Stage | None = None
    relation: Stage | None = None
    cold_start: Stage | None = None
    click: Stage | None = None
    attributes: list[Attribute] = field(default_factory=list)
    evaluation: Protocol = field(default_factory=Protocol)
    users: Users = field(default_factory=Users)
    cold_items: ColdItems = field(default_factory=ColdItems)
    seed: int = 0

    def __post_init__(self):
        stages = self.stages
        for name, stage in stages.items():
            check_stage(name, stage, self.model)
        judges: set[str] = {stage.judge for stage in stages.values()}
        parts = [part for stage in stages.values() for part in stage.parts.values()]
        steps = [step for stage in stages.values() for step in stage.steps_of_views]
        self._check_texts(steps)
        self._check_steps(steps)
        described = any(isinstance(part, UserAttributes) for part in parts)
        described |= any(getattr(step, "same_profile", False) for step in steps)
        described |= any("profile" in getattr(part, "false_negatives", ()) for part in parts)
        if stages and self.attributes and not described:
            raise ValueError(
                "attributes has no effect: no stage predicts them or compares users by them"
            )
        self.evaluation.check_used(judges)
        drawn = self.users.fraction < 1 or any(s.judge_kind.held_out for s in stages.values())
        if stages and self.users.seed and not drawn:
            raise ValueError("users.seed has no effect: users.fraction is 1")
        if stages and self.cold_items != ColdItems() and "cold_start" not in judges:
            raise ValueError("cold_items has no effect: no stage judges cold_start")

    def _check_steps(self, steps: list) -> None:
        encoder = settings_of(self.model.encoder)
        for step in steps:
            if getattr(step, "moves", False) and not getattr(encoder, "reads_positions", False):
                raise ValueError(
                    f"the step {type(step).__name__.lower()} needs an encoder that reads positions:"
                    f" {type(encoder).__name__} does not"
                )
        for step in steps:
            if isinstance(step, MaskRating) and not step.hide and not isinstance(encoder, Bag):
                raise ValueError(
                    "mask_rating.hide false needs the encoder bag: every event would see the rating"
                    " that it is to predict"
                )
        made = any(isinstance(step, Baskets) for step in steps)
        made |= self.texts is not None
        if self.model.items.segment is not None and self.stages and not made:
            raise ValueError("model.items.segment has no effect: no step makes segments (baskets)")

    def _check_texts(self, steps: list) -> None:
        """Where events are tokens, what asks for items has no place, and the other way round."""
        of_texts = [type(step).__name__ for step in steps if getattr(step, "of_texts", False)]
        if self.texts is None:
            judged = [name for name, stage in self.stages.items() if stage.judge == "texts"]
            if of_texts or judged or self.model.items.item_place is not None:
                what = "the step item_texts" if of_texts else "model.items.item_place"
                what = f"{judged[0]}.judge: texts" if judged else what
                raise ValueError(f"{what} needs the key texts: the events are items")
            return
        if "cls" not in self.model.tokens:
            raise ValueError("texts: the vector of a text is read at [CLS]: model.tokens: [cls]")
        if self.model.items.features or self.model.items.attributes or self.model.user_width:
            raise ValueError(
                "texts: events are tokens: model.items has no features and attributes, and the"
                " model no user_width"
            )
        if self.evaluation.logit_adjustment:
            raise ValueError("texts: scores are cosines: evaluation.logit_adjustment must be 0")
        for name, stage in self.stages.items():
            if stage.judge != "texts":
                raise ValueError(f"{name}.judge is {stage.judge}: with the key texts it is texts")
        for step in steps:
            if not getattr(step, "of_texts", False) and not isinstance(step, (Again, Mask)):
                raise ValueError(f"texts: the step {type(step).__name__.lower()} is of items")

    @classmethod
    def load(cls, name_or_file: str, **changes) -> "Recipe":
        """The recipe of a name (`fastrec recipes`) or YAML file with `changes`: keys of a recipe,
        groups of them as dicts, merged as `base:` does; or keys of a stage, for `pretraining`.

            Recipe.load("sasrec", steps=1000, model={"max_len": 20}, seed=1)

        Raises FileNotFoundError that lists the recipes, TypeError or ValueError for a key.
        """
        own = [field.name for field in dataclasses.fields(cls)]
        settings = recipes.load(str(name_or_file))
        for key, value in changes.items():
            if key not in own and key not in STAGE_KEYS:
                raise TypeError(f"{key!r} is no key of a recipe {own} nor of a stage {STAGE_KEYS}")
            part = {key: value} if key in own else {"pretraining": {key: value}}
            settings = recipes.merged(settings, part)
        return from_values(cls, settings)

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages that this recipe has, by name."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: part for name, part in named.items() if isinstance(part, Stage)}

    def stage(self, name: str) -> Stage:
        """Raises ValueError that lists the stages for one that this recipe has not."""
        if not self.stages:
            raise ValueError("there is no stage to run: --config names a recipe (fastrec recipes)")
        if name not in self.stages:
            raise ValueError(
                f"this recipe has no stage {name!r}; its stages are {[*self.stages]} (--task)"
            )
        return self.stages[name]


# The names of the stages of a recipe.
STAGES = [name for name, hint in get_type_hints(Recipe).items() if Stage in get_args(hint)]


def from_groups(settings: dict) -> dict:
    """Keys of a stage in Python, groups of them as dicts, as a recipe has them."""
    hints, groups = get_type_hints(Stage), ("init", "tables", "similar")
    return {
        key: from_values(hints[key], value, key)
        if key in groups and isinstance(value, dict)
        else value
        for key, value in settings.items()
    }
