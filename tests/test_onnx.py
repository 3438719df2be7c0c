# SPDX-License-Identifier: Apache-2.0
"""The ONNX file of a model, run by ONNX Runtime, gives the queries of `ask`."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from test_export import MODELS
from torch import nn
from torch.nn import functional as F

from fastrec import ModelConfig, UserModel
from fastrec.export import export_query
from fastrec.nn.encoders.bag import Bag
from fastrec.onnx import _bag, export_onnx, onnx_query

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


# An export takes ten seconds; the tests below have a model with tokens and one of two LayerNorms.
SOME = ("ligr, causal", "caser")
EVERY = [
    pytest.param(name, marks=() if name in SOME else pytest.mark.exhaustive)
    for name in MODELS
    if name != "gru"
]


@pytest.mark.parametrize("name", EVERY)
def test_the_file_is_the_model(name, tmp_path):
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    export_onnx(model, tmp_path / "query.onnx")
    session = runtime.InferenceSession(tmp_path / "query.onnx")
    generator = torch.Generator().manual_seed(3)
    for count in (0, 1, 2, 5, 70):
        lengths = torch.randint(1, 15, (count,), generator=generator).tolist()
        histories = [torch.randint(20, (n,), generator=generator).tolist() for n in lengths]
        batch = model.inputs_of(histories, ask=True)
        given = {"values": batch.values.numpy(), "offsets": batch.offsets.numpy()}
        (queries,) = session.run(["queries"], given)
        expected = model.ask(batch).detach().numpy()
        np.testing.assert_allclose(queries, expected, rtol=1e-4, atol=1e-5)
        assert len(np.unique(expected, axis=0)) >= (count + 1) // 2


def test_a_history_that_is_none_has_no_query(tmp_path):
    """And what one history holds is nothing to the others."""
    model = MODELS["post_norm, causal"]()
    export_onnx(model, tmp_path / "query.onnx")
    for query in (onnx_query(tmp_path / "query.onnx"), export_query(model).module()):
        for values, offsets, none in (
            ([5, 9, 4], [0, 2, 2, 3], [1]),
            ([5, 9, 4], [0, 0, 2, 3], [0]),
            ([5, -1, 4], [0, 2, 3], [0]),
            ([-1], [0, 1], [0]),
        ):
            found = query(torch.tensor(values), torch.tensor(offsets))
            wrong = found.isnan().all(1)
            assert wrong.nonzero().flatten().tolist() == none
            assert found[~wrong].isfinite().all()
            there = [values[a:b] for a, b in pairwise(offsets)]
            rest = [each for place, each in enumerate(there) if place not in none]
            torch.testing.assert_close(
                found[~wrong], model.ask(model.inputs_of(rest, ask=True)), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float64, marks=pytest.mark.exhaustive)]
)
def test_a_model_of_another_type_is_written_in_float32(dtype, tmp_path):
    model = MODELS["mask, tokens"]().to(dtype)
    export_onnx(model, tmp_path / "folder" / "query.onnx")
    assert model.item_embedding.weight.dtype == dtype
    batch = model.inputs_of([[3, 1], []], ask=True)
    expected = model.float().ask(batch)
    found = onnx_query(tmp_path / "folder" / "query.onnx")(batch.values, batch.offsets)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_has_no_form_is_named_and_a_file_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="jagged_gru_fwd.*no form"):
        export_onnx(MODELS["gru"](), tmp_path / "gru.onnx")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there.onnx").write_text("kept")
    with pytest.raises(FileExistsError, match=r"there\.onnx is there already"):
        export_onnx(MODELS["caser"](), tmp_path / "there.onnx")
    assert (tmp_path / "there.onnx").read_text() == "kept"


def test_a_bag_in_standard_operators_is_that_of_torch():
    """Also of no bag, which the exporter's own form, a loop, is not."""
    weight, parts = torch.randn(9, 4), torch.randn(7)
    items = torch.tensor([0, 8, 3, 3, 1, 2, 5])
    for offsets in ([0, 2, 2, 7], [0, 0]):
        given = items[: offsets[-1]], torch.tensor(offsets), parts[: offsets[-1]]
        own = F.embedding_bag(given[0], weight, given[1], mode="sum", per_sample_weights=given[2],
                              include_last_offset=True)  # fmt: skip
        found = _bag(weight, given[0], given[1], False, 0, False, given[2], True, -1)
        assert len(found) == 4
        torch.testing.assert_close(found[0], own)


@pytest.mark.exhaustive
def test_an_encoder_of_bags_has_a_file(tmp_path):
    model = UserModel(20, ModelConfig(width=8, max_len=10, encoder=Bag(hidden=[5])))
    export_onnx(model, tmp_path / "query.onnx")
    for histories in ([], [[1, 2], [3]]):
        batch = model.inputs_of(histories, ask=True)
        found = onnx_query(tmp_path / "query.onnx")(batch.values, batch.offsets)
        torch.testing.assert_close(found, model.ask(batch).detach(), rtol=1e-4, atol=1e-5)


def test_a_large_model_is_one_file_or_none(tmp_path, monkeypatch):
    """torch would write a second one, beside which the first is useless elsewhere."""
    exporter = pytest.importorskip("torch.onnx._internal.exporter._onnx_program")
    monkeypatch.setattr(exporter, "_LARGE_MODEL_THRESHOLD", 100)
    model = MODELS["post_norm, causal"]()
    export_onnx(model, tmp_path / "query.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["query.onnx"]
    batch = model.inputs_of([[1, 2]], ask=True)
    found = onnx_query(tmp_path / "query.onnx")(batch.values, batch.offsets)
    torch.testing.assert_close(found, model.ask(batch).detach(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("fastrec.onnx.MOST_BYTES", 100)
    with pytest.raises(ValueError, match=r"the model is 0.0 GB, and an ONNX file, .* at most 2: "):
        export_onnx(model, tmp_path / "other.onnx")
    assert len(list(tmp_path.iterdir())) == 1
