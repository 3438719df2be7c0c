# SPDX-License-Identifier: Apache-2.0
"""Recorded gradients (create_graph) and torch.func; the generated test of second derivatives is in
test_ops.py."""

import functools

import pytest
import torch
from backends import needs
from op_db import OPS
from op_db.case import TYPES, outputs_of, upstream_of
from torch.utils.checkpoint import checkpoint

from fastrec import bias_gelu_dropout, jagged_attention, linear_cross_entropy

pytestmark = needs("cpp", "linear_cross_entropy")


def problem(dtype=torch.float64):
    x, w = torch.randn(5, 6, dtype=dtype), torch.randn(9, 6, dtype=dtype)
    return x, w, torch.randint(9, (5,))


def test_hessian_is_that_of_the_reference():
    x, w, y = problem()
    found = [
        torch.autograd.functional.hessian(
            lambda x, w, b=backend: linear_cross_entropy(x, w, y, label_smoothing=0.1, backend=b),
            (x, w),
        )
        for backend in ("cpp", "reference")
    ]
    for ours, exact in zip(sum(found[0], ()), sum(found[1], ()), strict=True):
        assert exact.abs().max() > 1e-3
        torch.testing.assert_close(ours, exact)


def test_gradient_penalty_moves_the_gradient():
    x, w, y = problem()
    grads = []
    for backend in ("cpp", "reference"):
        leaf = w.clone().requires_grad_()
        query = x.clone().requires_grad_()
        loss = linear_cross_entropy(query, leaf, y, backend=backend)
        (grad,) = torch.autograd.grad(loss, query, create_graph=True)
        (loss + grad.square().sum()).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])
    plain = w.clone().requires_grad_()
    linear_cross_entropy(x, plain, y).backward()
    assert (grads[0] - plain.grad).abs().max() > 1e-3


def test_one_tensor_as_several_arguments():
    x, offsets = torch.randn(7, 1, 4, dtype=torch.float64), torch.tensor([0, 3, 7])

    def attend(x):
        return jagged_attention(x, x, x, offsets, max_seq_len=4)

    assert torch.autograd.gradgradcheck(attend, x.requires_grad_())


def test_third_derivative():
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("cpp", "reference"):
        value = bias_gelu_dropout(x, None, backend=backend).sum()
        for _ in range(3):
            (grad,) = torch.autograd.grad(value, x, create_graph=True)
            value = grad.sum()
        results.append(grad)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("op", [op for op in OPS if op.differentiable], ids=lambda op: op.name)
@pytest.mark.parametrize("types", [TYPES[0], TYPES[2]], ids=str)
def test_recording_does_not_change_the_gradient(op, types):
    """It is that of the kernel, to the bit."""
    if types not in op.types or ("cpp", types.name) in op.refuses:
        pytest.skip(f"{op.name} has no {types} kernel on cpp")
    samples = {sample.name: sample for sample in op.samples("cpu", types, True)}
    kwargs = samples[op.complete[0]].kwargs
    names = [name for name in op.differentiable if kwargs.get(name) is not None]
    found = []
    for record in (False, True):
        leaves = {name: kwargs[name].detach().requires_grad_() for name in names}
        outputs = outputs_of(op.function, kwargs | leaves | {"backend": "cpp"})
        roots = [value for value in outputs.values() if value.requires_grad]
        ups = [upstream_of(value).to(value.dtype) for value in roots]
        found.append(torch.autograd.grad(roots, list(leaves.values()), ups, create_graph=record))
    for plain, recorded in zip(*found, strict=True):
        plain, recorded = plain.to_dense(), recorded.to_dense()
        assert torch.equal(plain, recorded.detach())


@pytest.mark.parametrize("op", [op for op in OPS if op.differentiable], ids=lambda op: op.name)
def test_inside_of_a_checkpoint(op):
    """Without reentry, saved tensors are given once: to the gradient, and to what records it."""
    samples = {sample.name: sample for sample in op.samples("cpu", TYPES[0], True)}
    kwargs = samples[op.complete[0]].kwargs | {"backend": "cpp"}
    names = [name for name in op.differentiable if kwargs.get(name) is not None]
    leaves = {name: kwargs[name].detach().requires_grad_() for name in names}
    found = []
    for inside in (False, True):
        for record in (False, True):
            call = functools.partial(op.function, **kwargs | leaves)
            value = checkpoint(call, use_reentrant=False) if inside else call()
            roots = [each for each in _tensors(value) if each.requires_grad]
            ups = [upstream_of(root).to(root.dtype) for root in roots]
            found.append(
                torch.autograd.grad(roots, list(leaves.values()), ups, create_graph=record)
            )
    for others in found[1:]:
        assert all(map(torch.equal, map(_dense, found[0]), map(_dense, others)))


def _tensors(value) -> tuple:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def _dense(grad) -> torch.Tensor:
    return grad.detach().to_dense()


def test_torch_func_is_for_the_reference():
    x, w, y = problem()
    with pytest.raises(
        RuntimeError, match="linear_cross_entropy under torch.func .* backend='reference'"
    ):
        torch.func.grad(linear_cross_entropy)(x, w, y)

    def loss(x, w, y):
        return linear_cross_entropy(x[None], w, y[None], backend="reference")

    each = torch.func.vmap(torch.func.grad(loss), (0, None, 0))(x, w, y)
    leaf = x.clone().requires_grad_()
    linear_cross_entropy(leaf, w, y, reduction="sum").backward()
    torch.testing.assert_close(each, leaf.grad)


@pytest.mark.parametrize("op", [op for op in OPS if op.differentiable], ids=lambda op: op.name)
def test_batched_gradients(op):
    """torch.autograd.grad(is_grads_batched=True), as jacobian(vectorize=True) asks for them."""
    samples = {sample.name: sample for sample in op.samples("cpu", TYPES[0], True)}
    kwargs = samples[op.complete[0]].kwargs
    if kwargs.get("sparse_grad"):
        kwargs = kwargs | {"sparse_grad": False}
    names = [name for name in op.differentiable if kwargs.get(name) is not None]
    leaves = {name: kwargs[name].detach().requires_grad_() for name in names}
    outputs = outputs_of(op.function, kwargs | leaves | {"backend": "cpp"})
    root = next(value for value in outputs.values() if value.requires_grad)
    ups = torch.stack([upstream_of(root).to(root.dtype), torch.ones_like(root)])
    options = dict(retain_graph=True, allow_unused=True)
    batched = torch.autograd.grad(root, leaves.values(), ups, is_grads_batched=True, **options)
    for i, up in enumerate(ups):
        single = torch.autograd.grad(root, leaves.values(), up, **options)
        for rows, one in zip(batched, single, strict=True):
            if one is not None:
                torch.testing.assert_close(rows[i], one)
