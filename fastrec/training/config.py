"""A recipe: everything that names a system. The CLI turns every field into a flag."""

from dataclasses import dataclass, field
from typing import Literal

from fastrec.evaluation.protocols import Protocol
from fastrec.nn.user_model import ModelConfig
from fastrec.objectives.masked_item import Masking


@dataclass(frozen=True)
class Stage:
    """One training run: pre-training or fine-tuning.

    Attributes:
        masking: the corruption.
        steps: optimiser steps.
        batch_size: users a step.
        learning_rate: of Adam, the peak of the schedule.
        schedule: "constant", or "cosine" or "linear" down to 0 at the last step, after warm-up.
        warmup_steps: linear warm-up from 0.
        weight_decay: decoupled (AdamW).
        gradient_clip: largest gradient norm; 0 = off.
        precision: "32-true" or "bf16-mixed".
        validate_every: steps between validations.
        monitor: validation metric that chooses the kept model and stops early.
        patience: validations without improvement before stopping; 0 = never.
        checkpoint_every: steps between checkpoints to resume from.
        seed: of initialisation, order, masks and dropout.
        devices: processes, one per GPU (or CPU); they share each batch (DDP). "auto" = all GPUs, or
            one CPU process.
        backend: of the fused ops; None = native.
    """

    masking: Masking = field(default_factory=Masking)
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


@dataclass(frozen=True)
class Users:
    """The users that are trained and evaluated: a random `fraction`, drawn with `seed`."""

    fraction: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """A system: encoder, corruption and objective of both stages, and how it is evaluated."""

    model: ModelConfig = field(default_factory=ModelConfig)
    pretraining: Stage = field(default_factory=Stage)
    finetuning: Stage = field(
        default_factory=lambda: Stage(
            masking=Masking(last_only=True), batch_size=256, learning_rate=1e-4
        )
    )
    evaluation: Protocol = field(default_factory=Protocol)
    users: Users = field(default_factory=Users)
