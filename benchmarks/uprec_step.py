# SPDX-License-Identifier: Apache-2.0
"""Entries of a whole pre-training step of UPRec: the three losses, backward and AdamW; and, with no
users in all, of BERT4Rec: masked items alone, no tokens around them.

The peer is the same model on padded sequences in careful PyTorch: logits at the masked positions
only, similarities as one product, fused AdamW. Batches are ready for all (fastrec masks its own
inside the step). Extra memory holds parameters, gradients and moments, the same for all.

Legend: B users of a batch, L items read of a user, V items, D width, U users in all, S sequences of
the batch (its users and their drawn friends), T their tokens, N masked items, Q pairs of friends.
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.bench import Entry, largest
from benchmarks.padded import item_loss, padded_states
from benchmarks.relations import (
    UPREC,
    item_batch,
    masked_view,
    power_law_graph,
    side_of,
    social_batch,
)
from fastrec.data.attributes import EncodedAttribute
from fastrec.data.batch import JaggedBatch
from fastrec.data.graph import FriendSampler
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.user_model import UserModel
from fastrec.objectives.item import Item
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.random import Rng

SEED, STEP = 0, 0
P = 0.5
LINKS = 8  # friendships a user, before repeated ones are dropped


def _entry(b: int, length: int, v: int, d: int, u: int, **options) -> Entry:
    return Entry("uprec_step", dict(B=b, L=length, V=v, D=d, U=u), **options)


ENTRIES = (
    _entry(768, 30, 20_033, 64, 30_431, case="Yelp sizes", rounds=7),
    _entry(256, 50, 141_939, 64, 30_431, case="WeChat items", rounds=3),
    _entry(256, 30, 20_033, 64, 0, case="BERT4Rec, Yelp sizes", rounds=7),
)
SMOKE = (_entry(9, 6, 50, 16, 40, rounds=2), _entry(9, 6, 50, 16, 0, case="BERT4Rec", rounds=2))
QUICK = (ENTRIES[0],)
ELEMENT = "token"
STORED = "logits, similarities and attention probabilities"
PASSES = ("step",)
PEERS = {"eager": ("eager",), "`torch.compile`": ("torch.compile",)}
GRADIENT_LIMIT = {"float32": 1e-4}


@dataclass
class Problem:
    """A model, its heads and one batch; the padded form and the optimisers are made when asked.
    `compiled` is the padded loss that `torch.compile` made for the entry."""

    model: UserModel
    joint: JointObjective
    batch: JaggedBatch
    steps: dict[str, Callable] = field(default_factory=dict)
    compiled: Callable | None = None

    @functools.cached_property
    def padded(self) -> "Padded":
        return Padded(self.model, self.batch)


class Padded:
    """What a padded step reads: the batch masked as fastrec masks it, dense exclusions."""

    def __init__(self, model: UserModel, batch: JaggedBatch):
        view = masked_view(model, batch, Rng(SEED, STEP))["main"]
        self.targets = view.events["target"][view.scored]
        self.mask = torch.arange(int(view.lengths.max())) < view.lengths[:, None]
        self.values = view.values.new_zeros(self.mask.shape)
        self.values[self.mask] = view.values
        self.slots = self.mask.flatten().nonzero().squeeze(1)[view.scored]
        self.not_items = torch.ones_like(self.mask)
        self.not_items[self.mask] = view.values > model.token("mask")  # which stands for an item
        self.columns, self.pairs, pairs = view.users, 0, view.pairs
        if pairs is None:
            return
        self.pairs = len(pairs.positive)
        self.queries, self.candidates = pairs.query_rows, pairs.candidate_rows
        self.positive, (listed, offsets) = pairs.positive, pairs.exclude
        owner = torch.repeat_interleave(offsets.diff())
        self.excluded = torch.zeros(len(self.queries), len(self.candidates), dtype=torch.bool)
        self.excluded[owner, listed] = True
        self.excluded.scatter_(1, self.positive[:, None], False)


def padded_loss(model: UserModel, joint: JointObjective, batch: Padded, p: float) -> Tensor:
    states = padded_states(model, batch.values, batch.mask, p)
    loss = item_loss(model, states.flatten(0, 1).index_select(0, batch.slots), batch.targets)
    if "friends" not in joint.parts:
        return loss
    users = states.masked_fill(batch.not_items[:, :, None], -torch.inf).amax(1)
    for part, _ in joint.parts["user_attributes"].losses(users, batch.columns).values():
        loss = loss + joint.weights["user_attributes"] * part
    weight = joint.parts["friends"].weight
    query, candidate = users[batch.queries], users[batch.candidates]
    similarity = 2 * (query * weight) @ candidate.T - candidate.square() @ weight
    similarity = similarity.masked_fill(batch.excluded, -torch.inf)
    return loss + joint.weights["friends"] * F.cross_entropy(similarity, batch.positive)


def fastrec_loss(model: UserModel, joint: JointObjective, batch: JaggedBatch) -> Tensor:
    rng = Rng(SEED, STEP)
    return total_loss(joint(model, masked_view(model, batch, rng), rng))


def setting(
    b: int, length: int, v: int, d: int, u: int, batches: int = 1, layers: int = 2
) -> tuple[UserModel, JointObjective, list[JaggedBatch]]:
    """A model, its heads and the batches of the first steps."""
    torch.manual_seed(0)
    config = ModelConfig(
        width=d,
        max_len=length,
        dropout=P,
        encoder=Transformer(layers=layers),
        tokens=["cls", "sep"] if u else [],
    )
    model, generator = UserModel(v, config), np.random.default_rng(0)
    if u == 0:
        joint = JointObjective({"item": Item()}, model, side_of(model, []))
        users = np.arange(batches * b).reshape(batches, b)
        return model, joint, [item_batch(model, part, generator) for part in users]
    region = EncodedAttribute(
        "region", torch.from_numpy(generator.integers(6, size=u)), tuple("nesw-o")
    )
    rating = EncodedAttribute("rating", torch.randn(u))
    joint = JointObjective(UPREC.named(), model, side_of(model, [region, rating]))
    sampler = FriendSampler(power_law_graph(u, LINKS * u))
    made = [
        social_batch(model, sampler, [region, rating], b, generator, step)
        for step in range(STEP, STEP + batches)
    ]
    return model, joint, made


@functools.lru_cache(maxsize=2)
def _start(*sizes: int) -> tuple[UserModel, JointObjective, JaggedBatch]:
    model, joint, (batch,) = setting(*sizes)
    return model, joint, batch


def problem(entry: Entry, device: str = "cpu") -> tuple[Problem]:
    """Of the same model and batch whenever it is asked for, and with no step behind it."""
    if device != "cpu":
        raise ValueError(f"uprec_step runs on a CPU, benchmarks/gpu/uprec.py is for {device}")
    return (Problem(*_start(*entry.sizes.values())),)


def trained(problem: Problem, loss: Callable[[UserModel, JointObjective], Tensor]) -> Callable:
    """One step of training a copy of the model; returns the loss before it."""
    model, joint = copy.deepcopy((problem.model, problem.joint))
    parameters = [*model.parameters(), *joint.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(model, joint)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def implementations(entry: Entry, compiler: str = "inductor") -> dict[str, Callable]:
    compiled = torch.compile(padded_loss, backend=compiler)
    losses: dict[str, Callable] = {
        "fastrec": lambda p: lambda model, joint: fastrec_loss(model, joint, p.batch),
        "eager": lambda p: lambda model, joint: padded_loss(model, joint, p.padded, P),
        "torch.compile": lambda p: lambda model, joint: compiled(model, joint, p.padded, P),
    }

    def one(name: str) -> Callable:
        def step(problem: Problem) -> Tensor:
            problem.compiled = compiled
            if name not in problem.steps:
                problem.steps[name] = trained(problem, losses[name](problem))
            return problem.steps[name]()

        return step

    return {name: one(name) for name in losses}


def errors(entry: Entry, inputs: tuple, results: dict) -> dict[str, dict[str, float]]:
    """Of the loss and of the gradients of all parameters, relative, without dropout: masks of
    PyTorch's generator are others."""
    (problem,) = inputs

    def gradients(loss: Callable, dtype: torch.dtype) -> list[Tensor]:
        model, joint = copy.deepcopy((problem.model, problem.joint))
        model.encoder.dropout = 0.0
        parameters = [*model.to(dtype).parameters(), *joint.to(dtype).parameters()]
        value = loss(model, joint)
        grads = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        return [value.detach(), *grads]

    def padded(loss):
        return lambda model, joint: loss(model, joint, problem.padded, 0.0)

    exact = gradients(padded(padded_loss), torch.float64)
    scale = max(grad.abs().max() for grad in exact[1:])
    losses = {
        "fastrec": lambda model, joint: fastrec_loss(model, joint, problem.batch),
        "eager": padded(padded_loss),
        "torch.compile": padded(problem.compiled),
    }
    measured = {name: gradients(losses[name], torch.float32) for name in results}
    return {
        name: {
            "output_error": ((measured[name][0] - exact[0]).abs() / exact[0].abs()).item(),
            "gradient_error": largest(
                ((a - b).abs().max() / scale).item()
                for a, b in zip(measured[name][1:], exact[1:], strict=True)
            ),
        }
        for name in results
    }


def work(entry: Entry) -> dict[str, int]:
    """Products of the layers, of attention, of the losses; every parameter, its gradient and its
    moments moved as often as AdamW needs."""
    (at,) = problem(entry)
    batch, d, v = at.batch, entry.sizes["D"], entry.sizes["V"]
    lengths = batch.lengths + len(at.model.config.tokens)
    tokens, masked = int(lengths.sum()), len(at.padded.targets)
    pairs, squares = at.padded.pairs, int(lengths.square().sum())
    layers, heads = len(at.model.encoder.layers), at.model.encoder.layers[0].heads
    products = layers * (12 * tokens * d * d + 2 * squares * d)
    products += masked * (v + d) * d + pairs * pairs * d
    stored = masked * v + pairs * pairs + layers * heads * squares
    parameters = sum(p.numel() for p in at.model.parameters())
    return {
        "elements": tokens,
        "exps": stored,
        "bytes": 4 * 7 * parameters,
        "materialised": 4 * stored,
        "step": 3 * 2 * products,
    }
