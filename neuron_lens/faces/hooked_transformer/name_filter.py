"""Which hook points a filter names: a name, a glob, several, or a predicate. What matches nothing is an error."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from neuron_lens.errors import HookError, did_you_mean

__all__ = ["NamesFilter", "chosen_names", "is_exact"]

NamesFilter = Callable[[str], bool] | Sequence[str] | str | None


def chosen_names(
    names_filter: NamesFilter,
    known: Iterable[str],
    closed: Iterable[str] = (),
    why: dict[str, str] | None = None,
) -> list[str]:
    """The names a filter stands for, in the order they are known.

    Args:
        names_filter: None for all that are open; a name; a glob; a collection of those; a predicate over names.
        known: all names there are.
        closed: names that are costly. A name opens them; a glob or predicate does when it matches nothing else.
        why: reasons for names that others might expect here.

    Raises HookError for a name or glob that matches nothing, or a predicate that is true for no name.
    """
    names, shut = list(known), set(closed)
    if names_filter is None:
        return [name for name in names if name not in shut]
    if isinstance(names_filter, str):
        return _matching(names_filter, names, shut, why or {})
    if callable(names_filter):
        return _by_predicate(names_filter, names, shut)
    if not isinstance(names_filter, Iterable):
        raise HookError(
            f"names_filter must be a name, several names, a predicate or None; got {names_filter!r}"
        )
    wanted: set[str] = set()
    for part in names_filter:
        if not isinstance(part, str):
            raise HookError(
                f"names_filter holds {part!r} ({type(part).__name__}); expected names of hook points"
            )
        wanted.update(_matching(part, names, shut, why or {}))
    return [name for name in names if name in wanted]


def is_exact(name: Any) -> bool:
    """Whether a filter is one plain name, so that the point it names must fire."""
    return isinstance(name, str) and not any(mark in name for mark in "*?[")


def _matching(pattern: str, names: list[str], shut: set[str], why: dict[str, str]) -> list[str]:
    if pattern in names:
        return [pattern]
    found = [name for name in names if fnmatch.fnmatchcase(name, pattern)] if not is_exact(pattern) else []
    if not found:
        reason = f"this model has none: {why[pattern]}" if pattern in why else did_you_mean(pattern, names)
        raise HookError(f"no hook point is named {pattern!r}; {reason}")
    return [name for name in found if name not in shut] or found


def _by_predicate(predicate: Callable[[str], bool], names: list[str], shut: set[str]) -> list[str]:
    found = [name for name in names if predicate(name)]
    if not found:
        raise HookError(
            f"the predicate {getattr(predicate, '__qualname__', predicate)!r} is true for none of the {len(names)} hook points, "
            f"such as {', '.join(map(repr, names[:3]))}"
        )
    return [name for name in found if name not in shut] or found
