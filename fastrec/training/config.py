"""A recipe: everything that names a system. The CLI turns every field into a flag."""

from dataclasses import dataclass, field
from typing import Literal

from fastrec.data.attributes import Attribute
from fastrec.data.errors import check_choices
from fastrec.evaluation.protocols import Protocol
from fastrec.nn.user_model import ModelConfig
from fastrec.objectives.joint import Objectives
from fastrec.objectives.masked_item import Masking


@dataclass(frozen=True)
class Stage:
    """One training run: pre-training or fine-tuning.

    Attributes:
        masking: the corruption.
        objectives: what is trained, with weights.
        steps: optimiser steps, a multiple of `validate_every` where that is smaller.
        batch_size: users a step.
        learning_rate: of Adam, the peak of the schedule.
        schedule: "constant", or "cosine" or "linear" down to 0 at the last step, after warm-up.
        warmup_steps: linear warm-up from 0.
        weight_decay: decoupled (AdamW).
        gradient_clip: largest gradient norm; 0 = off.
        precision: "32-true" or "bf16-mixed".
        validate_every: steps between validations.
        monitor: validation metric that chooses the kept model and stops early: of the ranking, or
            "score" of user attributes, or "accuracy" of friends.
        patience: validations without improvement before stopping; 0 = never.
        checkpoint_every: steps between checkpoints to resume from.
        seed: of initialisation, order, masks and dropout.
        devices: processes, one per GPU (or CPU); they share each batch (DDP). "auto" = all GPUs, or
            one CPU process.
        backend: of the losses (items, friends); None = native.
        cuda_graph: replay forward and backward from CUDA graphs, batches padded to a budget. One
            process on one GPU.
    """

    masking: Masking = field(default_factory=Masking)
    objectives: Objectives = field(default_factory=Objectives)
    steps: int = 10000
    batch_size: int = 768
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    gradient_clip: float = 0.0
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    validate_every: int = 1000
    monitor: str = "NDCG@10"
    patience: int = 0
    checkpoint_every: int = 500
    seed: int = 0
    devices: int | Literal["auto"] = "auto"
    backend: Literal["reference", "cpp", "triton"] | None = None
    cuda_graph: bool = False

    def __post_init__(self):
        check_choices(self)
        if self.devices != "auto" and int(self.devices) < 1:
            raise ValueError(f"devices must be at least 1 or 'auto', got {self.devices}")
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "warmup_steps", "weight_decay", "gradient_clip", "patience"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.steps % self.pass_steps:
            raise ValueError(
                f"steps ({self.steps}) must be a multiple of validate_every"
                f" ({self.validate_every}): the last steps would not be validated"
            )

    @property
    def pass_steps(self) -> int:
        """Steps up to a validation."""
        return min(self.validate_every, self.steps)


@dataclass(frozen=True)
class Users:
    """The users that are trained and evaluated: a random `fraction`, drawn with `seed`. The others
    are held out: they test user profile prediction and social relation detection."""

    fraction: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ValueError(f"users.fraction must be in (0, 1], got {self.fraction}")


@dataclass(frozen=True)
class Social:
    """Friends in training and evaluation.

    Attributes:
        hops: candidates that are no negatives of a user: 1 friends, 2 friends of friends as well,
            0 neither.
        same_profile: nor are users with the same values in all discrete attributes.
        negatives: sampled beside the friend in the evaluation.
        seed: of these.
    """

    hops: Literal[0, 1, 2] = 2
    same_profile: bool = True
    negatives: int = 99
    seed: int = 0

    def __post_init__(self):
        check_choices(self)
        if self.negatives < 1:
            raise ValueError(f"social.negatives must be at least 1, got {self.negatives}")


def _task(objectives: Objectives, monitor: str) -> Stage:
    return Stage(
        objectives=objectives,
        steps=2000,
        batch_size=256,
        learning_rate=1e-4,
        validate_every=100,
        monitor=monitor,
    )


@dataclass(frozen=True)
class Recipe:
    """A system: encoder, corruption and objectives of the stages, and how it is evaluated.

    Attributes:
        pretraining: the first stage.
        finetuning: for the next item.
        profile: fine-tuning for user attributes.
        relation: fine-tuning for social relation detection.
        attributes: of the users that are predicted; an empty list takes all columns that have a
            type for it.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    pretraining: Stage = field(default_factory=Stage)
    finetuning: Stage = field(
        default_factory=lambda: Stage(
            masking=Masking(last_only=True), batch_size=256, learning_rate=1e-4
        )
    )
    profile: Stage = field(
        default_factory=lambda: _task(
            Objectives(masked_item=0.0, user_attribute=1.0, attribute_pool="cls"), "score"
        )
    )
    relation: Stage = field(
        default_factory=lambda: _task(Objectives(masked_item=0.0, social_relation=1.0), "accuracy")
    )
    attributes: list[Attribute] = field(default_factory=list)
    social: Social = field(default_factory=Social)
    evaluation: Protocol = field(default_factory=Protocol)
    users: Users = field(default_factory=Users)
