# SPDX-License-Identifier: Apache-2.0
"""Section `step`: a whole pre-training step: masked items, forward, backward, AdamW, bf16 autocast.

All implementations train the same model of fastrec.nn.user_model on the same masked batch:
"padded" is the encoder in plain PyTorch on a padded batch, as BERT4Rec code does it.

Legend: B sequences, L padded length, T events, N masked positions, V items, D width.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.bench import Entry
from benchmarks.gpu.checks import captured
from benchmarks.gpu.clock import Clock, spread
from benchmarks.gpu.context import NO_TIME, Context
from benchmarks.gpu.native import native
from benchmarks.jagged_attention import lengths_of
from benchmarks.padded import item_loss, padded_states
from benchmarks.relations import side_of
from fastrec.backend import NATIVE
from fastrec.data.batch import JaggedBatch, offsets_of
from fastrec.data.steps.mask import Mask
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.random import Rng


@dataclass(frozen=True)
class Step:
    """Sizes of a step; `lengths` is a case of benchmarks/jagged_attention.py."""

    name: str
    sequences: int
    length: int
    items: int
    lengths: str
    width: int = 64
    dropout: float = 0.5
    masked: float = 0.2


STEPS = (
    Step("Yelp sizes", 768, 30, 20_033, "yelp"),
    Step("WeChat sizes", 256, 50, 141_939, "full"),
    Step("large batch", 4096, 50, 141_939, "yelp"),
)
TINY = (Step("tiny", 5, 6, 40, "yelp", width=16),)


@dataclass
class Batch:
    jagged: JaggedBatch
    rows: Tensor  # int64 [N] of the events
    targets: Tensor  # int64 [N]
    padded: Tensor  # int64 [B, L]
    mask: Tensor  # bool [B, L], where an event is
    slots: Tensor  # int64 [N] of the padded positions


def batch_of(sizes: Step, model: UserModel, device: str) -> Batch:
    shape = dict(B=sizes.sequences, N=sizes.length, H=1, D=1)
    lengths = lengths_of(Entry("jagged_attention", shape, case=sizes.lengths))
    generator, offsets = torch.Generator().manual_seed(0), offsets_of(lengths)
    values = torch.randint(sizes.items, (int(offsets[-1]),), generator=generator)
    batch = JaggedBatch(values, offsets, torch.arange(sizes.sequences), sizes.length)
    masked = Mask(sizes.masked)(batch, Rng(0, 0), side_of(model, [])).with_scored().to(device)
    rows = masked.scored
    assert rows is not None
    mask = torch.arange(sizes.length, device=device) < lengths.to(device)[:, None]
    slot_of = mask.flatten().nonzero().squeeze(1)
    padded = masked.values.new_zeros(mask.shape)
    padded[mask] = masked.values
    return Batch(masked, rows, masked.events["target"][rows], padded, mask, slot_of[rows])


def padded_loss(model: UserModel, batch: Batch, p: float) -> Tensor:
    """The same model without fastrec."""
    states = padded_states(model, batch.padded, batch.mask, p).flatten(0, 1)
    return item_loss(model, states.index_select(0, batch.slots), batch.targets)


def jagged_loss(model: UserModel, batch: Batch, rng: Rng | None) -> Tensor:
    states = model.encode(batch.jagged, rng).states
    masked, table = states.index_select(0, batch.rows), model.item_embedding.weight
    return model.item_head.loss(masked, table, batch.targets)


def trainer(model: UserModel, loss: Callable[[UserModel], Tensor], device: str) -> Callable:
    """One step of training, which returns {"loss"}."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, fused=True, capturable=device == "cuda"
    )

    def step() -> dict[str, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            value = loss(model)
        value.backward()
        optimizer.step()
        return {"loss": value.detach()}

    return step


def _steps(sizes: Step, model: UserModel, batch: Batch, context: Context) -> dict[str, Callable]:
    """Name -> a function that makes one step, after what the first step has to prepare."""
    device, counter = context.device, torch.zeros((), dtype=torch.int64, device=context.device)
    rng, p = Rng(torch.full_like(counter, 7), counter), sizes.dropout
    compiled = torch.compile(padded_loss, backend="inductor" if context.cuda else "eager")

    def jagged(own: UserModel) -> Tensor:
        counter.add_(1)
        return jagged_loss(own, batch, rng)

    def one(loss: Callable[[UserModel], Tensor]) -> Callable:
        return trainer(copy.deepcopy(model), loss, device)

    plain = one(jagged)

    def reference() -> dict[str, Tensor]:
        with native(device, "reference"):
            return slow()

    slow = one(jagged)

    def in_graph() -> Callable:
        graph, _ = captured(one(jagged), context.cuda)
        return graph.replay

    lazy: list[Callable] = []

    def replay() -> None:
        if not lazy:
            lazy.append(in_graph())
        lazy[0]()

    return {
        "fastrec": plain,
        "fastrec in a CUDA graph": replay,
        "padded eager": one(lambda own: padded_loss(own, batch, p)),
        "padded torch.compile": one(lambda own: compiled(own, batch, p)),
        "reference": reference,
    }


def _kernels(call: Callable, cuda: bool) -> dict:
    """Device time of the kernels of one step, and the ten that take most of it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        call()
        if cuda:
            torch.cuda.synchronize()
    times: dict[str, float] = {}
    for event in found.events():
        on_device = str(event.device_type).endswith("CUDA")
        taken = event.device_time_total if on_device else event.self_cpu_time_total
        if on_device == cuda and taken:
            times[event.name] = times.get(event.name, 0.0) + taken / 1e6
    largest = sorted(times, key=times.__getitem__, reverse=True)[:10]
    return {"seconds": sum(times.values()), "largest": {name[:80]: times[name] for name in largest}}


def _difference(model: UserModel, batch: Batch) -> float:
    """Relative difference of the loss of both encoders without dropout, in float32."""
    with torch.no_grad():
        padded, jagged = padded_loss(model, batch, 0.0), jagged_loss(model, batch, None)
    return ((padded - jagged).abs() / padded.abs()).item()


def timed(
    key: str, steps: dict[str, Callable], context: Context, clock: Clock, rounds: int
) -> dict[str, dict]:
    """Rows of `steps`, timed in turn after two steps of each (one on CPU tensors, whose time says
    nothing); the kernels of "fastrec". Those of fastrec come first, and whatever the time: without
    them the others say nothing."""
    rows: dict[str, dict] = {}
    taken: dict[str, list[float]] = {}
    for name in steps:
        if why := context.announce(key, name):
            rows[name] = {"failed": why}
            continue
        if context.over() and not name.startswith("fastrec"):
            rows[name] = dict(NO_TIME)
            continue
        try:
            for _ in range(2 if context.cuda else 1):
                steps[name]()
            rows[name], taken[name] = {"peak_bytes": clock.peak_bytes(steps[name])}, []
        except Exception as error:
            rows[name] = context.rescue(error)
    context.announce(key, "times")
    for done in range(rounds):
        if done >= 3 and context.over():
            break
        for name in taken:
            taken[name].append(clock.seconds(steps[name], lead=False))
    for name, times in taken.items():
        rows[name]["step"] = spread(times)
    if "fastrec" in taken:
        context.announce(key, "kernels")
        ours = rows["fastrec"]["step"]["median"]
        for name in taken:
            rows[name]["ratio"] = rows[name]["step"]["median"] / ours
        try:
            rows["fastrec"]["kernels"] = _kernels(steps["fastrec"], context.cuda)
        except Exception as error:
            rows["fastrec"]["kernels"] = context.rescue(error)
    return rows


def _measure(sizes: Step, context: Context, clock: Clock, rounds: int) -> dict:
    torch.manual_seed(0)
    torch._dynamo.reset()  # static shapes again, not the dynamic ones of a second size
    config = ModelConfig(width=sizes.width, max_len=sizes.length)
    model = UserModel(sizes.items, config).to(context.device)
    batch = batch_of(sizes, model, context.device)
    difference = _difference(model, batch)
    if not difference < 1e-4:
        return {"failed": f"the losses of both encoders differ by {difference:.2g}"}
    steps = _steps(sizes, model, batch, context)
    return {
        "sequences": sizes.sequences,
        "events": len(batch.jagged.values),
        "masked": len(batch.rows),
        "items": sizes.items,
        "loss_difference": difference,
        "implementations": timed(sizes.name, steps, context, clock, rounds),
    }


def step(context: Context) -> None:
    assert NATIVE[context.device] == "triton", "the step is measured on the Triton kernels"
    clock, rounds = Clock(context.device), 1 if context.tiny else 31
    for sizes in context.new_first(TINY if context.tiny else STEPS, lambda sizes: sizes.name):
        call = functools.partial(_measure, sizes, context, clock, rounds)
        context.attempt(sizes.name, call, None)
