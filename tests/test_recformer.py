# SPDX-License-Identifier: Apache-2.0
"""Recformer: texts of items as tokens, the steps and embeddings of tokens, its two losses, and a
model of tokens that is asked about items. Oracles read one item, or one sequence, at a time."""

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
import torch
from builders import lists_of, synthetic
from test_data_prepare import shared
from torch.nn import functional as F

import fastrec
from fastrec.cli import main
from fastrec.data.batch import from_sequences
from fastrec.data.dataset_files import digest
from fastrec.data.errors import DataError
from fastrec.data.item_texts import TextData, Texts, item_texts, make_tokenizer
from fastrec.data.loader import SequenceLoader
from fastrec.data.side import SideData
from fastrec.data.steps.item_texts import ItemTexts
from fastrec.data.views import Views
from fastrec.evaluation.next_item import NextItemJudge
from fastrec.evaluation.protocol import Protocol
from fastrec.nn.text_model import TextModel
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective
from fastrec.random import Rng
from fastrec.training.config import Recipe
from fastrec.training.model_folder import load_model
from fastrec.training.stage import Init

tokenizers = pytest.importorskip(
    "tokenizers", reason="tokenizers is not installed: the texts of items (fastrec[text])"
)
SMALL = {"width": 16, "max_len": 40, "dropout": 0.0}
ITEMS = {"segment": {"width": 16}, "item_place": {"width": 16, "levels": 2}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """60 users and 30 items with a title, a year and genres, some of them missing."""
    folder = synthetic(tmp_path_factory.mktemp("texts"), num_users=60, num_items=30)
    described(folder)
    return fastrec.SequenceDataset.load(folder)


def described(folder: Path, columns: dict | None = None) -> None:
    """Other attributes for the items of a data set."""
    frame = pl.read_parquet(folder / "items.parquet")
    number = range(frame.height)
    columns = columns or {
        "full_title": [None if i % 7 == 3 else f"The Film No {i} of É{i % 5}" for i in number],
        "year": [None if i % 7 == 3 else 1990 + i % 4 for i in number],
        "genres": [[] if i % 7 == 3 else ["Drama", None, "War"][: 1 + i % 3] for i in number],
    }
    made = frame.select("item", "item_id").hstack([pl.Series(n, c) for n, c in columns.items()])
    made.write_parquet(folder / "items.parquet")
    schema = json.loads((folder / "schema.json").read_text())
    schema["digests"]["items.parquet"] = digest(folder / "items.parquet")
    (folder / "schema.json").write_text(json.dumps(schema))


def recipe(**stage) -> Recipe:
    return Recipe.load("recformer", model=SMALL | {"items": ITEMS}, **stage)


def text_of(dataset, item: int, tool) -> list[tuple[int, int]]:
    """(token, segment) of an item."""
    row, found = dataset.item_attributes().row(item, named=True), []
    for name in ("full_title", "year", "genres"):
        value = row[name]
        if isinstance(value, list):
            value = " ".join(part for part in value if part is not None)
        if value not in (None, ""):
            for kind, words in enumerate((name.replace("_", " "), str(value))):
                found += [(token, kind) for token in tool.encode(words).ids]
    return found or [(tool.token_to_id("[UNK]"), 1)]


def test_a_history_is_the_texts_of_its_items_the_latest_first(dataset):
    data = TextData(dataset, Texts(most=9))
    tool = tokenizers.Tokenizer.from_str(data.tokenizer)
    batch = data.gather([4, 0, 17], "train", 25)
    items = dataset.gather([4, 0, 17], "train", 25)
    for b, sequence in enumerate(lists_of(items)):
        rows = [
            (token, kind, place)
            for place, item in enumerate(reversed(sequence))
            for token, kind in text_of(dataset, item, tool)[:9]
        ][:25]
        columns = (batch.values, batch.events["segment"], batch.events["item_place"])
        assert [
            tuple(row) for row in zip(*(lists_of(batch, c)[b] for c in columns), strict=True)
        ] == rows
    assert batch.max_seq_len == 25 and batch.keys.tolist() == [4, 0, 17]
    assert data.num_items == tool.get_vocab_size() == len(data.item_ids())


def test_the_tokenizer_is_a_function_of_the_texts_and_spells_what_it_does_not_know(dataset):
    texts = item_texts(dataset)
    assert texts[1] == [
        ("full title", "The Film No 1 of É1"),
        ("year", "1991"),
        ("genres", "Drama"),
    ]
    assert texts[3] == []
    one = make_tokenizer(texts, 60)
    assert one == make_tokenizer(texts, 60)
    tool = tokenizers.Tokenizer.from_str(one)
    assert tool.get_vocab_size() == 60
    assert tool.encode("Title of a drama").tokens == ["title", "of", "[UNK]", "drama"]
    assert tool.encode("films").tokens == ["film", "##s"]
    with pytest.raises(ValueError, match="texts.vocabulary is 5, and single characters make"):
        make_tokenizer(texts, 5)


def test_columns_and_settings_that_are_wrong_are_named(dataset, tmp_path):
    with pytest.raises(DataError, match="column is missing; the attributes are"):
        TextData(dataset, Texts(columns=["plot"]))
    with pytest.raises(ValueError, match=r"texts.columns names one twice"):
        Texts(columns=["year", "year"])
    timed = synthetic(tmp_path, num_users=8, num_items=10)
    described(timed, {"length": [timedelta(minutes=i) for i in range(10)]})
    with pytest.raises(DataError, match=r"items.parquet.*length.*Duration\S+ is no text"):
        TextData(fastrec.SequenceDataset.load(timed), Texts())
    with pytest.raises(ValueError, match="texts.most must be at least 1, got 0"):
        Texts(most=0)
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        TextData(dataset, Texts(), "{}")
    data = TextData(dataset, Texts())
    with pytest.raises(ValueError, match="tokens have no ratings or times: the column 'rating'"):
        data.gather([0], "train", 9, ["rating"])


@pytest.mark.parametrize("target", ["last", "random"])
def test_views_have_one_target_and_what_is_before_it(dataset, target):
    data = TextData(dataset, Texts())
    side, batch = SideData(data), data.gather(list(range(40)), "train", 60)
    chosen = set()
    for step in range(8):
        parts = {}
        for view, keep in enumerate(("before", "target")):
            given = replace(batch, keys=batch.sample_ids | view << 32)
            parts[keep] = ItemTexts(keep, target)(given, Rng(3, step), side)
        columns = zip(
            *(
                lists_of(part, column)
                for part in (batch, parts["before"], parts["target"])
                for column in (part.values, part.events["item_place"])
            ),
            strict=True,
        )
        for b, (values, places, before, left, after, alone) in enumerate(columns):
            assert set(alone) == {0}
            fits = [
                p
                for p in range(max(places) + 1)
                if [v for v, q in zip(values, places, strict=True) if q == p] == after
                and [v for v, q in zip(values, places, strict=True) if q > p] == before
                and [q - p - 1 for q in places if q > p] == left
            ]
            assert fits and (target == "random" or fits[0] == 0)
            assert target == "last" or fits[0] < max(places)
            chosen.add((b, fits[0]))
    assert (len(chosen) > 80) == (target == "random")


def test_nothing_is_before_a_single_item(dataset):
    data = TextData(dataset, Texts())
    batch = data.expand(from_sequences([[4], [4, 7]]))
    for target in ("last", "random"):
        before = ItemTexts("before", target)(batch, Rng(0, 0), SideData(data))
        assert before.lengths.tolist() == [0, int(data.offsets[5] - data.offsets[4])]


def started(dataset):
    """Model, objective and the views of a step of the recipe."""
    chosen = recipe()
    data = TextData(dataset, chosen.texts)
    stage, side = chosen.pretraining, SideData(data)
    torch.manual_seed(0)
    model = UserModel(data.num_items, chosen.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    views = Views(stage.views, model.frame, side, chosen.model.max_len)
    loader = SequenceLoader(views, batch_size=12, users=torch.arange(20))
    return data, model, JointObjective(stage.parts, model, side), loader.batch_at(0)


def test_a_token_is_the_sum_of_four_embeddings(dataset):
    _, model, _, views = started(dataset)
    batch, part = views["main"], model.item_input
    summed = part(batch).dense() + model.encoder.positions(batch.positions())
    assert batch.values[0] == model.num_items + 1  # [CLS]
    for t in range(0, len(batch.values), 5):
        kind, place = (int(batch.events[name][t]) for name in ("segment", "item_place"))
        start = int(batch.offsets[batch.offsets <= t].max())
        expected = (
            part.ids.weight[batch.values[t]]
            + part.levels["segment"].weight[2 if kind < 0 else kind]
            + part.levels["item_place"].weight[2 if place < 0 else min(place, 1)]
            + model.encoder.positions.weight[t - start]
        )
        torch.testing.assert_close(summed[t], expected)
    assert {-1, 0, 1} == set(batch.events["segment"].tolist())
    assert batch.events["item_place"].max() > 1, "items beyond the levels are there"


def test_the_losses_are_those_of_the_paper(dataset):
    _, model, objective, views = started(dataset)
    found = {term.name: term for term in objective(model, views, Rng(0, 0))}
    a, b, words = (model.encode(views[name]) for name in ("main", "next", "words"))
    one, two = (e.states[e.batch.offsets[:-1]] for e in (a, b))
    expected = 0.0
    for i in range(12):  # eq. 6: the item that follows among those of the batch
        scores = torch.stack([F.cosine_similarity(one[i], two[j], dim=0) / 0.05 for j in range(12)])
        expected = expected - scores.log_softmax(0)[i] / 12
    torch.testing.assert_close(found["contrast"].loss, expected)
    rows = (words.batch.events["target"] >= 0).nonzero().squeeze(1)
    head, total = model.item_head, 0.0
    for t in rows.tolist():  # eq. 4-5: m = LayerNorm(GELU(W h + b)), softmax of the tokens
        m = head.norm(F.gelu(head.dense(words.states[t])))
        scores = model.item_embedding.weight[: model.num_items] @ m + head.bias
        total = total - scores.log_softmax(0)[words.batch.events["target"][t]]
    torch.testing.assert_close(found["item"].loss, total / len(rows))
    assert found["contrast"].weight == 1 and found["item"].weight == 0.1
    share = len(rows) / (words.batch.values < model.num_items).sum()
    assert 0.08 < share < 0.25


def test_items_and_histories_have_the_vectors_of_their_texts_alone(dataset):
    data, model, _, _ = started(dataset)
    asked = TextModel(model, data)
    tool = tokenizers.Tokenizer.from_str(data.tokenizer)
    table = asked.item_table
    assert table.shape == (30, 16) and not table.requires_grad

    def vector(items: list[int]) -> torch.Tensor:
        rows = [
            (*row, place)
            for place, item in enumerate(reversed(items))
            for row in text_of(dataset, item, tool)
        ][:40]
        tokens = from_sequences([[row[0] for row in rows]])
        names = {"segment": 1, "item_place": 2}
        columns = {n: torch.tensor([row[i] for row in rows]) for n, i in names.items()}
        encoded = model.encode(model.frame(replace(tokens, events=columns)))
        return F.normalize(encoded.states[0], dim=0)

    for item in (0, 3, 29):
        torch.testing.assert_close(table[item], vector([item]).detach())
    histories = [[4, 9, 3], [11], list(range(20))]
    batch = asked.inputs_of(histories, ask=True)
    for history, query in zip(histories, asked.ask(batch), strict=True):
        torch.testing.assert_close(query, vector(history))
    assert asked.ask(asked.inputs_of([[]])).isfinite().all()
    with pytest.raises(IndexError, match=r"item 30 of a history is out of \[0, 30\)"):
        asked.inputs_of([[30]])


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    chosen = recipe(steps=20, validate_every=10, batch_size=30, learning_rate=0.005)
    return fastrec.fit(dataset, recipe=chosen, output=folder, progress=False), folder


def test_a_trained_model_is_loaded_evaluated_and_asked(dataset, trained, tmp_path, capsys):
    model, folder = trained
    loaded = load_model(folder / "model", dataset)
    assert isinstance(loaded, TextModel) and torch.equal(loaded.item_table, model.item_table)
    model.save_pretrained(tmp_path / "copy")
    again = load_model(tmp_path / "copy", dataset)
    assert torch.equal(again.item_table, model.item_table)
    found = fastrec.evaluate(loaded, dataset)
    for asks in (
        lambda: fastrec.evaluate(loaded, dataset, Protocol(logit_adjustment=1.0)),
        lambda: fastrec.recommend(loaded, dataset, k=3, logit_adjustment=1.0),
    ):
        with pytest.raises(ValueError, match="logit_adjustment must be 0: the scores of texts are"):
            asks()
    best = fastrec.recommend(loaded, dataset, k=3, histories=[[*dataset.item_ids()[:4]], []])
    assert best.height == 6 and not set(best["item_id"][:3]) & set(dataset.item_ids()[:4])
    flags = ["--data", str(dataset.path), "--pretrained", str(folder / "model")]
    main(["evaluate", *flags, "--output", str(tmp_path / "metrics.json")])
    said = json.loads((tmp_path / "metrics.json").read_text())
    assert said["metrics"]["model"] == pytest.approx(found)
    main(["recommend", *flags, "--output", str(tmp_path / "best.csv"), "--k", "2"])
    assert pl.read_csv(tmp_path / "best.csv").height == 120
    with pytest.raises(ValueError, match="reads the texts of items has no program"):
        fastrec.export_query(loaded.model)
    with pytest.raises(ValueError, match="new_items_like has no effect"):
        load_model(folder / "model", dataset, new_items_like="year")
    (folder / "model" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json is not the file that was written"):
        load_model(folder / "model", dataset)


def test_a_model_goes_to_another_catalogue(dataset, tmp_path):
    chosen = recipe(steps=2, validate_every=2, batch_size=30)
    first = tmp_path / "first"
    model = fastrec.fit(dataset, recipe=chosen, output=first, progress=False)
    folder = synthetic(tmp_path, num_users=40, num_items=45, seed=9)
    described(folder)
    other = fastrec.SequenceDataset.load(folder)
    chosen = recipe(steps=4, validate_every=4, batch_size=20)
    tuned = fastrec.fit(other, model, recipe=chosen, progress=False)
    assert tuned.item_table.shape == (45, 16) and tuned.model.num_items == model.model.num_items
    assert tuned.texts.tokenizer == model.texts.tokenizer
    small = [f"--pretraining.{key}=2" for key in ("steps", "validate_every", "batch_size")]
    folders = [f"--data={folder}", f"--init={first / 'model'}", f"--output={tmp_path / 'second'}"]
    main(["finetune", "--config=recformer", *small, *folders])
    again = load_model(tmp_path / "second" / "model", other)
    assert again.item_table.shape == (45, 16) and again.model.tokenizer == model.model.tokenizer
    chosen = Recipe.load("recformer", model=SMALL | {"items": ITEMS}, steps=1,
                         texts={"most": 5, "columns": ["year"], "vocabulary": 90})  # fmt: skip
    with pytest.warns(UserWarning, match=r"keeps its own settings: texts.columns \[\], not \['ye"):
        kept = fastrec.fit(other, model, recipe=chosen, progress=False)
    assert kept.model.texts == model.model.texts == kept.texts.settings
    folders = [f"--data={folder}", f"--pretrained={tmp_path / 'second' / 'model'}"]
    with pytest.warns(UserWarning, match="keeps its own settings: texts.most 32, not 5"):
        main(["evaluate", "--config=recformer", "--texts.most=5", *folders])
    items = UserModel(other.num_items, recipe().model)
    with pytest.raises(
        ValueError, match="the model to start from reads items, it has no tokenizer"
    ):
        fastrec.fit(other, items, recipe=chosen, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": None}, "pretraining.judge: texts needs the key texts: the events are items"),
        ({"judge": "next_item"}, "judge is next_item: with the key texts it is texts"),
        ({"model": {"tokens": []}}, r"the vector of a text is read at \[CLS\]"),
        ({"model": {"items": {"attributes": {"x": {"width": 64}}}}}, "no features and attributes"),
        ({"evaluation": {"logit_adjustment": 1.0}}, "scores are cosines"),
        ({"views": {"main": [{"crop": {}}]}}, "texts: the step crop is of items"),
        ({"model": {"items": {"item_place": {"levels": 0}}}}, "levels must be at least 1, got 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe.load("recformer", **changes)


def test_texts_of_a_step_need_the_key():
    views = {"main": [{"item_texts": {}}, {"next_item": {}}]}
    with pytest.raises(ValueError, match="the step item_texts needs the key texts"):
        Recipe.load("sasrec", views=views)


@pytest.mark.slow  # a minute
def test_it_learns_from_titles_and_genres(tmp_path):
    """ml-100k, 99 negatives by popularity: popularity is near chance there, and what the softmax
    over a batch learns is how much likelier a user makes an item than others do."""
    source = shared("ml-100k") / "ml-100k.inter"
    main(["prepare", "--source", str(source), "--format", "recbole", "--output", f"{tmp_path}/ml"])
    dataset = fastrec.SequenceDataset.load(tmp_path / "ml")
    size = {"width": 32, "max_len": 96, "dropout": 0.0, "encoder": {"transformer": {"layers": 1}}}
    chosen = Recipe.load(
        "recformer",
        texts={"columns": ["movie_title", "class"]},
        model=size | {"items": {"segment": {"width": 32}, "item_place": {"width": 32}}},
        evaluation={"candidates": "sampled", "seen": "none"},
        steps=120, validate_every=60, batch_size=128, learning_rate=0.008, warmup_steps=20,
    )  # fmt: skip
    model = fastrec.fit(dataset, recipe=chosen, output=tmp_path / "run", progress=False)
    (file,) = (tmp_path / "run").glob("metrics/version_0/metrics.csv")
    first, *_, last = pl.read_csv(file)["train_loss"].drop_nulls()
    assert last < first - 0.5
    users = torch.as_tensor(dataset.users("valid"))
    judge = NextItemJudge(dataset, users, "valid", Protocol(candidates="sampled"))
    popular, ours = (judge.metrics(r) for r in (judge.popularity_ranks(), judge.ranks(model)))
    assert ours["NDCG@10"] > 1.5 * popular["NDCG@10"]


def test_an_adapter_of_a_model_of_texts(dataset, tmp_path):
    stage = dict(steps=2, validate_every=2, batch_size=30, progress=False, monitor="steps")
    base = fastrec.fit(dataset, recipe=recipe(), output=tmp_path / "base", **stage)
    init = Init(freeze=["items", "encoder"], patch=3)
    tuned = fastrec.fit(dataset, base, recipe=recipe(), init=init, output=tmp_path / "run", **stage)
    folders = [tmp_path / name / "model" for name in ("run", "base")]
    fastrec.save_adapter(tmp_path / "adapter", *folders)
    made = fastrec.with_adapter(load_model(folders[1], dataset), tmp_path / "adapter")
    assert isinstance(made, TextModel) and torch.equal(made.item_table, tuned.item_table)
