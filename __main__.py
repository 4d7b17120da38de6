"""The command line. A command is a module with `add_arguments` and `main`, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from . import __version__
from .extras import missing


class Command(NamedTuple):
    """A module, what it is for, and the optional packages that it cannot do without, with their extra."""

    module: str
    about: str
    extra: str = ""
    needs: tuple[str, ...] = ()


COMMANDS = {
    "bench": Command(
        ".bench.command", "how fast attention is here, beside every peer", "bench", ("rich", "matplotlib")
    ),
    "check": Command(".conformance.command", "whether an attention function is right, anybody's"),
    "demo": Command(".interop.demo.command", "a real trained model, stock attention against ours"),
    "explain": Command(".kernels.explain_command", "which implementation would run, and why"),
    "inspect": Command(".bench.static.command", "what the compiler makes of the kernels, without a GPU"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status says whether it succeeded."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="undivided", description="Fused attention you can trust.")
    parser.add_argument("--version", action="version", version=f"undivided {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    run = None
    for name, command in COMMANDS.items():
        flags = commands.add_parser(name, help=command.about)
        if arguments[:1] == [name]:
            complaint = missing(command.extra, *command.needs)
            if complaint:
                print(f"undivided {name}: {complaint}", file=sys.stderr)
                return 2
            module = importlib.import_module(command.module, __package__)
            module.add_arguments(flags)
            run = module.main
    options = parser.parse_args(arguments)
    assert run is not None, "argparse refuses what is no command"
    return int(run(options))


if __name__ == "__main__":
    sys.exit(main())
