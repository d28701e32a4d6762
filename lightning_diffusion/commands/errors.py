"""Errors of the user as one line that says what was found and what to write instead.

Whose error it is goes by its type, and by where it was raised: a `raise` statement of this package or of Lightning's
checks of its arguments is meant for the user, anything else is a defect and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import inspect
import linecache
import re
from argparse import ArgumentError
from collections.abc import Iterable
from importlib import import_module
from types import TracebackType

from lightning_diffusion.ranks import RankFailure

_CHECKED_BY = ("lightning_diffusion", "lightning.pytorch.trainer.connectors")
_MEANT = (ValueError, TypeError, OSError, ImportError)
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class UnknownOptionError(ValueError):
    """An option that the command does not have; `known` are those that it has."""

    def __init__(self, option: str, known: Iterable[str]) -> None:
        super().__init__(f"unknown option {option}{suggestion(option, known)}")


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or a full stop where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "."


def explain(error: BaseException) -> str | None:
    """One line for the user, or None if the error is not the user's."""
    if (missing := _not_installed(error)) is not None:
        return missing
    if (failure := rank_failure(error)) is not None:
        return str(failure)
    error = origin(error)
    if isinstance(error, ArgumentError):
        return " ".join(filter(None, [error.argument_name, _parsing(error.message)]))
    if isinstance(error, OSError) and (error.filename or error.errno in _FULL_DISK):
        return _one_line(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    if type(error).__name__ == "MisconfigurationException" or _is_meant(error):
        return _one_line(str(error))
    return None


def rank_failure(error: BaseException) -> RankFailure | None:
    """Another rank's failure, where that made this one end."""
    return next((one for one in (error, error.__cause__) if isinstance(one, RankFailure)), None)


def _not_installed(error: BaseException) -> str | None:
    """What jsonargparse tells of a class whose constructor says which package to install."""
    if not _raised_in(error).startswith("jsonargparse"):
        return None
    pattern = r"class_path '[\w.]*?(\w+)':(?:(?!class_path).)*?pip install -U '?([\w-]+)"
    found = re.search(pattern, str(error), re.DOTALL)
    return found and f"{found[1]} needs a package that is not installed: pip install {found[2]}"


def origin(error: BaseException) -> BaseException:
    """What a component raised, from under jsonargparse's account of all types that it tried."""
    while _raised_in(error).startswith("jsonargparse") and error.__cause__ is not None:
        if isinstance(error, ArgumentError):
            break
        error = error.__cause__
    return error


def _is_meant(error: BaseException) -> bool:
    return isinstance(error, _MEANT) and _raised_in(error).startswith(_CHECKED_BY) and _is_raise(error)


def _raised_in(error: BaseException) -> str:
    trace = _innermost(error)
    return str(trace.tb_frame.f_globals.get("__name__", "")) if trace else ""


def _is_raise(error: BaseException) -> bool:
    trace = _innermost(error)
    if trace is None:
        return False
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    return line.lstrip().startswith("raise")


def _innermost(error: BaseException) -> TracebackType | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def _parsing(message: str) -> str:
    """jsonargparse's account of a mistake in one line: the key, then the innermost complaint."""
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    found = next((said for rule in _RULES if (said := rule(key, message))), None)
    return found or _one_line(message)


def _unknown_class(key: str, message: str) -> str | None:
    match = re.search(r"Expected a dot import path string: (\S+)", message)
    return match and f"{key}: there is no class {match[1]}{suggestion(match[1], _class_names())}"


def _absent_file(key: str, message: str) -> str | None:
    match = re.search(r"File does not exist: '(.+)'", message)
    return match and f"--config {match[1]} does not exist"


def _missing_argument(key: str, message: str) -> str | None:
    match = re.search(r"given class_path '([^']+)':\s+the following arguments are required: (.+)", message)
    return match and f"{key}: {match[1].rpartition('.')[2]} needs {match[2]}"


def _unknown_argument(key: str, message: str) -> str | None:
    match = re.search(r"given class_path '([^']+)':\s+Option '([^']+)' is not accepted", message)
    if match is None:
        return None
    name, option = match[1].rpartition(".")[2], match[2]
    return f"{key}: {name} has no argument {option}{suggestion(option, _arguments_of(match[1]))}"


def _wrong_type(key: str, message: str) -> str | None:
    match = re.search(r"Expected an? <class '([^']+)'>\. Got value: (.+)", message)
    return match and f"{key}: expected {match[1]}, found {match[2]!r}"


def _wrong_union(key: str, message: str) -> str | None:
    expected = re.findall(r"^\s*- (Expected .+)", message, re.MULTILINE)
    value = re.search(r"Given value: (.+)", message)
    if not (expected and value):
        return None
    return f"{key}: {'; or '.join(dict.fromkeys(expected))}; found {value[1]!r}"


def _missing(key: str, message: str) -> str | None:
    match = re.search(r"arguments? (?:is|are) required: (.+)", message)
    if match is None:
        return None
    needed = re.sub(r"\b(fit|validate|test|predict)\.", "--", match[1])
    return f"{needed} is needed" + (": give it, or --config FILE that has it" if "model" in needed else "")


_RULES = (
    _absent_file,
    _missing_argument,
    _unknown_argument,
    _unknown_class,
    _wrong_type,
    _wrong_union,
    _missing,
)


def _class_names() -> list[str]:
    modules = ("lightning_diffusion", "lightning_diffusion.callbacks", "lightning_diffusion.datamodules")
    return [name for module in modules for name in import_module(module).__all__]


def _arguments_of(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)


def _one_line(message: str) -> str:
    return re.sub(r"\s+", " ", message).strip()
