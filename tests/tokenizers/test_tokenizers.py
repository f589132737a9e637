"""Laws: the same ids and offsets as the `tokenizers` library, round trips, BOS once, special tokens text."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from neuron_lens.errors import TokenizerError
from neuron_lens.tokenizers import (
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    as_tokenizer,
    bytes_tokenizer,
    load_tokenizer,
)
from neuron_lens.tokenizers.byte_level import ranks_from_merges
from neuron_lens.tokenizers.convert import NotExact, Roles, tiktoken_from_description

CORPUS = [
    "def encode(self, text):\n    return [ids for ids in text]  # the thing that isn't there\n",
    "The cat didn't sit on the mat; they've 1234 reasons, haven't they? HE'LL SEE. We're\n\n\n\t\tend",
    "naïve café über straße, 你好世界 你好 こんにちは 안녕하세요 🙂🙂👩‍👩‍👧 Привет мир",
] * 3
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(
            ["<|end|>", "<|begin|>", "  ", "    ", " " * 30, "\r\n", "\n\n\n", "\t", "\x00\x1f\x85", "\xa0"]
        ),
        st.sampled_from(
            ["🙂", "👩‍👩‍👧", "你好", "e\u0301", "가\u11a8", "\u212b", " didn't", "WE'LL", "ſ", "12345", "the"]
        ),
    ),
    max_size=8,
).map("".join)


def train(
    pre: Any,
    *,
    normalizer: Any = None,
    ignore_merges: bool = False,
    ordinary: tuple[str, ...] = (),
    template: bool = False,
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([tokenizers.AddedToken(text, normalized=True) for text in ordinary])
    if template:
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]),
            ]
        )
    return backend


def byte_level(**settings: Any) -> Any:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **settings})


def split_then_bytes(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(use_regex=False)]
    )


# What is converted to tiktoken, and what goes to the library: kind -> how it is made.
CONVERTED = {
    "gpt2": lambda: train(byte_level()),
    "llama3": lambda: train(split_then_bytes(LLAMA3), ignore_merges=True, template=True),
    "qwen": lambda: train(split_then_bytes(LLAMA3), normalizer=normalizers.NFC()),
    "neox": lambda: train(byte_level(), normalizer=normalizers.NFC(), ordinary=("  ", "   ", "    ")),
    "words_only": lambda: train(split_then_bytes(r" ?[^(\s|[.,!?])]+")),  # leaves gaps between its matches
    "no_regex": lambda: train(byte_level(use_regex=False)),
}
LEFT = {
    "prefix_space": lambda: train(byte_level(add_prefix_space=True)),
    "digits": lambda: train(pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level()])),
    "lowercase": lambda: train(byte_level(), normalizer=normalizers.Lowercase()),
    "anchors": lambda: train(split_then_bytes(r"^a|\s+$|\S+|\s")),
}


@functools.cache
def backend_of(kind: str) -> tokenizers.Tokenizer:
    return (CONVERTED | LEFT)[kind]()


@functools.cache
def converted(kind: str) -> TiktokenTokenizer:
    description = json.loads(backend_of(kind).to_str())
    return tiktoken_from_description(description, Roles(bos_id=1, eos_id=0), kind)


def save(backend: tokenizers.Tokenizer, folder: Path, **config: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", CONVERTED)
@settings(max_examples=120, deadline=None)
@given(text=TEXTS, allowed=st.booleans())
def test_same_ids_and_offsets_as_the_library(kind: str, text: str, allowed: bool) -> None:
    reference = tokenizers.Tokenizer.from_str(backend_of(kind).to_str())
    reference.encode_special_tokens = not allowed
    expected = reference.encode(text, add_special_tokens=False)
    ours = converted(kind)
    assert ours.encode(text, allowed_special=allowed) == expected.ids
    ids, spans = ours.offsets(text, allowed_special=allowed)
    assert ids == expected.ids
    if not ours.nfc:
        assert spans == expected.offsets


@pytest.mark.parametrize("kind", CONVERTED)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_round_trip_and_offsets_cover_the_text(kind: str, text: str) -> None:
    ours = converted(kind)
    ids, spans = ours.offsets(text)
    covered = set().union(*(range(start, end) for start, end in spans))
    assert covered == set(range(len(text)))
    assert spans == sorted(spans)
    assert b"".join(map(ours.token_bytes, ids)).decode() == ours.decode(ids)
    if not ours.nfc:
        assert ours.decode(ids) == text
        for token_id, (start, end) in zip(ids, spans, strict=True):
            data = ours.token_bytes(token_id)
            # A token of whole characters spans exactly them; others hold bytes of the characters they touch.
            assert data in text[start:end].encode()
            if data.decode(errors="replace").encode() == data:
                assert text[start:end].encode() == data


def test_offsets_point_at_the_characters_before_normalization() -> None:
    text = "cafe\u0301 x"
    ids, spans = converted("qwen").offsets(text)
    assert ids == converted("qwen").encode("caf\u00e9 x")
    # e and its accent are one character to the model
    assert any(start <= 3 and end == 5 for start, end in spans)
    assert spans[-1][1] == len(text)


@pytest.mark.parametrize("kind", LEFT)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_what_is_not_exact_goes_to_the_library(kind: str, text: str) -> None:
    with pytest.raises(NotExact):
        converted(kind)
    ours = as_tokenizer(backend_of(kind))
    assert isinstance(ours, HuggingFaceTokenizer)
    reference = tokenizers.Tokenizer.from_str(backend_of(kind).to_str())
    reference.encode_special_tokens = True
    assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids


@st.composite
def merge_tables(draw: st.DrawFn) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabularies no training would give: any two tokens may merge, in any order."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(draw(st.integers(1, 8))):
        pair = (draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens)))
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
            merges.append(pair)
    if draw(st.booleans()):
        merges = draw(st.permutations(merges))
    others = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"a", "b", "c"})
    return {token: i for i, token in enumerate(others + tokens)}, list(merges)


@settings(max_examples=300, deadline=None)
@given(
    table=merge_tables(),
    words=st.lists(st.text("abc", min_size=1, max_size=14), min_size=8),
    ignore=st.booleans(),
)
def test_accepted_ranks_are_exact(
    table: tuple[dict[str, int], list[tuple[str, str]]], words: list[str], ignore: bool
) -> None:
    vocab, merges = table
    ranks = ranks_from_merges(vocab, merges, [], ignore_merges=ignore)
    if ranks is None:
        return
    ours = tiktoken.Encoding("t", pat_str=r"(?s:.+)", mergeable_ranks=ranks, special_tokens={})
    reference = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=ignore))
    reference.pre_tokenizer = byte_level(use_regex=False)
    made = ["".join(pair) for pair in merges]
    for word in [*words, *made, *(token * 2 for token in made)]:
        assert ours.encode_ordinary(word) == reference.encode(word).ids


def test_ranks_are_accepted_and_refused_where_they_should_be() -> None:
    letters = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    good = [("a", "b"), ("b", "c"), ("ab", "c")]
    vocab = {**letters, "ab": 256, "bc": 257, "abc": 258}
    assert ranks_from_merges(vocab, good, []) is not None
    assert ranks_from_merges(vocab, [good[1], good[0], good[2]], []) is None  # not in the order of the ids
    assert ranks_from_merges(vocab, [good[0], good[1], ("a", "bc")], []) is None  # another last step
    assert (
        ranks_from_merges({**vocab, "xyz": 259}, good, []) is None
    )  # found whole by one, never made by the other
    assert ranks_from_merges({**vocab, "xyz": 259}, good, [], ignore_merges=True) is not None
    assert (
        ranks_from_merges({k: v for k, v in vocab.items() if k != "Q"}, good, []) is None
    )  # a byte without a token


def every_tokenizer() -> list[Tokenizer]:
    return [
        *map(converted, CONVERTED),
        as_tokenizer(backend_of("llama3")),
        sentencepiece_like(),
        bytes_tokenizer(),
    ]


@functools.cache
def sentencepiece_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    backend.decoder = decoders.Sequence(fallback)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))], show_progress=False
    )
    backend.train_from_iterator(CORPUS[:2], trainer)
    description = json.loads(backend.to_str())
    description["added_tokens"] = description["added_tokens"][:3]  # the byte tokens are ordinary vocabulary
    backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def sentencepiece_like() -> Tokenizer:
    return as_tokenizer(sentencepiece_backend())


@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_bos_is_never_doubled(text: str) -> None:
    for ours in every_tokenizer():
        plain = ours.encode(text, bos=False)
        assert ours.encode(text, bos=True) == [ours.bos_id, *plain]
        assert ours.encode(text) == (ours.encode(text, bos=True) if ours.adds_bos else plain)
        written = ours.token_str(ours.bos_id or 0) + text
        ids = ours.encode(written, bos=True, allowed_special=True)
        assert ids[0] == ours.bos_id
        assert ids == ours.encode(written, bos=False, allowed_special=True)
        ids, spans = ours.offsets(text, bos=True)
        assert ids == ours.encode(text, bos=True) and len(spans) == len(ids) and spans[0] == (0, 0)


@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_special_tokens_are_text_unless_allowed(text: str) -> None:
    for ours in every_tokenizer():
        special = set(ours.special_tokens.values())
        assert special.isdisjoint(ours.encode(text, bos=False))


@settings(max_examples=60, deadline=None)
@given(text=TEXTS.filter(lambda text: not text.startswith(" ")))
def test_sentencepiece_like_round_trip(text: str) -> None:
    ours = sentencepiece_like()
    assert ours.adds_bos and ours.bos_id == 1
    ids = ours.encode(text, bos=False)
    assert ours.decode(ids) == text.replace("▁", " ")
    assert b"".join(map(ours.token_bytes, ids)).decode().removeprefix(" ") == text.replace("▁", " ")


def test_objects_in_memory_are_taken_as_they_are() -> None:
    backend = tokenizers.Tokenizer.from_str(backend_of("llama3").to_str())
    taken = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>")
    taken.backend_tokenizer.enable_truncation(3)
    before = taken.backend_tokenizer.to_str()
    ours = as_tokenizer(taken)
    assert (ours.bos_id, ours.eos_id, ours.adds_bos) == (1, 0, True)
    assert ours.encode("the cat <|end|> and more") == converted("llama3").encode(
        "the cat <|end|> and more", bos=True
    )
    assert taken.backend_tokenizer.to_str() == before
    assert not taken.backend_tokenizer.encode_special_tokens
    assert as_tokenizer(ours) is ours
    encoding = converted("gpt2").encoding
    assert as_tokenizer(encoding).encode("the cat") == encoding.encode("the cat")
    with pytest.raises(TokenizerError, match="no known kind of tokenizer"):
        as_tokenizer(3)


def test_tokenizer_json_folder(tmp_path: Path) -> None:
    ours = load_tokenizer(save(backend_of("llama3"), tmp_path, eos_token={"content": "<|end|>"}))
    assert isinstance(ours, TiktokenTokenizer)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.adds_bos) == (
        1,
        0,
        None,
        True,
    )  # BOS from the template
    save(backend_of("llama3"), tmp_path, bos_token="<|begin|>", add_bos_token=False)
    assert not load_tokenizer(tmp_path).adds_bos  # the config overrules it
    save(backend_of("gpt2"), tmp_path, add_bos_token=True)
    with pytest.raises(TokenizerError, match="add_bos_token"):
        load_tokenizer(tmp_path)
    assert isinstance(load_tokenizer(save(backend_of("digits"), tmp_path)), HuggingFaceTokenizer)


def test_vocab_and_merges_folder(tmp_path: Path) -> None:
    backend_of("gpt2").model.save(str(tmp_path))
    roles = {"eos_token": "<|end|>", "bos_token": "<|end|>", "additional_special_tokens": ["<|begin|>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, TiktokenTokenizer)
    for text in CORPUS[:3]:
        assert ours.encode(text) == converted("gpt2").encode(text)
    assert ours.encode("a<|end|>", allowed_special=True)[-1] == ours.eos_id == 0
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b c\n")
    with pytest.raises(TokenizerError, match="'a b c'"):
        load_tokenizer(tmp_path)


def write_ranks(folder: Path, **config: Any) -> Path:
    import base64

    lines = [f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)]
    lines.append(f"{base64.b64encode(b'th').decode()} 256")
    (folder / "tokenizer.tiktoken").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pat_str": r"\S+|\s+", **config}))
    return folder


def test_ranks_folder(tmp_path: Path) -> None:
    special = {"<|endoftext|>": 257}
    write_ranks(tmp_path, special_tokens=special, bos_token="<|endoftext|>", add_bos_token=True)
    ours = load_tokenizer(tmp_path)
    assert ours.encode("the") == [257, 256, ord("e")]
    assert ours.special_tokens == special and ours.vocab_size == 258
    assert ours.token_strings([257, 256]) == ["<|endoftext|>", "th"]
    write_ranks(tmp_path, special_tokens={"<|endoftext|>": 256})
    with pytest.raises(TokenizerError, match="one id to 2 tokens"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.tiktoken").write_text("YQ== 0\nnot a line\n")
    with pytest.raises(TokenizerError, match="line 2"):
        load_tokenizer(tmp_path)


def test_wrong_input_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ours in every_tokenizer():
        for unknown in (ours.vocab_size, -1, 10**12):
            with pytest.raises(TokenizerError, match="ids go from 0 to"):
                ours.decode([unknown])
        with pytest.raises(TokenizerError, match="lone surrogate U\\+D800 at character 1"):
            ours.encode("a\ud800")
        with pytest.raises(TokenizerError, match="expected a text"):
            ours.encode(b"bytes")  # type: ignore[arg-type]
        assert ours.encode("", bos=False) == [] and ours.decode([]) == ""
    no_bos = as_tokenizer(backend_of("gpt2"))
    with pytest.raises(TokenizerError, match="no BOS token"):
        no_bos.encode("a", bos=True)
    (tmp_path / "other.txt").write_text("x")
    with pytest.raises(TokenizerError, match=r"holds no tokenizer: expected tokenizer.tiktoken"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(TokenizerError, match=r"cannot read .*tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        '{"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}'
    )
    with pytest.raises(TokenizerError, match="not as expected"):
        load_tokenizer(tmp_path)

    def unreachable(name: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    with pytest.raises(TokenizerError, match="cannot download its encoding 'gpt2'"):
        load_tokenizer("gpt2")


def test_bytes_tokenizer() -> None:
    ours = bytes_tokenizer()
    assert ours.encode("é<|endoftext|>")[:2] == list("é".encode()) and ours.vocab_size == 257
    assert ours.offsets("é")[1] == [(0, 1), (0, 1)]
