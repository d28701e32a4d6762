"""`lightning-diffusion COMMAND ...`: a dispatcher that imports torch only for commands that need it.

Errors of the user end with one line and status 2; all others keep their traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from lightning_diffusion import __version__
from lightning_diffusion.commands import COMMANDS, HELP
from lightning_diffusion.commands.errors import explain, rank_failure, suggestion
from lightning_diffusion.commands.help import PAGES

FAILED = 1
USAGE = 2
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):
            return INTERRUPTED
        raise
    except Exception as error:
        said = explain(error)
        if said is None:
            raise
        return _complain(said, FAILED if rank_failure(error) else USAGE)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0 if arguments else USAGE
    if arguments[0] in ("-V", "--version"):
        print(f"lightning-diffusion {__version__}")
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        return _complain(f"there is no command {command!r}{suggestion(command, COMMANDS)} See --help.")
    if command in PAGES and {"-h", "--help"} & set(rest):
        print(PAGES[command])
        return 0
    return _command(command)(command, rest)


def _command(name: str) -> Callable[[str, list[str]], int]:
    run: Callable[[str, list[str]], int] = import_module(COMMANDS[name]).run
    return run


def _complain(line: str, status: int = USAGE) -> int:
    print(f"lightning-diffusion: {line}", file=sys.stderr)
    return status
