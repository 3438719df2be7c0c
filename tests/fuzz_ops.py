# SPDX-License-Identifier: Apache-2.0
"""Calls of ops with random arguments, valid and wrong, by seed. test_fuzz_ops.py runs it in a
process of its own, which a crash ends:

    python fuzz_ops.py FIRST COUNT STEP

prints the seed of every call before it is made, and a line for every call that went wrong.
FASTREC_FUZZ_EXTENSION names the C++ extension to load, one built with -fsanitize=address.
"""

import dataclasses
import importlib.util
import os
import sys
from random import Random

import torch

if extension := os.environ.get("FASTREC_FUZZ_EXTENSION"):
    spec = importlib.util.spec_from_file_location("fastrec._C", extension)
    sys.modules["fastrec._C"] = importlib.util.module_from_spec(spec)

from op_check import assert_within_budget, on, samples
from op_db import OPS
from op_db.case import promote, run
from wrong_arguments import ERRORS, can_learn, changes, verdict

SMALL = 20_000  # elements of a sample, so that a call takes a few milliseconds


def laid_out(random: Random, tensor: torch.Tensor) -> torch.Tensor:
    """The same values in other memory: strided, transposed, one element off the alignment."""
    way = random.randrange(6)
    if way == 0:
        return torch.stack([tensor, tensor], -1)[..., 0]
    if way == 1 and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if way == 2:
        return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    return tensor


def chosen(random: Random):
    """(op, types, sample)."""
    while True:
        op = random.choice(OPS)
        types = random.choice(op.types)
        sample = random.choice(list(samples(op.name, "cpu", types, True).values()))
        tensors = [v for v in sample.kwargs.values() if isinstance(v, torch.Tensor)]
        if sum(tensor.numel() for tensor in tensors) <= SMALL:
            kwargs = {
                k: laid_out(random, v) if isinstance(v, torch.Tensor) else v
                for k, v in sample.kwargs.items()
            }
            return op, types, dataclasses.replace(sample, kwargs=kwargs)


def wrong(seed: int) -> str | None:
    """What is wrong with the call of a seed; None if nothing."""
    random = Random(seed)
    op, types, sample = chosen(random)
    backend = random.choice(["cpp", "cpp", "cpp", "reference"])
    if (backend, types.name) in op.refuses:
        backend = "reference"
    torch.set_num_threads(random.choice([1, 2]))
    possible = list(changes(sample))
    made = random.sample(possible, min(random.choice([0, 1, 2, 3]), len(possible)))
    if sample.kwargs.get("sparse_grad"):
        made = []  # the function of op_db around it takes tensors alone
    what = ", ".join(f"{change.argument} {change.what}" for change in made)
    print(f"{seed} {op.name} {backend} {types.name} {sample.name}: {what}", flush=True)
    # The floors of op_db, which float64 needs, are those of its large samples.
    compared = types.name != "float64"
    if compared and len(made) == 1:
        return verdict(op, backend, sample, made[0])
    if compared and not made:
        exact = run(op.reference, promote(sample), op.differentiable)
        low = run(op.reference, sample, op.differentiable)
        actual = run(on(op, backend), sample, op.differentiable)
        assert_within_budget(sample, actual, exact, low, op.rounding_band(backend, sample))
        return None
    kwargs = sample.kwargs | {change.argument: change.value for change in made}
    changed = dataclasses.replace(sample, kwargs=kwargs)
    try:
        op.function(**kwargs, backend=backend)
        if can_learn(op, changed):
            run(on(op, backend), changed, op.differentiable)
    except ERRORS:
        pass
    return None


def main(first: int, count: int, step: int) -> int:
    bad = 0
    for seed in range(first, first + count * step, step):
        try:
            why = wrong(seed)
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:300]}"
        if why:
            bad += 1
            print(f"WRONG {seed}: {why}", flush=True)
    print(f"{count} calls, {bad} wrong", flush=True)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
