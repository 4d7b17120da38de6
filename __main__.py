"""The command line. A command is a module with `add_arguments` and `main`, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from . import __version__

COMMANDS = {
    "bench": (".bench.command", "how fast attention is here, beside every peer"),
    "check": (".conformance.command", "whether an attention function is right, anybody's"),
    "demo": (".interop.demo.command", "a real trained model, stock attention against ours"),
    "explain": (".kernels.explain_command", "which implementation would run, and why"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status says whether it succeeded."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="undivided", description="Fused attention you can trust.")
    parser.add_argument("--version", action="version", version=f"undivided {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = None
    for name, (module, help_text) in COMMANDS.items():
        command = commands.add_parser(name, help=help_text)
        if arguments[:1] == [name]:
            asked = importlib.import_module(module, __package__)
            asked.add_arguments(command)
            run = asked.main
    options = parser.parse_args(arguments)
    assert run is not None, "argparse refuses what is no command"
    return int(run(options))


if __name__ == "__main__":
    sys.exit(main())
