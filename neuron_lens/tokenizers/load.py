"""From a name, a checkpoint folder or an object to a tokenizer.

Byte-level BPE goes through tiktoken, always; what tiktoken cannot reproduce exactly goes through the
`tokenizers` library (extra `hf`), and the reason is logged.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
from pathlib import Path
from typing import Any

import tiktoken

from neuron_lens.errors import MissingExtraError, TokenizerError
from neuron_lens.files.hub import resolve_checkpoint
from neuron_lens.tokenizers.base import Tokenizer
from neuron_lens.tokenizers.convert import NotExact, Roles, tiktoken_from_description
from neuron_lens.tokenizers.huggingface import HuggingFaceTokenizer
from neuron_lens.tokenizers.tiktoken import TiktokenTokenizer

__all__ = ["as_tokenizer", "load_tokenizer"]

_log = logging.getLogger(__name__)
_EXPECTED = "tokenizer.tiktoken, tokenizer.json, or vocab.json with merges.txt"


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a checkpoint (folder, file or name), or one of tiktoken's by its name.

    A local path comes first, then tiktoken's names (`gpt2`, `cl100k_base`, `o200k_base`), then the names
    `files.hub.resolve_checkpoint` knows. In a folder, `tokenizer.tiktoken` (base64 ranks, with `pat_str` and
    `special_tokens` in tokenizer_config.json) comes before `tokenizer.json`, and that before `vocab.json`
    with `merges.txt`.

    Raises TokenizerError when there is no tokenizer or its files are broken, CheckpointError when there is no
    such checkpoint, MissingExtraError when it takes the `tokenizers` library and that is not installed.
    """
    name = os.fspath(name_or_path)
    if not Path(name).expanduser().exists() and name in tiktoken.list_encoding_names():
        return _by_tiktoken_name(name)
    found = resolve_checkpoint(name_or_path)
    folder = found if found.is_dir() else found.parent
    config = _read_config(folder)
    try:
        if found.name.endswith(".tiktoken") or (found.is_dir() and (folder / "tokenizer.tiktoken").is_file()):
            tokenizer: Tokenizer = _from_ranks(
                found if found.is_file() else folder / "tokenizer.tiktoken", config
            )
        else:
            tokenizer = _from_description(_describe(found, config), config, str(found))
        tokenizer.chat_template = _chat_template(folder, config)
        return tokenizer
    except (KeyError, TypeError, AttributeError) as error:
        raise TokenizerError(f"the tokenizer files of {found} are not as expected: {error!r}") from error


def as_tokenizer(given: Any) -> Tokenizer:
    """Any tokenizer as this library's: ours, or an object of tiktoken, `transformers` or `tokenizers`.

    A path or a name is loaded. Objects are taken as they are, with the settings they have in memory, and
    are not changed. Raises TokenizerError for anything else.
    """
    if isinstance(given, Tokenizer):
        return given
    if isinstance(given, str | os.PathLike):
        return load_tokenizer(given)
    if isinstance(given, tiktoken.Encoding):
        return _from_encoding(given)
    backend = getattr(given, "backend_tokenizer", None)
    if backend is not None:
        bos_id = given.bos_token_id
        tokenizer = HuggingFaceTokenizer(
            backend,
            name=getattr(given, "name_or_path", "") or type(given).__name__,
            bos_id=bos_id,
            eos_id=given.eos_token_id,
            pad_id=given.pad_token_id,
            adds_bos=bos_id is not None and backend.encode("").ids[:1] == [bos_id],
        )
        tokenizer.chat_template = _default_template(getattr(given, "chat_template", None))
        return tokenizer
    if type(given).__module__.partition(".")[0] == "tokenizers" and hasattr(given, "to_str"):
        description = json.loads(given.to_str())
        roles = _roles(description, {})
        return HuggingFaceTokenizer(given, name=type(given).__name__, **vars(roles))
    raise TokenizerError(
        f"{type(given).__name__} is no known kind of tokenizer: give a tiktoken.Encoding, a fast tokenizer "
        "of transformers, a tokenizers.Tokenizer, or a path"
    )


def _by_tiktoken_name(name: str) -> TiktokenTokenizer:
    try:
        return _from_encoding(tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:  # the network's errors are OSErrors, a wrong checksum a ValueError
        raise TokenizerError(
            f"tiktoken cannot download its encoding {name!r} ({type(error).__name__}); connect to the "
            "network once, set TIKTOKEN_CACHE_DIR to a folder that has it, or give a folder that has one"
        ) from error


def _from_encoding(encoding: tiktoken.Encoding) -> TiktokenTokenizer:
    end_of_text = encoding._special_tokens.get("<|endoftext|>")
    return TiktokenTokenizer(encoding, bos_id=end_of_text, eos_id=end_of_text)


def _from_ranks(path: Path, config: dict[str, Any]) -> TiktokenTokenizer:
    """tiktoken's own file: one line a token, its bytes in base64 and its rank."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(
                f"line {number} of {path} is {line[:60]!r}: expected a token in base64, a space and its rank"
            ) from error
    if missing := [value for value in range(256) if bytes([value]) not in ranks]:
        raise TokenizerError(
            f"{path} lacks {len(missing)} of the 256 single bytes, first {bytes([missing[0]])!r}"
        )
    if "pat_str" not in config:
        raise TokenizerError(
            f"{path.parent / 'tokenizer_config.json'} lacks 'pat_str', the pattern {path.name} needs"
        )
    special = {str(text): int(token_id) for text, token_id in config.get("special_tokens", {}).items()}
    ids = [*ranks.values(), *special.values()]
    if len(set(ids)) < len(ids):
        raise TokenizerError(
            f"{path} and its special tokens give one id to {len(ids) - len(set(ids)) + 1} tokens"
        )
    try:
        encoding = tiktoken.Encoding(
            str(path.parent.name), pat_str=config["pat_str"], mergeable_ranks=ranks, special_tokens=special
        )
    except ValueError as error:
        raise TokenizerError(
            f"tiktoken does not read the pattern {config['pat_str']!r} of {path.parent}"
        ) from error
    return TiktokenTokenizer(encoding, **vars(_configured_roles(config, special)))


def _describe(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """What `tokenizer.json` says, or would say were it made from vocab.json and merges.txt."""
    folder = path if path.is_dir() else path.parent
    file = path if path.is_file() else folder / "tokenizer.json"
    if file.is_file():
        description = _read_json(file)
        if not isinstance(description.get("model"), dict):
            raise TokenizerError(f"{file} describes no tokenizer: it has no 'model'")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        description = _describe_vocab_and_merges(folder, config)
    else:
        sentencepiece = (folder / "tokenizer.model").is_file()
        raise TokenizerError(
            f"{folder} holds no tokenizer: expected {_EXPECTED}"
            + ("; convert its tokenizer.model with transformers' save_pretrained()" if sentencepiece else "")
        )
    known = {token["id"] for token in description.get("added_tokens") or []}
    later = config.get("added_tokens_decoder") or {}
    description["added_tokens"] = [
        *(description.get("added_tokens") or []),
        *({**token, "id": int(token_id)} for token_id, token in later.items() if int(token_id) not in known),
    ]
    return description


def _describe_vocab_and_merges(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    vocab = _read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line.split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    if wrong := [merge for merge in merges if len(merge) != 2]:
        raise TokenizerError(
            f"a line of {folder / 'merges.txt'} is {' '.join(wrong[0])!r}: expected two tokens"
        )
    if not any(config.get(role) for role in ("bos_token", "eos_token")) and "<|endoftext|>" in vocab:
        config.update(bos_token="<|endoftext|>", eos_token="<|endoftext|>")  # GPT-2's files say nothing of it
    added_file = folder / "added_tokens.json"
    added = _read_json(added_file) if added_file.is_file() else {}
    roles = [_content(config.get(f"{role}_token")) for role in ("bos", "eos", "pad", "unk")]
    roles += map(_content, config.get("additional_special_tokens") or [])
    added |= {token: vocab[token] for token in roles if token is not None and token in vocab}
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    prefix_space = bool(config.get("add_prefix_space"))
    byte_level = {"type": "ByteLevel", "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": text, **flags} for text, i in sorted(added.items(), key=lambda a: a[1])
        ],
        "pre_tokenizer": {**byte_level, "add_prefix_space": prefix_space},
        "decoder": {**byte_level, "add_prefix_space": prefix_space},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }


def _from_description(description: dict[str, Any], config: dict[str, Any], name: str) -> Tokenizer:
    roles = _roles(description, config)
    try:
        return tiktoken_from_description(description, roles, name)
    except NotExact as error:
        reason = str(error)
    _log.info("the tokenizer %s goes through the tokenizers library: %s", name, reason)
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError("tokenizers", "hf", f"the tokenizer of {name} ({reason})") from error
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises plain Exception for a description it cannot read
        raise TokenizerError(
            f"the tokenizers library cannot read the tokenizer of {name}: {error}"
        ) from error
    return HuggingFaceTokenizer(backend, name=name, **vars(roles))


def _roles(description: dict[str, Any], config: dict[str, Any]) -> Roles:
    """Roles from the config where it names them; the BOS policy from there, else from the post-processor."""
    vocab = description["model"].get("vocab")
    ids: dict[str, int] = dict(vocab) if isinstance(vocab, dict) else {}
    if isinstance(vocab, list):  # Unigram: pairs of token and score, in the order of the ids
        ids = {token: token_id for token_id, (token, _) in enumerate(vocab)}
    ids |= {token["content"]: token["id"] for token in description.get("added_tokens") or []}
    first = _first_of_template(description.get("post_processor"))
    if first is not None and config.get("bos_token") is None and first in ids:
        config = {**config, "bos_token": first}
    policy = config.get("add_bos_token")
    if policy is None:
        policy = first is not None and first == _content(config.get("bos_token"))
    return _configured_roles({**config, "add_bos_token": policy}, ids)


def _configured_roles(config: dict[str, Any], ids: dict[str, int]) -> Roles:
    found = {role: ids.get(_content(config.get(f"{role}_token")) or "") for role in ("bos", "eos", "pad")}
    adds_bos = bool(config.get("add_bos_token"))
    if adds_bos and found["bos"] is None:
        raise TokenizerError(
            f"tokenizer_config.json says add_bos_token, and its bos_token {config.get('bos_token')!r} is no "
            "token of this tokenizer; correct one of the two"
        )
    return Roles(bos_id=found["bos"], eos_id=found["eos"], pad_id=found["pad"], adds_bos=adds_bos)


def _first_of_template(post_processor: dict[str, Any] | None) -> str | None:
    """The special token a post-processor puts before a text, if it does."""
    if post_processor is None:
        return None
    if post_processor["type"] == "Sequence":
        found = map(_first_of_template, post_processor["processors"])
        return next((token for token in found if token is not None), None)
    if post_processor["type"] != "TemplateProcessing":
        return None
    first = post_processor["single"][0]
    return str(first["SpecialToken"]["id"]) if "SpecialToken" in first else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The text of chat_template.jinja, else `chat_template` of the config."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    named = config.get("chat_template")
    if isinstance(named, list):  # several, with their names
        named = {one["name"]: one["template"] for one in named}
    return _default_template(named)


def _default_template(named: Any) -> str | None:
    """Of a chat template, or several by name, the one for plain chats."""
    found = named.get("default") if isinstance(named, dict) else named
    return None if found is None else str(found)


def _content(token: Any) -> str | None:
    """A token of tokenizer_config.json, which is its text or an object with it."""
    if isinstance(token, dict):
        token = token.get("content")
    return None if token is None else str(token)


def _read_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over special_tokens_map.json; either may be missing."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            config |= {key: value for key, value in _read_json(folder / name).items() if value is not None}
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a JSON {type(value).__name__}: expected an object")
    return value
