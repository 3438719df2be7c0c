# SPDX-License-Identifier: Apache-2.0
"""Generated: every operator of op_db x backend x device x dtype x sample.

A backend is compared with the float64 reference on the same values, within the error budget of
`op_db.case.excess`. Backends that cannot run here are skipped and counted, see conftest.py.
"""

import functools
import itertools

import pytest
import torch
from backends import interpreted
from op_check import (
    assert_within_budget,
    check,
    expected,
    get,
    need,
    on,
    sample_names,
    samples,
    small,
)
from op_db import OPS
from op_db.case import TYPES, as_views, excess, gradients, outputs_of, run, upstream_of

from fastrec.backend import BACKENDS

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
FLOAT32, FLOAT64, BFLOAT16, _, MIXED = TYPES

pytestmark = pytest.mark.op_case


def _marks(op, backend, device, types, name, only):
    """The interpreter takes seconds for a call: other types than float32 are seen with some samples
    of `test_within_budget`, and everywhere in `make test-all`."""
    if not small(backend, device):
        return []
    known = types is FLOAT32 or (only is None and name in op.representative)
    return interpreted(backend) if known else [*interpreted(backend), pytest.mark.exhaustive]


def cases(types=TYPES, backends=BACKENDS, only=None):
    """pytest parameters (op, backend, device, types, sample name). `only`: names, by operator."""
    return [
        pytest.param(
            op,
            backend,
            device,
            t,
            name,
            id=f"{op.name}-{backend}-{device}-{t}-{name}",
            marks=_marks(op, backend, device, t, name, only),
        )
        for op in OPS
        for backend in backends
        for device in DEVICES
        for t in types
        if t in op.types and (backend, t.name) not in op.refuses
        for name in sample_names(op, t)
        if only is None or name in only(op)
    ]


def rest_exhaustive(kept, chosen):
    """The cases `chosen`; those that are not kept(op, backend, name) are of `make test-all`."""
    found = []
    for case in chosen:
        op, backend, *_, name = case.values
        rare = [] if kept(op, backend, name) else [pytest.mark.exhaustive]
        found.append(pytest.param(*case.values, id=case.id, marks=[*case.marks, *rare]))
    return found


each_sample = pytest.mark.parametrize("op, backend, device, types, name", cases())


@each_sample
def test_within_budget(op, backend, device, types, name, poisoned_memory):
    check(op, name, backend, device, types)


@pytest.mark.parametrize(
    "op, backend, types, message",
    [
        pytest.param(
            op, backend, t, message, id=f"{op.name}-{backend}-{name}", marks=interpreted(backend)
        )
        for op in OPS
        for (backend, name), message in op.refuses.items()
        for t in TYPES
        if t.name == name
    ],
)
def test_refused_types_raise(op, backend, types, message):
    need(op, backend, "cpu")
    sample = next(op.samples("cpu", types, True))
    with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError), match=message):
        op.function(**sample.kwargs, backend=backend)


def representative(op):
    return op.representative


def with_gradient(op):
    return op.representative if op.differentiable else ()


def _differentiable(op, backend, sample):
    """(function of the differentiable arguments, these)."""
    names = [n for n in op.differentiable if sample.kwargs.get(n) is not None]

    def f(*tensors):
        given = sample.kwargs | dict(zip(names, tensors, strict=True))
        return tuple(v for v in outputs_of(on(op, backend), given).values() if v.requires_grad)

    return f, tuple(sample.kwargs[n].clone().requires_grad_() for n in names)


each_representative = pytest.mark.parametrize(
    "op, backend, device, types, name",
    cases(types=[t for t in TYPES if t.name in ("float32", "bfloat16")], only=representative),
)


@pytest.mark.parametrize(
    "op, backend, device, types, name",
    rest_exhaustive(
        lambda _, backend, __: backend == "reference",
        cases(types=(FLOAT64,), backends=("reference", "cpp"), only=with_gradient),
    ),
)
def test_gradcheck(op, backend, device, types, name):
    need(op, backend, device)
    f, leaves = _differentiable(op, backend, samples(op.name, device, types, True)[name])
    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize(
    "op, backend, device, types, name",
    cases(types=(FLOAT64,), backends=("cpp",), only=with_gradient),
)
def test_gradcheck_along_random_directions(op, backend, device, types, name):
    """test_within_budget compares every entry with that of the reference in float64."""
    need(op, backend, device)
    f, leaves = _differentiable(op, backend, samples(op.name, device, types, True)[name])
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "op, backend, device, types, name",
    cases(types=(FLOAT64,), backends=("cpp",), only=with_gradient),
)
def test_gradgradcheck(op, backend, device, types, name):
    """Second derivatives, that of the upstream gradient included."""
    need(op, backend, device)
    f, leaves = _differentiable(op, backend, samples(op.name, device, types, True)[name])
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize(
    "op, private, backend, device",
    [
        pytest.param(op, private, backend, device, id=f"{op.name}-{private}-{backend}-{device}")
        for op in OPS
        for private in op.private
        for backend, device in (("cpp", "cpu"), ("triton", "cuda"))
        if device in DEVICES
    ],
)
def test_opcheck(op, private, backend, device):
    need(op, backend, device)
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastrec::{private}", device.upper()):
        pytest.skip(f"{private} has no {backend} kernel")
    function = getattr(torch.ops.fastrec, private).default
    for args in op.private_samples(device, private):
        torch.library.opcheck(function, args)


def _transposed(tensor):
    """The same values with the strides of a transposed buffer; every second element for vectors."""
    if tensor.dim() == 2:
        return tensor.t().contiguous().t()
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def _padded(tensor, fill, shift):
    """A view inside a larger buffer: `shift` elements off the alignment, `fill` all around, and in
    two dimensions a row stride that is wider than the row."""
    if tensor.dim() == 0:
        return _padded(tensor[None], fill, shift)[0]
    wide = [tensor.shape[0] + 2] + [size + 5 for size in tensor.shape[1:]]
    size = 1
    for extent in wide:
        size *= extent
    buffer = tensor.new_full((size + shift,), fill)
    view = buffer[shift:].view(wide)[tuple(slice(1, 1 + extent) for extent in tensor.shape)]
    view.copy_(tensor)
    return view


def _misaligned(tensor):
    """Contiguous, one element off the alignment of the allocator."""
    buffer = tensor.new_empty(tensor.numel() + 1)
    return buffer[1:].view(tensor.shape).copy_(tensor)


@each_representative
@pytest.mark.parametrize("layout", ["transposed", "misaligned", "strided"])
def test_memory_layout(op, backend, device, types, name, layout):
    move = {
        "transposed": _transposed,
        "misaligned": _misaligned,
        "strided": lambda tensor: _padded(tensor, 0, 3),
    }[layout]
    check(op, name, backend, device, types, move)


@functools.cache
def _torch_reads_around(dtype: torch.dtype) -> bool:
    """Whether PyTorch's own product reads the memory around its operands, as that of bfloat16 does
    on a processor with AMX (torch 2.13.0)."""
    for rows, width in itertools.product((1, 5, 17, 33), (20, 23, 48, 64)):
        a, b = (_padded(torch.ones(n, width, dtype=dtype), torch.nan, 3) for n in (rows, 19))
        if (a @ b.T).isnan().any() or (b.T @ b).isnan().any() or (b @ a.T).isnan().any():
            return True
    return False


@each_representative
def test_neighbouring_memory_is_neither_read_nor_written(op, backend, device, types, name):
    """NaN (the largest integer, True) around every argument: reading it spoils the result."""
    if backend == "reference" and _torch_reads_around(types.input):
        pytest.skip(f"PyTorch's product of {types.input} reads the memory around its operands here")
    moved = []

    def move(tensor):
        if tensor.dtype == torch.bool:
            fill = True
        elif tensor.is_floating_point():
            fill = torch.nan
        else:
            fill = torch.iinfo(tensor.dtype).max
        view = _padded(tensor, fill, 3)
        moved.append((view, fill))
        return view

    check(op, name, backend, device, types, move)
    for view, fill in moved:
        buffer = view._base.clone()
        inside = buffer.as_strided(view.shape, view.stride(), view.storage_offset())
        inside.fill_(fill)
        same = buffer.isnan() if isinstance(fill, float) else buffer == fill
        assert same.all(), "the memory around an argument was written"


def _same_bits(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{name} differs between two calls"


@each_representative
def test_second_call_has_the_same_bits(op, backend, device, types, name):
    need(op, backend, device)
    if backend not in op.deterministic and backend != "reference":
        pytest.skip(f"{op.name} does not promise determinism on {backend}")
    sample = get(op, name, backend, device, types)
    first = run(on(op, backend), sample, op.differentiable)
    _same_bits(first, run(on(op, backend), sample, op.differentiable))


@pytest.mark.parametrize(
    "op, backend, device, types, name",
    cases(types=[t for t in TYPES if t.name in ("float32", "bfloat16")], only=with_gradient),
)
def test_retained_graph_gives_the_same_gradients(op, backend, device, types, name):
    """Backward twice from one forward, the second time after other work: no state, no buffer that
    is consumed."""
    need(op, backend, device)
    kwargs, leaves = dict(get(op, name, backend, device, types).kwargs), {}
    for argument in op.differentiable:
        if kwargs.get(argument) is not None:
            kwargs[argument] = leaves[argument] = kwargs[argument].clone().requires_grad_()
    outputs = outputs_of(on(op, backend), kwargs)

    def backward(scale):
        grads = gradients(outputs, leaves, scale, retain_graph=True)
        return {key: grad.clone() for key, grad in grads.items()}

    first = backward(1)
    doubled = backward(2)
    _same_bits(first, backward(1))
    for key, grad in first.items():
        exact = 2 * grad.double()
        error, budget = excess(doubled[key], (2 * grad), exact)
        assert error <= budget, key


@pytest.mark.parametrize(
    "op, backend, device, types, name",
    cases(types=(FLOAT32, BFLOAT16), only=lambda op: op.complete if op.per_row else ()),
)
def test_views_in_one_call_are_separate_calls(op, backend, device, types, name):
    """Copies of a batch under other keys: bit for bit in everything that has an entry per row. The
    gradient of the rest is the sum of theirs."""
    need(op, backend, device)
    sample, count = get(op, name, backend, device, types), 3
    together = run(on(op, backend), as_views(op, sample, 0, count), op.differentiable)
    outputs = {key: value for key, value in together.items() if key not in op.differentiable}
    upstream = {key: upstream_of(value).to(value.dtype) for key, value in outputs.items()}
    sums = {key: 0 for key in op.differentiable if key not in op.per_row}
    seen = []
    for view in range(count):
        alone = as_views(op, sample, view, 1)
        part = {key: value.chunk(count)[view] for key, value in upstream.items()}
        found = run(on(op, backend), alone, op.differentiable, part)
        for key, value in found.items():
            if key in sums:
                sums[key] = sums[key] + value.double()
            else:
                assert torch.equal(value, together[key].chunk(count)[view]), key
        seen.append(found[next(iter(outputs))])
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    for key, total in sums.items():
        size = torch.finfo(together[key].dtype).eps * total.abs().max()
        assert (together[key] - total).abs().max() <= 8 * size, key


def subsets(names):
    """Nothing, all but one, and only the first."""
    return sorted({(), names[:1], *(tuple(n for n in names if n != left) for left in names)})


@pytest.mark.parametrize(
    "op, backend, device, types, name, wanted",
    [
        pytest.param(
            *case.values, wanted, id=f"{case.id}-{'+'.join(wanted) or 'none'}", marks=case.marks
        )
        for case in cases(types=(FLOAT32,), only=lambda op: op.complete)
        for wanted in subsets(case.values[0].differentiable)
    ],
)
def test_only_the_requested_gradients(op, backend, device, types, name, wanted):
    need(op, backend, device)
    sample = get(op, name, backend, device, types)
    every = run(on(op, backend), sample, op.differentiable)
    if not wanted:
        outputs = outputs_of(on(op, backend), sample.kwargs)
        assert not any(value.requires_grad for value in outputs.values())
        return
    some = run(on(op, backend), sample, wanted)
    assert every.keys() - some.keys() == set(op.differentiable) - set(wanted)
    _same_bits(some, {key: every[key] for key in some})


@pytest.mark.parametrize(
    "op, backend, device, types, name",
    cases(backends=("cpp",), only=lambda op: op.representative + op.many_tasks),
)
def test_same_bits_for_any_number_of_threads(op, backend, device, types, name):
    need(op, backend, device)
    sample = get(op, name, backend, device, types)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(run(on(op, backend), sample, op.differentiable))
    _same_bits(results[0], results[1])
    _same_bits(results[0], results[2])


@pytest.mark.parametrize(
    "op, backend, device, types, name",
    rest_exhaustive(
        lambda op, backend, _: backend == "cpp",
        [
            *cases(types=(FLOAT32,), backends=("reference",), only=representative),
            *cases(types=(MIXED,), backends=("cpp",), only=representative),
        ],
    ),
)
def test_compile_without_graph_break(op, backend, device, types, name):
    if backend not in op.compiles:
        pytest.skip(f"{op.name} on {backend} depends on values on the host")
    _compare_compiled(op, name, backend, device, types, "aot_eager")


# Losses, attention and projections; a call costs Inductor's C++ compiler 7 s.
INDUCTOR = ("cross_entropy", "attention", "linear")


@pytest.mark.parametrize(
    "op, backend, device, types, name",
    rest_exhaustive(
        lambda op, *_: op.name.endswith(INDUCTOR),
        cases(types=(FLOAT32,), backends=("cpp",), only=lambda op: op.complete[-1:]),
    ),
)
def test_compile_with_inductor(op, backend, device, types, name):
    _compare_compiled(op, name, backend, device, types, "inductor")


def _compare_compiled(op, name, backend, device, types, compiler):
    need(op, backend, device)
    torch._dynamo.reset()
    compiled = torch.compile(on(op, backend), fullgraph=True, dynamic=True, backend=compiler)
    sample = get(op, name, backend, device, types)
    actual = run(compiled, sample, op.differentiable)
    exact, low = expected(op.name, name, device, types, small(backend, device))
    assert_within_budget(sample, actual, exact, low)
    if compiler == "aot_eager":  # the same operators in the same order
        for key, value in run(on(op, backend), sample, op.differentiable).items():
            torch.testing.assert_close(actual[key], value, msg=key)
