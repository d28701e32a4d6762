"""Another class, on the command line or in a later file, starts from its own defaults.

jsonargparse keeps the init_args of the class before wherever the new one has arguments of the same names, defaults
included: `--model.objective DDPM` after a file with EDM would train DDPM with EDM's density and weighting.
"""

from __future__ import annotations

from typing import Any

import jsonargparse._typehints as typehints
from jsonargparse import Namespace
from jsonargparse._util import import_object


def forget_arguments_where_classes_change() -> None:
    """Make jsonargparse drop the init_args of a class that another one replaces."""
    typehints.discard_init_args_on_class_path_change = _forget


def _forget(parser_or_action: Any, before: Any, after: Any) -> None:
    if before and "init_args" in before and not _same(before["class_path"], after["class_path"]):
        for name in list(vars(before["init_args"])):
            before["init_args"].pop(name)
        after["init_args"] = after.get("init_args") or Namespace()  # type: ignore[no-untyped-call]


def _same(path: str, other: str) -> bool:
    return path == other or ("." in path and "." in other and import_object(path) is import_object(other))
