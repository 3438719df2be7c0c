# SPDX-License-Identifier: Apache-2.0
"""Whether the kernels are right: section `masks`, and the programs of the sections `budget` and
`attention_backward`.

    python -m benchmarks.gpu.correct budget cuda
    python -m benchmarks.gpu.correct attention cuda

Legend: B sequences, T events, H heads, D width, L events of a sequence.
"""

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from benchmarks.bench import largest
from benchmarks.gpu.checks import samples
from benchmarks.gpu.context import Context
from benchmarks.gpu.native import use_triton
from fastrec import bias_gelu_dropout, dropout_add_layer_norm, jagged_embedding
from fastrec.ops.jagged_attention import jagged_attention, jagged_attention_ref
from fastrec.random import Rng

RNG = Rng(2**61 + 12345, 7)


def beyond_budget(op, sample) -> list[str]:
    """Outputs and gradients that are further from float64 than the tests allow, and how far."""
    case = importlib.import_module("op_db.case")
    exact = case.run(op.reference, case.promote(sample), op.differentiable)
    low = case.run(op.reference, sample, op.differentiable)
    band, wrong = op.rounding_band("triton", sample), []
    for name, value in case.run(op.function, sample, op.differentiable).items():
        error, budget = case.excess(value, low[name], exact[name], sample.floor.get(name, 0))
        if value.numel():
            budget += band * exact[name].abs().max().item()
        if not error <= budget:
            wrong.append(f"{sample.name} {name} {error:.2g} > {budget:.2g}")
    return wrong


def budget(device: str, tiny: bool, worker: int, workers: int) -> None:
    """A line for every representative sample of every op that is this worker's: "ran <key>\\t<what
    is beyond the budget>". The first error of CUDA ends it: the context is broken."""
    for op, sample, key in islice(samples(device, tiny), worker, None, workers):
        try:
            wrong = beyond_budget(op, sample)
        except Exception as error:
            wrong = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"]
        print(f"ran {key}\t{'; '.join(wrong)}", flush=True)
        if device == "cuda":
            torch.cuda.synchronize()


def budgets(device: str, tiny: bool) -> int:
    """The same by several processes: most of the time is the compilation of kernels."""
    workers = 1 if tiny else max(1, min(14, (os.cpu_count() or 2) - 2))
    command = [sys.executable, "-m", "benchmarks.gpu.correct", "budget", device, *["tiny"] * tiny]
    running = [subprocess.Popen([*command, f"{i}/{workers}"]) for i in range(workers)]
    return max(abs(process.wait()) for process in running)


def kept(device: str, backend: str, width: int = 64) -> dict[str, Tensor]:
    """What the dropout of each op keeps, bool on the host."""
    lengths = torch.tensor([0, 1, 17 * width // 64, width // 2 - 1, width // 2 + 1, width])
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    events, views = int(offsets[-1]), (torch.arange(len(lengths)) * 2**32 + 5).to(device)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device)
    keys = views.repeat_interleave(lengths.to(device))
    shape, ones = (events, 2, width), torch.ones(events, width, device=device)
    zero = torch.zeros(shape, device=device)
    one_hot = torch.nn.functional.one_hot(positions, width)[:, None].expand(shape).float()
    drop = dict(dropout_p=0.3, rng=RNG, backend=backend)
    row = drop | dict(keys=keys, positions=positions)
    found = {
        "jagged_attention": jagged_attention(
            zero, zero, one_hot, offsets.to(device), max_seq_len=width, keys=views, **drop
        ),
        "bias_gelu_dropout": bias_gelu_dropout(ones, None, **row),
        "jagged_embedding": jagged_embedding(
            positions, ones[:width], positions=positions, **drop, keys=keys
        ),
        # Two values a row, of which the one that was kept is above the mean.
        "dropout_add_layer_norm": dropout_add_layer_norm(ones, None, None, None, **row).output,
    }
    return {name: (value > 0).cpu() for name, value in found.items()}


def masks(context: Context) -> None:
    """The masks of the kernels have the bits of those on the CPU."""
    width = 64 if context.cuda else 16
    expected = kept("cpu", "reference", width)
    found = functools.cache(lambda: kept(context.device, "triton", width))

    def check(name: str) -> dict:
        mine = found()[name]
        wrong = int((mine != expected[name]).sum())
        share = expected[name].float().mean().item()
        if wrong or not 0 < share < 1:
            return {"failed": f"{wrong} of {mine.numel()} differ, {share:.0%} kept"}
        return {"passed": True}

    for name in expected:
        context.attempt(name, functools.partial(check, name))


# The shape that assemblers compiled to wrong gradients in another library (docs/log/gpu.md): a tile
# of 64 x 64 and D = 32; beside it what is near. (D, longest sequence)
SHAPES = [(width, length) for length in (50, 33, 64, 128, 200) for width in (32, 64, 16)]


def attention_cases(tiny: bool) -> Iterator[tuple[str, dict[str, Tensor], dict]]:
    """(key, tensors, options) on the host."""
    for seed in range(1 if tiny else 3):
        for width, length in SHAPES[:1] if tiny else SHAPES:
            length = 9 if tiny else length
            for dtype in (torch.bfloat16, torch.float16):
                generator = torch.Generator().manual_seed(seed)
                lengths = torch.randint(1, length + 1, (3 if tiny else 24,), generator=generator)
                lengths[0] = length
                offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
                shape = (int(offsets[-1]), 2, width)
                names = ("query", "key", "value", "upstream")
                draw = functools.partial(torch.randn, shape, generator=generator)
                tensors = {name: draw().to(dtype) for name in names} | {"offsets": offsets}
                tensors["keys"] = torch.arange(len(lengths))
                key = f"D={width} L={length} {str(dtype).removeprefix('torch.')} seed {seed}"
                yield key, tensors, dict(max_seq_len=length, dropout_p=0.5, rng=RNG)


def gradients(function, tensors: dict[str, Tensor], options: dict) -> list[Tensor]:
    """Output and gradients, on the host."""
    given = [tensors[name].clone().requires_grad_() for name in ("query", "key", "value")]
    out = function(*given, tensors["offsets"], keys=tensors["keys"], **options)
    return [x.detach().cpu() for x in (out, *torch.autograd.grad(out, given, tensors["upstream"]))]


def attention_errors(tensors: dict[str, Tensor], options: dict, device: str) -> float:
    """The largest error against float64 on the host, over the budget of the tests."""
    excess = importlib.import_module("op_db.case").excess
    wide = {n: x.double() if x.is_floating_point() else x for n, x in tensors.items()}
    exact = gradients(jagged_attention_ref, wide, options)
    low = gradients(jagged_attention_ref, tensors, options)
    there = {name: x.to(device) for name, x in tensors.items()}
    found = gradients(jagged_attention, there, options | {"backend": "triton"})
    pairs = [excess(*three) for three in zip(found, low, exact, strict=True)]
    return largest(error / budget if budget else float(error > 0) for error, budget in pairs)


def attention(device: str, tiny: bool) -> None:
    """A line for every case: "ran <key>\\t<error over budget>"."""
    for key, tensors, options in attention_cases(tiny):
        print(f"ran {key}\t{attention_errors(tensors, options, device):.3f}", flush=True)


def main(what: str, device: str, *more: str) -> None:
    tiny, share = "tiny" in more, more[-1] if more else ""
    if what == "attention":
        attention(device, tiny)
    elif "/" in share:
        use_triton(device)
        worker, workers = map(int, share.split("/"))
        budget(device, tiny, worker, workers)
    else:
        sys.exit(budgets(device, tiny))


if __name__ == "__main__":
    main(*sys.argv[1:])
