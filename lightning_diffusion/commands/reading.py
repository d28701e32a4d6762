"""A configuration of fit, read and its model and data made, but no Trainer and no folder."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_diffusion.commands.classes import forget_arguments_where_classes_change
from lightning_diffusion.commands.errors import UnknownOptionError
from lightning_diffusion.commands.quiet import quiet
from lightning_diffusion.commands.train import Parser, import_all_components
from lightning_diffusion.module import DiffusionModule


class ReadingCLI(LightningCLI):
    """`model`, `datamodule`, and `config_init["trainer"]`, the arguments of the Trainer."""

    def __init__(self, arguments: list[str], own_options: Sequence[str]) -> None:
        self.own_options = own_options
        super().__init__(
            DiffusionModule,
            LightningDataModule,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"exit_on_error": False},
            auto_configure_optimizers=False,
            run=False,
            args=arguments,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        try:
            self.config = parser.parse_args(args)
        except argparse.ArgumentError as error:
            unknown = re.search(r"unrecognized arguments: ([^\s=]+)", error.message)
            if unknown:
                known = [*self.own_options, *parser._option_string_actions]
                raise UnknownOptionError(unknown[1], known) from error
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """None."""


def read_configuration(arguments: Sequence[str], own_options: Sequence[str] = ()) -> ReadingCLI:
    """Read `--config FILE` and options over it.

    Args:
        arguments: as for fit.
        own_options: those of the command itself, suggested for unknown ones.
    """
    quiet()
    import_all_components()
    forget_arguments_where_classes_change()
    return ReadingCLI(list(arguments), own_options)
