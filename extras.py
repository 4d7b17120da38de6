"""Optional packages: what a command says where one that it needs is missing."""

from __future__ import annotations

import importlib.util


def missing(extra: str, *modules: str) -> str | None:
    """One line: which of the modules are not installed, and the extra that has them; None if all are."""
    absent = [name.replace("_", "-") for name in modules if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return f"not installed: {', '.join(absent)}; get it with: pip install 'undivided[{extra}]'"
