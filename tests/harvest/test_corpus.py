"""Documents to windows: nothing lost, nothing doubled, parts apart, annotations where they belong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_lens.errors import RequestError
from neuron_lens.harvest.annotate import annotate
from neuron_lens.harvest.corpus import Corpus, Document, WindowShape, cut
from neuron_lens.harvest.lexical import BRACKETS, LEXICAL_CLASSES, STATEMENTS, lex
from neuron_lens.harvest.window_text import gather_windows
from neuron_lens.tokenizers import bytes_tokenizer
from neuron_lens.windows import ABSENT, TextWindows

SHAPE = WindowShape(length=4, row_length=16, context=4)
TOKENIZER = bytes_tokenizer()
SOURCE = '''"""Doc."""
import os.path
# a comment
@cache
def load(self, path: str = "x") -> int:
    return self.total[0] + len(path) * 2.5
'''


@given(st.lists(st.integers(0, 200), min_size=1, max_size=6), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_rows_keep_every_token_once_and_parts_share_none(lengths: list[int], seed: int) -> None:
    parts: dict[int, set[tuple[int, int]]] = {0: set(), 1: set(), 2: set()}
    for document, length in enumerate(lengths):
        kept = np.zeros(length, dtype=int)
        ids = np.arange(length, dtype=np.int32)
        for row in cut(document, ids, SHAPE, seed):
            assert len(row.ids) <= SHAPE.row_length
            assert np.array_equal(row.ids, ids[row.start : row.start + len(row.ids)])
            own = range(row.start + row.keep_from, row.start + len(row.ids))
            kept[own.start : own.stop] += 1
            parts[row.split] |= {(document, token) for token in own}
            assert row.start == 0 or row.keep_from == SHAPE.context
        assert (kept == 1).all()
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_splits_are_stable_and_have_their_shares() -> None:
    rows = list(cut(0, np.zeros(60_000, dtype=np.int32), SHAPE))
    again = list(cut(0, np.zeros(60_000, dtype=np.int32), SHAPE))
    assert [row.split for row in rows] == [row.split for row in again]
    shares = np.bincount([row.split for row in rows]) / len(rows)
    assert np.allclose(shares, [0.6, 0.2, 0.2], atol=0.03)


@pytest.mark.parametrize("shape", [(0, 16, 4), (4, 4, 4), (4, 15, 4), (4, 16, 6)])
def test_shapes_that_do_not_divide_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(RequestError, match="multiple"):
        WindowShape(length=shape[0], row_length=shape[1], context=shape[2])


@pytest.mark.parametrize("n_ctx", [4, 7, 32, 100, 255, 256, 4096])
def test_a_fitting_shape_exists_for_every_context(n_ctx: int) -> None:
    assert WindowShape.fitting(n_ctx).row_length <= n_ctx


def test_windows_carry_their_own_text_and_the_models_context() -> None:
    corpus = Corpus.of_documents([Document("one", SOURCE), Document("two", "short")])
    kept = np.array([(0, 0), (0, 16), (0, 60), (1, 0), (1, 4)])
    windows, unlexed = gather_windows(
        corpus, TOKENIZER, SHAPE, kept, [TOKENIZER.token_str(i) for i in range(256)]
    )
    assert unlexed == 0
    place = windows.rows_of([0, 1], [60, 4])
    record = windows.record(int(place[0]), np.arange(4.0), annotations=("lexical_class", "statement"))
    assert "".join(record.tokens) == SOURCE[60:64]
    assert record.identity == (0, 60)
    assert record.character_start == 60
    # The row that keeps token 60 begins at 48: its context, and no more, is what the model has read.
    assert record.context_position == 12
    assert "".join(record.preceding) == SOURCE[48:60]
    assert windows.record(int(place[1]), np.zeros(4)).tokens == ("t",)
    last = windows.columns["token"][place[1]]
    assert (last[-4:] == ABSENT).all()


def test_windows_round_trip_through_their_file(tmp_path: Path) -> None:
    corpus = Corpus.of_documents([Document("one", SOURCE)])
    windows, _ = gather_windows(
        corpus, TOKENIZER, SHAPE, np.array([(0, 0), (0, 16)]), [TOKENIZER.token_str(i) for i in range(256)]
    )
    windows.save(tmp_path / "windows.safetensors")
    again = TextWindows.load(tmp_path / "windows.safetensors")
    assert again.documents == windows.documents and again.token_texts == windows.token_texts
    assert again.names == windows.names and again.context == windows.context
    for name, column in windows.columns.items():
        assert np.array_equal(again.columns[name], column)
    with pytest.raises(RequestError, match="not kept"):
        again.rows_of([0], [8])
    (tmp_path / "windows.safetensors").write_bytes(b"nonsense")
    with pytest.raises(RequestError, match="windows"):
        TextWindows.load(tmp_path / "windows.safetensors")


def _class_at(piece: str) -> str:
    return LEXICAL_CLASSES[lex(SOURCE).lexical_class[SOURCE.index(piece)]]


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ('"""Doc', "docstring"), ("import", "keyword"), ("os", "module name"), ("# a", "comment"), ("@", "decorator"),
        ("cache", "decorator"), ("def", "keyword"), ("load", "function name"), ("self,", "self"), ("path:", "parameter"),
        ('"x"', "string"), ("(self", "opening bracket"), ("    return", "indentation"), ("total", "attribute"),
        ("len", "builtin"), ("2.5", "number"), ("+", "operator"), ("= ", "assignment"), (".total", "dot"), ("\n", "newline"),
    ],
)  # fmt: skip
def test_lexical_classes(piece: str, expected: str) -> None:
    assert _class_at(piece) == expected


def test_statements_and_brackets() -> None:
    lexical = lex(SOURCE)
    said = {
        piece: STATEMENTS[lexical.statement[SOURCE.index(piece)]]
        for piece in ("os", "# a", "cache", "load", "total")
    }
    assert said == {"os": "import", "# a": "comment", "cache": "decorator", "load": "def", "total": "return"}
    inside = {
        piece: BRACKETS[lexical.bracket[SOURCE.index(piece)]] for piece in ("path: ", "path)", "0]", "load")
    }
    assert inside == {"path: ": "parameters", "path)": "call", "0]": "square bracket", "load": "none"}


@pytest.mark.parametrize("text", ["x = 'never closed", "if x:\n  a\n b\n", "(((", "prose, isn't it?"])
def test_text_that_does_not_lex_is_unknown_throughout(text: str) -> None:
    lexical = lex(text)
    assert not lexical.known
    assert {LEXICAL_CLASSES[code] for code in lexical.lexical_class} == {"unknown"}


@given(st.text(max_size=120))
@settings(max_examples=150, deadline=None)
def test_annotation_fits_any_text(text: str) -> None:
    ids, spans = TOKENIZER.offsets(text, bos=False)
    columns, _ = annotate(text, np.asarray(ids, dtype=np.int32), spans)
    assert {len(column) for column in columns.values()} == {len(ids)}


def test_positions_pieces_and_repeats() -> None:
    text = "ab c\n    ab"
    ids, spans = TOKENIZER.offsets(text, bos=False)
    columns, _ = annotate(text, np.asarray(ids, dtype=np.int32), spans)
    assert columns["position_in_line"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert columns["indent"].tolist() == [0] * 5 + [1] * 6
    assert columns["piece"].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert columns["repeated"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert columns["continuation"][9] == ord("b")


def test_corpora_from_paths(tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("b = 1\n")
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / ".hidden.py").write_text("hidden = 1\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(
            json.dumps({"path": "inner.py", "text": "c = 1"}) + "\n\n" + json.dumps({"text": "d"}) + "\n"
        )
    corpus = Corpus.of_paths([tmp_path])
    assert [document.text for document in corpus] == ["text", "b = 1\n", "c = 1", "d"]
    assert [document.name for document in corpus][2] == "inner.py"
    assert corpus.n_documents == 4
    assert Corpus.of_paths([str(tmp_path / "*.py")]).fingerprint != corpus.fingerprint
    assert Corpus.of_paths([tmp_path]).fingerprint == corpus.fingerprint


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b"  \n", "empty"),
        ("binary.txt", b"\xff\xfe\x00", "UTF-8"),
        ("bad.jsonl", b'{"text": "x"}\n{"words": 1}\n', "line 2"),
        ("bad.jsonl", b"not json\n", "line 1"),
        ("bad.jsonl.gz", b"not gzip", "bad.jsonl.gz"),
    ],
)
def test_unreadable_corpora_say_why(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=complaint):
        Corpus.of_paths([tmp_path / name])


def test_paths_that_match_nothing_are_errors(tmp_path: Path) -> None:
    for path in ("missing.py", "*.nothing", ""):
        with pytest.raises(RequestError, match="corpus path"):
            Corpus.of_paths([tmp_path / path])
