# SPDX-License-Identifier: Apache-2.0
"""What `prepare` says when it is done."""

import resource
from dataclasses import dataclass, field
from pathlib import Path

from fastrec.data.event_columns import PLACE
from fastrec.data.prepare.split import report_lines

TIE_RULE = "stable by (timestamp, row of the source)"


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` read, removed and wrote; `str(report)` is meant to be printed."""

    output: Path
    source: str
    before: dict[str, int]
    after: dict[str, int]
    removed: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, float] = field(default_factory=dict)
    num_short_users: int = 0
    tie_rule: str = TIE_RULE
    time: str = PLACE
    inferred: dict[str, str] = field(default_factory=dict)
    preview: list[str] = field(default_factory=list)
    catalogue: str | None = None
    split: dict | None = None
    attributes: dict[str, list[str]] = field(default_factory=dict)
    relations: int = 0
    item_features: dict[str, dict[str, int]] = field(default_factory=dict)
    cold: str | None = None
    seconds: float = 0.0
    peak_memory: int = 0  # bytes

    def __str__(self) -> str:
        lines = [f"{self.source} -> {self.output}"]
        if self.inferred:
            said = ", ".join(f"{name} {value}" for name, value in self.inferred.items())
            lines.append(f"  recognised: {said}")
        lines += [
            f"  {'begins with:' if i == 0 else '':<12} {line}"
            for i, line in enumerate(self.preview)
        ]
        for name, count in self.after.items():
            lines.append(f"  {name:<13}{self.before[name]:>13,} -> {count:>13,}")
        lines += [f"  removed: {count:,} {reason}" for reason, count in self.removed.items()]
        if not self.removed:
            lines.append("  removed: nothing")
        if self.catalogue is not None:
            lines.append(f"  items: {self.catalogue}")
        for name, columns in self.attributes.items():
            if columns:
                lines.append(f"  {name} have {', '.join(columns)}")
        if self.relations:
            lines.append(f"  relations: {self.relations:,}")
        for name, feature in self.item_features.items():
            none = f"; {feature['missing']:,} items have none" if feature["missing"] else ""
            lines.append(f"  item features: {name}, {feature['width']} numbers{none}")
        if self.cold is not None:
            lines.append(f"  cold start: {self.cold}")
        lines.append(
            "  length: min {min:g}, median {median:g}, mean {mean:.1f}, max {max:g}".format(
                **self.lengths
            )
        )
        if self.split is not None:
            lines += [f"  {line}" for line in report_lines(self.split)]
        elif self.num_short_users:
            lines.append(f"  {self.num_short_users:,} users have fewer than 3 events: train only")
        lines.append(f"  order: {self.tie_rule}")
        lines.append(f"  time: {self.time}")
        lines.append(f"  {took(self.before['interactions'], self.seconds, self.peak_memory)}")
        return "\n".join(lines)


def took(events: int, seconds: float, memory: int) -> str:
    """How long it took, in words."""
    return (
        f"took {seconds:.1f} s, {events / max(seconds, 1e-9):,.0f} events/s,"
        f" peak memory {memory / 2**30:.2f} GiB"
    )


def peak_memory() -> int:
    """Bytes that this process had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
