"""Prompts as versioned text files: loaded by name, rendered with named slots, known by the hash of their text.

A file is UTF-8 text with slots written `{{name}}` (single braces are text, so JSON needs no escaping). A line
that is only `[system]`, `[user]` or `[assistant]` begins a message; a file without such lines is one plain text.
What is put into a slot is never read for slots or message lines.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from neuron_lens.errors import RequestError, did_you_mean
from neuron_lens.llm.request import Message

__all__ = ["FOLDER", "Prompt", "load_prompt", "prompt_names"]

FOLDER = "prompt_files"  # the folder of a package that holds its prompts, as <name>.txt

_SLOT = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_ROLE_LINE = re.compile(r"^\[(system|user|assistant)\][ \t]*\n", re.MULTILINE)


@dataclass(frozen=True)
class Prompt:
    """One prompt. Raises RequestError for a template with a broken slot or an empty text."""

    name: str
    template: str

    def __post_init__(self) -> None:
        # Line ends are not part of a prompt's identity: a checkout may rewrite them.
        object.__setattr__(self, "template", self.template.replace("\r\n", "\n").strip("\n"))
        if not self.template.strip():
            raise RequestError(f"the prompt {self.name!r} is empty")
        stray = _SLOT.sub("", self.template).find("{{")
        if stray >= 0:
            raise RequestError(
                f"the prompt {self.name!r} has '{{{{' that opens no slot: slots are written {{{{name}}}}, with letters, "
                f"digits and underscores; found {_SLOT.sub('', self.template)[stray : stray + 30]!r}"
            )

    @classmethod
    def from_file(cls, path: str | Path) -> Prompt:
        """A prompt of the user's own; its name is the file's. Raises RequestError when it cannot be read."""
        path = Path(path)
        try:
            return cls(path.stem, path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"cannot read the prompt file {path}: {error}; expected UTF-8 text") from error

    @property
    def hash(self) -> str:
        """SHA-256 of the text, in hex."""
        return hashlib.sha256(self.template.encode("utf-8")).hexdigest()

    @property
    def version(self) -> str:
        """Name and hash, for requests and results: "detection@0f3a9c21b7d4"."""
        return f"{self.name}@{self.hash[:12]}"

    @property
    def slots(self) -> tuple[str, ...]:
        """The names of the slots, in order of first appearance."""
        return tuple(dict.fromkeys(_SLOT.findall(self.template)))

    def render(self, **values: object) -> str:
        """The text with every slot filled with `str(value)`; message lines stay as they are.

        Raises RequestError for a slot without a value or a value without a slot.
        """
        return self._filled(self.template, values)

    def messages(self, **values: object) -> tuple[Message, ...]:
        """The messages of the file with every slot filled; a file without message lines is one user message.

        Raises RequestError as `render` does, and for text before the first message line or an empty message.
        """
        self._check(values)
        before, *parts = _ROLE_LINE.split(self.template + "\n")
        if not parts:
            return (Message(role="user", content=self._filled(before.strip("\n"), values)),)
        if before.strip():
            raise RequestError(
                f"the prompt {self.name!r} has text before its first [role] line: {before[:40]!r}"
            )
        messages = []
        for role, body in zip(parts[::2], parts[1::2], strict=True):
            if not body.strip():
                raise RequestError(f"the prompt {self.name!r} has an empty [{role}] message")
            content = self._filled(body.strip("\n"), values)
            messages.append(Message(role=cast(Literal["system", "user", "assistant"], role), content=content))
        return tuple(messages)

    def _filled(self, text: str, values: dict[str, object]) -> str:
        self._check(values)
        return _SLOT.sub(lambda slot: str(values[slot.group(1)]), text)

    def _check(self, values: dict[str, object]) -> None:
        missing = [slot for slot in self.slots if slot not in values]
        if missing:
            raise RequestError(f"the prompt {self.name!r} needs a value for: {', '.join(missing)}")
        for name in values:
            if name not in self.slots:
                hint = did_you_mean(name, self.slots) if self.slots else "it has no slots"
                raise RequestError(f"the prompt {self.name!r} has no slot {name!r}; {hint}")


def load_prompt(name: str, *, package: str = "neuron_lens.llm") -> Prompt:
    """The prompt `<package>/prompt_files/<name>.txt`. Raises RequestError when there is none."""
    file = importlib.resources.files(package) / FOLDER / f"{name}.txt"
    if not file.is_file():
        raise RequestError(
            f"{package} has no prompt {name!r}; {did_you_mean(name, prompt_names(package=package))}"
        )
    return Prompt(name, file.read_text(encoding="utf-8"))


def prompt_names(*, package: str = "neuron_lens.llm") -> list[str]:
    """The names of a package's prompts, sorted."""
    folder = importlib.resources.files(package) / FOLDER
    if not folder.is_dir():
        return []
    return sorted(file.name.removesuffix(".txt") for file in folder.iterdir() if file.name.endswith(".txt"))
