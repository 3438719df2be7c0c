# SPDX-License-Identifier: Apache-2.0
"""The weighted sum of objectives that a stage trains (UPRec eq. 15), from one encoder pass."""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastrec.data.batch import JaggedBatch
from fastrec.data.side import SideData
from fastrec.random import Rng

M = TypeVar("M", bound=nn.Module)


class Term(NamedTuple):
    """`weight` times the mean of a loss over `number` things; None: a value to look at."""

    name: str
    weight: float
    loss: Tensor
    number: Tensor | int | None


class JointObjective(nn.Module):
    """Encodes all views end to end, once, and gives every objective those that it reads.

    Args:
        objectives: by name: settings with `weight`, `views` and `build(model, side)`, or a module
            with `weight` and `views` itself. A module maps (model, rng, *encoded views) to
            {label: (loss, count)}: a mean over `count` things, or a value to look at with None.
        model, side: what `build` is given.
        backend: of the losses that have a choice.
    """

    def __init__(self, objectives: Mapping, model, side: SideData, backend: str | None = None):
        super().__init__()
        if not objectives:
            raise ValueError("there is no objective to train")
        self.parts = nn.ModuleDict()
        self.weights: dict[str, float] = {}
        self.views: dict[str, list[str]] = {}
        for name, objective in objectives.items():
            module = objective
            if isinstance(objective, type):
                raise TypeError(f"the objective {name} is a class: give an instance of it")
            if not isinstance(objective, nn.Module):
                module = objective.build(model, side)
            if hasattr(module, "backend"):
                module.backend = backend
            self.parts[name] = module
            self.weights[name] = getattr(objective, "weight", 1.0)
            self.views[name] = list(getattr(objective, "views", ["main"]))
            if not isinstance(self.weights[name], (int, float)):
                raise ValueError(
                    f"the weight of {name} must be a number, got"
                    f" {type(self.weights[name]).__name__}: give the module settings with `weight`"
                )
            if not self.weights[name] > 0:
                raise ValueError(
                    f"the weight of {name} is {float(self.weights[name])}, expected above 0"
                )

    def find(self, kind: type[M]) -> M | None:
        """The first objective of a class, for a judge that reads its parameters."""
        return next((part for part in self.parts.values() if isinstance(part, kind)), None)

    def require(self, kind: type[M], judge: str, name: str) -> M:
        """`find`. Raises ValueError where there is none: the judge needs the objective `name`."""
        if (found := self.find(kind)) is None:
            raise ValueError(f"the judge {judge} needs the objective {name}")
        return found

    def check_users(self, smallest: int, largest: int) -> None:
        """Raise ValueError where the smallest step of an epoch has fewer users than an objective
        needs, `least_users` of its module, or where no step has two and an objective tells the
        users of a step apart, `tells_apart` of its module: its loss would be 0."""
        for name, part in self.parts.items():
            if smallest < (least := getattr(part, "least_users", 0)):
                raise ValueError(
                    f"{name} needs at least {least} users a step, and a step of an epoch has"
                    f" {smallest}: choose another batch_size"
                )
            if largest < 2 and getattr(part, "tells_apart", False):
                raise ValueError(
                    f"{name} tells the users of a step apart, and a step has {largest}: choose"
                    " another batch_size"
                )

    @torch.no_grad()
    def rehearse(self, model, views: dict[str, JaggedBatch]) -> None:
        """The objectives of fastrec on a few users on the host, natively and without a trace: what
        does not fit is said before anything is written. One of somebody else may count its calls.
        """
        rng = Rng(0, 0)
        encoded = model.encode_views(views, rng)
        for name, part in self.parts.items():
            if not type(part).__module__.startswith("fastrec."):
                continue
            own: Any = part
            backend = getattr(own, "backend", None)
            if backend is not None:
                own.backend = None
            own.eval()  # batch statistics stay
            try:
                own(model, rng, *(encoded[view] for view in self.views[name]))
            finally:
                own.train()
                if backend is not None:
                    own.backend = backend

    def forward(self, model, views: dict[str, JaggedBatch], rng: Rng) -> list[Term]:
        """The terms of the loss: `total_loss` is their sum of weight times loss. Seed and step may
        be tensors on the device. What is decided here depends on shapes alone."""
        encoded, terms = model.encode_views(views, rng), []
        for name, part in self.parts.items():
            losses = part(model, rng, *(encoded[view] for view in self.views[name]))
            _check(name, losses)
            for label, (loss, number) in losses.items():
                label = label if label == name else f"{name}.{label}"
                terms.append(Term(label, self.weights[name], loss, number))
        return terms


def _check(name: str, losses) -> None:
    """Raise TypeError unless an objective returned what `forward` expects of it."""
    right = isinstance(losses, dict) and all(
        isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Tensor)
        for value in losses.values()
    )
    if not right or any(loss.dim() for loss, _ in losses.values()):
        raise TypeError(
            f"the objective {name} returned {type(losses).__name__}, expected"
            " {label: (loss, count)} with losses without dimensions, means over count things"
        )


def total_loss(terms: list[Term]) -> Tensor:
    """The weighted sum; of `of_all_ranks` where several processes average their gradients."""
    return torch.stack([term.weight * term.loss for term in terms if term.number is not None]).sum()


def of_all_ranks(terms: list[Term], world_size: int) -> list[Term]:
    """Terms whose average over the ranks is the mean over the things of all ranks: each loss times
    the share of them that this rank has, times the number of ranks. A value to look at stays."""
    if world_size == 1:
        return terms
    device = terms[0].loss.device
    numbers = [0 if term.number is None else term.number for term in terms]
    counts = torch.stack(
        [torch.as_tensor(number, dtype=torch.float64, device=device) for number in numbers]
    )
    totals = counts.clone()
    torch.distributed.all_reduce(totals)
    shares = (counts * world_size / totals.clamp_min(1)).to(terms[0].loss.dtype)
    return [
        term if term.number is None else term._replace(loss=term.loss * share)
        for term, share in zip(terms, shares, strict=True)
    ]
