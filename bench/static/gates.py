"""What a compiled kernel must look like before it ships. A gate says what is wrong, in a sentence.

The limits on slots are the best that a study of launch shapes reached for the same loops, plus about a
tenth: a change that makes the compiler issue more per score is seen here before any GPU is at hand.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import hopper
from .model import PRODUCTS
from .report import Row
from .targets import TARGETS

# (architecture, kernel, head_dim) -> instructions other than matrix ones per score and thread, main loop.
SLOTS = {
    ("sm_90", "forward", 64): 10.5,
    ("sm_90", "forward", 128): 10.9,
    ("sm_90", "forward", 256): 15.5,
    ("sm_90", "dkdv", 64): 11.5,
    ("sm_90", "dkdv", 128): 12.0,
    ("sm_90", "dq", 64): 9.0,
    ("sm_90", "dq", 128): 9.0,
    ("sm_80", "forward", 64): 9.0,
    ("sm_80", "forward", 128): 16.5,
}
SPILLS_OUTSIDE_LOOPS = 32
# What the limits on slots and on spills outside loops were set with. Under another version these two are
# shown and not judged, since its compiler counts differently; spills inside loops are judged under every one.
TUNED_WITH = "3.6."


def failures(row: Row) -> Iterator[str]:
    """Every gate the row misses."""
    figures, variant, target = row.figures, row.variant, TARGETS[row.architecture]
    if figures is None:
        yield f"does not compile: {row.error}"
        return
    if figures.shared > target.shared_per_cta:
        yield f"{figures.shared} bytes of shared memory, {target.shared_per_cta} are there"
    if row.kernel not in PRODUCTS or variant.dtype == "float32":
        return
    if figures.matrix != (target.matrix_instruction,):
        yield f"matrix instructions {figures.matrix}, must be {target.matrix_instruction} alone"
    if variant.implementation == "gluon":
        yield from hopper.failures(row)
        return
    if variant.options == "all":  # all at once: it has to fit
        return
    watched = row.architecture in ("sm_80", "sm_90") and variant.head_dim in (64, 128)
    if watched and figures.spills_in_loops:
        yield f"{figures.spills_in_loops} spills inside a loop"
    if variant.options != "plain" or not row.triton.startswith(TUNED_WITH):
        return
    if watched and figures.spills > SPILLS_OUTSIDE_LOOPS:
        yield f"{figures.spills} spills, at most {SPILLS_OUTSIDE_LOOPS} outside loops"
    loop = figures.main_loop
    if loop is None or loop.slots is None:
        return
    limit = SLOTS.get((row.architecture, row.kernel, variant.head_dim))
    if limit is not None and loop.slots > limit:
        yield f"{loop.slots:.2f} slots per score, at most {limit}"
    ffma, exp2 = loop.count("ffma"), loop.count("exp2")
    if row.kernel == "forward" and ffma < 0.9 * exp2:
        yield f"{ffma} FFMA for {exp2} exp2: the scale is no longer folded into the exponent"
