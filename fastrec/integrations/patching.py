# SPDX-License-Identifier: Apache-2.0
"""Functions of another library replaced by fused ones, and put back.

Classes keep their parameters, names and configurations: a checkpoint that was written with the
patch loads without it, and the other way round.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastrec.nn.plain import is_plain
from fastrec.random import Rng

# The name of a library and of its distribution, and the version that the replacements are for.
LIBRARIES = {
    "recbole": ("recbole", "1.2.1"),
    "rectools": ("rectools", "0.19.0"),
    "replay": ("replay-rec", "0.22.0"),
    "transformers": ("transformers", "5.23.0"),
}


class Replacement(NamedTuple):
    """`function` in place of the method `name` of the class `owner`."""

    owner: type
    name: str
    function: Callable


class Parity(NamedTuple):
    """The original and the fused loss of one batch, without dropout.

    loss: of the original. loss_difference: absolute.
    gradients: of each parameter (largest absolute value of the original, largest absolute
        difference).
    """

    model: str
    loss: float
    loss_difference: float
    gradients: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        lines = [f"{self.model}: loss {self.loss:.6f}, difference {self.loss_difference:.1e}"]
        for name, (largest, difference) in self.gradients.items():
            lines.append(f"  {name}: gradient up to {largest:.1e}, difference {difference:.1e}")
        return "\n".join(lines)


class Patch:
    """What `patch` has replaced in one library. As a context manager it is undone at the end,
    unless it was active before: whoever asked for it first keeps it.

    Attributes:
        name: of the library.
        replaced: the functions, as "module.Class.method".
        parity: whether the first batch of each class of models is computed both ways.
        reports: what that gave.
    """

    def __init__(self, name: str, replacements: list[Replacement]):
        self.name, self.parity = name, False
        self.reports: list[Parity] = []
        self._asked = 1  # calls of `patch`, without those whose `with` has ended
        self._replacements = replacements
        # None: inherited.
        self._originals = [owner.__dict__.get(attribute) for owner, attribute, _ in replacements]
        self._replace()

    def _replace(self) -> None:
        for owner, attribute, function in self._replacements:
            setattr(owner, attribute, function)

    def _restore(self) -> None:
        for (owner, name, _), original in zip(self._replacements, self._originals, strict=True):
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    @property
    def replaced(self) -> list[str]:
        return [
            f"{owner.__module__}.{owner.__qualname__}.{name}"
            for owner, name, _ in self._replacements
        ]

    def undo(self) -> None:
        """Put the original functions back. A second time does nothing.

        Raises RuntimeError, and puts nothing back, if a function has been replaced once more since.
        """
        if _ACTIVE.get(self.name) is not self:
            return
        for owner, name, function in self._replacements:
            if owner.__dict__.get(name) is not function:
                raise RuntimeError(
                    f"{owner.__qualname__}.{name} was replaced by something else after"
                    f" fastrec.patch({self.name!r}): undo that first"
                )
        self._restore()
        del _ACTIVE[self.name]

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """The original functions, as long as this lasts."""
        self._restore()
        try:
            yield
        finally:
            self._replace()

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *error) -> None:
        self._asked -= 1
        if self._asked == 0:
            self.undo()

    def __repr__(self) -> str:
        state = "active" if _ACTIVE.get(self.name) is self else "undone"
        return f"Patch({self.name!r}, {state}, {len(self._replacements)} functions)"


_ACTIVE: dict[str, Patch] = {}


def patch(library: str, *, parity: bool = False) -> Patch:
    """Replace functions of an installed library by fused ones: losses over all items or tokens, the
    encoders of sequential recommenders, full ranking. docs/integrations.md lists them.

    Classes, not instances: models that exist already are served too. What a fused function does not
    serve (another loss, a subclass with a `forward` of its own, a hook) runs the original code and
    a warning says so, once for each reason. Calling it again returns the same handle.

    Args:
        library: "recbole", "rectools", "replay" or "transformers".
        parity: the first training batch of each class of models is computed both ways, without
            dropout, and the largest absolute differences of the loss and of each gradient are
            printed and kept in `Patch.reports`. Asked of an active patch: the next batch.

    Returns:
        Patch: `undo()` puts everything back; in a `with` statement its end does, unless the patch
            was active before.

    Raises:
        ValueError: another library.
        ModuleNotFoundError: the library is not installed.
    """
    if library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)}, got {library!r}")
    if library in _ACTIVE:
        _ACTIVE[library]._asked += 1
    else:
        distribution, tested = LIBRARIES[library]
        try:
            found = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            raise ModuleNotFoundError(
                f"fastrec.patch({library!r}) replaces functions of {distribution}, which is not"
                " installed here",
                name=library,
            ) from None
        if found != tested:
            warnings.warn(
                f"fastrec.patch({library!r}) is tested with {distribution} {tested}, installed is"
                f" {found}: look at a batch with parity=True",
                stacklevel=2,
            )
        module = importlib.import_module(f"fastrec.integrations.{library}")
        _ACTIVE[library] = Patch(library, module.replacements())
    active = _ACTIVE[library]
    if parity:
        active.parity, active.reports = True, []
    return active


def unpatch(library: str | None = None) -> None:
    """Undo the patch of a library, or of all. Nothing happens where there is none."""
    if library is not None and library not in LIBRARIES:
        raise ValueError(f"library must be one of {', '.join(LIBRARIES)}, got {library!r}")
    for active in list(_ACTIVE.values()):
        if library in (None, active.name):
            active.undo()


def patched() -> list[str]:
    """The libraries that are patched."""
    return list(_ACTIVE)


@functools.cache
def keep_original(what: str, why: str) -> None:
    """Say, once, that `what` runs its original code."""
    warnings.warn(f"fastrec leaves {what} as it is: {why}", stacklevel=3)


def own_method(model: object, owner: type, names: Iterable[str]) -> str | None:
    """Which method a model has in place of that of `owner`, by its class or set on the model
    itself, as a reason. None: none of them."""
    for name in names:
        # Functions, not methods: those are others at each look, and Lightning sets some on objects.
        mine, theirs = getattr(model, name), getattr(owner, name)
        if getattr(mine, "__func__", mine) is not getattr(theirs, "__func__", theirs):
            return f"it has a {name} of its own"
    return None


def is_default_loss(loss: Any) -> bool:
    """Whether it is `nn.CrossEntropyLoss()`, without a setting or a hook."""
    return (
        is_plain(loss, nn.CrossEntropyLoss)
        and loss.weight is None
        and (loss.ignore_index, loss.reduction, loss.label_smoothing) == (-100, "mean", 0)
    )


def scored_rows(target: Tensor, none: int, *columns: Tensor) -> tuple[Tensor, ...]:
    """(target [N], the columns [N, ...]) of the rows that have a target, where the host knows them.
    Elsewhere, and under torch.compile, all rows: nothing waits for their number, and an op that is
    told `ignore_index=none` leaves the others out.

    Raises ValueError for columns of another length: rows of other places would be taken."""
    for column in columns:
        if len(column) != len(target):
            raise ValueError(
                f"there must be a target for each place: {len(column)} places,"
                f" {len(target)} targets"
            )
    if target.device.type != "cpu" or torch.compiler.is_compiling():
        return target, *columns
    rows = (target != none).nonzero().squeeze(1)
    return tuple(x.index_select(0, rows) for x in (target, *columns))


def unserved_part(model: nn.Module, kinds: set[type]) -> str | None:
    """Why the parameters of a model cannot be read instead of calling its modules: one of another
    class than `kinds` (an adapter, for one), or a hook that waits for a call. None: they can."""
    for name, module in model.named_modules():
        if module is not model and type(module) not in kinds:
            return f"{name} is a {type(module).__name__}"
        if module is not model and not is_plain(module, type(module)):
            return f"hooks wait for calls of {name}"
    return None


def rng_of(model: nn.Module) -> Rng | None:
    """For a model in training mode a key of its own for every batch, from torch's generator: who
    seeds that seeds the dropout."""
    if not model.training:
        return None
    return Rng(int(torch.randint(2**62, (), device="cpu")), 0)


def check_parity(
    library: str, model: nn.Module, original: Callable[[], Tensor], fused: Callable[[], Tensor]
) -> None:
    """Compare the two losses of a batch, if `patch` was asked to and has not for this class.
    `original` runs with no function replaced."""
    active = _ACTIVE.get(library)
    name = type(model).__qualname__
    if active is None or not active.parity or any(name == one.model for one in active.reports):
        return

    def plain() -> Tensor:
        with active.suspended():
            return original()

    report = compare(model, plain, fused)
    active.reports.append(report)
    print(f"fastrec, parity of {report}")


def compare(
    model: nn.Module, original: Callable[[], Tensor], fused: Callable[[], Tensor]
) -> Parity:
    """Losses and gradients of both, with every module of the model in evaluation mode."""
    training = [module for module in model.modules() if module.training]
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    try:
        found = []
        for loss_of in (original, fused):
            with torch.enable_grad():
                loss = loss_of()
                found.append((loss.detach().double(), _gradients(loss, list(parameters.values()))))
    finally:
        for module in training:
            module.training = True
    (loss, grads), (other, others) = found
    gradients = {
        name: (float(a.abs().max()), float((a.double() - b.double()).abs().max()))
        for name, a, b in zip(parameters, grads, others, strict=True)
    }
    return Parity(type(model).__qualname__, float(loss), float((loss - other).abs()), gradients)


def _gradients(loss: Tensor, parameters: list[nn.Parameter]) -> Sequence[Tensor]:
    if not (parameters and loss.requires_grad):  # autograd refuses both
        return [torch.zeros_like(p) for p in parameters]
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
