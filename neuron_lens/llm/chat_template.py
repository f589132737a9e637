"""How a chat becomes the one text a model continues.

A `ChatTemplate` is written by hand; a `JinjaTemplate` is the one a checkpoint ships with. Both give pieces, each with
whether it is the template's own: special tokens count there, and are plain text in what people and judges wrote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NoReturn, Protocol

from pydantic import BaseModel, ConfigDict

from neuron_lens.errors import BackendError
from neuron_lens.llm.request import Message

__all__ = ["CHATML", "PLAIN", "ChatTemplate", "JinjaTemplate", "Template"]

Piece = tuple[str, bool]  # a text, and whether it is part of the template


class Template(Protocol):
    """What writes chats down.

    `special`: its own special tokens become their ids. `begins`: it writes what a text begins with (BOS) itself.
    `stop`: texts that end an answer.
    """

    @property
    def special(self) -> bool: ...
    @property
    def begins(self) -> bool: ...
    @property
    def stop(self) -> tuple[str, ...]: ...

    def pieces(self, messages: Sequence[Message]) -> list[list[Piece]]:
        """The pieces up to the last message, and those from there to the opening of the answer."""
        ...

    def model_dump_json(self) -> str: ...


class ChatTemplate(BaseModel):
    """How a chat becomes a text: each turn is its role's opening, the content and its role's closing.

    `answer` opens the model's turn, and `stop` are texts that end it. With `special`, special tokens in the openings
    and closings become their ids; in contents they are always text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: tuple[str, str] = ("", "\n\n")
    user: tuple[str, str] = ("User: ", "\n\n")
    assistant: tuple[str, str] = ("Assistant: ", "\n\n")
    answer: str = "Assistant:"
    stop: tuple[str, ...] = ("\n\nUser:",)
    special: bool = False

    @property
    def begins(self) -> bool:
        """A BOS is left to the tokenizer's own policy."""
        return False

    def pieces(self, messages: Sequence[Message]) -> list[list[Piece]]:
        """The pieces up to the last message, and those from there to the opening of the answer."""
        turns: list[list[Piece]] = []
        for message in messages:
            opening, closing = getattr(self, message.role)
            turns.append([(opening, True), (message.content, False), (closing, True)])
        return [[piece for turn in turns[:-1] for piece in turn], [*turns[-1], (self.answer, True)]]


PLAIN = ChatTemplate()
CHATML = ChatTemplate(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    answer="<|im_start|>assistant\n",
    stop=("<|im_end|>",),
    special=True,
)

# Private characters around a message's number stand for its content while the template is rendered.
_PLACE = re.compile("\ue000([0-9]+)\ue001")


class JinjaTemplate(BaseModel):
    """A checkpoint's own chat template: a Jinja text that reads `messages` and `add_generation_prompt`.

    Contents are put in afterwards, exactly as they are: what a template does to contents (trimming, say) is not done.

    Args:
        source: the Jinja text (chat_template.jinja, or `chat_template` of tokenizer_config.json).
        special_tokens: what the template may call by name, such as {"bos_token": "<s>"}.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    special_tokens: dict[str, str] = {}

    @property
    def special(self) -> bool:
        """Special tokens written by the template become their ids."""
        return True

    @property
    def begins(self) -> bool:
        """The template writes a BOS itself, where there is one."""
        return True

    @property
    def stop(self) -> tuple[str, ...]:
        """None: an answer ends with the tokenizer's EOS."""
        return ()

    def pieces(self, messages: Sequence[Message]) -> list[list[Piece]]:
        """The pieces up to the last message, and those from there to the opening of the answer.

        Raises BackendError for a template that is no Jinja, refuses the roles of these messages, or leaves one out.
        """
        from jinja2 import TemplateError

        places = [
            {"role": message.role, "content": f"\ue000{number}\ue001"}
            for number, message in enumerate(messages)
        ]
        try:
            text = _compiled(self.source).render(
                messages=places, add_generation_prompt=True, **self.special_tokens
            )
        except TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise BackendError(
                f"the model's chat template cannot write a chat of {roles}: {error}; give LocalBackend a template of its "
                f"own (ChatTemplate, such as PLAIN or CHATML)"
            ) from error
        parts = _PLACE.split(text)
        found = [int(number) for number in parts[1::2]]
        if found != list(range(len(messages))):
            raise BackendError(
                f"the model's chat template writes the messages {found} of {len(messages)}: expected each once, in "
                "order; give LocalBackend a template of its own (ChatTemplate)"
            )
        pieces = [
            (messages[int(part)].content, False) if odd % 2 else (part, True)
            for odd, part in enumerate(parts)
        ]
        return [pieces[:-3], pieces[-3:]]


@lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """As transformers compiles them: sandboxed, lines of blocks trimmed, `raise_exception` to refuse a chat."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)
