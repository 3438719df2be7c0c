# SPDX-License-Identifier: Apache-2.0
"""The exported program gives the queries of `ask`, for batches of any size."""

import pytest
import torch
from builders import FORMS, model_of
from torch import nn

from fastrec import ModelConfig, UserModel, export_query
from fastrec.nn.encoders.caser import Caser
from fastrec.nn.encoders.dilated import Dilated
from fastrec.nn.encoders.fm import Fm
from fastrec.nn.encoders.gru import Gru
from fastrec.nn.item_parts import Rating, TimeGap
from fastrec.nn.items import Items

MODELS = {
    **{f"{form}, causal": lambda form=form: model_of(causal=True, **FORMS[form]) for form in FORMS},
    "mask, tokens": lambda: model_of(tokens=["cls", "sep"], layers=2, heads=2),
    "ur": lambda: model_of(tokens=["ur"], causal=True),
    "users, own table": lambda: model_of(num_users=3, user_width=4, head_table="own", causal=True),
    "rating": lambda: model_of(items=Items(rating=Rating(low=1, high=5, width=4)), causal=True),
    "time gap": lambda: model_of(items=Items(time_gap=TimeGap(width=4)), causal=True),
    "gru": lambda: UserModel(20, ModelConfig(width=8, max_len=10, encoder=Gru())),
    "caser": lambda: UserModel(20, ModelConfig(width=8, max_len=10, encoder=Caser())),
    "dilated": lambda: UserModel(20, ModelConfig(width=8, max_len=10, encoder=Dilated())),
    "fm": lambda: UserModel(20, ModelConfig(width=8, max_len=10, encoder=Fm(hidden=[5]))),
}


def test_a_history_of_tokens_alone_has_no_query():
    """It was asked at the last event of another one."""
    model = MODELS["ur"]()
    token = model.token("ur")
    values, offsets = torch.tensor([3, token, token, 7, token]), torch.tensor([0, 2, 3, 5])
    found = export_query(model).module()(values, offsets)
    assert found.isnan().all(1).tolist() == [False, True, False]
    expected = model.ask(model.inputs_of([[3], [7]], ask=True))
    torch.testing.assert_close(found[[0, 2]], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_program_is_the_model(name, tmp_path):
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    torch.export.save(export_query(model), tmp_path / "query.pt2")
    program = torch.export.load(tmp_path / "query.pt2").module()
    generator = torch.Generator().manual_seed(3)
    for count in (0, 1, 2, 5, 70):  # of the last one, more events than the shortened layer needs
        lengths = torch.randint(1, 15, (count,), generator=generator).tolist()
        histories = [torch.randint(20, (n,), generator=generator).tolist() for n in lengths]
        batch = model.inputs_of(histories, ask=True)
        with torch.no_grad():
            queries, expected = program(batch.values, batch.offsets), model.ask(batch)
        torch.testing.assert_close(queries, expected, rtol=1e-4, atol=1e-5)
        assert len(expected.unique(dim=0)) >= (count + 1) // 2
