# SPDX-License-Identifier: Apache-2.0
"""Learning rates, decay and clipping of a stage against plain PyTorch."""

import pytest
import torch
from builders import MODEL, loader_of, recipe, run, synthetic, trained_weights

from fastrec.data.dataset import SequenceDataset
from fastrec.data.side import SideData
from fastrec.data.steps.mask import Mask
from fastrec.nn.user_model import UserModel
from fastrec.objectives.item import Item
from fastrec.objectives.joint import JointObjective, total_loss
from fastrec.random import Rng

# Shares of the peak in the steps of a stage of six, two of them warm-up.
FACTORS = {
    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0],
    "linear": [0.5, 1.0, 1.0, 0.75, 0.5, 0.25],
    "cosine": [0.5, 1.0, 1.0, 0.8535533906, 0.5, 0.1464466094],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return synthetic(tmp_path_factory.mktemp("synthetic"))


@pytest.mark.parametrize("schedule", FACTORS)
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_stage_is_adamw_with_clipping_and_a_schedule(data, tmp_path, schedule, clip, precision):
    chosen = recipe(
        steps=6, validate_every=6, warmup_steps=2, schedule=schedule, weight_decay=0.2,
        gradient_clip=clip, learning_rate=0.01, precision=precision, betas=(0.8, 0.98),
    )  # fmt: skip
    run(data, tmp_path / "run", chosen)

    dataset = SequenceDataset.load(data)
    torch.manual_seed(chosen.seed)
    model, side = UserModel(dataset.num_items, MODEL), SideData(dataset)
    objective = JointObjective({"item": Item()}, model, side)
    users = torch.as_tensor(dataset.users("test"))
    loader = loader_of(model, {"main": [Mask()]}, side, batch_size=64, users=users)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.2, betas=(0.8, 0.98))
    norms = []
    for step, factor in enumerate(FACTORS[schedule]):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            terms = objective(model, loader.batch_at(step), Rng(chosen.seed, step))
        total_loss(terms).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9).item())
        optimizer.step()
    assert min(norms) > 0.06, "the gradients are clipped in every step"
    trained = trained_weights(tmp_path / "run")
    for name, value in model.state_dict().items():
        # The fused optimiser rounds otherwise; states in bfloat16 magnify that.
        # Adam takes lr times a ratio: of a gradient near 0 the last bits are seen. In bfloat16 that
        # is a hundredth of a step of 0.01 for a few weights (0.00017 on an AMD EPYC, Zen 3).
        close = dict(rtol=1e-4, atol=1e-5) if precision == "32-true" else dict(rtol=1e-3, atol=5e-4)
        found = trained[f"model.{name}"]
        # The bias of the keys changes no attention: its gradient is rounding alone.
        if name.endswith("query_key_value.bias"):
            found, value = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (found, value))
        torch.testing.assert_close(found, value, **close)
