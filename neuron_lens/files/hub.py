"""From the name of a checkpoint to the local folder that holds it.

Looked for, in this order: a local folder, a checkpoint that ships with the library, a remote folder
(`https://`, `gs://`, `az://`), the Hugging Face cache on this machine, and the Hugging Face hub.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from neuron_lens.errors import CheckpointError, did_you_mean
from neuron_lens.files.model_defs import model_defs_dir, shipped_checkpoints
from neuron_lens.files.remote import is_remote, join_remote, local_copy, remote_exists

__all__ = ["cached_snapshot", "hugging_face_cache", "resolve_checkpoint"]

_POINT_TO_A_FOLDER = (
    "give the path of a local folder with config.json, the weights and the tokenizer's files, such as one "
    "saved by save_pretrained()"
)
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
# Everything a tokenizer can be made of; a checkpoint has some of them.
_TOKENIZER_FILES = (
    "tokenizer.tiktoken",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
_OTHER_FILES = ("generation_config.json",)
_REPOSITORY_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_checkpoint(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """The local folder (or file) of a checkpoint, downloaded first where that is needed.

    `revision` is a branch, tag or commit on the Hugging Face hub. Raises CheckpointError, saying how to
    point to a folder, when there is no such checkpoint or it cannot be fetched.
    """
    name = os.fspath(name_or_path)
    if not name:
        raise CheckpointError(f"an empty checkpoint name was given; {_POINT_TO_A_FOLDER}")
    if is_remote(name):
        return _download_folder(name)
    local = Path(name).expanduser()
    if local.exists():
        if local.is_dir() and not any(local.iterdir()):
            raise CheckpointError(f"the checkpoint folder {local} is empty; {_POINT_TO_A_FOLDER}")
        return local
    if name in shipped_checkpoints():
        return model_defs_dir() / name
    if isinstance(name_or_path, Path) or not _REPOSITORY_NAME.fullmatch(name) or name.startswith("."):
        raise CheckpointError(f"there is no checkpoint folder {name}; {_POINT_TO_A_FOLDER}")
    return cached_snapshot(name, revision=revision) or _download_from_hub(name, revision)


def hugging_face_cache() -> Path:
    """The folder of the Hugging Face hub's cache, as its own environment variables place it."""
    if given := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(given).expanduser()
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    return Path(home).expanduser() / "hub"


def cached_snapshot(name: str, *, revision: str | None = None) -> Path | None:
    """The folder of a complete checkpoint `name` in the Hugging Face cache, or None.

    Complete means: config.json and all weights. Needs no network and no huggingface_hub.
    """
    repository = hugging_face_cache() / ("models--" + name.replace("/", "--"))
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = repository / "snapshots" / commit if commit else None
    return snapshot if snapshot is not None and _is_complete(snapshot) else None


def _is_complete(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    for index in _INDEXES:
        if (folder / index).is_file() and all(
            (folder / shard).is_file() for shard in _shards(folder / index)
        ):
            return True
    return any((folder / single).is_file() for single in _SINGLE_FILES)


def _shards(index: Path) -> list[str]:
    """The files a shard index names. Raises CheckpointError when it is no shard index."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"cannot read the shard index {index}: {error!r}") from error
    if wrong := [shard for shard in shards if Path(shard).name != shard]:
        raise CheckpointError(f"the shard index {index} points outside its folder: {', '.join(wrong)}")
    return shards


def _download_folder(url: str) -> Path:
    """Copy a checkpoint folder from a remote store; its files need not be listed, their names are known."""
    config = local_copy(join_remote(url, "config.json"))
    for names in ((_INDEXES[0],), (_SINGLE_FILES[0],), (_INDEXES[1],), (_SINGLE_FILES[1],)):
        if _fetch_if_there(url, config.parent, names[0]):
            if names[0] in _INDEXES:
                for shard in _shards(config.parent / names[0]):
                    local_copy(join_remote(url, shard))
            break
    else:
        raise CheckpointError(
            f"{url} holds config.json but no weights: expected one of {', '.join(_INDEXES + _SINGLE_FILES)}"
        )
    for name in _TOKENIZER_FILES + _OTHER_FILES:
        _fetch_if_there(url, config.parent, name)
    return config.parent


def _fetch_if_there(url: str, folder: Path, name: str) -> bool:
    """Copy one file into the cache; false when the store has none. A cached file asks for no network."""
    if (folder / name).is_file():
        return True
    if not remote_exists(join_remote(url, name)):
        return False
    local_copy(join_remote(url, name))
    return True


def _download_from_hub(name: str, revision: str | None) -> Path:
    shipped = shipped_checkpoints()
    hint = f" ({did_you_mean(name, shipped)})" if shipped and "/" not in name else ""
    try:
        import huggingface_hub
        from huggingface_hub import errors as hub_errors
    except ImportError as error:
        raise CheckpointError(
            f"{name!r} is no local folder, does not ship with the library{hint}, and is not in the "
            f"Hugging Face cache {hugging_face_cache()}; to download it, pip install 'neuron-lens[hf]', "
            f"or {_POINT_TO_A_FOLDER}"
        ) from error
    try:
        # One quick question first: without a network it fails at once, where a download would retry.
        info = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10)
        return _snapshot(huggingface_hub, name, info)
    except hub_errors.GatedRepoError as error:
        reason = "it is gated: accept its terms on huggingface.co and log in with `hf auth login`"
        raise _not_fetched(name, reason, hint) from error
    except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError) as error:
        what = f"the Hugging Face hub has no model {name!r}" + (
            f" at revision {revision!r}" if revision else ""
        )
        raise _not_fetched(name, what + " (or it is private)", hint) from error
    except hub_errors.OfflineModeIsEnabled as error:
        raise _not_fetched(
            name, "HF_HUB_OFFLINE forbids the network and it is not in the cache", hint
        ) from error
    except Exception as error:
        # The hub's client changes its HTTP library between versions, and the classes of its network errors
        # with it; any failure of a download reaches the user as one line, with its cause chained.
        reason = (str(error).strip().splitlines() or [""])[0]
        raise _not_fetched(
            name, f"the hub cannot be reached ({type(error).__name__}: {reason[:160]})", hint
        ) from error


def _snapshot(huggingface_hub: Any, name: str, info: Any) -> Path:
    """Fetch config, tokenizer and weights; PyTorch pickles only where there are no safetensors."""
    files = [sibling.rfilename for sibling in info.siblings or []]
    safe = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    weights = ["model*.safetensors", _INDEXES[0]] if safe else ["pytorch_model*.bin", _INDEXES[1]]
    folder = huggingface_hub.snapshot_download(
        name, revision=info.sha, allow_patterns=["config.json", *_OTHER_FILES, *_TOKENIZER_FILES, *weights]
    )
    return Path(folder)


def _not_fetched(name: str, reason: str, hint: str) -> CheckpointError:
    return CheckpointError(f"cannot load {name!r}{hint}: {reason}; {_POINT_TO_A_FOLDER}")
