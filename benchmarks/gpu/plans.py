# SPDX-License-Identifier: Apache-2.0
"""What `gpu_evidence` runs, in which order, and how much of the time that is left it may take.

A part is a section, or `section@n`: only its first n cases. Whatever minute a plan is cut in, what
came before is worth more than what comes after.
"""

from benchmarks.gpu.cases import MEASURED
from benchmarks.gpu.tune import TUNED

# Section -> its share of the time that is left when it begins, where sections are named one by one.
SHARES = {
    "probe": 1,
    "attention_backward": 3,
    "budget": 4,
    "masks": 1,
    "test": 8,
    "linear_ce": 8,
    "in_batch": 4,
    "attention": 4,
    "encoder": 2,
    "rank_topk": 3,
    "sampled": 2,
    "step": 6,
    "uprec_step": 5,
    "memory": 2,
    "graphs": 2,
    "compile": 3,
    "sanitize": 3,
    "sasrec": 6,
    "tune_linear_ce": 3,
    "tune_in_batch": 1,
    "tune_attention": 2,
}

# Part -> its share of the time that is left when it begins, beside those of the later parts: about
# its seconds, although they add up to 341 and 491 and a call has 300.
PLANS = {
    # Is it right, and how far are the cases that decide what is worked on?
    "first": {
        "probe": 12,
        "attention_backward": 35,  # the one that public evidence predicts to be wrong
        "budget": 40,
        "masks": 4,
        "graphs@15": 15,
        "linear_ce@3": 40,
        "attention@3": 20,
        "uprec_step@1": 40,
        "in_batch@3": 15,
        "rank_topk@2": 10,
        "linear_ce@5": 20,
        "uprec_step": 25,
        "test": 45,
        "sanitize@1": 20,
    },
    # What failed, is missing or was mended; the rest of the table; what could be faster. Rows of
    # the same code that are good are not measured again.
    "second": {
        "probe": 12,
        "attention_backward": 20,
        "budget": 25,
        "masks": 4,
        "graphs@15": 10,
        "linear_ce@5": 40,
        "attention@3": 15,
        "uprec_step": 40,
        "in_batch@3": 12,
        "rank_topk@2": 8,
        "tune": 45,
        "linear_ce": 20,
        "step": 30,
        "memory": 10,
        "attention": 15,
        "in_batch": 10,
        "rank_topk": 10,
        "sampled": 10,
        "encoder": 10,
        "graphs": 15,
        "compile": 20,
        "test": 30,
        "sanitize": 20,
        "sasrec": 60,
    },
}  # fmt: skip


def _of_floor(name: str, stored: dict) -> float:
    """How near the floor the first case of a section comes, of 1; 0 where it has no time."""
    section = name.removeprefix("tune_")
    rows = stored.get("sections", {}).get(section, {}).get("rows", {})
    for entry in MEASURED[section].entries[:1]:
        found = rows.get(entry.key, {}).get("implementations", {}).get("fastrec", {})
        return found.get("both", {}).get("floor_share", 0.0)
    return 0.0


def parts_of(plan: str, stored: dict) -> dict[str, float]:
    """The parts of a plan; tiles are tried of what is furthest from its floor first."""
    parts: dict[str, float] = {}
    for part, share in PLANS[plan].items():
        if part == "tune":
            order = sorted(TUNED, key=lambda name: _of_floor(name, stored))
            parts |= {name: share / len(TUNED) for name in order}
        else:
            parts[part] = share
    return parts


def section_of(part: str) -> tuple[str, int | None]:
    """(section, number of its first cases that are meant; None for all)."""
    section, _, number = part.partition("@")
    return section, int(number) if number else None
