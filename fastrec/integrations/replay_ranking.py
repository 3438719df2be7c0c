# SPDX-License-Identifier: Apache-2.0
"""Validation, test and prediction of RePlay: the best items, without the scores of all.

Where only callbacks of RePlay read what a step returns, it returns the states of the last places,
and the callbacks find the best items of them. Legend: B sequences, L places, D width, V items, S
seen items of a sequence, k items found.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import lightning
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from replay.nn.lightning import LightningModule
from replay.nn.lightning.callback import ComputeMetricsCallback, TopItemsCallbackBase
from replay.nn.lightning.postprocessor import SeenItemsFilter
from torch import Tensor, nn

from fastrec.data.batch import offsets_of
from fastrec.integrations.patching import Replacement, keep_original, own_method
from fastrec.integrations.replay_encoder import encode, places_of, unserved_tower
from fastrec.integrations.replay_models import (
    MODELS,
    item_vectors,
    number_of_items,
    tower_of,
    unserved_head,
)
from fastrec.nn.plain import is_plain
from fastrec.ops.linear_topk import TopK, linear_topk


class Query(NamedTuple):
    """In place of the scores: states [B, D] of the last places, item vectors [V, D]."""

    states: Tensor
    items: Tensor


def replacements() -> list[Replacement]:
    return [
        Replacement(LightningModule, "validation_step", _step("validation")),
        Replacement(LightningModule, "test_step", _step("test")),
        Replacement(LightningModule, "predict_step", _step("predict")),
        Replacement(ComputeMetricsCallback, "_batch_end", _metrics()),
        Replacement(TopItemsCallbackBase, "on_predict_batch_end", _top_items()),
    ]


def _step(stage: str) -> Callable:
    original = getattr(LightningModule, f"{stage}_step")

    @functools.wraps(original)
    def step(self, batch, batch_idx, dataloader_idx=0):
        why = _unserved(self, batch, stage)
        query = None if why else last_query(self.model, batch)
        if query is None:
            what = f"the {stage} of {type(self.model).__qualname__}"
            keep_original(what, why or "a last place is padding behind an item")
            return original(self, batch, batch_idx, dataloader_idx)
        return query

    return step


def last_query(model, batch: dict) -> Query | None:
    """None where a last place is padding, and items are in front of it."""
    tower = tower_of(model)
    padding_mask = batch["padding_mask"]
    asked = torch.zeros_like(padding_mask)
    asked[:, -1] = True
    places = places_of(padding_mask, asked)
    if places is None:
        return None
    rows = places.batch.offsets[1:] - 1
    return Query(encode(tower, batch["feature_tensors"], places, rows), item_vectors(model))


def _unserved(module: LightningModule, batch: dict, stage: str) -> str | None:
    model = module.model
    if own_method(module, LightningModule, ("forward",)):
        return "its LightningModule has a forward of its own"
    owner = next((kind for kind in MODELS if isinstance(model, kind)), None)
    if owner is None:
        return "it is no SasRec or TwoTower"
    if why := own_method(model, owner, ("forward", "forward_inference")):
        return why
    if not all(is_plain(part, type(part)) for part in (module, model, model.body)):
        return "hooks wait for its calls"
    if getattr(model, "context_merger", None) is not None:
        return "it has a context_merger"
    tower = tower_of(model)
    if why := unserved_head(model.get_logits) or unserved_tower(tower):
        return why
    if torch.is_grad_enabled() or model.training:
        return "gradients or dropout are on"
    if module.candidates_to_score is not None or batch.get("candidates_to_score") is not None:
        return "candidates are given"
    return _unserved_reader(module, batch, stage)


def _unserved_reader(module: LightningModule, batch: dict, stage: str) -> str | None:
    """Who wants more of a step than the best items."""
    trainer, hook = module._trainer, f"on_{stage}_batch_end"
    if trainer is None:
        return "no Trainer runs it"
    if own_method(module, lightning.LightningModule, (hook,)):
        return f"its LightningModule has an {hook}"
    if stage == "predict" and trainer.predict_loop.return_predictions:
        return "its scores are returned: predict(..., return_predictions=False) asks for none"
    for callback in trainer.callbacks:
        kind = type(callback)
        if not own_method(callback, lightning.Callback, (hook,)):
            continue  # it reads nothing
        if isinstance(callback, (ComputeMetricsCallback, TopItemsCallbackBase)):
            if why := _unserved_callback(callback, module.model, batch, hook):
                return why
        # Progress bars and the like read no scores, the functions of a LambdaCallback may.
        elif (
            isinstance(callback, BasePredictionWriter)
            or hook in vars(callback)
            or not kind.__module__.startswith("lightning.")
        ):
            return f"{kind.__name__} may read the scores"
    return None


def _unserved_callback(callback, model, batch: dict, hook: str) -> str | None:
    kind = type(callback)
    owner = TopItemsCallbackBase
    if isinstance(callback, ComputeMetricsCallback):
        owner = ComputeMetricsCallback
    names = {"_batch_end", hook, "_apply_postproccesors", "_prepare_candidates"} & {*dir(owner)}
    if why := own_method(callback, owner, sorted(names)):
        return f"{kind.__name__}: {why}"
    items = number_of_items(model)
    if owner is ComputeMetricsCallback:
        counted = callback._item_count  # candidates, which `_batch_end` hands it, must be below
        if counted is not None and counted < items:
            return f"{kind.__name__} counts {counted} of {items} items"
    for filter in callback._postprocessors:
        if type(filter) is not SeenItemsFilter:
            return f"a postprocessor is a {type(filter).__name__}"
        if filter.item_count != items:
            return f"SeenItemsFilter counts {filter.item_count} of {items} items"
    return None


def best_items(query: Query, k: int, callback, batch: dict) -> TopK | None:
    """The k best items [B, k], without those that the filters of a callback leave out. None where
    there are not that many in a row, or scores are NaN: what the original makes of these is left to
    it. On a GPU this waits for the answer."""
    exclude, items = None, len(query.items)
    if callback._postprocessors:
        columns = [filter.seen_items_column for filter in callback._postprocessors]
        seen = torch.cat([batch[column] for column in columns], 1)
        seen = seen.to(query.states.device, torch.int64).sort(1).values
        listed = (seen >= 0) & (seen < items)  # others are padding
        exclude = seen[listed], offsets_of(listed.sum(1))
    if k > items:
        return None
    best = linear_topk(query.states, query.items, k, exclude=exclude)
    return None if (best.indices < 0).any() else best


def with_scores(query: Query) -> dict[str, Tensor]:
    """What the original step returns, as far as the callbacks read it."""
    return {"logits": nn.functional.linear(query.states, query.items)}


def _metrics() -> Callable:
    original = ComputeMetricsCallback._batch_end

    @functools.wraps(original)
    def _batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx):
        best = None
        if isinstance(outputs, Query):
            k = self._metrics_builders[dataloader_idx].max_k
            best = best_items(outputs, k, self, batch)
            outputs = with_scores(outputs) if best is None else {"logits": best.values}
        if best is not None:  # the original finds the best of the best: candidates of each row
            batch = {**batch, "candidates_to_score": best.indices}
        original(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if best is not None:
            self._set_postprocessor_candidates(None)

    return _batch_end


def _top_items() -> Callable:
    original = TopItemsCallbackBase.on_predict_batch_end

    @functools.wraps(original)
    def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        best = None
        if isinstance(outputs, Query):
            best = best_items(outputs, self._top_k, self, batch)
            outputs = with_scores(outputs) if best is None else outputs
        if best is None:
            return original(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        self._query_batches.append(batch[self.query_column])
        self._item_batches.append(best.indices)
        self._item_scores.append(best.values)

    return on_predict_batch_end
