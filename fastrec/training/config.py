# SPDX-License-Identifier: Apache-2.0
"""A recipe: everything that names a system. The command line turns every field into a flag."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args, get_type_hints

from fastrec import recipes
from fastrec.data.attributes import Attribute
from fastrec.data.cold_items import ColdItems
from fastrec.data.item_texts import Texts
from fastrec.data.settings import check_choices, from_values
from fastrec.data.steps.baskets import Baskets
from fastrec.data.steps.fill import Fill
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.mask import Mask
from fastrec.data.steps.parts import Step
from fastrec.data.views import Again, parts_of
from fastrec.evaluation.next_item import Protocol
from fastrec.nn.encoders.parts import settings_of
from fastrec.nn.encoders.sublayers import PatchForm
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.transfer import PARTS
from fastrec.objectives.cold_start import ColdStart
from fastrec.objectives.friends import Friends
from fastrec.objectives.item import Item
from fastrec.objectives.parts import Objectives
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.training.rows import Tables


@dataclass(frozen=True)
class Init:
    """What a stage takes from the model that it starts from (`--init`).

    Attributes:
        take: items, encoder, head (of the items), or the name of an objective whose parameters are
            taken over where both models have them. Where the items are others: input (levels of
            ratings and time gaps, what joins them, special tokens), transform (of the head) and
            users (their vectors). The rest starts at random.
        freeze: parts that are taken and not trained; patches inside of them are.
        patch: width of the model patches that the encoder gets, 0 for none (PeterRec).
        patch_form: "serial", behind each convolution or sublayer, or "parallel", of its input and
            added to what it gives.
        second_norm: train the second LayerNorm of each block of a frozen encoder, as PeterRec may.
        pool: an objective of that model, such as rank: the objectives of this stage begin with the
            parameters of its pool.
        ids: embed the ids of the items, from 0, beside the features that the model has alone
            (transductive).
        causal: whether the encoder of this stage is causal, whatever `model` says; None: as there.
            S3-Rec trains at masked items, and then for next items with the same weights.
        users: whose ids that model has seen: the "same" as in this data set, who are not held out
            to test it then, or "other" people.
    """

    take: list[str] = field(default_factory=lambda: ["items", "encoder", "head"])
    freeze: list[Literal["items", "encoder", "head", "input", "transform", "users"]] = field(
        default_factory=list
    )
    patch: int = 0
    patch_form: PatchForm = "serial"
    second_norm: bool = False
    pool: str | None = None
    ids: bool = False
    causal: bool | None = None
    users: Literal["same", "other"] = "same"

    def __post_init__(self):
        for name, values in (("users", ("same", "other")), ("patch_form", ("serial", "parallel"))):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"init.{name} must be {values[0]!r} or {values[1]!r}, got"
                    f" {getattr(self, name)!r}"
                )
        objectives = [field.name for field in dataclasses.fields(Objectives)]
        if self.pool is not None and self.pool not in objectives:
            raise ValueError(f"init.pool is {self.pool!r}, expected one of {objectives}")
        known = (*PARTS, *objectives)
        for name in self.take:
            if name not in known:
                raise ValueError(f"init.take names {name!r}, expected some of {list(known)}")
        for name in self.freeze:
            if name not in self.take:
                raise ValueError(f"init.freeze names {name!r}, which init.take does not: random")
        if self.ids and "items" in self.take:
            raise ValueError("init.ids needs init.take with input in place of items: ids are new")
        if "users" in self.take and self.users == "other":
            raise ValueError("init.take names users, whose vectors init.users: other starts anew")
        if self.patch < 0:
            raise ValueError(f"init.patch must not be negative, got {self.patch}")
        if self.patch_form != "serial" and not self.patch:
            raise ValueError("init.patch_form has no effect: init.patch is 0")
        if self.second_norm and "encoder" not in self.freeze:
            raise ValueError("init.second_norm has no effect: init.freeze leaves the encoder out")


@dataclass(frozen=True)
class Stage:
    """One training run of a system: pre-training, or fine-tuning for a task.

    Attributes:
        views: named lists of steps that make what is encoded of the users of a step.
        objectives: what is trained on the views. In Python also {name: settings or module}.
        judge: what validation and `evaluate` measure: the next item of each user, attributes of
            users who were not trained on, their friends, items of another catalogue, or whether
            users are found again by their vectors, which needs no target. "texts": the next item
            of a model that reads the texts of items.
        init: what is taken from the model that the stage starts from.
        tables: how the item table is updated.
        filler: folder of the masked-item model that the step `fill` draws from.
        steps: optimiser steps, a multiple of `validate_every` where that is smaller.
        batch_size: users a step.
        dropout: of the model in this stage and from then on; None: as the model has it.
        learning_rate: of Adam, the peak of the schedule.
        schedule: "constant", or "cosine" or "linear" down to 0 at the last step, after warm-up.
        warmup_steps: linear warm-up from 0.
        weight_decay: decoupled (AdamW).
        betas: of Adam, the decay of its averages of the gradient and of its square.
        gradient_clip: largest gradient norm; 0 = off.
        precision: "32-true" or "bf16-mixed".
        validate_every: steps between validations.
        monitor: validation metric that chooses the kept model and stops early; None: NDCG@10 of
            the next item, MRR@10 of cold_start, "score" of attributes, "accuracy" of friends, MRR
            of vectors. "steps" keeps the last model and never stops: for objectives that do not
            train what the judge asks.
        patience: validations without improvement before stopping; 0 = never.
        checkpoint_every: steps between checkpoints to resume from.
        devices: processes, one per GPU (or CPU); they share each batch (DDP). "auto" = all GPUs, or
            one CPU process.
        backend: of the losses (items, friends, contrast); None = native.
        cuda_graph: replay forward and backward from CUDA graphs, batches padded to a budget. One
            process on one GPU.
    """

    views: dict[str, list[Step]] = field(default_factory=dict)
    objectives: Objectives = field(default_factory=Objectives)
    judge: Literal["next_item", "attributes", "friends", "vectors", "cold_start", "texts"] = (
        "next_item"
    )
    init: Init = field(default_factory=Init)
    tables: Tables = field(default_factory=Tables)
    filler: str | None = None
    steps: int = 10000
    batch_size: int = 768
    dropout: float | None = None
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    gradient_clip: float = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    validate_every: int = 1000
    monitor: str | None = None
    patience: int = 10
    checkpoint_every: int = 500
    devices: int | Literal["auto"] = "auto"
    backend: Literal["reference", "cpp", "triton"] | None = None
    cuda_graph: bool = False

    def __post_init__(self):
        check_choices(self)
        if self.devices != "auto" and not 1 <= int(self.devices) <= 1024:
            raise ValueError(f"devices must be in [1, 1024] or 'auto', got {self.devices}")
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "gradient_clip", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {list(self.betas)}")
        if self.steps % self.pass_steps:
            raise ValueError(
                f"steps ({self.steps}) must be a multiple of validate_every"
                f" ({self.validate_every}): the last steps would not be validated"
            )
        read = set()
        for name, objective in self.parts.items():
            for view in getattr(objective, "views", ["main"]):
                read.add(view)
                if view not in self.views:
                    raise ValueError(
                        f"the objective {name} reads the view {view!r}; views are"
                        f" {list(self.views)}"
                    )
        read |= {part.view for part in self.steps_of_views if hasattr(part, "view")}
        if unread := [name for name in self.views if name not in read]:
            raise ValueError(f"no objective reads the view {unread[0]!r}: it has no effect")
        self._check_rows()
        if self.filler is not None and not self.fills:
            raise ValueError("filler has no effect: no view has the step fill")

    def _check_rows(self) -> None:
        """The rows of cold start are no users: nothing else that asks who a user is goes along."""
        cold = [name for name, part in self.parts.items() if isinstance(part, ColdStart)]
        if self.judge != "cold_start":
            if cold:
                raise ValueError(f"the objective {cold[0]} needs judge: cold_start")
            return
        if not cold:
            raise ValueError("the judge cold_start needs the objective cold_start")
        for name, part in self.parts.items():
            if isinstance(part, (Item, Friends, UserAttributes)):
                raise ValueError(f"the objective {name} cannot be trained beside {cold[0]}")
        if any(isinstance(part, Friend) for part in self.steps_of_views):
            raise ValueError("the step friend has no place in a stage with judge: cold_start")

    @property
    def steps_of_views(self) -> list:
        """The steps of all views, those inside of choices included."""
        return [part for steps in self.views.values() for part in parts_of(steps)]

    @property
    def fills(self) -> bool:
        """Whether a view has the step `fill`."""
        return any(isinstance(part, Fill) for part in self.steps_of_views)

    @property
    def parts(self) -> dict:
        """The objectives by name."""
        given = self.objectives
        return dict(given) if isinstance(given, Mapping) else given.named()

    def event_columns(self, model: list[str]) -> list[str]:
        """Columns of events that its steps read, beside those of the model."""
        read = [name for step in self.steps_of_views for name in getattr(step, "event_columns", ())]
        return [*model, *dict.fromkeys(name for name in read if name not in model)]

    @property
    def pass_steps(self) -> int:
        """Steps up to a validation."""
        return min(self.validate_every, self.steps)

    @property
    def monitored(self) -> str:
        defaults = {
            "next_item": "NDCG@10", "friends": "accuracy", "cold_start": "MRR@10", "vectors": "MRR",
            "texts": "NDCG@10",
        }  # fmt: skip
        return self.monitor or defaults.get(self.judge, "score")


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
    attributes: list[Attribute] = field(default_factory=list)
    evaluation: Protocol = field(default_factory=Protocol)
    users: Users = field(default_factory=Users)
    cold_items: ColdItems = field(default_factory=ColdItems)
    seed: int = 0

    def __post_init__(self):
        stages = self.stages
        for name, stage in stages.items():
            for objective in stage.parts.values():
                if isinstance(objective, Item) and stage.judge == "next_item":
                    causal = stage.init.causal
                    causal = self.model.causal if causal is None else causal
                    _check_asked(name, stage, objective, causal)
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
        drawn = self.users.fraction < 1 or judges & {"attributes", "friends"}
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


# The names of the keys of a stage, and of the stages of a recipe.
STAGE_KEYS = [field.name for field in dataclasses.fields(Stage)]
STAGES = [name for name, hint in get_type_hints(Recipe).items() if Stage in get_args(hint)]


def _check_asked(name: str, stage: Stage, objective: Item, causal: bool) -> None:
    """A model is trained for what its judge asks: a causal one at its last item, another at a
    [MASK]. Views with steps of somebody else are not looked at."""
    for view in objective.views:
        asks = [getattr(part, "asks", None) for part in parts_of(stage.views[view])]
        if causal and "last" not in asks and "mask" in asks and len(objective.views) == 1:
            raise ValueError(
                f"{name}: a causal encoder is asked for the next item at its last item, and the"
                f" view {view!r} trains it at [MASK] alone: use next_item, or causal: false"
            )
        if not causal and "last" in asks:
            raise ValueError(
                f"{name}: next_item needs a causal encoder: here every event of the view {view!r}"
                " would see the item that it is to predict"
            )
