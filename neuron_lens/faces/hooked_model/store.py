"""A store of runs: `base_dir/experiment/model/time/`, with a query over what they were."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, overload

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.faces.hooked_model.cache import ActivationCache
from neuron_lens.faces.hooked_model.stored import METADATA, CacheWriter, StoredCache, jsonable
from neuron_lens.files.atomic import write_json_atomic

__all__ = ["ActivationLoader", "ActivationSaver", "QueryResult"]

ENVIRONMENT = "ACTIVATION_BASE_DIR"


def _from_environment() -> str:
    folder = os.environ.get(ENVIRONMENT)
    if not folder:
        raise RequestError(
            f"the environment variable {ENVIRONMENT} names no folder; set it, or give base_dir"
        )
    return folder


class ActivationSaver:
    """Saves caches, each in a folder of its own that appears whole and is never overwritten.

    Args:
        base_dir: the store. experiment_name: the folder in it that runs belong to.
    """

    def __init__(self, base_dir: str | os.PathLike[str], experiment_name: str = "default") -> None:
        if not experiment_name or "/" in experiment_name or experiment_name.startswith("."):
            raise RequestError(f"experiment_name must be a plain folder name; got {experiment_name!r}")
        self.base_dir, self.experiment_name = Path(base_dir), experiment_name

    @classmethod
    def from_env(cls, experiment_name: str = "default") -> ActivationSaver:
        """A saver into the folder that the environment variable ACTIVATION_BASE_DIR names."""
        return cls(_from_environment(), experiment_name)

    def new_folder(self, model_name: str) -> Path:
        """A folder of a new run that does not exist yet, named by the time, to the microsecond."""
        parent = self.base_dir / self.experiment_name / model_name.replace("/", "_")
        while True:
            folder = parent / datetime.now().strftime("%Y-%m-%d_%H_%M_%S_%f")
            if not folder.exists():
                return folder

    def save(
        self,
        activations: ActivationCache,
        model: Any,
        target_token_positions: Sequence[Any] | None = None,
        interventions: Any = None,
        extraction_config: Any = None,
        other_metadata: Mapping[str, Any] | None = None,
        tag: str | None = None,
    ) -> Path:
        """Save a cache and return its folder. model: its name, or the HookedModel.

        Raises RequestError, with nothing written, for metadata that is no JSON, and for values that cannot be stored.
        """
        name = model if isinstance(model, str) else model.config.model_name
        known = {
            "target_token_positions": target_token_positions,
            "interventions": interventions,
            "extraction_config": extraction_config,
        }
        metadata = self.metadata(name, tag, {**known, **dict(other_metadata or {})})
        with CacheWriter(self.new_folder(name), metadata) as writer:
            writer.add(activations)
        return writer.folder

    def save_cache(
        self, cache: ActivationCache, other_metadata: Mapping[str, Any] | None = None, tag: str | None = None
    ) -> Path:
        """Save a cache of `extract_cache`, whose metadata says what it is. Raises RequestError when it has none."""
        described = dict(cache.get("metadata", {}))
        if "model_name" not in described:
            raise RequestError("the cache has no metadata that names its model; use save(cache, model, …)")
        described = {**described, **dict(other_metadata or {})}
        name = described.pop("model_name")
        return self.save(cache, name, other_metadata=described, tag=tag)

    def metadata(self, model_name: str, tag: str | None, more: Mapping[str, Any]) -> dict[str, Any]:
        """What is written of a run."""
        return {
            **more,
            "model_name": model_name,
            "tag": tag,
            "experiment_name": self.experiment_name,
            "save_time": datetime.now().isoformat(timespec="microseconds"),
        }

    def rename_experiment(self, new: str) -> None:
        """Rename the experiment's folder. Raises RequestError when there is none, or the new one exists."""
        renamed = ActivationSaver(self.base_dir, new)
        source, target = self.base_dir / self.experiment_name, self.base_dir / new
        if not source.is_dir() or target.exists():
            raise RequestError(
                f"cannot rename {source} to {target}: the first must exist, the second must not"
            )
        os.rename(source, target)
        self.experiment_name = renamed.experiment_name


class ActivationLoader:
    """Finds and loads what an `ActivationSaver` saved. experiment_name: None searches all experiments."""

    def __init__(self, base_dir: str | os.PathLike[str], experiment_name: str | None = "default") -> None:
        self.base_dir, self.experiment_name = Path(base_dir), experiment_name

    @classmethod
    def from_env(cls, experiment_name: str | None = "default") -> ActivationLoader:
        """A loader from the folder that the environment variable ACTIVATION_BASE_DIR names."""
        return cls(_from_environment(), experiment_name)

    @classmethod
    def from_saver(cls, saver: ActivationSaver) -> ActivationLoader:
        """A loader of what a saver saves."""
        return cls(saver.base_dir, saver.experiment_name)

    def query(
        self,
        *,
        tag: str | None = None,
        model_name: str | None = None,
        target_token_positions: Sequence[Any] | None = None,
        extraction_config: Any = None,
        interventions: Any = None,
        save_time: str | None = None,
        experiment_name: str | None = None,
        custom_keys: Mapping[str, Any] | None = None,
        where: Callable[[Mapping[str, Any]], bool] | None = None,
        **custom: Any,
    ) -> QueryResult:
        """The runs that match everything given, the oldest first.

        Args:
            save_time: a prefix of the time, "2026-11-21". experiment_name: in place of the loader's own. where: any test of the
                metadata. custom, custom_keys: further entries of the metadata and their values.

        Raises:
            RequestError: a run's metadata cannot be read.
        """
        wanted = {
            "tag": tag,
            "model_name": model_name,
            "target_token_positions": target_token_positions,
            "extraction_config": extraction_config,
            "interventions": interventions,
            **dict(custom_keys or {}),
            **custom,
        }
        given = {
            key: json.loads(json.dumps(jsonable(value))) for key, value in wanted.items() if value is not None
        }
        found = []
        for run in self._runs(experiment_name or self.experiment_name):
            told = run.metadata
            fits = all(key in told and told[key] == value for key, value in given.items())
            if (
                fits
                and told.get("save_time", "").startswith(save_time or "")
                and (where is None or where(told))
            ):
                found.append(run)
        return QueryResult(sorted(found, key=lambda run: str(run.metadata.get("save_time", ""))))

    def _runs(self, experiment: str | None) -> Iterator[StoredCache]:
        # temporary folders of writers begin with a dot
        for path in self.base_dir.glob(f"{experiment or '[!.]*'}/[!.]*/[!.]*/{METADATA}"):
            yield StoredCache(path.parent)


class QueryResult(Sequence[StoredCache]):
    """Runs that a query found: indexable, sliceable, loadable."""

    def __init__(self, runs: Sequence[StoredCache]) -> None:
        self._runs = list(runs)

    @overload
    def __getitem__(self, index: int) -> StoredCache: ...

    @overload
    def __getitem__(self, index: slice) -> QueryResult: ...

    def __getitem__(self, index: int | slice) -> StoredCache | QueryResult:
        if isinstance(index, slice):
            return QueryResult(self._runs[index])
        if not -len(self._runs) <= index < len(self._runs):
            raise IndexError(f"the query found {len(self._runs)} runs; there is no run {index}")
        return self._runs[index]

    def __len__(self) -> int:
        return len(self._runs)

    def get_paths(self) -> list[Path]:
        """The runs' folders."""
        return [run.folder for run in self._runs]

    def load(self, which: int | str = -1) -> tuple[ActivationCache, dict[str, Any]]:
        """One run's cache and metadata: by index (-1 is the newest), or by the name of its folder.

        Raises RequestError when the query found no such run.
        """
        if not self._runs:
            raise RequestError(
                "the query found no run: there is nothing to load; ask for less, or look at query()"
            )
        if isinstance(which, int):
            run = self[which]
        else:
            named = {run.folder.name: run for run in self._runs}
            if which not in named:
                raise RequestError(
                    f"the query found no run {which!r}; {did_you_mean(which, named or ['none'])}"
                )
            run = named[which]
        return run.load(), dict(run.metadata)

    def update_run_experiment(self, new: str) -> None:
        """Move the runs to another experiment of the same store.

        Raises RequestError, with nothing moved, when one of them would stand in the place of another.
        """
        targets = []
        for run in self._runs:
            time, model = run.folder, run.folder.parent
            targets.append(ActivationSaver(model.parents[1], new).base_dir / new / model.name / time.name)
            if targets[-1].exists():
                raise RequestError(f"{targets[-1]} exists already, and runs are never overwritten")
        for run, target in zip(self._runs, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(run.folder, target)
            write_json_atomic(target / METADATA, {**run.metadata, "experiment_name": new})
        self._runs = [StoredCache(target) for target in targets]

    def remove(self) -> None:
        """Delete the runs' folders."""
        for run in self._runs:
            shutil.rmtree(run.folder)
        self._runs = []

    def __repr__(self) -> str:
        return f"QueryResult of {len(self)} runs: {', '.join(run.folder.name for run in self._runs[:4])}"
