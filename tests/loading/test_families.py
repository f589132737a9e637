"""Every family, loaded from disk, computes what transformers computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from neuron_lens.loading import verify
from neuron_lens.loading.registry import definition_for, definitions

from .families import CASES, Case, quiet

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loaded_equals_transformers(case: Case, tmp_path: Path) -> None:
    folder = case.save(tmp_path)
    with quiet():
        result = verify(folder, new_tokens=6)
    assert result.passed, result


def test_every_definition_has_cases() -> None:
    assert {definition.name for definition in definitions()} == {case.family for case in CASES}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case_is_of_its_definition(case: Case) -> None:
    raw = case.config().to_dict() | {"architectures": [type_name(case)]}
    assert definition_for(raw, "config").name == case.family


def type_name(case: Case) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[case.model_type]
