# SPDX-License-Identifier: Apache-2.0
"""What a trained model is asked, against a full sort of plain scores; text ids that are no rows."""

import warnings

import numpy as np
import polars as pl
import pytest
import torch
from builders import dataset_of, model_of
from torch import nn

import fastrec
from fastrec import serve
from fastrec.data.batch import JaggedBatch
from fastrec.data.dataset import SequenceDataset
from fastrec.data.ids import Ids
from fastrec.data.prepare import prepare
from fastrec.data.prepare.readers import RawData
from fastrec.evaluation.blocks import row_blocks

V = 30
MODELS = {
    "causal": dict(causal=True, pre_norm=True),
    "mask": dict(tokens=["cls", "sep"]),
    "own table, user vectors": dict(causal=True, head_table="own", user_width=3),
    "no bias": dict(tokens=["ur"], head_bias=False, max_len=5),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> SequenceDataset:
    """60 users of 3 to 12 events; item 7 of a raw file is "item 7", and rows are not in order."""
    generator, rows = np.random.default_rng(1), []
    for user in range(60):
        for time in range(int(generator.integers(3, 13))):
            rows.append((f"user {user}", f"item {int(generator.integers(V))}", time))
    rows += [("user 60", f"item {item}", item) for item in range(V)]  # everything
    events = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    folder = tmp_path_factory.mktemp("serve") / "data"
    prepare(RawData("here", events), folder)
    return SequenceDataset.load(folder)


def made(name: str, dataset, width: int = 8):
    model = model_of(num_items=dataset.num_items, num_users=dataset.num_users, width=width,
                     **MODELS[name])  # fmt: skip
    for parameter in model.parameters():  # scores that differ from item to item
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.5)
    return model


def sorted_scores(
    model, dataset, batch, past, k, seen="exclude", tau=0.0, allowed=None, blocked=()
):
    """[(rank, item id, score)] of each sequence of a batch, from a full sort."""
    ids = dataset.item_ids().tolist()
    counts = dataset.item_counts("train").double().clamp_min(1)
    share = tau * (counts / counts.sum()).log()
    query = model.next_item_query(model.encode(batch)).detach().double()
    table, bias = model.item_table.detach().double(), model.item_head.bias.detach().double()
    out = []
    for scores, known in zip((query @ table.T + bias - share).tolist(), past, strict=True):
        left = [
            (-score, row) for row, score in enumerate(scores)
            if not (seen == "exclude" and row in known)
            and (allowed is None or ids[row] in allowed) and ids[row] not in blocked
        ]  # fmt: skip
        best = sorted(left)[:k]
        out.append([(rank, ids[row], -score) for rank, (score, row) in enumerate(best, 1)])
    return out


def users_of(model, dataset, users):
    batch = model.inputs(dataset, users, "all", ask=True)
    past = [set(dataset.gather([user], "all").values.tolist()) for user in users]
    return batch, past


def check(frame, owners, expected):
    whole = [(owner, *row) for owner, rows in zip(owners, expected, strict=True) for row in rows]
    assert frame.columns == ["user_id", "rank", "item_id", "score"]
    assert frame.drop("score").rows() == [row[:3] for row in whole]
    np.testing.assert_allclose(frame["score"], [row[3] for row in whole], rtol=2e-5, atol=2e-5)


OPTIONS = [
    dict(),
    dict(seen="none", tau=0.7),
    dict(blocked=[f"item {i}" for i in range(0, V, 3)]),
    dict(allowed=[f"item {i}" for i in (29, 3, 4, 11, 3, 17)]),
    dict(allowed=[f"item {i}" for i in range(20)], blocked=["item 4", "item 25"], tau=-2.0),
    dict(allowed=["item 2", "item 5"], blocked=["item 5"], seen="none"),
    dict(allowed=[], seen="none"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("name", MODELS)
def test_recommendations_are_those_of_a_full_sort(name, options, dataset, monkeypatch):
    """All users, one and a few; blocks of 7; two answers of one recommender."""
    monkeypatch.setattr(serve, "row_blocks", lambda count: row_blocks(count, 7))
    model = made(name, dataset)
    recommender, ids = fastrec.Recommender(model, dataset), dataset.user_ids().tolist()
    named = {"logit_adjustment" if key == "tau" else key: value for key, value in options.items()}
    for users in (range(61), [5], [60, 3, 3]):
        batch, past = users_of(model, dataset, list(users))
        expected = sorted_scores(model, dataset, batch, past, 6, **options)
        asked = None if len(users) == 61 else [ids[user] for user in users]
        for _ in range(2):
            check(recommender.recommend(6, asked, **named), [ids[u] for u in users], expected)
        check(
            fastrec.recommend(model, dataset, 6, asked, **named), [ids[u] for u in users], expected
        )


@pytest.mark.parametrize("kind", [np.array, torch.tensor, pl.Series, tuple, iter])
def test_ids_may_be_of_any_library(kind):
    """The text of an element of a tensor is no id."""
    ids = Ids(np.array([5, 7, 9]))
    assert ids.find(kind([9, 4, 5])) == [2, -1, 0]
    assert ids.rows(kind([7, 5]), "items").tolist() == [1, 0]
    with pytest.raises(ValueError, match="2 of 3 items are not in the data set, the first is 4"):
        ids.rows(kind([4, 5, 6]), "items")


@pytest.mark.parametrize("seen", ["exclude", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_histories_of_known_and_unknown_items(name, seen, dataset):
    model, ids = made(name, dataset), dataset.item_ids().tolist()
    histories = [["item 3", "x", "item 9", "item 3"], ["y"], [], ["item 1"] * 30, ["z", "item 0"]]
    known = [[ids.index(item) for item in part if item in ids] for part in histories]
    kept = [0, 3, 4] if model.config.causal else [0, 1, 2, 3, 4]
    batch = model.inputs_of([known[i] for i in kept], ask=True)
    expected = sorted_scores(model, dataset, batch, [set(known[i]) for i in kept], 40, seen)
    said = "^3 of 37 items of the histories are not known, the first is 'x'"
    if model.config.causal:
        said += "; 2 of 5 histories have no known item: a causal model has nothing to go on"
    else:
        said += "$"
    recommender = fastrec.Recommender(model, dataset)
    with pytest.warns(UserWarning, match=said) as caught:
        found = recommender.recommend(40, histories=histories, seen=seen)
    assert len(caught) == 1
    check(found, kept, expected)
    for place in (3, 0):  # alone, where the items that are seen are left out another way
        with warnings.catch_warnings(record=place == 0):
            alone = recommender.recommend(40, histories=[histories[place]], seen=seen)
        check(alone, [0], [expected[kept.index(place)]])


def test_what_clients_ask_for_is_not_remembered_for_ever(dataset, monkeypatch):
    monkeypatch.setattr("fastrec.serve.MOST_SAID", 5)
    recommender = fastrec.Recommender(made("causal", dataset), dataset)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for place in range(20):
            for _ in range(2):
                recommender.recommend(1, histories=[["item 3", "x" * 1000 + str(place % 10)]])
                recommender.recommend(1, histories=[["item 3", f"{place} gone"]])
    assert len(recommender._said) <= 7
    assert 21 <= len(caught) < 40, "each text once, and again where it was forgotten"
    assert max(len(str(warning.message)) for warning in caught) < 200


@pytest.mark.parametrize("name", ["causal", "mask"])
def test_nothing_known_and_nothing_asked(name, dataset):
    recommender = fastrec.Recommender(made(name, dataset), dataset)
    types = [pl.Int64, pl.Int64, pl.String, pl.Float32]
    none = recommender.recommend(3, histories=[])
    assert none.height == 0 and none.dtypes == types
    with pytest.warns(UserWarning, match="^1 of 1 items of the histories are not known"):
        unknown = recommender.recommend(3, histories=[[7]])
    assert unknown.dtypes == types and unknown.height == (0 if name == "causal" else 3)
    query = recommender.queries(histories=[])
    assert query.height == 0 and query.columns == ["user_id", "query"]


def test_integer_ids_are_found_as_integers_and_as_text(tmp_path):
    events = [(user, 100 - item, item) for user in range(6) for item in range(user, user + 5)]
    frame = pl.DataFrame(events, schema=["user_id", "item_id", "timestamp"], orient="row")
    prepare(RawData("here", frame), tmp_path / "data")
    dataset = SequenceDataset.load(tmp_path / "data")
    recommender = fastrec.Recommender(model_of(num_items=10), dataset)
    one, other = (
        recommender.recommend(9, histories=[history], blocked=blocked)
        for history, blocked in (([100, 97], ["91"]), (["100", "97"], [91]))
    )
    assert one.equals(other) and one.dtypes[2] == pl.Int64
    assert set(one["item_id"]) == set(range(91, 101)) - {100, 97, 91}


def test_similar_items_have_the_largest_cosines(dataset, monkeypatch):
    monkeypatch.setattr(serve, "row_blocks", lambda count: row_blocks(count, 7))
    model, ids = made("causal", dataset), dataset.item_ids().tolist()
    with torch.no_grad():
        model.item_embedding.weight[11] = 2 * model.item_embedding.weight[4]  # one direction
        model.item_embedding.weight[8] = 0  # none
    table = model.item_table.detach().double().numpy()
    size = np.linalg.norm(table, axis=1)
    cosine = table @ table.T / np.where(size > 0, size, 1)[:, None] / np.where(size > 0, size, 1)
    recommender = fastrec.Recommender(model, dataset)
    for asked, k in ((None, 5), ([ids[11], ids[0]], 100)):
        rows = range(V) if asked is None else [11, 0]
        frame = recommender.similar(asked, k)
        assert frame.columns == ["item_id", "rank", "similar_item_id", "score"]
        parts = frame.partition_by("item_id", maintain_order=True)
        assert [part["item_id"][0] for part in parts] == [ids[row] for row in rows]
        for row, part in zip(rows, parts, strict=True):
            others = sorted((-cosine[row, j], j) for j in range(V) if j != row)[:k]
            assert part["rank"].to_list() == list(range(1, len(others) + 1))
            np.testing.assert_allclose(part["score"], [-c for c, _ in others], atol=1e-6)
            if row != 8:  # all of its cosines are 0
                assert part["similar_item_id"].to_list() == [ids[j] for _, j in others]
    assert recommender.similar([ids[4]], 1).row(0)[2] == ids[11]


@pytest.mark.parametrize("name", MODELS)
def test_item_vectors_and_queries_give_the_scores(name, dataset):
    """What an index of somebody else needs."""
    model = made(name, dataset)
    recommender, items = fastrec.Recommender(model, dataset), fastrec.item_vectors(model, dataset)
    assert items.columns == ["item_id", "vector", "bias"]
    assert items["item_id"].to_list() == dataset.item_ids().tolist()
    users = dataset.user_ids()[[9, 2]].tolist()
    histories = [["item 3"], ["item 5", "item 6"]]
    for who in (dict(user_ids=users), dict(histories=histories)):
        queries = recommender.queries(**who)
        scores = queries["query"].to_numpy() @ items["vector"].to_numpy().T
        scores += items["bias"].to_numpy()
        best = recommender.recommend(V, **who, seen="none")
        for owner, row in zip(queries["user_id"], scores, strict=True):
            part = best.filter(pl.col("user_id") == owner)
            order = (-row).argsort(kind="stable")
            assert part["item_id"].to_list() == items["item_id"].gather(order).to_list()
            np.testing.assert_allclose(part["score"], row[order], rtol=1e-5, atol=1e-5)
    assert recommender.queries()["user_id"].to_list() == dataset.user_ids().tolist()


def test_what_every_request_needs_is_read_once(dataset, monkeypatch):
    reads = []
    original = SequenceDataset._column
    monkeypatch.setattr(
        SequenceDataset, "_column", lambda self, *name: reads.append(name) or original(self, *name)
    )
    counts = SequenceDataset.item_counts
    monkeypatch.setattr(
        SequenceDataset, "item_counts", lambda self, *split: reads.append(split) or counts(self)
    )
    recommender = fastrec.Recommender(made("causal", dataset), dataset)
    for _ in range(3):
        recommender.recommend(3, histories=[["item 3"]], logit_adjustment=1.0)
    assert [name for name in reads if name[0] != "train"] == [("items.parquet", "item_id")]
    assert len(reads) == 2
    for _ in range(3):
        recommender.recommend(3, ["user 3"])
    assert len(reads) == 3


def test_one_adjustment_is_not_taken_for_another(dataset, monkeypatch):
    """And the events are counted once for all of them."""
    model = made("causal", dataset)
    recommender = fastrec.Recommender(model, dataset)
    taus = (1.0, 1.0, -3.0, 0.0, 1.0)
    expected = [
        fastrec.recommend(model, dataset, 4, ["user 1"], logit_adjustment=tau) for tau in taus
    ]
    counted, count = [], type(dataset).item_counts
    monkeypatch.setattr(
        type(dataset), "item_counts", lambda *split: counted.append(split) or count(*split)
    )
    for tau, answer in zip(taus, expected, strict=True):
        found = recommender.recommend(4, ["user 1"], logit_adjustment=tau)
        assert found.equals(answer)
    assert len(counted) == 1


def test_a_program_answers_for_those_whose_input_is_items_alone(dataset):
    calls = []
    for name, users in (("causal", 2), ("own table, user vectors", 1)):
        model = made(name, dataset)

        def program(values, offsets, model=model):
            calls.append(len(offsets) - 1)
            return model.ask(JaggedBatch(values, offsets, offsets[1:], model.max_positions))

        plain = fastrec.Recommender(model, dataset)
        other = fastrec.Recommender(model, dataset, program)
        for asked in (dict(user_ids=["user 3", "user 9"]), dict(histories=[["item 3"]])):
            assert plain.recommend(5, **asked).equals(other.recommend(5, **asked))
        assert len(calls) == users, "a user with a vector is asked of the model"
        calls.clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_program_in_float32_for_a_model_of_another_type(dataset, dtype):
    """As an ONNX file is."""
    model = made("causal", dataset).to(dtype)

    def program(values, offsets):
        states = model.ask(JaggedBatch(values, offsets, offsets[1:], model.max_positions))
        return states.float()

    plain, other = (fastrec.Recommender(model, dataset, ask) for ask in (None, program))
    asked = dict(histories=[["item 3"], ["item 5", "item 2"]])
    expected, found = plain.recommend(5, **asked), other.recommend(5, **asked)
    assert found.drop("score").equals(expected.drop("score"))
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-6)


def test_only_allowed_items_are_scored(dataset, monkeypatch):
    sizes, original = [], serve.linear_topk

    def counted(query, table, *rest, **options):
        sizes.append(len(table))
        return original(query, table, *rest, **options)

    monkeypatch.setattr(serve, "linear_topk", counted)
    recommender = fastrec.Recommender(made("mask", dataset), dataset)
    recommender.recommend(5, allowed=["item 1", "item 2", "item 1"])
    assert sizes == [2]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(k=0), ValueError, "k must be a whole number, at least 1, got 0"),
        (dict(seen="no"), ValueError, "seen must be 'exclude' or 'none', got 'no'"),
        (dict(user_ids=[]), ValueError, "the list of users is empty"),
        (dict(user_ids=["user 1", "u", 3]), ValueError, "2 of 3 users are not in .* first is 'u'"),
        (dict(user_ids="user 1"), TypeError, "expected a list of ids, got the text 'user 1'"),
        (dict(histories=["item 1"]), TypeError, "expected a list of ids, got the text 'item 1'"),
        (dict(user_ids=3), TypeError, "expected a list of ids, got 3"),
        (dict(histories=3), TypeError, "expected a list of ids, got 3"),
        (dict(histories=[3]), TypeError, "expected a list of ids, got 3"),
        (dict(blocked=3), TypeError, "expected a list of ids, got 3"),
        (dict(allowed=3), TypeError, "expected a list of ids, got 3"),
        (dict(user_ids=["user 1"], histories=[]), ValueError, "user_ids or histories, not both"),
        (dict(allowed=["a", "item 1"]), ValueError, "1 of 2 allowed items are not .* first is 'a'"),
        (dict(blocked=["item 1", 5]), ValueError, "1 of 2 blocked items are not .* first is 5"),
        (dict(logit_adjustment=float("nan")), ValueError, "logit_adjustment must be finite"),
    ],
)
def test_wrong_requests(arguments, error, message, dataset):
    with pytest.raises(error, match=message):
        fastrec.Recommender(made("mask", dataset), dataset).recommend(**{"k": 3, **arguments})


def test_other_wrong_calls(dataset):
    model = made("causal", dataset)
    for call in (fastrec.Recommender, fastrec.item_vectors):
        with pytest.raises(
            ValueError, match="the model scores 30 items, and the 20 of memory are others"
        ):
            call(model, dataset_of([[1, 2, 3]], 20))
    for call in (fastrec.recommend, fastrec.evaluate, fastrec.user_vectors, fastrec.item_vectors):
        with pytest.raises(
            TypeError, match="expected a model, got 'run/model': fastrec.load_model"
        ):
            call("run/model", dataset, **({"k": 3} if call is fastrec.recommend else {}))
    recommender = fastrec.Recommender(model, dataset)
    with pytest.raises(ValueError, match="1 of 2 items are not in the data set, the first is 'x'"):
        recommender.similar(["item 1", "x"])
    with pytest.raises(ValueError, match="k must be a whole number, at least 1, got -1"):
        recommender.similar(k=-1)
    with torch.no_grad():
        model.item_head.bias[3] = torch.inf
    with pytest.raises(ValueError, match="scores of the model are not finite"):
        recommender.recommend(3)
    with pytest.raises(ValueError, match="biases of the model are not finite"):
        fastrec.item_vectors(model, dataset)


def test_another_default_device(dataset):
    """Requests run where the model is."""
    recommender = fastrec.Recommender(made("mask", dataset), dataset)
    asked = [
        lambda: recommender.recommend(4, ["user 1", "user 2"], allowed=["item 1", "item 2"]),
        lambda: recommender.recommend(4, histories=[["item 5"]], logit_adjustment=0.5),
        lambda: recommender.similar(["item 4"]),
        lambda: recommender.queries(["user 8"]),
        lambda: fastrec.item_vectors(recommender.model, dataset),
    ]
    expected = [ask() for ask in asked]
    torch.set_default_device("meta")
    try:
        found = [ask() for ask in asked]
    finally:
        torch.set_default_device(None)
    for one, other in zip(expected, found, strict=True):
        assert one.height and one.equals(other)
