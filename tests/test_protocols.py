# SPDX-License-Identifier: Apache-2.0
"""Other rankings than UPRec's and the full one: zeroed scores, uniform and listed negatives, other
cutoffs; what lists show; ranks to a file."""

import json

import polars
import pytest
import torch
from builders import dataset_of, synthetic

import fastrec
from fastrec.cli import main
from fastrec.data.errors import DataError
from fastrec.evaluation.candidates import listed_negatives, sampled_negatives
from fastrec.evaluation.metrics import list_metrics, ranking_metrics
from fastrec.evaluation.next_item import NextItemJudge, evaluate
from fastrec.evaluation.protocol import Protocol

SEQUENCES = [[5, 1, 1, 9], [20, 3, 20], [7, 7, 7], [0, 22, 21, 5], [2, 21, 22], [4, 9, 4, 6]]
NO_BIAS = torch.zeros(23)


@pytest.mark.parametrize("seed", range(8))
def test_zeroed_scores_rank_as_a_stable_sort(seed):
    """Also where the target was seen before (users 1 and 2), and where scores are 0 themselves."""
    torch.manual_seed(seed)
    dataset, users = dataset_of(SEQUENCES, 23), torch.arange(6)
    judge = NextItemJudge(dataset, users, "test", Protocol(seen="zero"))
    query, table = torch.randint(-2, 3, (6, 3)).float(), torch.randint(-2, 3, (23, 3)).float()
    ranks = judge._rank(query, table, NO_BIAS, slice(0, 6))
    for user, sequence in enumerate(SEQUENCES):
        scores = table @ query[user]
        scores[sequence[:-1]] = 0
        order = sorted(range(23), key=lambda item: (-scores[item].item(), item))
        assert ranks[user] == 1 + order.index(sequence[-1]), user


def test_uniform_negatives_are_unseen_distinct_and_of_all_items():
    dataset, users = dataset_of(SEQUENCES, 23), torch.arange(6)
    counts = torch.zeros(6, 23)
    for seed in range(300):
        drawn = sampled_negatives(dataset, users, 5, seed, by="uniform")
        assert all(len(set(row)) == 5 for row in drawn.tolist())
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float32))
    for user, sequence in enumerate(SEQUENCES):
        unseen = [item for item in range(23) if item not in sequence]
        assert counts[user, sequence].sum() == 0
        expected = 300 * 5 / len(unseen)
        assert ((counts[user, unseen] - expected).abs() < 5 * expected**0.5).all()
    by = Protocol(candidates="sampled", negatives=5, negatives_by="uniform", seed=3)
    judge = NextItemJudge(dataset, users, "test", by)
    drawn = sampled_negatives(dataset, users, 5, 3, by="uniform")
    assert torch.equal(judge.candidates()[:, 1:], drawn[judge.owner])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("protocols")
    synthetic(folder, num_users=120)
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return fastrec.SequenceDataset.load(folder / "data")


def lines_of(dataset, count: int = 4) -> list[str]:
    items = dataset.item_ids()
    negatives = sampled_negatives(dataset, torch.arange(dataset.num_users), count, 0)
    return [
        " ".join(map(str, [user, *items[row]]))
        for user, row in zip(dataset.user_ids(), negatives.numpy(), strict=True)
    ]


def twice(line: str) -> str:
    user, first, _, *rest = line.split()
    return " ".join([user, first, first, *rest])


def test_listed_negatives_are_those_of_the_file(dataset, tmp_path):
    lines, file = lines_of(dataset), tmp_path / "sample.txt"
    file.write_text("\n".join(reversed(lines)) + "\n")
    users = torch.tensor([7, 0, 3])
    expected = sampled_negatives(dataset, torch.arange(dataset.num_users), 4, 0)[users]
    assert torch.equal(listed_negatives(dataset, users, file), expected)
    protocol = Protocol(candidates="sampled", negatives_file=str(file))
    judge = NextItemJudge(dataset, users, "test", protocol)
    assert torch.equal(judge.candidates()[:, 1:], expected[judge.owner])
    assert f"among the items of {file}" in str(protocol)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda lines: lines[1:], "1 of 120 users have no line"),
        (lambda lines: [*lines, lines[0]], "row 121: user '.*' is listed twice"),
        (lambda lines: [lines[0], lines[1] + " 1"], "row 2: 5 items, the first line has 4"),
        (lambda lines: [lines[0] + "x"], "row 1: item '.*x' is not in"),
        (lambda lines: ["nobody" + lines[0]], "row 1: user 'nobody.*' is not in"),
        (lambda lines: [lines[0], twice(lines[1]), *lines[2:]], "row 2: item '.*' stands twice"),
    ],
)
def test_a_wrong_list_is_an_error_that_names_its_row(dataset, tmp_path, change, error):
    file = tmp_path / "sample.txt"
    file.write_text("\n".join(change(lines_of(dataset))) + "\n")
    with pytest.raises(DataError, match=error):
        listed_negatives(dataset, torch.arange(dataset.num_users), file)


@pytest.mark.parametrize("place", [0, -2, -1], ids=["seen", "valid", "test"])
def test_an_event_of_a_user_is_no_listed_negative(dataset, tmp_path, place):
    """The target beside itself shared its rank: HR@1 was 0 for every model."""
    file, lines, start, end = tmp_path / "sample.txt", lines_of(dataset), *dataset.offsets[5:7]
    item = str(dataset.item_ids()[dataset.values[start:end][place]])
    lines[5] = " ".join([*lines[5].split()[:-1], item])
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=f"row 6: item '{item}' is an event of the user"):
        listed_negatives(dataset, torch.arange(dataset.num_users), file)


def test_metrics_at_any_cutoff():
    ranks = torch.tensor([1.0, 3.0, 10.0, 11.0])
    metrics = ranking_metrics(ranks, (3, 20))
    assert list(metrics) == ["HR@3", "NDCG@3", "HR@20", "NDCG@20", "MRR@20", "MRR"]
    assert metrics["HR@3"] == 0.5 and metrics["HR@20"] == 1
    assert metrics["MRR@20"] == pytest.approx((1 + 1 / 3 + 1 / 10 + 1 / 11) / 4)
    assert ranking_metrics(ranks)["MRR@10"] == pytest.approx((1 + 1 / 3 + 1 / 10) / 4)


def test_coverage_and_novelty():
    counts = torch.tensor([8, 4, 2, 1, 0])  # of 16, the last item counted as one
    found = list_metrics(torch.tensor([[0, 1], [1, 2], [1, -1]]), counts)
    assert found == {
        "coverage": pytest.approx(3 / 5),
        "novelty": pytest.approx((1 + 3 * 2 + 3) / 5),
    }
    assert list_metrics(torch.tensor([[-1]]), counts) == {"coverage": 0, "novelty": 0}


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        (dict(negatives_by="uniform"), "negatives_by has no effect: candidates is full"),
        (dict(negatives_file="x"), "negatives_file has no effect: candidates is full"),
        (
            dict(candidates="sampled", negatives=9, negatives_file="x"),
            "negatives has no effect: negatives_file lists them",
        ),
        (dict(candidates="sampled", seen="zero"), "seen has no effect"),
        (dict(cutoffs=[]), "cutoffs must be at least 1"),
    ],
)
def test_keys_without_effect_are_refused(keys, error):
    with pytest.raises(ValueError, match=error):
        Protocol(**keys)


def test_evaluate_by_the_command_line(folder, dataset, tmp_path, capsys):
    """Cutoffs, lists and a file of ranks; the same numbers from Python."""
    recipe = fastrec.Recipe.load(
        "sasrec", steps=4, batch_size=64, validate_every=4, warmup_steps=1,
        model={"width": 8, "max_len": 8},
    )  # fmt: skip
    model = fastrec.fit(dataset, recipe=recipe, output=tmp_path / "run", progress=False)
    ranks, metrics = tmp_path / "ranks.parquet", tmp_path / "metrics.json"
    main(
        ["evaluate", f"--data={folder / 'data'}", f"--pretrained={tmp_path / 'run' / 'model'}",
         f"--ranks={ranks}", f"--output={metrics}", "--evaluation.cutoffs=[2, 20]"]
    )  # fmt: skip
    found = json.loads(metrics.read_text())
    said = capsys.readouterr().out
    assert "lists of 20: " in said and str(ranks) in said
    frame = polars.read_parquet(ranks)
    assert frame.columns == ["user_id", "item_id", "rank"]
    again = ranking_metrics(torch.from_numpy(frame["rank"].to_numpy().copy()), (2, 20))
    assert found["metrics"]["model"] == pytest.approx(again)
    protocol = Protocol(seen="exclude", cutoffs=[2, 20])
    assert evaluate(model, dataset, protocol) == pytest.approx(again)
    best = fastrec.recommend(model, dataset, k=20)  # of all events, not of the test input
    assert 0 < found["lists"]["coverage"] <= 1 and best.height
    with pytest.raises(SystemExit, match=r"ranks\.parquet is there already"):
        main(
            ["evaluate", f"--data={folder / 'data'}", f"--ranks={ranks}",
             f"--pretrained={tmp_path / 'run' / 'model'}"]
        )  # fmt: skip
