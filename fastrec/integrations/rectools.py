# SPDX-License-Identifier: Apache-2.0
"""Transformer models of RecTools: the softmax loss at the targets alone, without scores, and
validation at the last place alone.

The original computes the scores of all items at every place of a session, padding included,
[B, L, V]. The encoder stays the original's. Legend: B sessions, L places, D width, V items with the
extra tokens, N places with a target.
"""

import functools
from collections.abc import Callable

from rectools.models.nn.transformers.lightning import TransformerLightningModule
from rectools.models.nn.transformers.similarity import DistanceSimilarityModule
from rectools.models.nn.transformers.torch_backbone import TransformerTorchBackbone
from rectools.models.rank import Distance
from torch import Tensor

from fastrec.integrations.patching import (
    Replacement,
    check_parity,
    keep_original,
    own_method,
    scored_rows,
)
from fastrec.nn.plain import is_plain
from fastrec.ops.linear_cross_entropy import linear_cross_entropy

# The methods whose work the fused functions do.
METHODS = ("get_batch_logits", "get_loss_calculator", "_calc_softmax_loss")
PADDING = 0


def replacements() -> list[Replacement]:
    return [
        Replacement(TransformerLightningModule, "training_step", _training_step()),
        Replacement(TransformerLightningModule, "validation_step", _validation_step()),
    ]


def _training_step() -> Callable:
    original = TransformerLightningModule.training_step

    @functools.wraps(original)
    def training_step(self, batch, batch_idx):
        if why := _unserved(self):
            keep_original(f"the loss of {type(self).__qualname__}", why)
            return original(self, batch, batch_idx)
        check_parity(
            "rectools",
            self,
            lambda: self.loss_calculator(self.get_batch_logits(batch), batch["y"], batch["yw"]),
            lambda: softmax_loss(self, batch),
        )
        loss = softmax_loss(self, batch)
        self.log(
            self.train_loss_name, loss, on_step=False, on_epoch=True, prog_bar=self.verbose > 0
        )
        return loss

    return training_step


def _validation_step() -> Callable:
    original = TransformerLightningModule.validation_step

    @functools.wraps(original)
    def validation_step(self, batch, batch_idx):
        if why := _unserved(self):
            keep_original(f"the loss of {type(self).__qualname__}", why)
            return original(self, batch, batch_idx)
        items = self.torch_model.item_model.get_all_embeddings()
        last = self.torch_model.encode_sessions(batch, items)[:, -1:]  # [B, 1, D]
        logits = self.torch_model.similarity_module(last, items) / self.logits_t  # for callbacks
        loss = self.loss_calculator(logits, batch["y"], batch["yw"])
        self.log(self.val_loss_name, loss, on_step=False, on_epoch=True, prog_bar=self.verbose > 0)
        return {"loss": loss, "logits": logits.squeeze()}

    return validation_step


def _unserved(module: TransformerLightningModule) -> str | None:
    if module.loss != "softmax":
        return f"loss is {module.loss}, served is softmax"
    if why := own_method(module, TransformerLightningModule, METHODS):
        return why
    softmax = TransformerLightningModule._calc_softmax_loss.__func__
    if getattr(module.loss_calculator, "__func__", None) is not softmax:
        return "its loss_calculator is another than that of softmax"
    backbone = module.torch_model
    if own_method(backbone, TransformerTorchBackbone, ("forward",)):
        return f"its backbone {type(backbone).__name__} has a forward of its own"
    similarity = backbone.similarity_module
    if type(similarity) is not DistanceSimilarityModule:
        return f"its similarity module is {type(similarity).__name__}"
    for part in (backbone, similarity):
        if not is_plain(part, type(part)):
            return f"hooks wait for calls of {type(part).__name__}"
    return None


def softmax_loss(module: TransformerLightningModule, batch: dict[str, Tensor]) -> Tensor:
    """The sum of weight times softmax loss over the targets, divided by how many of these products
    are above 0, as in RecTools. 0 where none is, there NaN."""
    backbone, target = module.torch_model, batch["y"].flatten()
    items = backbone.item_model.get_all_embeddings()  # [V, D]
    states = backbone.encode_sessions(batch, items).flatten(0, 1)  # [B L, D]
    weight = batch["yw"].expand_as(batch["y"]).flatten()
    target, states, weight = scored_rows(target, PADDING, states, weight)
    similarity = backbone.similarity_module
    if similarity.distance == Distance.COSINE:
        states, items = (similarity._get_embeddings_norm(x) for x in (states, items))
    loss = weight * linear_cross_entropy(
        states / module.logits_t, items, target, ignore_index=PADDING, reduction="none"
    )
    return loss.sum() / (loss > 0).sum().clamp_min(1)
