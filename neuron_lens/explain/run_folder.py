"""A run folder: what was asked, written down, so that every command can be run again alone and on the right thing.

    manifest.json                  a `Manifest`: model, corpus, harvest, explainer, scorers, prompts
    sources/<dictionary>.safetensors   copies of autoencoders and directions, see `kept_sources`
    harvest/<source>/              see `harvest.shard`
    requests.sqlite                answers of judges, see `llm.cache`
    embeddings.sqlite              vectors of embeddings endpoints, see `scorers.embedding_cache`
    units/<unit>/result.json       a `UnitResult`; with pages, index.html beside it
    run.json                       a `RunResult`; with pages, index.html beside it

A folder holds one model on one corpus with one explainer; scorers can be added. What does not fit is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeInt, ValidationError, field_validator

import neuron_lens
from neuron_lens.errors import RequestError
from neuron_lens.explain.explainers import Explainer, JudgeExplainer
from neuron_lens.explain.explainers.base import described, prompt_named
from neuron_lens.explain.recipe import Recipe
from neuron_lens.explain.result import ModelFacts, RunFacts, RunResult, UnitResult, UnitSummary
from neuron_lens.explain.scorers import BaseScorer
from neuron_lens.files.atomic import write_text_atomic
from neuron_lens.llm import Backend
from neuron_lens.records import Record, Unit

if TYPE_CHECKING:
    from neuron_lens.harvest.corpus import Corpus
    from neuron_lens.harvest.sources import UnitSource

__all__ = ["CorpusFacts", "Manifest", "Method", "RunFolder", "SourceFacts"]

_NAME = "manifest.json"


class Method(Record):
    """How something was done: the explainer's or scorer's name and options, who was asked, which prompt."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    judge: str = ""
    prompt: str = ""

    @classmethod
    def of(cls, part: Explainer | BaseScorer, backend: Backend | None) -> Method:
        """Of an explainer or scorer that asks `backend`."""
        prompt, judge = "", ""
        if isinstance(part, JudgeExplainer):
            prompt, judge = prompt_named(part.name).version, described(backend)
        elif isinstance(part, BaseScorer):
            prompt = part.prompt(backend)
            judge = described(backend) if part.asks else ""
        fields = dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
        options = {field.name: _plain(getattr(part, field.name)) for field in fields}
        kept = {name: value for name, value in options.items() if value is not None}
        return cls(name=part.name, options=kept, judge=judge, prompt=prompt)

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.name}({options})" + (f" by {self.judge}" if self.judge else "")


def _plain(value: Any) -> str | int | float | bool | None:
    """An option as JSON holds it; of an object (an embedder, a simulator) its name, None for what has none."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    name = getattr(value, "name", None)
    return name if isinstance(name, str) else None


class CorpusFacts(Record):
    """Which text was read."""

    name: str
    fingerprint: str
    n_documents: NonNegativeInt

    @classmethod
    def of(cls, corpus: Corpus) -> CorpusFacts:
        """Of a corpus."""
        return cls(name=corpus.name, fingerprint=corpus.fingerprint, n_documents=corpus.n_documents)


class SourceFacts(Record):
    """Units of one kind, layer, site and dictionary that were harvested; `indices` None: all of the layer."""

    kind: Literal["neuron", "latent", "head", "direction"]
    layer: NonNegativeInt
    site: str
    dictionary: str = ""
    indices: tuple[NonNegativeInt, ...] | None = None

    @classmethod
    def of(cls, source: UnitSource, units: Sequence[Unit]) -> SourceFacts:
        """Of a source and the units that were asked of it."""
        named = (
            tuple(sorted(unit.index for unit in units)) if source.kind in ("latent", "direction") else None
        )
        return cls(
            kind=source.kind,
            layer=source.layer,
            site=source.site,
            dictionary=source.dictionary,
            indices=named,
        )

    def units(self) -> tuple[Unit, ...]:
        """The units that are named, or the first one."""
        return tuple(
            Unit(kind=self.kind, layer=self.layer, index=index, site=self.site, dictionary=self.dictionary)
            for index in self.indices or (0,)
        )


class Manifest(Record):
    """What a run folder is a run of.

    `harvest` are the settings; `explainer` is None before anything is explained; `scorers` by name; `prompts` maps the
    names of all prompts used to the hashes of their text; `recipe` says how model, corpus, autoencoders and directions
    are had again (see `explain.recipe`), for the commands that are given a run folder only.
    """

    format: Literal["neuron_lens run"] = "neuron_lens run"
    format_version: Literal[1] = 1
    package_version: str = neuron_lens.__version__
    method_version: int
    model: ModelFacts
    corpus: CorpusFacts
    harvest: dict[str, Any]
    sources: tuple[SourceFacts, ...] = ()
    explainer: Method | None = None
    scorers: dict[str, Method] = Field(default_factory=dict)
    prompts: dict[str, str] = Field(default_factory=dict)
    recipe: Recipe | None = None

    @field_validator("recipe", mode="before")
    @classmethod
    def _none_is_written_empty(cls, given: Any) -> Any:
        """Older folders say {} where there is no recipe."""
        return given or None

    def with_prompts(self) -> Manifest:
        """With the hashes of the prompts its methods use."""
        methods = [*([self.explainer] if self.explainer else []), *self.scorers.values()]
        names = sorted({method.prompt.split("@")[0] for method in methods if method.prompt})
        return self.model_copy(update={"prompts": {name: prompt_named(name).hash for name in names}})

    def joined(self, other: Manifest, folder: Path) -> Manifest:
        """This run's manifest with what `other` adds. Raises RequestError where they are runs of different things."""
        for name, mine, theirs in (
            ("version of the method", self.method_version, other.method_version),
            ("model", _shown(self.model), _shown(other.model)),
            ("corpus", _shown(self.corpus), _shown(other.corpus)),
            ("harvest settings", *_differing(self.harvest, other.harvest)),
        ):
            if mine != theirs:
                raise _is_another(folder, name, mine, theirs)
        if self.explainer is not None and other.explainer is not None and self.explainer != other.explainer:
            raise _is_another(folder, "explainer", self.explainer, other.explainer)
        for name, method in other.scorers.items():
            if self.scorers.get(name, method) != method:
                raise _is_another(folder, f"scorer {name}", self.scorers[name], method)
        for one in other.sources:
            self._refuse_namesake(one, folder)
        return self.model_copy(
            update={
                "sources": tuple(dict.fromkeys((*self.sources, *other.sources))),
                "explainer": self.explainer or other.explainer,
                "scorers": self.scorers | other.scorers,
                "prompts": self.prompts | other.prompts,
                "recipe": _joined_recipe(self.recipe, other.recipe),
            }
        )

    def _refuse_namesake(self, new: SourceFacts, folder: Path) -> None:
        """Units are filed under kind, layer and dictionary: those of another site would take their place."""
        for held in self.sources:
            same = (held.kind, held.layer, held.dictionary) == (new.kind, new.layer, new.dictionary)
            if same and held.site != new.site:
                raise _is_another(
                    folder,
                    f"site of the {new.kind} {new.dictionary} in layer {new.layer}",
                    held.site,
                    new.site,
                )


def _joined_recipe(mine: Recipe | None, theirs: Recipe | None) -> Recipe | None:
    """What one run did without, an autoencoder, another may have named."""
    if mine is None or theirs is None:
        return mine or theirs
    return mine.with_sources(theirs.sources)


def _shown(facts: ModelFacts | CorpusFacts) -> str:
    return f"{facts.name} (fingerprint {facts.fingerprint[:12]})"


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    names = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    return {name: mine.get(name) for name in names}, {name: theirs.get(name) for name in names}


def _is_another(folder: Path, what: str, mine: object, theirs: object) -> RequestError:
    return RequestError(
        f"{folder} holds a run with another {what}: it has {mine}, asked for is {theirs}; give another folder"
    )


class RunFolder:
    """The files of a run."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._written: set[tuple[str, int, str, str]] = (
            set()
        )  # kinds of units with new pages since the last index

    @property
    def harvest(self) -> Path:
        """Where harvests lie."""
        return self.path / "harvest"

    @property
    def requests(self) -> Path:
        """The cache of judges' answers."""
        return self.path / "requests.sqlite"

    @property
    def embeddings(self) -> Path:
        """The cache of what embeddings endpoints gave."""
        return self.path / "embeddings.sqlite"

    @property
    def index(self) -> Path:
        """The RunResult."""
        return self.path / "run.json"

    @staticmethod
    def is_one(path: Path | str) -> bool:
        """Whether a path is a folder with a manifest."""
        return (Path(path) / _NAME).is_file()

    def manifest(self) -> Manifest | None:
        """What the folder holds a run of, None where nothing is written down. Raises RequestError for a damaged one."""
        path = self.path / _NAME
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValidationError) as error:
            raise RequestError(
                f"{path} is no manifest of a run that this version reads ({_first_problem(error)}); give another folder"
            ) from None

    def require_manifest(self) -> Manifest:
        """The manifest. Raises RequestError for a folder that is no run."""
        found = self.manifest()
        if found is None:
            what_to_do = "make one with neuron-lens harvest or explain"
            if self.harvest.is_dir():
                what_to_do = "its harvest was stopped: give the same command again, and it goes on"
            raise RequestError(f"{self.path} is no run folder (it has no {_NAME}); {what_to_do}")
        return found

    def check(self, asked: Manifest) -> Manifest:
        """What the manifest becomes when `asked` is done here. Raises RequestError where it does not fit."""
        found = self.manifest()
        return asked if found is None else found.joined(asked, self.path)

    def write_manifest(self, manifest: Manifest) -> None:
        """Write it, unless it says the same already."""
        if self.manifest() != manifest:
            write_text_atomic(self.path / _NAME, manifest.model_dump_json(indent=1) + "\n")

    def read(self, unit: Unit) -> UnitResult | None:
        """The result of a unit, None when there is none."""
        path = self.result_path(unit)
        return UnitResult.read(path) if path.is_file() else None

    def result_path(self, unit: Unit) -> Path:
        """Where a unit's result lies."""
        return self.path / "units" / unit.name / "result.json"

    def write_result(self, result: UnitResult, *, page: bool) -> None:
        """Write a unit's result and, if asked, its page: the page first, as a unit counts as done when its result.json is
        there."""
        if page:
            from neuron_lens.report.pages import write_unit_page

            write_unit_page(result, self.path)
        write_text_atomic(self.result_path(result.unit), result.model_dump_json() + "\n")
        self._written.add(_together(result.unit))

    def write_run(self, run: RunResult, *, page: bool) -> None:
        """Write the index and, if asked, its page and the links between units' pages that could not be there before."""
        write_text_atomic(self.index, run.model_dump_json() + "\n")
        if page and run.units:
            from neuron_lens.report.pages import link_pages, write_index

            near = [one.unit for one in run.units if _together(one.unit) in self._written]
            link_pages((UnitResult.read(self.result_path(unit)) for unit in near), self.path)
            write_index(run, self.path)
        self._written.clear()

    def run(self) -> RunResult:
        """The index of finished units. Raises RequestError when there is none."""
        if not self.index.is_file():
            raise RequestError(
                f"{self.path} holds no explanations yet ({self.index.name} does not exist): run neuron-lens explain into "
                "it; one that was stopped goes on"
            )
        return RunResult.read(self.index)

    def results(self) -> Iterator[UnitResult]:
        """The results of the index, in its order."""
        for summary in self.run().units:
            yield UnitResult.read(self.path / summary.path / "result.json")

    def finished(self, model: ModelFacts, run: RunFacts) -> dict[str, UnitSummary]:
        """Summaries of the units of this very run that are there, by name."""
        summaries: dict[str, UnitSummary] = {}
        if self.index.is_file():
            found = self.run()
            if (found.model, found.run) == (model, run):
                summaries = {
                    one.unit.name: one for one in found.units if self.result_path(one.unit).is_file()
                }
        # A killed run has units that no index lists.
        for path in sorted((self.path / "units").glob("*/result.json")):
            if path.parent.name not in summaries:
                result = UnitResult.read(path)
                if (result.model, result.run) == (model, run):
                    summaries[result.unit.name] = result.summary()
        return summaries


def _first_problem(error: OSError | ValidationError) -> str:
    """The first thing that is wrong, in one line."""
    if isinstance(error, OSError):
        return str(error)
    first = error.errors(include_url=False)[0]
    return ": ".join([*map(str, first["loc"]), first["msg"]])


def _together(unit: Unit) -> tuple[str, int, str, str]:
    """What units have in common that can be similar."""
    return (unit.kind, unit.layer, unit.site, unit.dictionary)
