"""What an area file is made of. Standard library only, so that every environment can read it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Case", "Peer", "area_names", "open_area"]


@dataclass(frozen=True)
class Case:
    """One shape to measure.

    Attributes:
        name: what it is called in the results.
        sizes: whatever the area's peers need to know.
        tolerance: largest difference between outputs, in standard deviations of ours; 0 for equality.
        peers: names of those measured on it, ours first; empty for all of the area.
    """

    name: str
    sizes: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 0.0
    peers: tuple[str, ...] = ()

    def measured(self, peers: Sequence[Peer]) -> list[Peer]:
        """Those of the area's peers that are measured on it. Raises KeyError for a name that is none of theirs."""
        by_name = {peer.name: peer for peer in peers}
        return [by_name[name] for name in self.peers] or list(peers)


@dataclass(frozen=True)
class Peer:
    """One that is measured.

    Attributes:
        name: what it is called in the results.
        build: `build(case, folder)` gets everything ready and returns what is measured, a function without arguments;
            the tensor or tensors (list, dict) it returns are compared with those of the first peer.
        environment: a name of scripts/peer_env; None for our own environment.
        process: peers of the same process name are measured in one process; None for one of its own.
        checked: whether its output is compared.
    """

    name: str
    build: Callable[[Case, Path], Callable[[], Any]]
    environment: str | None = None
    process: str | None = None
    checked: bool = True

    @property
    def process_name(self) -> str:
        """The process it is measured in."""
        return self.process or self.name


def area_names() -> list[str]:
    """The areas there are: files of `areas/`."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "areas")]))


def open_area(name: str) -> ModuleType:
    """The module of an area. Raises SystemExit when there is none of that name."""
    if name not in area_names():
        raise SystemExit(f"no area is called {name!r}; known: {', '.join(area_names())}")
    return importlib.import_module(f"benchmarks.areas.{name}")
