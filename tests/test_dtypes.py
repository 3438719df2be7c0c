# SPDX-License-Identifier: Apache-2.0
"""Models in another dtype than float32: asked, saved, read; and what a stage does with them."""

import pytest
import torch
from builders import recipe, run, synthetic
from test_export import MODELS
from torch import nn

from fastrec import UserModel
from fastrec.nn.transfer import with_items

EPS = {torch.float64: 1e-5, torch.bfloat16: 0.06, torch.float16: 0.01}
dtypes = pytest.mark.parametrize("dtype", EPS, ids=str)


def asked(model: UserModel) -> torch.Tensor:
    batch = model.inputs_of([[1, 2, 3], [4], [5, 6, 7, 8, 9, 1, 2]], ask=True)
    with torch.no_grad():
        return model.ask(batch)


@dtypes
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_another_dtype_is_asked_saved_and_read(name, dtype, tmp_path):
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = asked(model)
    found = asked(model.to(dtype))
    assert found.dtype == dtype
    assert (found.double() - expected.double()).norm() < EPS[dtype] * expected.norm()
    model.save_pretrained(tmp_path)
    read = UserModel.from_pretrained(tmp_path)
    assert torch.equal(asked(read), found)
    # A list of items with one more.
    more = with_items(read, torch.tensor([*range(read.num_items), -1]))
    assert {p.dtype for p in more.parameters()} == {dtype}
    assert torch.equal(asked(more), found)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("synthetic"))


SHORT = recipe(steps=4, validate_every=2)


@dtypes
def test_a_stage_trains_float32_and_says_so(data, tmp_path, dtype):
    model = UserModel(150, SHORT.model).to(dtype)
    with pytest.raises(ValueError, match=f"the model to start from has numbers of {dtype}"):
        run(data, tmp_path / "run", SHORT, model=model)
    torch.set_default_dtype(dtype)
    try:
        with pytest.raises(ValueError, match=f"a new model has numbers of {dtype}"):
            run(data, tmp_path / "run", SHORT)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not (tmp_path / "run").exists()


CONTEXTS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_what_the_caller_is_inside_of_changes_no_number(data, tmp_path, name):
    plain = run(data, tmp_path / "plain", SHORT)
    with CONTEXTS[name]():
        inside = run(data, tmp_path / "run", SHORT)
    for key, value in plain.state_dict().items():
        assert torch.equal(value, inside.state_dict()[key]), key


def test_the_caller_draws_on_as_before(data, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    run(data, tmp_path / "run", SHORT)
    assert torch.equal(torch.rand(3), expected)
