"""Options of a command: unknown ones are named with the nearest known one, abbreviations are refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from lightning_diffusion.commands.errors import UnknownOptionError, suggestion

Action = Callable[[list[str]], None]


class Parser(argparse.ArgumentParser):
    """Raises its errors instead of exiting.

    Args:
        command: the words after `lightning-diffusion`.
        description, examples: what the help says before and after the options.
    """

    def __init__(self, command: str, description: str, examples: str = "") -> None:
        super().__init__(
            f"lightning-diffusion {command}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            exit_on_error=False,
        )

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)

    def parse(self, arguments: list[str]) -> Any:
        """The values of all options."""
        for option in (argument.partition("=")[0] for argument in arguments if argument.startswith("--")):
            if option not in self._option_string_actions:
                raise UnknownOptionError(option, self._option_string_actions)
        return self.parse_args(arguments)


def refuse_missing(option: str, place: str) -> None:
    """Raise a FileNotFoundError, in one line, if a run folder or checkpoint is not there."""
    if not Path(place).exists():
        raise FileNotFoundError(f"{option} {place} does not exist: give a run folder or a checkpoint")


def run_action(command: str, arguments: list[str], actions: Mapping[str, Action], help_page: str) -> int:
    """Do what the first word says; without one, or with --help, print the page."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_page)
        return 0
    action, *rest = arguments
    if action not in actions:
        raise ValueError(
            f"there is no `{command} {action}`{suggestion(action, actions)} See {command} --help"
        )
    actions[action](rest)
    return 0
