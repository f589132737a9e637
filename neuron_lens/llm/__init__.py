"""Judges: language models asked by text, wherever they run. Needs neither torch nor the `openai` package to import.

Reading order: request, answer_file, backend, retry, budget, cache, then the backends (openai, local, scripted), structured, run.
"""

from __future__ import annotations

from neuron_lens.llm.answer_file import AnswerFile, key_of
from neuron_lens.llm.backend import AttemptingBackend, Backend, Capabilities, request_key, require
from neuron_lens.llm.budget import Budget, BudgetExceeded, Estimate, Price, estimate
from neuron_lens.llm.cache import CachedBackend, RequestCache
from neuron_lens.llm.chat_template import CHATML, PLAIN, ChatTemplate, JinjaTemplate
from neuron_lens.llm.local import LocalBackend
from neuron_lens.llm.openai import OpenAIBackend
from neuron_lens.llm.prompts import Prompt, load_prompt, prompt_names
from neuron_lens.llm.request import (
    JsonSchema,
    Message,
    Missing,
    Request,
    Response,
    TokenLogprob,
    TokenLogprobs,
    Usage,
)
from neuron_lens.llm.retry import CallFailed, Retry, TransientFailure
from neuron_lens.llm.run import complete_all, complete_all_structured, run_all, run_all_structured
from neuron_lens.llm.scripted import RandomFaults, ScriptedBackend
from neuron_lens.llm.structured import StructuredRequest, complete_structured

__all__ = [
    "CHATML",
    "PLAIN",
    "AnswerFile",
    "AttemptingBackend",
    "Backend",
    "Budget",
    "BudgetExceeded",
    "CachedBackend",
    "CallFailed",
    "Capabilities",
    "ChatTemplate",
    "Estimate",
    "JinjaTemplate",
    "JsonSchema",
    "LocalBackend",
    "Message",
    "Missing",
    "OpenAIBackend",
    "Price",
    "Prompt",
    "RandomFaults",
    "Request",
    "RequestCache",
    "Response",
    "Retry",
    "ScriptedBackend",
    "StructuredRequest",
    "TokenLogprob",
    "TokenLogprobs",
    "TransientFailure",
    "Usage",
    "complete_all",
    "complete_all_structured",
    "complete_structured",
    "estimate",
    "key_of",
    "load_prompt",
    "prompt_names",
    "request_key",
    "require",
    "run_all",
    "run_all_structured",
]
