"""What does an attention function do? Its conventions in words, found from outside.

A test says that a number is wrong; a probe says why: "bottom-right", "in base 2", "repeated every 64 keys".
Other conventions than ours are described, and judged only where the target's claims promise one.
"""

from __future__ import annotations

import torch

from ..guard import RAISABLE, WrongAnswerError, first_line, guarded, told
from ..target import Target
from ..verdict import HANGS, RAISED, Observation
from . import alibi, dropout, edges, gradients, lse, relative_bias, sinks, softmax, statistics, visibility
from .subject import Probe, Subject

_ROOMS = (visibility, softmax, lse, statistics, edges, gradients, sinks, alibi, relative_bias, dropout)


def probe(target: Target, device: str | torch.device = "cpu") -> list[Observation]:
    """Ask a target everything that its claims allow to be asked. A call that raises is an answer too.

    The last answer is that of a call that hangs, if one does.
    """
    subject = Subject(target, torch.device(device))
    observations: list[Observation] = []
    for asked in (probe for room in _ROOMS for probe in room.probes(subject)):
        observations.append(_observe(asked))
        if observations[-1].found.startswith(HANGS):
            break
    return observations


def _observe(probe: Probe) -> Observation:
    try:
        with guarded():
            found = probe.look()
    except WrongAnswerError as error:
        found = first_line(error)
    except RAISABLE as error:
        found = f"{RAISED}{told(error)}"[:200]
    ok = None if probe.promised is None else found == probe.promised
    return Observation(probe.question, found, probe.promised, ok)
