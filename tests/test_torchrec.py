# SPDX-License-Identifier: Apache-2.0
"""Tables spread over processes against those of TorchRec: row-wise sharded, with its fused row-wise
Adagrad. Runs where `torchrec` and `fbgemm_gpu` are importable (docs/testing.md)."""

import importlib.util

import pytest
import torch
import torch.distributed as dist
from groups import Ranks

from fastrec.nn.sharded import ShardedEmbedding
from fastrec.training.rows import RowAdamW

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("torchrec") or not importlib.util.find_spec("fbgemm_gpu"),
    reason="torchrec and fbgemm-gpu-cpu are not installed",
)
ROWS, WIDTH, RATE, EPS = 45, 8, 0.1, 1e-8


def table() -> torch.nn.Embedding:
    torch.manual_seed(0)
    return torch.nn.Embedding(ROWS, WIDTH)


def steps_of(rank: int):
    """(ids, what the gradients of their vectors are) of five steps; ids repeat."""
    generator = torch.Generator().manual_seed(rank)
    for _ in range(5):
        ids = torch.randint(ROWS, (20 + 3 * rank,), generator=generator)
        yield ids, torch.randn(len(ids), WIDTH, generator=generator)


def ours(group) -> list[torch.Tensor]:
    module, found = ShardedEmbedding(table(), group), []
    settings = dict(lr=1.0, eps=EPS)
    optimizer = RowAdamW([], [module.weight], "adagrad", RATE, settings)
    for ids, grad in steps_of(dist.get_rank(group)):
        vectors = module(ids)
        found.append(vectors.detach().clone())
        vectors.backward(grad)
        optimizer.step()
    return [*found, module.weight.detach()]


def theirs(group) -> list[torch.Tensor]:
    from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
    from torchrec.distributed.embedding import EmbeddingCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.distributed.planner.types import ParameterConstraints
    from torchrec.distributed.types import ShardingEnv
    from torchrec.optim import RowWiseAdagrad
    from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

    cpu = torch.device("cpu")
    config = EmbeddingConfig(
        name="table", embedding_dim=WIDTH, num_embeddings=ROWS, feature_names=["items"]
    )
    whole = EmbeddingCollection(device=torch.device("meta"), tables=[config])
    apply_optimizer_in_backward(RowWiseAdagrad, whole.parameters(), {"lr": RATE, "eps": EPS})
    sharder = EmbeddingCollectionSharder()
    planner = EmbeddingShardingPlanner(
        topology=Topology(world_size=dist.get_world_size(group), compute_device="cpu"),
        constraints={
            "table": ParameterConstraints(sharding_types=["row_wise"], compute_kernels=["fused"])
        },
    )
    plan = planner.collective_plan(whole, [sharder], group)
    env = ShardingEnv.from_process_group(group)
    model = DistributedModelParallel(whole, env=env, device=cpu, plan=plan, sharders=[sharder])
    (weight,) = model.state_dict().values()
    (shard,) = weight.local_shards()
    first = shard.metadata.shard_offsets[0]
    with torch.no_grad():
        shard.tensor.copy_(table().weight[first : first + len(shard.tensor)])
    found = []
    for ids, grad in steps_of(dist.get_rank(group)):
        lengths = torch.ones(len(ids), dtype=torch.int64)
        given = KeyedJaggedTensor.from_lengths_sync(["items"], ids, lengths)
        vectors = model(given)["items"].values()
        found.append(vectors.detach().clone())
        vectors.backward(grad)
    return [*found, shard.tensor.detach().clone()]


def test_sharded_rows_are_those_of_torchrec():
    ranks = Ranks(2)
    try:
        pairs = zip(ranks.run(ours), ranks.run(theirs), strict=True)
        for mine, other in pairs:
            assert len(mine) == len(other) == 6
            for one, two in zip(mine, other, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    finally:
        ranks.close()
