"""Calls that stay a library's and take time there: what runs, why, what to do. Copies, sorts and look-ups are listed by name alone (Report.fallbacks)."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch.fx import Node

from .ir.graph import source_of

GROUPED = ("products of a mixture's experts: how many rows an expert gets is data, and one tileweld::linear has one weight for all rows. "
           "What is around them, the router and the gate between them, runs in kernels")
LOOP = ("nothing for speed alone: in transformers, set_experts_implementation('eager') breaks the graph at every expert, 'batched_mm' copies a weight for every token; "
        "with bfloat16 weights transformers calls torch's grouped_mm instead of this loop over experts")
NOTHING = "nothing: it is torch's one call for all experts"
REASONS = {"transformers::grouped_mm_fallback": (GROUPED, LOOP), "transformers::grouped_mm_fallback_backward": (GROUPED, LOOP), "aten::_grouped_mm": (GROUPED, NOTHING), "aten::_scaled_grouped_mm": (GROUPED, NOTHING)}
KNOWN = ("aten", "prims", "prim", "tileweld", "builtins", "_operator", "higher_order")


@dataclasses.dataclass(frozen=True)
class LibraryCall:
    """A call left to a library: the op, why it is in no kernel, what to do about it, the user's line."""

    op: str
    reason: str
    cure: str
    source: str


def explained(named: Iterable[tuple[str, Node]]) -> list[LibraryCall]:
    """Of (op, node), in order, those of which there is something to say: grouped products, and custom ops of other libraries."""
    found = []
    for op, node in named:
        space, has_namespace, _ = op.partition("::")
        if op in REASONS:
            reason, cure = REASONS[op]
        elif has_namespace and space not in KNOWN:
            reason = f"a custom op of {space}: one call whose inside is not in the graph, so that nothing is known of what it computes"
            cure = f"let the model take a path in plain torch operations where {space} offers one; else nothing, it runs as it did"
        else:
            continue
        found.append(LibraryCall(op, reason, cure, source_of(node)))
    return found
