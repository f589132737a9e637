"""What is concluded about a unit: explanation, scores, controls, causal effect; the content of result.json.

A score that could not be computed is `None`, never zero, and its coverage says how much of the planned
evidence was there. Everything is deterministic given model, corpus, settings and seed: no dates, no
durations.

A run folder holds `run.json` (a `RunResult`) and, for every unit, `units/<unit.name>/result.json`
(a `UnitResult`); see `run_folder`. Fields that were added later have defaults, so that older files can be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import Field, NonNegativeInt, ValidationError

from neuron_lens.errors import RequestError
from neuron_lens.explain.scorer_result import Headline, QuantileScore, Score, ScorerControl, ScorerResult
from neuron_lens.records import QuantileStratum, Record, TokenWindow, Unit, UnitStatistics

if TYPE_CHECKING:
    import pandas

__all__ = [
    "SCHEMA_VERSION",
    "AblationEffect",
    "Baseline",
    "CandidateScore",
    "CausalEffect",
    "Control",
    "Explanation",
    "Headline",
    "ModelFacts",
    "Predicate",
    "QuantileScore",
    "RunFacts",
    "RunResult",
    "Score",
    "ScoredWindow",
    "ScorerControl",
    "ScorerResult",
    "SimilarUnit",
    "SplitCounts",
    "Table",
    "TableEntry",
    "TokenValue",
    "UnitResult",
    "UnitSummary",
]

SCHEMA_VERSION = 1

Stratum = Literal["top", "quantile", "random"]


class TableEntry(Record):
    """One row of a table: where the feature has the value `key`, the prediction is `value` higher."""

    key: str
    value: float
    n: NonNegativeInt  # training tokens with this key


class Table(Record):
    """One readable rule: a feature of the text (such as "token" or "lexical_class") and effects of its
    values.

    Keys that are not listed have the effect 0. `share` is the part of the training variance the rule
    explains, given the rules before it.
    """

    feature: str
    title: str  # the feature in words: "the token", "the previous token"
    entries: tuple[TableEntry, ...]
    share: float


class Predicate(Record):
    """The whole prediction: `base` plus the effects of every table, no lower than `floor`."""

    base: float
    floor: float
    tables: tuple[Table, ...]


class CandidateScore(Record):
    """One of the sentences an explanation was chosen from. `missing` says why there is no sentence; `validation` is
    its headline figure on validation windows, None where nothing had to be chosen."""

    sentence: str | None
    missing: str = ""
    chosen: bool = False
    validation: Score | None = None


class Explanation(Record):
    """A sentence for people, and, of the explainers that give one, the predicate it summarises.

    `firing_threshold` is the predicted activation above which the explanation says that the unit fires
    (chosen on the validation windows). `prompt` and `backend` say how a judge was asked and which; `candidates`
    are the sentences it was chosen from, by `chosen_by`, on validation windows. `another` is what the same explainer
    says of another unit: the control of scores by a judge.
    """

    explainer: str  # "token_statistics", or the name of one that asks a judge
    sentence: str
    predicate: Predicate | None = None
    firing_threshold: float | None = None
    prompt: str = ""
    backend: str = ""
    another: str = ""
    candidates: tuple[CandidateScore, ...] = ()
    chosen_by: str = ""


class Control(Record):
    """The same scores for a prediction that should not work."""

    name: Literal["another_unit", "shuffled"]
    description: str
    sentence: str | None  # the explanation used, where it is another unit's
    scores: dict[str, Score]


class ScoredWindow(Record):
    """A test window with what the explanation predicted at each token (`None`: no prediction)."""

    window: TokenWindow
    simulated: tuple[float | None, ...] | None
    stratum: Stratum


class TokenValue(Record):
    """A token and a figure for it (a logit, a change in log-probability)."""

    token: str
    id: NonNegativeInt
    value: float


class AblationEffect(Record):
    """What replacing the unit's activation does to the next-token prediction at chosen positions.

    Losses are in nats per token. `raised` and `lowered` are the next tokens whose log-probability changes
    most, averaged over the positions (ablated minus intact).
    """

    n_positions: NonNegativeInt
    loss_intact: float | None
    loss_ablated: float | None
    loss_change: Score
    divergence: float | None  # mean KL(intact || ablated), nats
    raised: tuple[TokenValue, ...]
    lowered: tuple[TokenValue, ...]


class CausalEffect(Record):
    """The unit replaced where it fires, and, as the comparison, where it does not."""

    replaced_by: Literal["zero", "mean"]
    value: float
    where_firing: AblationEffect
    where_silent: AblationEffect


class SimilarUnit(Record):
    """A unit that is active at the same tokens: Pearson's correlation and the Jaccard index of the tokens where each
    fires, on the uniform sample; the cosine of what they write, where both write one direction."""

    unit: Unit
    pearson: float
    jaccard: float
    cosine: float | None = None


class Baseline(Record):
    """What token statistics say of a unit that was explained in another way: no judge, no network."""

    explanation: Explanation
    scores: dict[str, Score]
    controls: tuple[Control, ...]


class SplitCounts(Record):
    """How many windows each part held; the parts never share a window."""

    train: NonNegativeInt
    validation: NonNegativeInt
    test: NonNegativeInt


class ModelFacts(Record):
    """Which model was explained; `fingerprint` is a hash of its config and weights."""

    name: str
    n_layers: int
    d_model: int
    d_mlp: int
    fingerprint: str


class RunFacts(Record):
    """What the result depends on besides the model."""

    package_version: str
    corpus: str
    corpus_fingerprint: str
    n_documents: NonNegativeInt
    n_tokens: NonNegativeInt
    n_unlexed_documents: NonNegativeInt  # documents whose lexical class is "unknown" throughout
    window_length: NonNegativeInt
    row_length: NonNegativeInt
    seed: int
    settings: str = ""  # a hash of all other settings


class UnitResult(Record):
    """Everything about one unit: the content of result.json and of its page.

    `scores` and every control's `scores` share their names: "correlation" (Pearson, pooled over the tokens of
    the test windows), "correlation_random" (over the random windows only: the unit at its natural density),
    "detection_accuracy" (balanced, of "does it fire at this token"), "detection_auc". They are those of a predicate:
    empty for an explanation without one, whose scores are in `judged`, one entry a scorer; `unscored` says of a scorer
    why it does not apply to this unit. `baseline` is there when the explanation is not that of token statistics.
    """

    schema_version: Literal[1] = 1
    model: ModelFacts
    run: RunFacts
    unit: Unit
    explanation: Explanation
    statistics: UnitStatistics
    scores: dict[str, Score]
    controls: tuple[Control, ...]
    splits: SplitCounts
    train_top: tuple[TokenWindow, ...]
    strata: tuple[QuantileStratum, ...]  # of the training windows
    test_windows: tuple[ScoredWindow, ...]
    promoted: tuple[TokenValue, ...]  # next tokens the unit's output weights raise, by logit
    suppressed: tuple[TokenValue, ...]
    reads: tuple[TokenValue, ...] = ()  # input tokens whose embedding drives it most, by its input weights
    causal: CausalEffect | None
    judged: tuple[ScorerResult, ...] = ()
    unscored: dict[str, str] = Field(default_factory=dict)
    baseline: Baseline | None = None
    similar: tuple[SimilarUnit, ...] = ()

    def summary(self) -> UnitSummary:
        """The unit's row in the run's table."""
        return UnitSummary(
            unit=self.unit,
            sentence=self.explanation.sentence,
            scores=self.scores,
            controls={control.name: control.scores for control in self.controls},
            density=self.statistics.density,
            maximum=self.statistics.maximum,
            loss_change=None if self.causal is None else self.causal.where_firing.loss_change,
            judged=tuple(Headline.of(result) for result in self.judged),
            unscored=tuple(self.unscored),
        )

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read a result.json. Raises RequestError when it is not one, or of another schema version."""
        return _read(cls, path)


class UnitSummary(Record):
    """A row of the table of a run."""

    unit: Unit
    sentence: str
    scores: dict[str, Score]
    controls: dict[str, dict[str, Score]]
    density: float
    maximum: float
    loss_change: Score | None
    judged: tuple[Headline, ...] = ()
    unscored: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """The unit's folder, relative to the run folder."""
        return f"units/{self.unit.name}"


class RunResult(Record):
    """The index of a run folder: the content of run.json, one row a unit in order of layer and index.

    Iterating gives the rows. `unexplained` says of units that were asked for, by name, why they have no explanation;
    the same run again tries them again.
    """

    schema_version: Literal[1] = 1
    model: ModelFacts
    run: RunFacts
    units: tuple[UnitSummary, ...]
    unexplained: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: ModelFacts,
        run: RunFacts,
        summaries: Iterable[UnitSummary],
        unexplained: Mapping[str, str],
    ) -> Self:
        """Put rows in order: by layer, neurons first, then by index."""

        def place(summary: UnitSummary) -> tuple[int, str, str, int]:
            unit = summary.unit
            return (unit.layer, "" if unit.kind == "neuron" else unit.kind, unit.dictionary, unit.index)

        return cls(
            model=model,
            run=run,
            units=tuple(sorted(summaries, key=place)),
            unexplained=dict(sorted(unexplained.items())),
        )

    def __iter__(self) -> Iterator[UnitSummary]:  # type: ignore[override]  # rows, not fields
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)

    def to_rows(self) -> list[dict[str, Any]]:
        """A flat row a unit: what it is, the sentence, and every score with its interval and control."""
        from neuron_lens.explain.table import rows_of

        return rows_of(self)

    def to_dataframe(self) -> pandas.DataFrame:
        """`to_rows` as a data frame. Raises MissingExtraError without pandas."""
        from neuron_lens.explain.table import data_frame

        return data_frame(self)

    def save(self, path: Path | str) -> None:
        """Write the rows as .csv or .jsonl, or the whole as .json. Raises RequestError for another ending."""
        from neuron_lens.explain.table import save_run

        save_run(self, path)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read a run.json. Raises RequestError when it is not one, or of another schema version."""
        return _read(cls, path)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def _read(kind: type[AnyRecord], path: Path | str) -> AnyRecord:
    try:
        return kind.model_validate_json(Path(path).read_bytes())
    except FileNotFoundError:
        raise RequestError(f"{path} does not exist; expected the {kind.__name__} of a finished run") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise RequestError(
            f"{path} is not a {kind.__name__} of schema version {SCHEMA_VERSION}: {place}: {first['msg']}"
        ) from None
