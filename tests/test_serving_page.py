# SPDX-License-Identifier: Apache-2.0
"""The code of docs/serving.md runs as it stands."""

import shutil
from pathlib import Path

import pytest
import torch
from builders import synthetic

import fastrec
from fastrec.nn.encoders.transformer import Transformer

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"


def run(mark: str, names: dict) -> dict:
    """Run the block of the page between two marks."""
    block = PAGE.read_text().split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]
    exec(compile(block.split("```python")[1].split("```")[0], mark, "exec"), names)
    return names


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set and a model where the page expects them, as the current folder."""
    dataset = fastrec.SequenceDataset.load(synthetic(tmp_path, num_users=60, num_items=50))
    torch.manual_seed(0)
    config = fastrec.ModelConfig(width=8, max_len=20, encoder=Transformer(layers=1, causal=True))
    fastrec.UserModel(dataset.num_items, config).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)


def test_recommender_and_an_index_of_somebody_else(folder):
    names = run("recommender", {})
    attributes = names["dataset"].item_attributes()
    assert 0 < names["cheap"].height < 50 and "category" in attributes.columns
    assert not {5, 9} & set(names["best"]["item_id"]) and names["best"].height == 10
    assert names["like"].columns == ["item_id", "rank", "similar_item_id", "score"]
    found = run("index", names)["found"]
    best = names["recommender"].recommend(10, [3, 14], seen="none")
    assert found.flatten().tolist() == best["item_id"].to_list()


def test_the_index_of_the_page_finds_what_recommend_does(folder):
    pytest.importorskip("faiss", reason="faiss is not installed: the index of items")
    names = run("faiss", run("recommender", {}))
    best = names["recommender"].recommend(10, [3, 14], seen="none")
    assert names["found"].flatten().tolist() == best["item_id"].to_list()
    assert names["recall"] == 1.0


def test_the_program_of_the_page_gives_the_same_answers(folder):
    names = run("program", run("recommender", {}))
    torch.testing.assert_close(names["queries"], names["model"].ask(names["batch"]))
    asked = dict(histories=[[5, 9, 2], [7]], k=10)
    one, other = names["recommender"].recommend(**asked), names["faster"].recommend(**asked)
    assert one.drop("score").equals(other.drop("score"))


def test_the_onnx_file_of_the_page_gives_the_same_answers(folder):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: it writes ONNX files")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it runs ONNX files")
    names = run("onnx_input", run("onnx", run("recommender", {})))
    batch = names["model"].inputs_of([[5, 9, 2], [7]], ask=True)
    assert names["values"].tolist() == batch.values.tolist()
    assert names["offsets"].tolist() == batch.offsets.tolist()
    torch.testing.assert_close(torch.from_numpy(names["queries"]), names["model"].ask(batch))
    for histories in ([[5, 9, 2]], [[5, 9, 2], [7]]):
        asked = dict(histories=histories, k=10)
        one, other = names["recommender"].recommend(**asked), names["faster"].recommend(**asked)
        assert one.drop("score").equals(other.drop("score"))


@pytest.mark.slow  # a compiler runs for half a minute
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs g++")
def test_the_compiled_program_of_the_page_gives_the_same_answers(folder):
    names = run("compiled", run("recommender", {"torch": torch}))
    for histories in ([[5, 9, 2]], [[5, 9, 2], [7]] * 9):
        asked = dict(histories=histories, k=10)
        one, other = names["recommender"].recommend(**asked), names["faster"].recommend(**asked)
        assert one.drop("score").equals(other.drop("score"))


def test_service(folder):
    pytest.importorskip("fastapi", reason="fastapi is not installed: the service of the page")
    pytest.importorskip("httpx2", reason="httpx2 is not installed: the client of fastapi")
    from fastapi.testclient import TestClient

    threads = torch.get_num_threads()
    try:
        # Annotations of a request are read from the module that a class names.
        names = run("service", {"__name__": "service"})
    finally:
        torch.set_num_threads(threads)
    client, recommender = TestClient(names["app"]), names["recommender"]
    got = client.post("/recommend", json={"history": [3, "7"], "k": 4, "blocked": [1]})
    expected = recommender.recommend(4, histories=[[3, 7]], blocked=[1])
    assert got.status_code == 200 and got.json() == expected.to_dicts() and len(got.json()) == 4
    got = client.post("/recommend", json={"history": [3], "allowed": [8, 9], "k": 4})
    assert {row["item_id"] for row in got.json()} == {8, 9}
    got = client.post("/recommend", json={"history": [3], "blocked": ["x"]})
    assert got.status_code == 422 and "the first is 'x'" in got.json()["detail"]
    got = client.get("/similar/7", params={"k": 3})
    assert got.json() == recommender.similar([7], 3).to_dicts()
    assert client.get("/similar/x").status_code == 422
    with pytest.warns(UserWarning, match="1 of 1 histories have no known item"):
        assert client.post("/recommend", json={"history": ["new"]}).json() == []
