"""The one glossary of axes. Every shape in docstrings, errors and site declarations uses these words.

| axis      | meaning                                                                  |
|-----------|--------------------------------------------------------------------------|
| batch     | rows of a batch; each is a sequence of its own                           |
| pos       | positions of a sequence; where attention looks from (the query)          |
| key_pos   | positions attention looks at (longer than pos when a KV cache is used)   |
| head      | query heads                                                              |
| kv_head   | key and value heads (fewer than `head` under grouped-query attention)    |
| d_head    | width of one head                                                        |
| d_model   | width of the residual stream                                             |
| d_mlp     | width of the MLP's hidden layer: its neurons                             |
| d_vocab   | tokens of the vocabulary                                                 |
| d_latent  | latents of a sparse autoencoder                                          |
| expert    | experts of a mixture-of-experts MLP                                      |
| choice    | the experts a token uses, best first                                     |
| token     | tokens of all rows in one axis: batch · pos, or those of them one expert reads |
| one       | an axis of length 1, kept so that the tensor broadcasts                  |
"""

from __future__ import annotations

from typing import Literal, get_args

__all__ = ["AXES", "Axis"]

Axis = Literal[
    "batch",
    "pos",
    "key_pos",
    "head",
    "kv_head",
    "d_head",
    "d_model",
    "d_mlp",
    "d_vocab",
    "d_latent",
    "expert",
    "choice",
    "token",
    "one",
]

AXES: tuple[Axis, ...] = get_args(Axis)
