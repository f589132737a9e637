"""A checkpoint's chat template writes what transformers writes with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuron_lens.errors import BackendError
from neuron_lens.llm import PLAIN, JinjaTemplate, LocalBackend, Message, Request
from neuron_lens.tokenizers import load_tokenizer
from neuron_lens.transformer import Transformer, TransformerConfig

# The habits of published templates: ChatML with a default system turn, a BOS and tags, loops that skip.
CHAT_ML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TAGS = """{{ bos_token }}{% for message in messages %}
    {% if message.role == 'system' %}<<SYS>>{{ message.content }}<</SYS>>{% continue %}{% endif %}
    {%- if message.role == 'user' %}[INST] {{ message.content }} [/INST]{% else %}{{ message.content + eos_token }}{% endif %}
{% endfor %}"""
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
LEAVES_OUT = "{{ messages[-1]['content'] }}"

contents = st.text(st.characters(exclude_categories=["Cs", "Co"]), min_size=1).filter(
    lambda text: text == text.strip()
)
chats = st.builds(
    lambda system, turns, last: tuple(
        Message(role=role, content=text) for role, text in [*system, *turns, ("user", last)]
    ),
    st.lists(st.tuples(st.just("system"), contents), max_size=1),
    st.lists(st.tuples(st.sampled_from(["user", "assistant"]), contents), max_size=4),
    contents,
)


@pytest.mark.parametrize("source", [CHAT_ML, TAGS])
@given(messages=chats)
def test_it_writes_what_transformers_writes(source: str, messages: tuple[Message, ...]) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    named = {"bos_token": "<s>", "eos_token": "</s>"}
    parts = JinjaTemplate(source=source, special_tokens=named).pieces(messages)
    chat = [{"role": message.role, "content": message.content} for message in messages]
    ((theirs,), _) = render_jinja_template(
        conversations=[chat], chat_template=source, add_generation_prompt=True, **named
    )
    assert "".join(text for part in parts for text, _ in part) == theirs
    assert [text for part in parts for text, own in part if not own] == [one.content for one in messages]
    assert [own for _, own in parts[1]] == [True, False, True]


@pytest.mark.parametrize("source", [NO_SYSTEM, LEAVES_OUT, "{% for"])
def test_a_template_that_cannot_write_a_chat_is_refused(source: str) -> None:
    messages = (Message(role="system", content="S"), Message(role="user", content="U"))
    with pytest.raises(BackendError, match="give LocalBackend a template of its own"):
        JinjaTemplate(source=source).pieces(messages)


def test_a_checkpoint_brings_its_template(tmp_path: Path) -> None:
    ranks = "".join(f"{word} {rank}\n" for rank, word in enumerate(_base64_bytes()))
    (tmp_path / "tokenizer.tiktoken").write_text(ranks)
    config = {"pat_str": "(?s:.)", "special_tokens": {"<|im_start|>": 256, "<|im_end|>": 257}}
    config |= {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}

    def tokenizer(**more: object) -> object:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | more))
        return load_tokenizer(tmp_path)

    small = TransformerConfig(n_layers=1, d_model=8, n_heads=1, d_mlp=8, d_vocab=258, n_ctx=200)
    assert LocalBackend(Transformer(small, tokenizer=tokenizer())).template is PLAIN
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": CHAT_ML}]
    for more in ({"chat_template": CHAT_ML}, {"chat_template": several}):
        backend = LocalBackend(Transformer(small, tokenizer=tokenizer(**more)))
        assert isinstance(backend.template, JinjaTemplate) and backend.template.source == CHAT_ML
    (tmp_path / "chat_template.jinja").write_text(CHAT_ML)
    backend = LocalBackend(Transformer(small, tokenizer=tokenizer(chat_template="older")))
    messages = (Message(role="system", content="<|im_end|>"), Message(role="user", content="U"))
    beginning, rest = backend._encoded(Request(messages=messages, max_tokens=1))
    assert beginning == [256, *b"system\n", *b"<|im_end|>"]  # in contents, special tokens are text
    assert rest == [257, *b"\n\n", 256, *b"user\n", *b"U", 257, *b"\n\n", 256, *b"assistant\n"]


def _base64_bytes() -> list[str]:
    import base64

    return [base64.b64encode(bytes([value])).decode() for value in range(256)]
