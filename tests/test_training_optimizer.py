"""Learning rates, decay and clipping of a stage against plain PyTorch."""

import pytest
import torch
from test_training import MODEL, data, recipe, run, trained_weights  # noqa: F401

from fastrec.data.dataset import SequenceDataset
from fastrec.data.loader import SequenceLoader
from fastrec.nn.user_model import UserModel
from fastrec.objectives.joint import JointObjective, total_loss

# Shares of the peak in the steps of a stage of six, two of them warm-up.
FACTORS = {
    "constant": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0],
    "linear": [0.5, 1.0, 1.0, 0.75, 0.5, 0.25],
    "cosine": [0.5, 1.0, 1.0, 0.8535533906, 0.5, 0.1464466094],
}


@pytest.mark.parametrize("schedule", FACTORS)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_stage_is_adamw_with_clipping_and_a_schedule(data, tmp_path, schedule, clip):  # noqa: F811
    stage = recipe(
        steps=6, validate_every=6, warmup_steps=2, schedule=schedule, weight_decay=0.2,
        gradient_clip=clip, learning_rate=0.01,
    ).pretraining  # fmt: skip
    run(data, tmp_path / "run", stage)

    dataset = SequenceDataset.load(data)
    torch.manual_seed(stage.seed)
    model = UserModel(dataset.num_items, MODEL)
    objective = JointObjective(stage.objectives, model, [])
    loader = SequenceLoader(
        dataset, "train", batch_size=stage.batch_size, max_len=MODEL.max_len, seed=stage.seed,
        users=torch.as_tensor(dataset.users("test")), **model.sequence_tokens,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.2)
    norms = []
    for step, factor in enumerate(FACTORS[schedule]):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * factor
        optimizer.zero_grad()
        terms = objective(model, loader.batch_at(step), stage.masking, stage.seed, step)
        total_loss(terms).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or 1e9).item())
        optimizer.step()
    assert min(norms) > 0.06, "the gradients are clipped in every step"
    trained = trained_weights(tmp_path / "run")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[f"model.{name}"], value, rtol=1e-4, atol=1e-6)
