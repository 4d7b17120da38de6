"""Is an attention function right? Ours or anybody's: `check` says so, `undivided check` in a terminal.

Nothing here knows how an implementation works. `oracle` says what the answer is and how well
conditioned each of its elements is, `budget` how far from it a correct implementation may land. A
`target` is what is checked, `adapters` finds one by name, `cases` are what to ask, option by option,
`combinations` every pair of them, `distributions` with which numbers; `questions` puts cases to the checks
of `safety`, with the traps of `memory`, and `probes` says in words what a function does. `check` asks it
all, `shrink` makes what fails small, `report` shows it.
"""

from .check import check
from .report import Report
from .target import Capabilities, Target, target

__all__ = ["Capabilities", "Report", "Target", "check", "target"]
