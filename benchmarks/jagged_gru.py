# SPDX-License-Identifier: Apache-2.0
"""Entries of jagged_gru, the input product included, against `torch.nn.GRU` on packed and on padded
sequences.

Legend: B sequences, T events, N most events of a sequence, D input width, H width of a state; an
element is a gate of an event. Cases: "beauty" has lengths like those of Beauty (3 to N, mean about
9), "full" has B times N. The peers pack or pad inside the measured function and take the events
back, as a jagged model would.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from benchmarks.bench import Entry, both, errors_against
from fastrec.ops.jagged_gru import jagged_gru, jagged_gru_ref


def _entry(b: int, n: int, case: str, d: int = 64, h: int = 64, **options) -> Entry:
    return Entry("jagged_gru", dict(B=b, N=n, D=d, H=h), case=case, **options)


ENTRIES = (
    _entry(256, 50, "beauty", rounds=15),
    _entry(256, 50, "full"),
    _entry(256, 50, "beauty", d=128, h=128),
)
SMOKE = (_entry(5, 9, "beauty", d=8, h=8, rounds=2), _entry(3, 20, "full", d=8, h=8, rounds=2))
QUICK = (_entry(256, 50, "beauty"),)
ELEMENT = "gate"
PASSES = ("forward", "both")
PEERS = {"packed `nn.GRU`": ("packed",), "padded `nn.GRU`": ("padded",)}
GRADIENT_LIMIT = {"float32": 1e-5}


def lengths_of(entry: Entry) -> Tensor:
    b, n = entry.sizes["B"], entry.sizes["N"]
    if entry.case == "full":
        return torch.full((b,), n)
    generator = torch.Generator().manual_seed(0)
    return (3 + torch.empty(b).exponential_(1 / 6.3, generator=generator)).long().clamp_max(n)


def work(entry: Entry) -> dict[str, int]:
    """Products of all events with both weights, and backward twice as many; three exponentials an
    event and feature. Input, states, q, r, z, n and their gradients are read or written once."""
    events, (_, _, d, h) = int(lengths_of(entry).sum()), entry.sizes.values()
    products = 2 * events * 3 * h * (d + h)
    return {
        "elements": events * 3 * h,
        "exps": events * 3 * h,
        "bytes": 4 * events * (3 * d + 13 * h),
        "materialised": 4 * entry.sizes["B"] * entry.sizes["N"] * 5 * h,
        "forward": products,
        "both": 3 * products,
    }


def _gru(x: Tensor, sizes: Tensor | None, parameters: list[Tensor]) -> Tensor:
    """The function behind nn.GRU, which is called without a module."""
    zero = x.new_zeros(1, x.shape[0] if sizes is None else int(sizes[0]), parameters[1].shape[1])
    rest = parameters, True, 1, 0.0, False, False
    if sizes is None:
        return torch._VF.gru(x, zero, *rest, True)[0]  # type: ignore[attr-defined]
    return torch._VF.gru(x, sizes, zero, *rest)[0]  # type: ignore[attr-defined]


def _padded_rows(input: Tensor, offsets: Tensor, slots: Tensor, longest: int) -> Tensor:
    padded = input.new_zeros((len(offsets) - 1) * longest, input.shape[1])
    return padded.index_copy(0, slots, input).unflatten(0, (-1, longest))


def _padded(input: Tensor, offsets: Tensor, slots: Tensor, longest: int, *parameters: Tensor):
    out = _gru(_padded_rows(input, offsets, slots, longest), None, list(parameters))
    return out.flatten(0, 1).index_select(0, slots)


def _packed(input: Tensor, offsets: Tensor, slots: Tensor, longest: int, *parameters: Tensor):
    rows, lengths = _padded_rows(input, offsets, slots, longest), offsets.diff()
    packed = pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
    out = packed._replace(data=_gru(packed.data, packed.batch_sizes, list(parameters)))
    # The events of packed sequences stand step by step, longest sequence first.
    step = torch.arange(longest)[:, None].expand(-1, len(lengths))
    place = torch.where(step < lengths[packed.sorted_indices], step, -1)
    event = (place + offsets[packed.sorted_indices])[place >= 0]
    return torch.zeros_like(out.data).index_copy(0, event, out.data)


def implementations(entry: Entry, compiler: str) -> dict[str, Callable]:
    """Name -> states(input, offsets, slots of the events in the padded batch, N, parameters)."""
    return {
        "fastrec": lambda x, offsets, slots, longest, *own: jagged_gru(x, offsets, *own),
        "packed": _packed,
        "padded": _padded,
        "reference": lambda x, offsets, slots, longest, *own: jagged_gru_ref(x, offsets, *own),
    }


def problem(entry: Entry, device: str = "cpu") -> tuple:
    lengths, (_, _, d, h) = lengths_of(entry), entry.sizes.values()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    longest = int(lengths.max())
    slots = (torch.arange(longest) < lengths[:, None]).flatten().nonzero().squeeze(1).to(device)
    generator = torch.Generator(device).manual_seed(0)

    def random(*size, scale=1.0):
        return (torch.randn(size, generator=generator, device=device) * scale).requires_grad_()

    shapes = ((3 * h, d), (3 * h, h), (3 * h,), (3 * h,))
    parameters = (random(*shape, scale=h**-0.5) for shape in shapes)
    return random(len(slots), d), offsets, slots, longest, *parameters


def errors(
    entry: Entry, inputs: tuple, results: dict[str, tuple[Tensor, ...]]
) -> dict[str, dict[str, float]]:
    """Against float64."""
    x, offsets, _, _, *parameters = inputs
    double = [tensor.detach().double().requires_grad_() for tensor in (x, *parameters)]

    def exact(x, *parameters):
        return jagged_gru_ref(x, offsets, *parameters)

    return errors_against(both(exact, tuple(double)), results)
