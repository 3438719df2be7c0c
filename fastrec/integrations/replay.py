# SPDX-License-Identifier: Apache-2.0
"""SasRec and TwoTower of RePlay: sequences without padding, losses and rankings without scores.

The parameters stay in RePlay's modules; what is computed with them is not. Legend: B sequences of
padded length L, P targets of a place, D width, V items, K negatives, N places with a target.
"""

import functools
from collections.abc import Callable

from replay.nn import loss
from replay.nn.sequential import SasRec, TwoTower
from torch import Tensor, nn

from fastrec.integrations import replay_ranking
from fastrec.integrations.patching import Replacement, check_parity, keep_original
from fastrec.integrations.replay_encoder import encode, places_of, unserved_tower
from fastrec.integrations.replay_models import (
    as_in_training,
    item_embedding,
    item_vectors,
    number_of_items,
    tower_of,
    unserved_head,
)
from fastrec.nn.plain import is_plain
from fastrec.ops.linear_cross_entropy import linear_cross_entropy
from fastrec.ops.sampled_linear_cross_entropy import sampled_linear_cross_entropy

# RePlay's own losses read the states at targets alone.
LOSSES = {kind for kind in vars(loss).values() if isinstance(kind, type)}


def replacements() -> list[Replacement]:
    return [
        Replacement(SasRec, "forward_train", _forward_train(SasRec)),
        Replacement(TwoTower, "forward_train", _forward_train(TwoTower)),
        Replacement(loss.CE, "forward", _loss(loss.CE, _unserved_ce, ce)),
        Replacement(loss.LogOutCE, "forward", _loss(loss.LogOutCE, _unserved_logout, logout_ce)),
        Replacement(
            loss.CESampled, "forward", _loss(loss.CESampled, _unserved_sampled, sampled_ce)
        ),
        *replay_ranking.replacements(),
    ]


def _forward_train(owner: type) -> Callable:
    original = owner.forward_train  # type: ignore[attr-defined]

    @functools.wraps(original)
    def forward_train(
        self, feature_tensors, padding_mask, positive_labels, negative_labels, target_padding_mask
    ):
        labels = positive_labels, negative_labels

        def plain(targets):
            return original(self, feature_tensors, padding_mask, *labels, targets)

        def fused(targets):
            states, why = _states(self, feature_tensors, padding_mask, targets)
            if states is None:
                keep_original(f"the encoder of {type(self).__qualname__}", why)
                return plain(targets)
            found = self.loss(
                model_embeddings=states,
                feature_tensors=feature_tensors,
                positive_labels=positive_labels,
                negative_labels=negative_labels,
                padding_mask=padding_mask,
                target_padding_mask=targets,
            )
            return {"loss": found, "hidden_states": (states,)}

        def without_dropout(loss_of):
            # A copy: BCE changes the shape of the mask that it gets.
            with as_in_training(self):
                return loss_of(target_padding_mask.clone())["loss"]

        check_parity("replay", self, lambda: without_dropout(plain), lambda: without_dropout(fused))
        return fused(target_padding_mask)

    return forward_train


def _states(model, features, padding_mask, targets) -> tuple[Tensor | None, str]:
    """[B, L, D], 0 where there is neither an item nor a target, or None and why not."""
    tower = tower_of(model)
    if why := unserved_tower(tower):
        return None, why
    if getattr(model, "context_merger", None) is not None:
        return None, "it has a context_merger"
    if type(model.loss) not in LOSSES or not is_plain(model.loss, type(model.loss)):
        return None, f"its loss, {type(model.loss).__name__}, may read any place"
    places = places_of(padding_mask, targets.any(2))
    if places is None:
        return None, "a batch has targets at padding behind an item"
    out = encode(tower, features, places)
    states = out.new_zeros(padding_mask.numel(), out.shape[1]).index_copy(0, places.flat, out)
    return states.unflatten(0, padding_mask.shape), ""


def _loss(owner: type[nn.Module], unserved: Callable, fused: Callable) -> Callable:
    original = owner.forward

    @functools.wraps(original)
    def forward(
        self,
        model_embeddings,
        feature_tensors,
        positive_labels,
        negative_labels,
        padding_mask,
        target_padding_mask,
    ):
        asked = model_embeddings, positive_labels, negative_labels, target_padding_mask
        if why := unserved(self, *asked):
            keep_original(f"the loss {type(self).__qualname__}", why)
            return original(
                self,
                model_embeddings,
                feature_tensors,
                positive_labels,
                negative_labels,
                padding_mask,
                target_padding_mask,
            )
        return fused(self, *asked)

    return forward


def _unserved_labels(self, states: Tensor, positives: Tensor, targets: Tensor) -> str | None:
    if not is_plain(self._loss, nn.CrossEntropyLoss):
        return "its _loss is no plain CrossEntropyLoss"
    if positives.shape[-1] != 1:
        return f"a place has {positives.shape[-1]} targets"
    if positives.shape != targets.shape or positives.shape[:2] != states.shape[:2]:
        return "its labels, masks and states are of different places"
    return unserved_head(self.logits_callback)


def _unserved_ce(self, states, positives, negatives, targets) -> str | None:
    return _unserved_labels(self, states, positives, targets)


def ce(self, states, positives, negatives, targets) -> Tensor:
    """The softmax loss over all items of the targets, in the reduction of `self._loss`."""
    settings = self._loss
    labels = positives.masked_fill(~targets, settings.ignore_index).flatten()
    return linear_cross_entropy(
        states.flatten(0, 1),
        item_vectors(self.logits_callback.__self__),
        labels,
        weight=settings.weight,
        reduction=settings.reduction,
        ignore_index=settings.ignore_index,
        label_smoothing=settings.label_smoothing,
    )


def _unserved_logout(self, states, positives, negatives, targets) -> str | None:
    if why := _unserved_labels(self, states, positives, targets) or _unserved_settings(self):
        return why
    items = number_of_items(self.logits_callback.__self__)
    if self.cardinality != items:
        return f"its cardinality is {self.cardinality}, its model has {items} items"
    if 0 <= self.negative_labels_ignore_index < items:
        return f"its negative_labels_ignore_index, {self.negative_labels_ignore_index}, is an item"
    return None


def _unserved_settings(self) -> str | None:
    settings = self._loss
    if settings.weight is not None or settings.label_smoothing or settings.ignore_index == 0:
        return "its _loss has a weight, label_smoothing or ignore_index 0"
    return None


def logout_ce(self, states, positives, negatives, targets) -> Tensor:
    """With one target of a place the negatives are all other items: the softmax loss."""
    rows, labels = _targets(positives, targets)
    items = item_vectors(self.logits_callback.__self__)
    asked = states.flatten(0, 1).index_select(0, rows)
    return linear_cross_entropy(asked, items, labels, reduction=self._loss.reduction)


def _targets(positives: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Places int64 [N] in [B L] and their targets [N]. On a GPU this waits for N."""
    rows = targets.flatten().nonzero().squeeze(1)
    return rows, positives.flatten().index_select(0, rows)


def _unserved_sampled(self, states, positives, negatives, targets) -> str | None:
    if why := _unserved_labels(self, states, positives, targets) or _unserved_settings(self):
        return why
    model = self.logits_callback.__self__
    table = item_embedding(model) if isinstance(model, SasRec) else None
    if table is None:
        return f"the items of {type(model).__name__} are no embedding"
    left_out = (negatives == self.negative_labels_ignore_index).any()
    if table.padding_idx is not None:  # nn.Embedding gives its row no gradient
        left_out |= (negatives == table.padding_idx).any()
        left_out |= (targets & (positives == table.padding_idx)).any()
    if left_out:  # on a GPU this waits, once
        return "some negatives are ignored, or some items are padding"
    return None


def sampled_ce(self, states, positives, negatives, targets) -> Tensor:
    """The softmax loss over the target and the negatives: [K] of all, [B, K], or [B, L, K]."""
    rows, labels = _targets(positives, targets)
    if negatives.dim() == 3:
        negatives = negatives.flatten(0, 1).index_select(0, rows)
    elif negatives.dim() == 2:
        negatives = negatives.index_select(0, rows // targets.shape[1])
    return sampled_linear_cross_entropy(
        states.flatten(0, 1).index_select(0, rows),
        item_embedding(self.logits_callback.__self__).weight,  # type: ignore[union-attr]
        labels,
        negatives,
        reduction=self._loss.reduction,
    )
