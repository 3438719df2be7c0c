# SPDX-License-Identifier: Apache-2.0
"""A trained model as a program of torch.export: what asks it for the next item, in one graph.

Legend: B histories, T events, D width.
"""

import math

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config
from torch.nn import functional as F

from fastrec.data.batch import JaggedBatch


class Query(nn.Module):
    """`UserModel.ask` of plain tensors, for people without a vector of their own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        none = torch.full_like(values, math.nan, dtype=torch.float32)
        events = dict.fromkeys(self.model.event_columns, none)
        # Keys are read by dropout alone, and a bound of the lengths is that of all inputs.
        known = values.clamp_min(0)
        batch = JaggedBatch(known, offsets, offsets[1:], self.model.max_positions, events)
        # ONNX counts rows below 0 from the end, and without an item of its own a history is asked
        # at that of another.
        bad = F.pad((values < 0).long().cumsum(0), (1, 0))
        tokens = sum(map(len, self.model.around(ask=True)))
        least = tokens + self.model.config.causal
        wrong = (bad[offsets[1:]] > bad[offsets[:-1]]) | (offsets.diff() < least)
        return torch.where(wrong[:, None], math.nan, self.model.ask(batch))


def export_query(model) -> torch.export.ExportedProgram:
    """The program (values [T], offsets [B + 1]) -> queries [B, D] of a model, for any T and B: what
    `model.ask(model.inputs_of(histories, ask=True))` computes of the values and offsets of that
    batch, and NaN for a history that cannot be asked: one with a value below 0, or without an item
    where the model is causal. It is on the device of the model, whose weights it shares until it is
    saved or compiled.

    `torch.export.save` writes it, `torch.export.load` reads it where `import fastrec` has run, and
    `torch._inductor.aoti_compile_and_package` compiles it. `Recommender` takes all of them.

    The encoder must be one that torch.export can trace, as those of fastrec are.

    Raises ValueError for a model that reads the texts of items: its input is more than values.
    """
    if getattr(model, "texts", None) is not None:
        raise ValueError(
            "a model that reads the texts of items has no program: its input is more than items"
        )
    batch = model.inputs_of([[0, 0], [0], [0, 0, 0]], ask=True).to(model.device)
    any_size = {0: torch.export.Dim.DYNAMIC}
    # Otherwise the program takes no batch of one.
    with torch.no_grad(), _config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        return torch.export.export(
            Query(model),
            (batch.values, batch.offsets),
            dynamic_shapes={"values": any_size, "offsets": any_size},
        )
