# SPDX-License-Identifier: Apache-2.0
"""The ONNX file of a model, run by ONNX Runtime, gives the queries of `ask`."""

import numpy as np
import pytest
import torch
from test_export import MODELS
from torch import nn

from fastrec.onnx import export_onnx

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


# An export takes six seconds; the others have no operator that these have not.
SOME = ("post_norm, causal", "ligr, causal", "mask, tokens", "time gap", "caser")
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


def test_what_has_no_form_is_named_and_a_file_is_not_overwritten(tmp_path):
    with pytest.raises(ValueError, match="jagged_gru_fwd.*no form"):
        export_onnx(MODELS["gru"](), tmp_path / "gru.onnx")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there.onnx").write_text("kept")
    with pytest.raises(FileExistsError, match=r"there\.onnx exists"):
        export_onnx(MODELS["caser"](), tmp_path / "there.onnx")
    assert (tmp_path / "there.onnx").read_text() == "kept"
