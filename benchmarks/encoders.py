# SPDX-License-Identifier: Apache-2.0
"""What the encoders and a request take beside their peers, on the users of a data set.

    python -m benchmarks.encoders asked   --data data --length 50   # states of 4,096 users
    python -m benchmarks.encoders dilated --data data --length 50   # beside nn.Conv1d
    python -m benchmarks.encoders caser   --data data --length 50   # beside nn.Conv2d
    python -m benchmarks.encoders patches --data data --length 50   # a training step with them
    python -m benchmarks.encoders request --data data --length 50   # a Recommender, a history
    python -m benchmarks.encoders everyone --data data --rounds 1   # the 10 best of all users
    python -m benchmarks.encoders rank    --data data --length 150  # a step of AdaptSSR, 128 users
    python -m benchmarks.encoders rating  --data data --length 200  # of bert4rec-rating, 128 users

Process CPU time on one thread, of a request and of everyone wall time, all in turn in one process:
minimum, median and 99th percentile in ms, and the ratio of minimum and median to the first one's.
That the results are equal is in tests/test_asked.py, tests/test_dilated.py, tests/test_caser.py,
tests/test_rank.py and tests/test_rating_runs.py. `data` is a folder of `fastrec prepare`, with
ratings for `rating`.

Legend: B sequences, T events, L most events, D width.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.nn import functional as F

from benchmarks.padded import PaddedRating, padded_states
from fastrec.data.batch import JaggedBatch
from fastrec.data.dataset import SequenceDataset
from fastrec.data.side import Shard, SideData
from fastrec.data.steps.mask_rating import MaskRating
from fastrec.data.views import Views
from fastrec.evaluation.next_item import seen_items
from fastrec.export import export_query
from fastrec.nn.encoders.caser import Caser
from fastrec.nn.encoders.dilated import Dilated
from fastrec.nn.encoders.transformer import Transformer
from fastrec.nn.items import ItemRows
from fastrec.nn.model_config import ModelConfig
from fastrec.nn.transfer import freeze
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.onnx import export_onnx, onnx_query
from fastrec.ops.linear_topk import linear_topk
from fastrec.random import Rng
from fastrec.serve import Recommender
from fastrec.training.config import Recipe

BATCH, BLOCK, WIDTH, DILATIONS = 256, 512, 64, (1, 4, 1, 4)
Work = dict[str, Callable[[], object]]


def asked(dataset: SequenceDataset, length: int, encoder: Transformer) -> Work:
    """Queries of 4,096 users in blocks: from the asked states alone, and from all states."""
    config = ModelConfig(WIDTH, length, head_transform=False, encoder=encoder)
    model, users = UserModel(dataset.num_items, config), torch.arange(min(4096, dataset.num_users))
    blocks = [model.inputs(dataset, part, "test", ask=True) for part in users.split(BLOCK)]
    return {
        "asked": lambda: [model.ask(block) for block in blocks],
        "all states": lambda: [model.next_item_query(model.encode(block)) for block in blocks],
    }


def trained(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Forward and backward of `call`, with gradients of x and of the module."""
    x = x.clone().requires_grad_()

    def step() -> None:
        module.zero_grad()
        x.grad = None
        call(x).sum().backward()

    return step


class ConvBlocks(nn.Module):
    """The blocks of `Dilated` on padded sequences [B, L, D]."""

    def __init__(self):
        super().__init__()
        dilations = [times * each for each in DILATIONS for times in (1, 2)]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(WIDTH, WIDTH, 3, dilation=each) for each in dilations
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in dilations)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for index, (conv, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            padded = F.pad(out.transpose(1, 2), (2 * conv.dilation[0], 0))
            out = F.relu(norm(conv(padded).transpose(1, 2)))
            if index % 2:
                x = out = x + out
        return x


def dilated(batch: JaggedBatch, length: int) -> Work:
    encoder, peer = Dilated(dilations=list(DILATIONS)).build(WIDTH, length, 0.0), ConvBlocks()
    events = torch.randn(len(batch.values), WIDTH)
    return {
        "fastrec": trained(encoder, lambda x: encoder(ItemRows(x, None), batch), events),
        "nn.Conv1d, padded": trained(peer, peer, torch.randn(len(batch), length, WIDTH)),
    }


class ConvWindows(nn.Module):
    """Caser's filters on windows [N, L, D]: 16 of each height, 4 vertical ones."""

    def __init__(self, width: int, window: int = 5):
        super().__init__()
        self.horizontal = nn.ModuleList(
            nn.Conv2d(1, 16, (height, width)) for height in range(1, window + 1)
        )
        self.vertical = nn.Conv2d(1, 4, (window, 1))
        self.output = nn.Linear(16 * window + 4 * width, width)

    def forward(self, windows: Tensor) -> Tensor:
        x = windows.unsqueeze(1)
        parts = [F.relu(conv(x)).squeeze(3).amax(2) for conv in self.horizontal]
        return F.relu(self.output(torch.cat([*parts, self.vertical(x).flatten(1)], 1)))


def caser(batch: JaggedBatch, length: int, width: int = 50) -> Work:
    encoder, peer = Caser().build(width, length, 0.0), ConvWindows(width)
    events, longest = torch.randn(len(batch.values), width), len(batch) * batch.max_seq_len
    # A window holds other events each time: what the convolutions take does not depend on which.
    windows = events[:, None].expand(-1, 5, -1)
    padded = torch.randn(longest, 1, width).expand(-1, 5, -1)
    return {
        "fastrec": trained(encoder, lambda x: encoder(ItemRows(x, None), batch), events),
        "nn.Conv2d, windows of events": trained(peer, peer, windows),
        "nn.Conv2d, padded": trained(peer, peer, padded),
    }


def patches(num_items: int, batch: JaggedBatch, length: int, encoder, frozen: bool) -> Work:
    """Forward, backward and AdamW of a model without patches and with patches of D / 4. frozen:
    the encoder without patches, as PeterRec trains."""
    forms = {
        "no patches": encoder,
        "serial": replace(encoder, patch=WIDTH // 4),
        "parallel": replace(encoder, patch=WIDTH // 4, patch_form="parallel"),
    }
    return {
        name: training_step(num_items, batch, ModelConfig(WIDTH, length, encoder=form), frozen)
        for name, form in forms.items()
    }


def training_step(num_items: int, batch: JaggedBatch, config: ModelConfig, frozen: bool):
    model = UserModel(num_items, config)
    freeze(model, ["encoder"] if frozen else [])
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, fused=True)
    targets = batch.values.roll(-1)

    def step() -> None:
        optimizer.zero_grad()
        states = model.encode(batch, Rng(0, 0)).states
        model.item_head.loss(states, model.output_table, targets).backward()
        optimizer.step()

    return step


def served(dataset: SequenceDataset, length: int) -> UserModel:
    encoder = Transformer(heads=1, causal=True, pre_norm=True)
    config = ModelConfig(WIDTH, length, head_transform=False, encoder=encoder)
    return UserModel(dataset.num_items, config)


def request(dataset: SequenceDataset, length: int, only: str = "") -> Work:
    """The 10 best of one history of 20 items. only: "Recommender", without what compiles."""
    model = served(dataset, length)
    recommender = Recommender(model, dataset)
    history = [dataset.item_ids()[:20].tolist()]
    plain = {"Recommender": lambda: recommender.recommend(10, histories=history)}
    if only == "Recommender":
        return plain
    with tempfile.TemporaryDirectory() as folder:
        path = aoti_compile_and_package(
            export_query(model), package_path=f"{folder}/query.pt2", inductor_configs={}
        )
        program = aoti_load_package(path)
        export_onnx(model, f"{folder}/query.onnx")
        onnx = Recommender(model, dataset, onnx_query(f"{folder}/query.onnx"))
    compiled = Recommender(model, dataset, program)
    return {
        **plain,
        "with a compiled program": lambda: compiled.recommend(10, histories=history),
        "with an ONNX file": lambda: onnx.recommend(10, histories=history),
    }


def everyone(dataset: SequenceDataset, length: int) -> Work:
    """The 10 best of every user: what a Recommender takes beside its two kernels, whose inputs are
    ready there."""
    model = served(dataset, length)
    recommender = Recommender(model, dataset)
    blocks = torch.arange(dataset.num_users).split(512)
    batches = [model.inputs(dataset, users, "all", ask=True) for users in blocks]
    seen = [seen_items(dataset, users, "all") for users in blocks]
    table, bias = model.item_table, model.item_head.bias

    def kernels() -> None:
        for batch, past in zip(batches, seen, strict=True):
            linear_topk(model.ask(batch), table, 10, linear_bias=bias, exclude=past)

    return {
        "model and linear_topk alone": kernels,
        "Recommender": lambda: recommender.recommend(10),
    }


def ranking(model: UserModel, joint: JointObjective, views: dict[str, JaggedBatch], p: float):
    """The loss of `rank` on padded views [4 B, L] in plain PyTorch: one pass, similarities of all
    vectors as one product. What does not depend on weights is ready."""
    batch = JaggedBatch.cat(list(views.values()))
    mask = torch.arange(int(batch.lengths.max())) < batch.lengths[:, None]
    values = batch.values.new_zeros(mask.shape)
    values[mask] = batch.values
    users, pool = len(batch) // 4, joint.parts["rank"].pool
    own = torch.eye(users, dtype=torch.bool).repeat(2, 4)

    def loss() -> Tensor:
        states = padded_states(model, values, mask, p)
        scores = torch.tanh(pool.project(states)) @ pool.query
        share = scores.masked_fill(~mask, -torch.inf).softmax(1)
        u = F.normalize((states * share[:, :, None]).sum(1), dim=1)
        a, b, a_again, b_again = u.split(users)
        similar = u[: 2 * users] @ u.T
        hardest = similar.masked_fill(own, -torch.inf).amax(1)
        other = torch.stack([(x * y).sum(1) for x in (a, a_again) for y in (b, b_again)])
        same = torch.cat([(a * a_again).sum(1), (b * b_again).sum(1)])
        pairs = torch.stack([torch.cat([other[0], other[0]]), torch.cat([other[1], other[2]])])
        alike = other.detach().clamp_min(0).mean(0).repeat(2)
        won = (1 - alike) * (same - pairs.amax(0)) + alike * (pairs.amin(0) - hardest)
        return -F.logsigmoid(won).mean()

    return loss


def rank(dataset: SequenceDataset, length: int, batch: int = 128) -> Work:
    """Forward and backward of the stage `ranking` of AdaptSSR; views and padding are ready."""
    stage = Recipe.load("adaptssr").stage("ranking")
    model = UserModel(dataset.num_items, ModelConfig(WIDTH, length, 0.1, encoder=Transformer()))
    side = SideData(dataset)
    joint = JointObjective(stage.parts, model, side)
    users = torch.linspace(0, dataset.num_users - 1, batch).long()
    made = Views(stage.views, model.frame, side, length)
    views = made(side.gather(users, length), Rng(0, 0), Shard(users.numpy()))
    padded = ranking(model, joint, views, 0.1)
    return {
        "fastrec": step(lambda: total_loss(joint(model, views, Rng(0, 0))), model, joint),
        "padded, one product of 4 B": step(padded, model, joint),
    }


def step(loss: Callable[[], Tensor], *modules: nn.Module) -> Callable[[], None]:
    """Forward and backward."""

    def run() -> None:
        for module in modules:
            module.zero_grad()
        loss().backward()

    return run


def rating(dataset: SequenceDataset, length: int, batch: int = 128) -> Work:
    """Forward and backward of bert4rec-rating, the head without biases; the view and its padding
    are ready."""
    plain = {"rating": {"biases": None}}
    recipe = Recipe.load("bert4rec-rating", model={"max_len": length}, objectives=plain)
    stage, config = recipe.stage("pretraining"), recipe.model
    model = UserModel(dataset.num_items, config)
    side = SideData(dataset, event_columns=model.event_columns)
    joint = JointObjective(stage.parts, model, side)
    users = torch.linspace(0, dataset.num_users - 1, batch).long()
    made = Views({"main": [MaskRating()]}, model.frame, side, length)
    views = made(side.gather(users, length), Rng(0, 0), Shard(users.numpy()))
    peer = PaddedRating(model, joint.parts["rating"], views["main"], config.dropout)
    return {
        "fastrec": step(lambda: total_loss(joint(model, views, Rng(0, 0))), model, joint),
        "nn.TransformerEncoder, padded": step(peer, peer),
    }


def measured(work: Work, rounds: int, clock=time.process_time) -> dict[str, list[float]]:
    """The times in ms of each, sorted, one after the other in every round but the first."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, call in work.items():
            start = clock()
            call()
            times[name].append(1e3 * (clock() - start))
    return {name: sorted(each[1:]) for name, each in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("asked", "dilated", "caser", "patches", "request", "everyone", "rank", "rating")
    parser.add_argument("part", choices=parts)
    parser.add_argument("--data", required=True)
    parser.add_argument("--length", type=int, default=50)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="what has this in its name, alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dataset = SequenceDataset.load(options.data)
    users = torch.linspace(0, dataset.num_users - 1, BATCH).long()
    batch = dataset.gather(users, "train", options.length)
    works: dict[str, Work] = {}
    if options.part == "asked":
        causal = Transformer(heads=1, causal=True, pre_norm=True)
        for name, encoder in (("causal, 1 head", causal), ("[MASK], 2 heads", Transformer())):
            works[name] = asked(dataset, options.length, encoder)
    elif options.part == "patches":
        causal = Transformer(heads=1, causal=True, pre_norm=True)
        for name, each in (("dilated", Dilated()), ("transformer", causal)):
            for frozen in (False, True):
                title = f"{name}, {'frozen' if frozen else 'trained'}, T={len(batch.values)}"
                works[title] = patches(dataset.num_items, batch, options.length, each, frozen)
    elif options.part == "rank":
        works["a step of ranking"] = rank(dataset, options.length)
    elif options.part == "rating":
        works["a step of ratings"] = rating(dataset, options.length)
    elif options.part == "everyone":
        works[f"all {dataset.num_users:,} users"] = everyone(dataset, options.length)
    elif options.part == "request":
        works["one history of 20 items"] = request(dataset, options.length, options.only)
    else:
        make = {"dilated": dilated, "caser": caser}[options.part]
        works[f"B={BATCH} T={len(batch.values)}"] = make(batch, options.length)
    rounds = options.rounds or {"asked": 6, "request": 200, "everyone": 2}.get(options.part, 20)
    waits = options.part in ("request", "everyone")
    context = torch.no_grad() if waits or options.part == "asked" else torch.enable_grad()
    clock = time.perf_counter if waits else time.process_time
    with context:
        for title, work in works.items():
            chosen = {name: call for name, call in work.items() if options.only in name}
            if not chosen:
                parser.error(f"none of {', '.join(work)} has {options.only!r} in its name")
            print(title)
            found = measured(chosen, rounds, clock)
            first = next(iter(found.values()))
            for name, times in found.items():
                low, middle, tail = times[0], median(times), times[int(0.99 * len(times))]
                ratios = f"{low / first[0]:.2f}, {middle / median(first):.2f}"
                print(f"  {name:<30}{low:9.2f}, {middle:.2f}, {tail:.2f} ms   {ratios}")


if __name__ == "__main__":
    main()
