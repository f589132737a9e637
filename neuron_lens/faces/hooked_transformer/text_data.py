"""Texts of the user's as data sets: files to rows of text, texts to rows of ids, logits to a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neuron_lens.errors import MissingExtraError, RequestError
from neuron_lens.faces.hooked_transformer.model import HookedTransformer
from neuron_lens.faces.hooked_transformer.tokenizer_view import TokenizerView
from neuron_lens.tokenizers import as_tokenizer

__all__ = [
    "TextRows",
    "TokenRows",
    "get_dataset",
    "keep_single_column",
    "logits_to_df",
    "tokenize_and_concatenate",
]

# Names of published collections, and where to find each.
_PUBLISHED = {
    "openwebtext": "stas/openwebtext-10k",
    "owt": "stas/openwebtext-10k",
    "pile": "NeelNanda/pile-10k",
    "c4": "NeelNanda/c4-10k",
    "code": "NeelNanda/code-10k",
    "python": "NeelNanda/code-10k",
    "c4_code": "NeelNanda/c4-code-20k",
    "c4-code": "NeelNanda/c4-code-20k",
    "wiki": "NeelNanda/wiki-10k",
}


class TextRows(Sequence[dict[str, str]]):
    """Rows {"text": …}; `rows["text"]` is the list of all texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = list(texts)

    def __getitem__(self, key: Any) -> Any:
        if key == "text":
            return self.texts
        return TextRows(self.texts[key]) if isinstance(key, slice) else {"text": self.texts[key]}

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[dict[str, str]]:
        return ({"text": text} for text in self.texts)

    @property
    def column_names(self) -> list[str]:
        """["text"]"""
        return ["text"]


class TokenRows(Sequence[dict[str, Tensor]]):
    """Rows {"tokens": ids [pos]}, as a DataLoader takes them; `rows["tokens"]` is [row, pos]."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __getitem__(self, key: Any) -> Any:
        if key == "tokens":
            return self.tokens
        return {"tokens": self.tokens[key]}

    def __len__(self) -> int:
        return len(self.tokens)


def get_dataset(dataset_name: str, **options: Any) -> TextRows:
    """Texts of files: a path, a folder or a glob of text files, or `.jsonl` with a "text" in each line.

    Raises RequestError for the names of published collections, which need a download, and for paths without text.
    """
    from neuron_lens.harvest.corpus import Corpus  # needed only here

    if options:
        raise RequestError(f"get_dataset has no option {sorted(options)}; it reads files")
    if dataset_name in _PUBLISHED:
        raise RequestError(
            f"{dataset_name!r} is the published data set {_PUBLISHED[dataset_name]!r}, which this library does not fetch: "
            "download it (datasets.load_dataset), or give get_dataset a path of text files or .jsonl"
        )
    return TextRows(document.text for document in Corpus.of_paths([dataset_name]))


def keep_single_column(dataset: Any, col_name: str) -> Any:
    """A data set (of the datasets library, or any rows that are mappings) with one column only.

    Raises RequestError when there is no such column.
    """
    known = getattr(dataset, "column_names", None)
    if known is not None:
        if col_name not in known:
            raise RequestError(f"the data set has no column {col_name!r}; it has {', '.join(known)}")
        dropped = [name for name in known if name != col_name]
        return dataset.remove_columns(dropped) if dropped else dataset
    rows = list(dataset)
    lacking = next((row for row in rows if not isinstance(row, Mapping) or col_name not in row), None)
    if lacking is not None:
        raise RequestError(f"a row of the data set has no column {col_name!r}: {lacking!r:.80}")
    return [{col_name: row[col_name]} for row in rows]


def tokenize_and_concatenate(
    dataset: Any,
    tokenizer: Any,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int | None = None,
) -> TokenRows:
    """Texts joined with the end-of-text token between them, cut into rows of `max_length` ids; the rest is left out.

    Args:
        dataset: texts, or rows with a text under `column_name`.
        tokenizer: any known kind, or a model that has one.
        streaming, num_proc: accepted; rows are made at once.
        add_bos_token: every row begins with the BOS token, where the tokenizer has one.

    Raises RequestError when there is too little text for one row.
    """
    if isinstance(tokenizer, HookedTransformer):
        known = tokenizer._need_tokenizer()
    else:
        known = as_tokenizer(tokenizer.inner if isinstance(tokenizer, TokenizerView) else tokenizer)
    ids: list[int] = []
    for number, row in enumerate(dataset):
        if number and known.eos_id is not None:
            ids.append(known.eos_id)
        ids += known.encode(
            row if isinstance(row, str) else row[column_name], bos=False, allowed_special=True
        )
    bos = [known.bos_id] if add_bos_token and known.bos_id is not None else []
    width = max_length - len(bos)
    rows = [bos + ids[start : start + width] for start in range(0, len(ids) - width + 1, width)]
    if not rows:
        raise RequestError(f"the texts have {len(ids)} tokens together, too few for one row of {max_length}")
    return TokenRows(torch.tensor(rows))


def logits_to_df(logits: Tensor, tokenizer: Any = None, top_k: int | None = None) -> Any:
    """Logits of one position [d_vocab] as a pandas table, likeliest token first.

    Columns: token_index, token_string (with a tokenizer), logit, log_prob, probability. Needs pandas.
    """
    try:
        import pandas
    except ImportError:
        raise MissingExtraError("pandas", "pandas", "logits_to_df") from None
    if logits.dim() != 1:
        raise RequestError(f"expected the logits of one position [d_vocab]; got {list(logits.shape)}")
    log_probs = logits.detach().float().log_softmax(-1)
    order = log_probs.argsort(descending=True)[:top_k]
    columns: dict[str, Any] = {"token_index": order.tolist()}
    if tokenizer is not None:
        columns["token_string"] = [tokenizer.decode([i]) for i in order.tolist()]
    columns["logit"] = logits.detach()[order].tolist()
    columns["log_prob"] = log_probs[order].tolist()
    columns["probability"] = log_probs[order].exp().tolist()
    return pandas.DataFrame(columns)
