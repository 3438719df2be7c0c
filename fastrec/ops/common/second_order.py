# SPDX-License-Identifier: Apache-2.0
"""Second derivatives of the ops: those of their references.

The backward pass of an op is a kernel, which autograd cannot look into. Where gradients are
recorded (`create_graph`: gradient penalties, Hessian-vector products, influence functions), the
gradient is still that of the kernel; only its own derivative is taken through plain PyTorch, at the
memory and the speed of the reference.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# (ctx, *saved) -> (inputs, outputs): what forward got, argument by argument, and what plain PyTorch
# makes of it. An input whose value is not saved, because the derivative does not depend on it, is
# any leaf of its shape.
Reference = Callable[..., tuple[Sequence[Tensor | None], Sequence[Tensor]]]


def twice_differentiable(reference: Reference):
    """Decorates the `backward` of an autograd function."""

    def decorate(backward):
        @functools.wraps(backward)
        def record(ctx, *grads):
            if not _recorded():
                return backward(ctx, *grads)
            tensors = (*grads, *ctx.saved_tensors)
            return _Recorded.apply(backward, reference, ctx, len(grads), *tensors)

        return record

    return decorate


def once_differentiable(what: str):
    """Decorates a `backward` that has no reference: where gradients are recorded it raises
    RuntimeError. PyTorch's decorator of this name leaves the second derivative out without a word
    where the upstream gradient is a constant, as that of a loss is."""

    def decorate(backward):
        @functools.wraps(backward)
        def refuse(ctx, *grads):
            if _recorded():
                raise RuntimeError(
                    f"{what} has no second derivative: its gradient cannot be recorded"
                    " (create_graph)"
                )
            return backward(ctx, *grads)

        return refuse

    return decorate


def _recorded() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _Unpacked:
    """The context of a `backward` whose saved tensors were unpacked before: checkpoints without
    reentry give each of them once."""

    def __init__(self, ctx, saved_tensors):
        self._ctx, self.saved_tensors = ctx, saved_tensors

    def __getattr__(self, name):
        return getattr(self._ctx, name)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backward, reference, outer, count, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.reference, ctx.outer, ctx.count = reference, outer, count
        ctx.set_materialize_grads(False)
        return backward(_Unpacked(outer, tensors[count:]), *tensors[:count])

    @staticmethod
    def backward(ctx, *upstream):
        with torch.enable_grad():
            # Views, so that a tensor that is two arguments gets two gradients.
            own = [t.view_as(t) if t is not None and t.requires_grad else t
                   for t in ctx.saved_tensors]  # fmt: skip
            inputs, outputs = ctx.reference(ctx.outer, *own[ctx.count :])
            roots = _pairs(outputs, own[: ctx.count])
            places = [i for i, x in enumerate(inputs) if x is not None and x.requires_grad]
            first = torch.autograd.grad(
                [output for output, _ in roots], [inputs[i] for i in places],
                [grad for _, grad in roots], create_graph=True, allow_unused=True,
            )  # fmt: skip
        asked = _pairs(first, [upstream[i] for i in places])
        leaves = [i for i, t in enumerate(own) if t is not None and t.requires_grad]
        found: list[Tensor | None] = [None] * len(own)
        if asked and leaves:
            second = torch.autograd.grad(
                [grad for grad, _ in asked], [own[i] for i in leaves],
                [given for _, given in asked],
                create_graph=torch.is_grad_enabled(), allow_unused=True,
            )  # fmt: skip
            for i, grad in zip(leaves, second, strict=True):
                found[i] = grad
        return None, None, None, None, *found


def _pairs(values, grads) -> list[tuple[Tensor, Tensor]]:
    """Those that derivatives flow through."""
    pairs = zip(values, grads, strict=True)
    return [(v, g) for v, g in pairs if v is not None and g is not None and v.requires_grad]


def leaf(shape, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An input of which nothing but its shape matters."""
    return torch.zeros(shape, dtype=dtype or like.dtype, device=like.device, requires_grad=True)
