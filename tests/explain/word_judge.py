"""A judge that knows one thing: words. It explains a unit by the marked word it sees most, and holds descriptions to it."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from neuron_lens.llm import Capabilities, Request, ScriptedBackend

CHAT = Capabilities(chat=True, json_schema=True)


def answer(prompt: str) -> str:
    """The answer to the last message of a chat."""
    described = re.search(r"^Description: .*the word '(.*?)'", prompt, re.MULTILINE)
    texts = [json.loads(text) for text in re.findall(r'^\d+: (".*")$', prompt, re.MULTILINE)]
    if "Description:" not in prompt:
        words = Counter(re.findall(r"<<\s*(\S+?)\s*>>", prompt))
        word = min(words, key=lambda one: (-words[one], one)) if words else "?"
        return json.dumps({"explanation": f"it responds to the word '{word}'"})
    word = described[1] if described else "?"
    listed = re.search(r"^Tokens \(\d+\): (.*)$", prompt, re.MULTILINE)
    if listed:
        tokens = json.loads(listed[1])
        return json.dumps({"activations": [8 * (token.strip() == word) for token in tokens]})
    if "The marks are" in prompt:
        marked = [set(re.findall(r"<<\s*(\S+?)\s*>>", text)) for text in texts]
        return json.dumps({"answers": [found == {word} for found in marked]})
    return json.dumps({"answers": [word in text.split() for text in texts]})


def served(body: dict[str, Any]) -> str:
    """The answer to a chat completion's body."""
    return answer(body["messages"][-1]["content"])


def scripted(request: Request) -> str:
    """The answer to a request."""
    return answer(request.texts[-1])


def word_judge(**options: Any) -> ScriptedBackend:
    """The judge as a backend."""
    return ScriptedBackend(scripted, name="words", capabilities=CHAT, **options)
