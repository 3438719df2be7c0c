# SPDX-License-Identifier: Apache-2.0
"""The synthetic data: statistics, order that carries signal, social and profile signal."""

import hashlib

import numpy as np
import pytest
import torch

from fastrec.cli import main
from fastrec.data.dataset import SequenceDataset
from fastrec.data.graph import SocialGraph
from fastrec.data.prepare import store, synthetic
from fastrec.data.prepare.synthetic import generate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "d"
    return generate(path, num_users=8_000, num_items=2_000, seed=1)


@pytest.mark.parametrize(
    ("name", "value"), [("num_communities", -1), ("num_communities", 0), ("mean_friends", -1.0),
                        ("zipf", float("nan"))],
)  # fmt: skip
def test_numbers_that_cannot_be_are_named(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        generate(tmp_path / "d", num_users=50, num_items=50, **{name: value})


def digest(path):
    names = ("values.npy", "offsets.npy", "schema.json")
    return [hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names]


def test_shape_of_the_data(dataset):
    lengths = dataset.lengths
    assert lengths.min() == 5 and lengths.max() <= 350
    assert 6 <= np.median(lengths) <= 9 and 9 <= lengths.mean() <= 12
    counts = np.sort(dataset.item_counts("all").numpy())[::-1]
    assert counts[: len(counts) // 10].sum() > 0.2 * counts.sum() and counts[0] > 8 * counts[1000]
    events = dataset._table("interactions.parquet")
    time, user = events["timestamp"].to_numpy(), events["user"].to_numpy()
    assert (np.diff(time)[np.diff(user) == 0] > 0).all(), "no ties"
    assert set(events["rating"].unique()) == {1, 2, 3, 4, 5}
    users = dataset.user_attributes()
    assert users["mean_rating"].is_between(1, 5).all() and users["region"].n_unique() == 6
    items = dataset.item_attributes()
    assert items["price"].min() > 0 and items["attributes"].list.len().min() >= 2


def test_items_of_another_catalogue(dataset):
    table = dataset.cold_items()
    count = np.bincount(table["user"].to_numpy(), minlength=dataset.num_users)
    assert count.max() == 5 and 0.12 < (count == 0).mean() < 0.22
    assert table.unique(["user", "item"]).height == table.height
    assert 300 < table["item"].n_unique() <= 400
    assert table["item_id"].n_unique() == table["item"].n_unique()


def hit_rate(scores, targets, k=10):
    better = (scores > scores.gather(1, targets[:, None])).sum(1)
    return (better < k).double().mean().item()


def rankers(dataset):
    """HR@10 on the last items, full ranking: popularity, popularity in the community of the item
    before, and a first-order Markov chain; all counted without the last two items of a user."""
    train = dataset.gather(dataset.users("train"), "train")
    later = train.positions()[1:] > 0
    pairs = train.values[:-1][later], train.values[1:][later]
    v = dataset.num_items
    follows = torch.zeros(v, v).index_put_(pairs, torch.ones(len(pairs[0])), accumulate=True)
    popularity = dataset.item_counts("train").float()
    targets = dataset.targets("test")
    last = torch.from_numpy(dataset.values[dataset.offsets[1:] - 2].astype(np.int64))
    topic = torch.tensor(dataset.item_attributes()["attributes"].list.max().to_list())
    together = topic[last][:, None] == topic[None, :]
    return (
        hit_rate(popularity.expand(len(targets), -1), targets),
        hit_rate(popularity * together, targets),
        hit_rate(follows[last] + 1e-6 * popularity, targets),
    )


def test_order_beats_popularity(dataset, tmp_path):
    popular, community, markov = rankers(dataset)
    assert popular < 0.12 and community > 2 * popular, (popular, community)
    assert markov > 3 * popular and markov > 1.3 * community, (popular, community, markov)
    assert markov < 0.6, "room for a model"
    # Without walks there is nothing in the order that the community does not say.
    shuffled = generate(tmp_path / "d", num_users=8_000, num_items=2_000, seed=1, walk=0.0)
    _, community, markov = rankers(shuffled)
    assert markov < community


def test_friends_share_items_and_regions(dataset):
    pairs = dataset.relations()
    assert (pairs[:, 0] < pairs[:, 1]).all() and len(np.unique(pairs, axis=0)) == len(pairs)
    degrees = np.diff(SocialGraph.from_dataset(dataset).offsets)
    assert 4 < degrees.mean() < 9 and 0.1 < (degrees == 0).mean() < 0.2
    bought = torch.zeros(dataset.num_users, dataset.num_items)
    whole = dataset.gather(dataset.users("all"), "all")
    bought[whole.segment_ids(), whole.values] = 1
    left, right = pairs.T
    other = np.random.default_rng(0).permutation(right)
    shared = (bought[left] * bought[right]).sum().item()
    by_chance = (bought[left] * bought[other]).sum().item()
    assert shared > 2 * by_chance
    region = dataset.user_attributes()["region"].to_numpy()
    assert (region[left] == region[right]).mean() > 1.4 * (region[left] == region[other]).mean()


def test_items_of_a_user_share_a_category(dataset):
    category = torch.tensor(dataset.item_attributes()["category"].to_list())
    whole = dataset.gather(dataset.users("all"), "all")
    kinds = category[whole.values]
    inside = whole.positions()[1:] > 0
    same = (kinds[1:] == kinds[:-1])[inside].double().mean()
    assert same > 3 * (1 / 12)


def test_the_seed_decides_everything(tmp_path, dataset):
    def make(name, **options):
        generate(tmp_path / name, **{"num_users": 300, "num_items": 100, **options})
        return digest(tmp_path / name)

    assert make("a", seed=5) == make("b", seed=5)
    assert make("c", seed=6)[0] != make("d", seed=5)[0]
    assert make("e", seed=5, walk=0.9)[0] != make("f", seed=5)[0]


@pytest.mark.parametrize("users,items", [(2, 10), (50, 10), (3, 500)])
def test_tiny(tmp_path, users, items):
    dataset = generate(tmp_path / "d", num_users=users, num_items=items)
    assert (dataset.num_users, dataset.num_items) == (users, items)
    SequenceDataset.load(tmp_path / "d").relations()


def test_arguments(tmp_path):
    for options, match in (
        ({"seed": -3}, "seed must be at least 0, got -3"),
        ({"num_users": 1}, "num_users must be at least 2"),
        ({"num_items": 5}, "num_items must be at least 10"),
        ({"walk": 1.5}, "probabilities"),
        ({"max_length": 3}, "max_length"),
    ):
        with pytest.raises(ValueError, match=match):
            generate(tmp_path / "d", **options)
    generate(tmp_path / "d", num_users=5, num_items=20)
    with pytest.raises(FileExistsError):
        generate(tmp_path / "d", num_users=5, num_items=20)
    generate(tmp_path / "d", num_users=6, num_items=20, overwrite=True)


def test_users_in_blocks_are_of_one_world(tmp_path, monkeypatch):
    """Blocks of users differ, and share communities, items and what these are like; events in
    chunks are the same bytes."""
    monkeypatch.setattr(synthetic, "BLOCK", 700)
    made = generate(tmp_path / "a", num_users=2_000, num_items=300, seed=5, median_length=30.0)
    monkeypatch.setattr(store, "CHUNK", 999)
    again = generate(tmp_path / "b", num_users=2_000, num_items=300, seed=5, median_length=30.0)
    assert digest(made.path) == digest(again.path)
    assert 25 < np.median(made.lengths) < 35 and made.lengths.max() == 350
    first, second = (made.gather(np.arange(n, n + 600), "all").values for n in (0, 700))
    assert not torch.equal(first[:1000], second[:1000])
    counts = [np.bincount(part, minlength=300) for part in (first.numpy(), second.numpy())]
    assert np.corrcoef(counts)[0, 1] > 0.8, "popular items are the same"
    users = made.user_attributes()
    for some in (users[:700], users[1400:]):
        assert some["region"].n_unique() == 6 and 3 < some["mean_rating"].mean() < 4.5


def test_generate_from_the_command_line(tmp_path, capsys):
    main(["generate", f"--output={tmp_path / 'd'}", "--users=50", "--items=40", "--seed=3"])
    said = capsys.readouterr().out
    assert "50 users, 40 items" in said and "events/s, peak memory" in said
    assert digest(tmp_path / "d") == digest(
        generate(tmp_path / "e", num_users=50, num_items=40, seed=3).path
    )
    with pytest.raises(SystemExit, match="median_length must be above 5"):
        main(["generate", f"--output={tmp_path / 'f'}", "--median_length=5"])
