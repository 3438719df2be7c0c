# SPDX-License-Identifier: Apache-2.0
"""Counter-based randomness: contract version 2, reference implementation in plain torch.

A draw depends on (seed, step, key, site, layer, head, row, column) and on nothing else, so it is
the same in any batch, on any rank, jagged or padded, on CPU or GPU, and in any recomputation.
Nothing here reads or advances a global generator.

The key of a sequence is int64, view << 32 | sample id: sequences with the same events and different
views are dropout views of one sample, and may stand in one batch. The generator is Philox4x32 with
7 rounds (Salmon et al., SC 2011). Its key and counter words:

    k0 = lo32(seed) ^ (site << 24) ^ (bits << 16)      k1 = hi32(seed)
    c0 = row << 16 | group                             c1 = view << 16 | layer << 8 | head
    c2 = lo32(key), the sample id                      c3 = lo32(step)

`bits` is 8 or 16; one call serves 16 or 8 consecutive columns of a row, `group` being the column
divided by that number. An event with probability p happens where draw < threshold(p, bits).
Sample ids and steps count modulo 2^32, views modulo 2^16.

Version 1 had the view as an argument beside the sample id, whose high half did not count. For ids
below 2^32, and so for all keys of view 0, the bits are those of version 1.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastrec.tensors import INDEX, has_values

# Sites 1-5 are dropout sites of an encoder, 6 and 7 are of items' vectors; 16 and up belong to the
# data path. Numbers are part of the contract: a new site gets a new number, an old one is never
# reused. In their order, to see which are taken.
SITES = {
    "attention": 1,
    "embedding": 2,
    "attention_output": 3,
    "ffn_inner": 4,
    "ffn_output": 5,
    "item_features": 6,
    "item_gate": 7,
    "mask_item": 16,
    "mask_forced": 17,
    "mask_replace": 18,
    "mask_random_item": 19,
    "epoch_order": 20,
    "draw_friend": 21,
    "mask_exact": 22,
    "crop": 23,
    "reorder": 24,
    "reorder_key": 25,
    "one_of": 26,
    "negatives_shared": 28,
    "negatives_own": 29,
    "evaluation_negatives": 30,
    "fill": 40,
    "fill_item": 41,
    "window": 42,
    "same_target": 44,
    "substitute": 45,
    "insert": 46,
    "segment": 47,
    "prefix": 48,
    "basket": 50,
    "basket_user": 51,
    "permute": 52,
    "drop": 55,
    "drop_kept": 56,
    "mask_rating": 60,
    "mask_rating_forced": 61,
    "item_texts": 65,
    "negatives_click": 70,
}

FIRST_OWN_SITE = 128


def site_number(site: str | int) -> int:
    """The number of a site: of `SITES`, or one from 128 to 255, which parts that are not fastrec's
    take for themselves. Raises ValueError for another."""
    if isinstance(site, int):
        if FIRST_OWN_SITE <= site < 256:
            return site
    elif site in SITES:
        return SITES[site]
    raise ValueError(
        f"site must be one of {list(SITES)}, or a number from {FIRST_OWN_SITE} to 255 of one's own,"
        f" got {site!r}"
    )


ROUNDS = 7
_MASK32 = 0xFFFFFFFF


def _mul_hi_lo(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    # The int64 product wraps modulo 2^64, which keeps all 64 bits of the unsigned product; the
    # arithmetic shift smears the sign into the high half, and the mask removes it.
    product = word * multiplier
    return (product >> 32) & _MASK32, product & _MASK32


def _word(value: Tensor | int, device: torch.device | None = None) -> Tensor:
    """A word as a tensor, on `device` if given: there a number is filled in, not copied from the
    host, because a copy waits for the device and cannot be captured in a CUDA graph."""
    if isinstance(value, Tensor):
        return value if device is None else value.to(device, non_blocking=True)
    if device is not None and device.type != "cpu":
        return torch.full((), value, dtype=torch.int64, device=device)
    # Not torch.as_tensor: compiled, with an int that varies, it keeps 32 of 64 bits (torch 2.13).
    return torch.tensor(value, device="cpu")


def philox(key: tuple, counter: tuple) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7. Words are int64 tensors (or ints) holding unsigned 32-bit values, broadcast."""
    # Expanded words must share a device; those without dimensions could stay on the host.
    places = (word.device for word in counter if isinstance(word, Tensor) and not word.is_cpu)
    device = next(places, None)
    return _rounds(key, torch.broadcast_tensors(*(_word(word, device) for word in counter)))


def _rounds(key: tuple, counter: tuple) -> tuple:
    """The rounds on tensors or on arrays, whose int64 wraps alike."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(ROUNDS):
        high0, low0 = _mul_hi_lo(0xD2511F53, c0)
        high1, low1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def threshold(p: float, bits: int = 16, name: str = "probability") -> int:
    """T such that `draw < T` happens with probability T / 2^bits, the nearest to p."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {p}")
    return int(2**bits * p + 0.5)


def check_keys(keys: Tensor | np.ndarray) -> None:
    if keys.dtype not in (torch.int64, np.int64):  # the view is in the upper half
        raise TypeError(f"keys must be int64, got {keys.dtype}")


def check_positions(name: str, index: Tensor | int) -> None:
    """A position of 65,536 would run into the next field of its word. No host sync on a GPU."""
    if not isinstance(index, Tensor):
        low = high = float(index)
    elif not has_values(index) or index.numel() == 0:
        return
    else:
        low, high = (value.item() for value in index.aminmax())
    if low < 0 or high >= 65536:
        raise ValueError(f"{name} must be in [0, 65536), got {low if low < 0 else high:.0f}")


@dataclass(frozen=True)
class Rng:
    """What a draw depends on besides its element: `seed` and `step`.

    A step that is a tensor is read when an op is called. Activation checkpointing calls it again in
    backward: there, pass `rng.pinned(device)`, so that both calls read the same step.

    words: what `pinned` has copied.
    """

    seed: Tensor | int
    step: Tensor | int
    words: Tensor | None = None

    def __post_init__(self):
        for name, word in (("seed", self.seed), ("step", self.step)):
            if isinstance(word, Tensor):
                if word.dtype not in INDEX or word.numel() != 1:
                    raise TypeError(
                        f"{name} as a tensor must be one int64 or int32, got {word.dtype}"
                        f" {list(word.shape)}"
                    )
            elif isinstance(word, (float, str)):
                raise TypeError(f"{name} must be a whole number or a tensor, got {word!r:.60}")
            elif not torch.compiler.is_compiling() and not -(2**63) <= word < 2**63:
                raise ValueError(f"{name} must be in [-2^63, 2^63), got {word}")

    def key(self, device: torch.device) -> Tensor:
        """int64 [2] on `device`, (seed, step) as the kernels read them. A copy: a step counter that
        is advanced in place between forward and backward does not change the mask."""
        if self.words is not None and self.words.device == device:
            return self.words
        if device.type == "cpu" and isinstance(self.seed, int) and isinstance(self.step, int):
            return torch.tensor([self.seed, self.step], device=device)
        words = (_word(word, device).to(torch.int64) for word in (self.seed, self.step))
        return torch.stack([word.reshape(()) for word in words])

    def pinned(self, device: torch.device) -> "Rng":
        """The same with its key copied now, once for all ops of a pass over an encoder: on a GPU
        each copy is up to three launches."""
        return Rng(self.seed, self.step, self.key(device))


def _call(
    rng: Rng,
    keys: Tensor,
    row: Tensor | int,
    group: Tensor | int,
    *,
    site: str | int,
    layer: int = 0,
    head: Tensor | int = 0,
    bits: int = 16,
) -> Tensor:
    """The four words of each call: int64 [..., 4], `keys`, `row`, `group` and `head` broadcast."""
    seed, step = _word(rng.seed), _word(rng.step)
    key, counter = _words(seed, step, keys, row, group, site, layer, head, bits)
    return torch.stack(philox(key, counter), dim=-1)


def _words(seed, step, keys, row, group, site: str | int, layer: int, head, bits: int) -> tuple:
    """Key and counter of the contract, from tensors, arrays or numbers."""
    check_keys(keys)
    if isinstance(row, Tensor):
        row = row.to(torch.int64)  # in 32 bits a row from 32,768 on would run out of its word
    elif isinstance(row, np.ndarray):
        row = row.astype(np.int64, copy=False)
    key = ((seed & _MASK32) ^ (site_number(site) << 24) ^ (bits << 16), (seed >> 32) & _MASK32)
    counter = (
        (row << 16) | group,
        ((keys >> 32 & 0xFFFF) << 16) | (layer << 8) | head,
        keys & _MASK32,
        step & _MASK32,
    )
    return key, counter


def draws(
    rng: Rng,
    keys: Tensor,
    row: Tensor | int,
    col: Tensor,
    *,
    site: str | int,
    layer: int = 0,
    head: int = 0,
    bits: int = 16,
) -> Tensor:
    """Unsigned `bits`-bit draws for the elements (keys, row, col), which broadcast.

    Returns int64. Rows and columns must be below 65,536, `layer` and `head` below 256.
    """
    if bits not in (8, 16):
        raise ValueError(f"bits must be 8 or 16, got {bits}")
    if not (0 <= layer < 256 and 0 <= head < 256):
        raise ValueError(f"out of range: layer {layer}, head {head}")
    check_positions("row", row)
    check_positions("col", col)
    group_shift, lane = (4, col & 15) if bits == 8 else (3, col & 7)
    group, per_word = col >> group_shift, 32 // bits
    which, shift = lane // per_word, bits * (lane % per_word)
    if keys.dim() and col.dim() and all(map(_readable, (rng.seed, rng.step, keys, row, col))):
        # The steps of a view draw little and often: an operation of numpy costs a fifth of torch's.
        seed, step = int(rng.seed), int(rng.step)
        rows = row.numpy() if isinstance(row, Tensor) else row
        words = _rounds(
            *_words(seed, step, keys.numpy(), rows, group.numpy(), site, layer, head, bits)
        )
        word = torch.from_numpy(np.choose(which.numpy(), words))
    else:
        calls = _call(rng, keys, row, group, site=site, layer=layer, head=head, bits=bits)
        word = calls.gather(-1, which.expand(calls.shape[:-1]).unsqueeze(-1)).squeeze(-1)
    return word >> shift & ((1 << bits) - 1)


def wide_draws(rng: Rng, keys: Tensor, col: Tensor, *, site: str | int) -> Tensor:
    """Unsigned 32-bit draws, int64: the 16 bits of row 0 above those of row 1. Sorting by them
    shuffles, and `draw * n >> 32` is a number below n, each to within 2^-32."""
    rows = torch.arange(2, device=keys.device).view(2, *[1] * max(keys.dim(), col.dim()))
    high, low = draws(rng, keys, rows, col, site=site)
    return high << 16 | low


def keep_mask(
    rng: Rng,
    p: float,
    keys: Tensor,
    row: Tensor,
    columns: int,
    *,
    site: str | int,
    layer: int = 0,
    head: Tensor | int = 0,
) -> tuple[Tensor, float]:
    """Dropout mask of whole rows, 8 bits a draw: (bool [..., columns], scale of the kept values).

    `keys`, `row` and `head` broadcast to the leading shape. The probability is quantised to 1/256
    and the scale is exact for the quantised one. p = 1 is rejected.
    """
    drop = threshold(p, 8)
    if drop == 256:
        raise ValueError(f"dropout probability {p} leaves nothing to keep")
    groups = torch.arange((columns + 15) // 16, device=keys.device)
    head = head.unsqueeze(-1) if isinstance(head, Tensor) else head
    words = _call(
        rng, keys.unsqueeze(-1), row.unsqueeze(-1), groups, site=site, layer=layer, head=head,
        bits=8,
    )  # fmt: skip
    # int32 words in memory are the contract's 16 little-endian bytes.
    draws8 = words.to(torch.int32).view(torch.uint8).flatten(-2)[..., :columns]
    return draws8 >= drop, 256 / (256 - drop)


def _readable(value: Tensor | int) -> bool:
    """Whether numpy can read a number or tensor: not on a device, of a trace or of torch.func."""
    if not isinstance(value, Tensor):
        return True
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return has_values(value) and not wrapped(value)


def sort_keys(rng: Rng, keys: Tensor, *, site: str | int) -> Tensor:
    """One 62-bit number per key (int64, not negative): sorting by it shuffles the samples.

    It is made of the first two words of the call for row 0 (bits 16, layer and head 0), each
    without its lowest bit.
    """
    words = _call(rng, keys, 0, 0, site=site)
    return (words[..., 0] >> 1) << 31 | (words[..., 1] >> 1)


def draw_words(rng: Rng, keys: Tensor, row: Tensor, groups: int, *, site: str | int) -> Tensor:
    """The 32-bit words of groups 0, 1, ... (bits 16; layer and head 0): int64 [..., 4 groups].

    `keys` and `row` broadcast to the leading shape. Word i holds the 16-bit draws of columns
    2 i (its low half) and 2 i + 1.
    """
    check_positions("row", row)
    if not 0 < groups <= 65536:
        raise ValueError(f"groups must be in [1, 65536], got {groups}")
    group = torch.arange(groups, device=keys.device)
    return _call(rng, keys.unsqueeze(-1), row.unsqueeze(-1), group, site=site).flatten(-2)
