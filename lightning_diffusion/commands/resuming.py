"""The configuration of an earlier run under a command line that wins over it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lightning_diffusion.io import run_folder_of


def value_of(arguments: list[str], option: str) -> str | None:
    """The value of `--option VALUE` or `--option=VALUE`, None if it is not there."""
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument == option:
            return following or None
        if argument.startswith(f"{option}="):
            return argument.removeprefix(f"{option}=")
    return None


def with_configuration_of(place: str | None, arguments: list[str]) -> list[str]:
    """Put the configuration of the run that `place` belongs to, if there is one, before the arguments."""
    folder = run_folder_of(place) if place else None
    return arguments if folder is None else ["--config", str(folder / "config.yaml"), *arguments]


def changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """`key: old -> new` for every key that differs."""
    old, new = dict(_flat(before)), dict(_flat(now))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key, _ABSENT) != new.get(key, _ABSENT):
            yield f"{key}: {_said(old, key)} -> {_said(new, key)}"


_ABSENT = object()


def _said(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "(absent)"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else name)
    else:
        yield key, value
