# SPDX-License-Identifier: Apache-2.0
"""A stage of a recipe: one training run, and what it starts from."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal

from fastrec.data.settings import check_fields
from fastrec.data.steps.baskets import Baskets
from fastrec.data.steps.click import Click as Labelled
from fastrec.data.steps.fill import Fill
from fastrec.data.steps.friend import Friend
from fastrec.data.steps.insert import Insert
from fastrec.data.steps.parts import Step
from fastrec.data.steps.same_target import SameTarget
from fastrec.data.steps.substitute import Substitute
from fastrec.data.views import check_steps, parts_of
from fastrec.evaluation.judges import JUDGES, JudgeKind, JudgeName
from fastrec.nn.encoders.sublayers import PatchForm
from fastrec.nn.transfer import PARTS
from fastrec.objectives.align import Align
from fastrec.objectives.click import Click
from fastrec.objectives.cold_start import ColdStart
from fastrec.objectives.item_attributes import ItemAttributes
from fastrec.objectives.parts import Objectives, check_objectives
from fastrec.objectives.user_attributes import UserAttributes
from fastrec.training.rows import Tables

# Steps that ask who a user is, or what other users have.
_OF_USERS = {
    Friend: "friend", Substitute: "substitute", Insert: "insert", SameTarget: "same_target",
    Baskets: "baskets",
}  # fmt: skip


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
        check_fields(self)
        objectives = [field.name for field in dataclasses.fields(Objectives)]
        if self.pool is not None and self.pool not in objectives:
            raise ValueError(f"init.pool is {self.pool!r}, expected one of {objectives}")
        known = (*PARTS, *objectives)
        for name in self.take:
            if name not in known:
                raise ValueError(f"init.take names {name!r}, expected some of {list(known)}")
        inside = {"input": "items", "transform": "head", "users": "head"}
        if self.users == "other":
            del inside["users"]
        for name in self.freeze:
            if name not in self.take and inside.get(name) not in self.take:
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
class Similar:
    """What says which items are similar, for the steps `substitute` and `insert`.

    Attributes:
        model: folder of a trained model: items are similar by the products of their vectors.
        users: the more similar one of that and of the item with the most users in common, both
            scaled to 0 .. 1 (the hybrid of CoSeRec); false: by the model alone.
    """

    model: str
    users: bool = True


@dataclass(frozen=True)
class Stage:
    """One training run of a system: pre-training, or fine-tuning for a task.

    Attributes:
        views: named lists of steps that make what is encoded of the users of a step.
        objectives: what is trained on the views. In Python also {name: settings or module}.
        judge: what validation and `evaluate` measure: the next item of each user, attributes of
            users who were not trained on, their friends, items of another catalogue, the ratings
            of held-out events, which of them are clicks, or whether users are found again by their
            vectors, which needs no target. "texts": the next item of a model that reads the texts
            of items.
        init: what is taken from the model that the stage starts from.
        tables: how the item table is updated.
        filler: folder of the masked-item model that the step `fill` draws from.
        similar: a model that says which items are similar; None: those with the most users in
            common.
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
        validate_users: whom a validation asks at most, drawn at random; None: all. Of attributes
            and friends it is a tenth of the users.
        monitor: validation metric that chooses the kept model and stops early; None: NDCG@10 of
            the next item, MRR@10 of cold_start, "score" of attributes and ratings, "accuracy" of
            friends, MRR of vectors, AUC of click. "steps" keeps the last model and never stops: for
            objectives that do not train what the judge asks.
        patience: validations without improvement before stopping; 0 = never.
        checkpoint_every: steps between checkpoints to resume from.
        devices: processes, one per GPU (or CPU); they share each batch (DDP). "auto" = all GPUs, or
            one CPU process.
        num_nodes: machines, each with as many processes; all see one `output`.
        backend: of the ops of the losses; None: the device's own. The encoder's is always that.
        cuda_graph: replay forward and backward from CUDA graphs, batches padded to a budget. One
            process on one GPU.
    """

    views: dict[str, list[Step]] = field(default_factory=dict)
    objectives: Objectives = field(default_factory=Objectives)
    judge: JudgeName = "next_item"
    init: Init = field(default_factory=Init)
    tables: Tables = field(default_factory=Tables)
    filler: str | None = None
    similar: Similar | None = None
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
    validate_users: int | None = None
    monitor: str | None = None
    patience: int = 10
    checkpoint_every: int = 500
    devices: int | Literal["auto"] = "auto"
    num_nodes: int = 1
    backend: Literal["reference", "cpp", "triton"] | None = None
    cuda_graph: bool = False

    def __post_init__(self):
        check_fields(self)
        for each in dataclasses.fields(self):  # Lightning takes no integer of NumPy
            value = getattr(self, each.name)
            if isinstance(value, Integral) and not isinstance(value, bool):
                object.__setattr__(self, each.name, int(value))
        check_steps(self.views)
        check_objectives(self.objectives)
        if self.devices != "auto" and not 1 <= int(self.devices) <= 1024:
            raise ValueError(f"devices must be in [1, 1024] or 'auto', got {self.devices}")
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every", "num_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "gradient_clip", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.validate_users is not None:
            if self.validate_users < 1:
                raise ValueError(f"validate_users must be at least 1, got {self.validate_users}")
            if self.judge_kind.held_out or self.judge_kind.rows:
                raise ValueError(f"validate_users has no effect on the judge {self.judge}")
        if self.monitor in self.judge_kind.errors:
            best = self.judge_kind.monitor
            raise ValueError(f"monitor {self.monitor}: the largest would be kept; use {best}")
        if self.monitor == "steps" and self.patience not in (0, Stage.patience):
            raise ValueError("patience has no effect: with monitor: steps nothing stops early")
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
        self._check_labels()
        if self.filler is not None and not self.fills:
            raise ValueError("filler has no effect: no view has the step fill")
        asks = any(isinstance(part, (Substitute, Insert)) for part in self.steps_of_views)
        if self.similar is not None and not asks:
            raise ValueError("similar has no effect: no view has the step substitute or insert")

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
            ours = type(part).__module__.startswith("fastrec.")
            if ours and not isinstance(part, ColdStart | Align):
                raise ValueError(f"the objective {name} cannot be trained beside {cold[0]}")
        for kind, name in _OF_USERS.items():
            if any(isinstance(part, kind) for part in self.steps_of_views):
                raise ValueError(f"the step {name} has no place in a stage with judge: cold_start")

    def _check_labels(self) -> None:
        """Clicks that are labelled are predicted."""
        predicted = any(isinstance(part, Click) for part in self.parts.values())
        if self.judge == "click" and not predicted:
            raise ValueError("the judge click needs the objective click")
        levels = {part.least for part in self.steps_of_views if isinstance(part, Labelled)}
        if levels and not predicted:
            raise ValueError("the step click has no effect: no objective click")
        if len(levels) > 1:
            raise ValueError(f"views have clicks from other ratings on: {sorted(levels)}")

    @property
    def least_click(self) -> float | None:
        """Rating of a click by the step `click`; None where no view has it."""
        levels = [part.least for part in self.steps_of_views if isinstance(part, Labelled)]
        return levels[0] if levels else None

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
    def side_files(self) -> set[str]:
        """Files of a data set that it reads beside the events and what its model reads."""
        objectives = self.parts.values()
        friends = [part for part in self.steps_of_views if isinstance(part, Friend)]
        described = any(isinstance(part, UserAttributes) for part in objectives)
        described |= self._compares_profiles or any(part.same_profile for part in friends)
        read = {
            "users.parquet": described,
            "items.parquet": any(isinstance(part, ItemAttributes) for part in objectives),
            "relations.parquet": bool(friends),
        }
        file = self.judge_kind.side_file
        return {name for name, is_read in read.items() if is_read or name == file}

    @property
    def _compares_profiles(self) -> bool:
        return any(
            "profile" in getattr(part, "false_negatives", []) for part in self.parts.values()
        )

    @property
    def pass_steps(self) -> int:
        """Steps up to a validation."""
        return min(self.validate_every, self.steps)

    @property
    def judge_kind(self) -> JudgeKind:
        return JUDGES[self.judge]

    @property
    def monitored(self) -> str:
        return self.monitor or self.judge_kind.monitor


# The names of its keys.
STAGE_KEYS = [field.name for field in dataclasses.fields(Stage)]
