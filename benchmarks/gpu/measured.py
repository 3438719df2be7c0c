# SPDX-License-Identifier: Apache-2.0
"""What a section that times an op is made of."""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.bench import Entry
from benchmarks.peers import Peers

# (operations, bytes, exponentials) of one pass.
Counts = tuple[float, float, float]


@dataclass(frozen=True)
class Measured:
    """A section.

    entries: shapes for a GPU; the tests run those of the module's SMOKE.
    floor: counts by pass, of the cheapest known way that stores nothing of the size of a product.
    formula: the same in words.
    memory: the big shape whose peak memory the section `memory` takes, fastrec alone.
    designs: other designs of the op itself, not chosen (yet).
    peers: implementations of others that need CUDA. Functions, or reasons for their absence.
    columns: of the summary: names of implementations of which the fastest counts.
    """

    entries: tuple[Entry, ...]
    floor: Callable[[Entry], dict[str, Counts]]
    formula: str
    memory: tuple[Entry, ...] = ()
    designs: Callable[[Entry], Peers] = lambda entry: {}
    peers: Callable[[Entry], Peers] = lambda entry: {}
    columns: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("eager", ("eager",)),
        ("torch.compile", ("torch.compile",)),
    )

    @property
    def ops(self) -> tuple[str, ...]:
        """Names of the modules of `benchmarks/` that the entries are of."""
        return tuple(dict.fromkeys(entry.op for entry in self.entries))


def item_bytes(entry: Entry) -> int:
    return 4 if entry.dtype == "float32" else 2
