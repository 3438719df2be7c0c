# SPDX-License-Identifier: Apache-2.0
"""Section `uprec_step`: pre-training of UPRec, three losses, on a new batch every step.

What a training loop does with a batch that the loader made: items masked, batch to the device,
forward, backward, AdamW, bf16 autocast. "fastrec in CUDA graphs" is `cuda_graph` of a stage, and
first of all checked: losses and gradients of several batches against those without a graph. The
padded peers get batches that are on the device already.

Legend: B users of a batch, S sequences (users and drawn friends), V items, D width.
"""

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import uprec_step as cpu
from benchmarks.bench import largest
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.context import Context
from benchmarks.gpu.step import timed, trainer
from benchmarks.relations import masked_view
from fastrec.data.batch import JaggedBatch
from fastrec.objectives.joint import total_loss
from fastrec.random import Rng
from fastrec.training.graphed import GraphedObjective, cuda_graph


@dataclass(frozen=True)
class Sizes:
    name: str
    users: int
    length: int
    items: int
    width: int
    graph: int
    batches: int = 8
    layers: int = 2


SIZES = (
    Sizes("UPRec, Yelp sizes", 768, 30, 20_033, 64, 30_431),
    Sizes("UPRec, WeChat items", 256, 50, 141_939, 64, 30_431),
)
TINY = (Sizes("UPRec, tiny", 3, 4, 50, 16, 40, batches=2, layers=1),)


def _capture(context: Context) -> Callable:
    """Without CUDA the captured function itself."""
    return cuda_graph if context.cuda else lambda losses, packs: losses


def _eager(modules: nn.ModuleList, batch: JaggedBatch, step: int, device: str) -> Tensor:
    model, joint = modules
    rng = Rng(cpu.SEED, step)
    views = masked_view(model, batch, rng)
    return total_loss(joint(model, {n: view.to(device) for n, view in views.items()}, rng))


def _graphed(modules: nn.ModuleList, context: Context) -> Callable[[JaggedBatch, int], Tensor]:
    call = GraphedObjective(*modules, cpu.SEED, capture=_capture(context))

    def loss(batch: JaggedBatch, step: int) -> Tensor:
        return total_loss(call(masked_view(modules[0], batch, Rng(cpu.SEED, step)), step))

    return loss


def _difference(modules: nn.ModuleList, batches: list[JaggedBatch], context: Context) -> float:
    """Largest relative difference of the loss and of a gradient between a graph and none."""
    graphed = _graphed(modules, context)
    worst = 0.0
    for step, batch in enumerate(batches):
        found = []
        for loss in (graphed(batch, step), _eager(modules, batch, step, context.device)):
            modules.zero_grad()
            loss.backward()
            grads = [p.grad.clone() for p in modules.parameters() if p.grad is not None]
            found.append((loss.detach().reshape(1), *grads))
        for ours, plain in zip(*found, strict=True):
            scale = plain.abs().max().clamp_min(1e-6)
            worst = largest((worst, ((ours - plain).abs().max() / scale).item()))
    return worst


def _padded(modules: nn.ModuleList, batch: JaggedBatch, device: str) -> cpu.Padded:
    made = cpu.Padded(modules[0], batch)
    for name, value in vars(made).items():
        if isinstance(value, Tensor):
            setattr(made, name, value.to(device))
    made.columns = {name: column.to(device) for name, column in made.columns.items()}
    return made


def _measure(sizes: Sizes, context: Context, clock: Clock, rounds: int) -> dict:
    torch._dynamo.reset()
    model, joint, batches = cpu.setting(
        sizes.users,
        sizes.length,
        sizes.items,
        sizes.width,
        sizes.graph,
        sizes.batches,
        sizes.layers,
    )
    modules = nn.ModuleList([model, joint])
    padded = [_padded(modules, batch, context.device) for batch in batches]
    modules.to(context.device)
    difference = _difference(modules, batches, context)
    if not difference < 1e-3:
        return {"failed": f"a step from a graph differs by {difference:.2g}"}
    # One program for all batches; on CPU tensors, where nothing is timed, one for each costs less.
    compiler = "inductor" if context.cuda else "eager"
    compiled = torch.compile(cpu.padded_loss, dynamic=context.cuda, backend=compiler)

    def one(name: str) -> Callable:
        own, steps = copy.deepcopy(modules), itertools.count()
        graphed = _graphed(own, context)

        def loss(modules: nn.ModuleList) -> Tensor:
            step = next(steps)
            at = step % sizes.batches
            if name == "fastrec":
                return _eager(modules, batches[at], step, context.device)
            if name == "fastrec in CUDA graphs":
                return graphed(batches[at], step)
            function = compiled if name == "padded torch.compile" else cpu.padded_loss
            return function(*modules, padded[at], cpu.P)

        return trainer(own, loss, context.device)

    names = ("fastrec", "fastrec in CUDA graphs", "padded eager", "padded torch.compile")
    return {
        "sequences": sum(map(len, batches)) / sizes.batches,
        "events": sum(int(part.mask.sum()) for part in padded) / sizes.batches,
        "items": sizes.items,
        "difference": difference,
        "implementations": timed(
            sizes.name, {name: one(name) for name in names}, context, clock, rounds
        ),
    }


def uprec_step(context: Context) -> None:
    clock, rounds = Clock(context.device), 1 if context.tiny else 31
    for sizes in context.new_first(TINY if context.tiny else SIZES, lambda sizes: sizes.name):
        call = functools.partial(_measure, sizes, context, clock, rounds)
        context.attempt(sizes.name, call, None)
