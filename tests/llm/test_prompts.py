"""Prompt files: every slot filled, nothing else read, known by their hash."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import RequestError
from neuron_lens.llm import Message, Prompt, load_prompt, prompt_names

CHAT = Prompt("chat", '[system]\nBe {{manner}}.\n\n[user]\nText: {{text}}\n{"a": {"b": 1}}\n[assistant]\nok')


def test_messages_and_slots() -> None:
    assert CHAT.slots == ("manner", "text")
    assert CHAT.messages(manner="brief", text="x") == (
        Message(role="system", content="Be brief."),
        Message(role="user", content='Text: x\n{"a": {"b": 1}}'),
        Message(role="assistant", content="ok"),
    )
    assert Prompt("p", "just {{ text }}").messages(text=3) == (Message(role="user", content="just 3"),)


@given(st.text())
def test_values_are_never_read(value: str) -> None:
    assert (
        Prompt("p", "<{{a}}|{{b}}>").render(a=value, b="\n[system]\n{{a}}")
        == f"<{value}|\n[system]\n{{{{a}}}}>"
    )
    assert len(CHAT.messages(manner="[user]\n{{text}}", text=value)) == 3


def test_missing_and_unknown_slots_are_errors() -> None:
    with pytest.raises(RequestError, match="needs a value for: text"):
        CHAT.messages(manner="brief")
    with pytest.raises(RequestError, match=r"no slot 'manners'; did you mean 'manner'"):
        CHAT.messages(manner="brief", text="x", manners="y")
    with pytest.raises(RequestError, match="no slots"):
        Prompt("p", "plain").render(a=1)


@pytest.mark.parametrize("template", ["", " \n", "{{a b}}", "{{a", "{{1}}"])
def test_broken_templates_are_errors(template: str) -> None:
    with pytest.raises(RequestError, match="the prompt 'p'"):
        Prompt("p", template)
    with pytest.raises(RequestError, match="before its first"):
        Prompt("p", "hello\n[user]\nx").messages()
    with pytest.raises(RequestError, match="empty"):
        Prompt("p", "[system]\n\n[user]\nx").messages()


def test_the_hash_follows_the_text_and_not_the_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"one {{slot}}\r\ntwo\r\n")
    mine = Prompt.from_file(path)
    assert mine.hash == Prompt("other", "one {{slot}}\ntwo").hash
    assert mine.hash != Prompt("mine", "one {{slot}}\nthree").hash
    assert mine.version == f"mine@{mine.hash[:12]}"
    with pytest.raises(RequestError, match="cannot read"):
        Prompt.from_file(tmp_path / "none.txt")


def test_packaged_prompts_load_by_name() -> None:
    assert prompt_names() == ["json_answer", "json_repair"]
    for name in prompt_names():
        prompt = load_prompt(name)
        assert "schema" in prompt.slots and prompt.name == name
    with pytest.raises(RequestError, match="did you mean 'json_repair'"):
        load_prompt("json_repairs")
    assert prompt_names(package="neuron_lens.files") == []
