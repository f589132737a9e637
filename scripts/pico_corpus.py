"""The text that `pico` is trained, evaluated and explained on: Python's standard library.

Tests are left out. Whole files are held out by a fixed hash of their path, so that the split is the same on
every machine. Used by train_pico.py and evaluate_pico.py.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
from pathlib import Path

import numpy as np

LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "__pycache__", "turtledemo", "ensurepip"}
END_OF_TEXT = "<|endoftext|>"
# words with their leading space and underscores, numbers by up to three digits, punctuation, line ends with the next
# line's indentation
PATTERN = r" ?_*\p{L}+|\p{N}{1,3}|_+| ?[^\s\p{L}\p{N}_]+|\n+[ \t]*|[ \t]+(?!\S)|\s+"


def documents() -> list[tuple[str, str]]:
    """(path relative to the library, text) of every module, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT & set(relative.parts):
            continue
        text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
        if text.strip():
            found.append((relative.as_posix(), text))
    return found


def is_held_out(path: str) -> bool:
    """About a tenth of all files, chosen by a hash of the path."""
    return hashlib.sha256(path.encode()).digest()[0] < 26


def split() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Training documents and held-out documents."""
    everything = documents()
    return [d for d in everything if not is_held_out(d[0])], [d for d in everything if is_held_out(d[0])]


def train_tokenizer(texts: list[str], vocabulary: int, folder: Path) -> None:
    """Train a byte-level BPE and write its ranks in the form that tiktoken reads."""
    import base64

    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary - 1, initial_alphabet=alphabet, min_frequency=2)
    tokenizer.train_from_iterator(texts, trainer)
    decode = {character: byte for byte, character in _byte_characters().items()}
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(decode[c] for c in token) for token, _ in by_id]
    # single bytes first, in byte order; the merged tokens keep the order in which they were learned
    merged = [token for token in tokens if len(token) > 1]
    ordered = [bytes([byte]) for byte in range(256)] + merged
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ordered)]
    (folder / "tokenizer.tiktoken").write_text("".join(lines))
    settings = {
        "pat_str": PATTERN,
        "special_tokens": {END_OF_TEXT: len(ordered)},
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _byte_characters() -> dict[int, str]:
    """The printable stand-in that byte-level BPE uses for each byte: printable latin-1 as itself, others from U+0100 on."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in kept]
    return {byte: chr(byte) for byte in kept} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


def load_encoding(folder: Path):
    """The trained tokenizer as a tiktoken encoding."""
    import base64

    import tiktoken

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    ranks = {}
    for line in (folder / "tokenizer.tiktoken").read_text().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    return tiktoken.Encoding(
        "pico", pat_str=settings["pat_str"], mergeable_ranks=ranks, special_tokens=settings["special_tokens"]
    )


def token_stream(texts: list[str], encoding) -> np.ndarray:
    """All documents as one stream of ids, each begun by the end-of-text token."""
    parts = [[encoding.eot_token, *encoding.encode_ordinary(text)] for text in texts]
    return np.concatenate([np.array(part, dtype=np.uint16) for part in parts])


def write_sample(held_out: list[tuple[str, str]], path: Path, limit: int) -> int:
    """Write held-out files, those of a hash order first, until `limit` characters; returns how many files.

    The tables of `encodings/` are left out: they are long and all alike.
    """
    readable = [document for document in held_out if not document[0].startswith("encodings/")]
    ordered = sorted(readable, key=lambda d: hashlib.sha256(d[0].encode()).hexdigest())
    chosen, total = [], 0
    for name, text in ordered:
        if total + len(text) <= limit:
            chosen.append({"path": name, "text": text})
            total += len(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(json.dumps(row) + "\n" for row in sorted(chosen, key=lambda row: row["path"]))
    path.write_bytes(gzip.compress(body.encode(), mtime=0))
    return len(chosen)
