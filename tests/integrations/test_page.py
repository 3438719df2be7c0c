# SPDX-License-Identifier: Apache-2.0
"""The code of docs/integrations.md runs as it stands, where the library is installed."""

from pathlib import Path

import pytest

import fastrec

PAGE = Path(__file__).parent.parent.parent / "docs" / "integrations.md"


def run(library: str, mark: str | None = None) -> dict:
    """Run the block of the page between two marks, called as the library unless said otherwise."""
    pytest.importorskip(library, reason=f"{library} is not installed")
    mark = mark or library
    block = PAGE.read_text().split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0]
    names: dict = {}
    exec(compile(block.split("```python")[1].split("```")[0], library, "exec"), names)
    return names


def test_transformers():
    (report,) = run("transformers")["patch"].reports
    assert report.model == "BertForMaskedLM" and report.loss_difference < 1e-5


def test_patch_and_undo():
    patch = run("recbole", "patch")["patch"]
    assert patch.replaced and not fastrec.patched()


def test_recbole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])  # RecBole reads the command line
    file = tmp_path / "data" / "shop" / "shop.inter"
    file.parent.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(40):
        lines += [f"{user}\t{(7 * user + 3 * place) % 30}\t{place}" for place in range(8)]
    file.write_text("\n".join(lines) + "\n")
    names = run("recbole")
    (report,) = names["patch"].reports
    assert report.model == "SASRec" and report.loss_difference < 1e-5
    assert set(names["result"]["test_result"]) == {"recall@10", "ndcg@10"}


def test_rectools(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["user_id,item_id,weight,datetime"]
    for user in range(30):
        lines += [
            f"{user},{(7 * user + 3 * place) % 30},1,2020-01-{place + 1:02}" for place in range(8)
        ]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    names = run("rectools")
    (report,) = names["patch"].reports
    assert report.loss_difference < 1e-5 and set(names["best"]["user_id"]) == set(range(30))


def test_replay(tmp_path, monkeypatch):
    pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.chdir(tmp_path)
    lines = ["user_id,item_id,timestamp"]
    for user in range(30):
        lines += [f"{user},{(7 * user + 3 * place) % 30},{place}" for place in range(8)]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    names = run("replay")
    (report,) = names["patch"].reports
    assert report.model == "SasRec" and report.loss_difference < 1e-5
    found = names["best"].get_result()
    assert len(found) == 300 and set(found["user_id"]) == set(range(30))
