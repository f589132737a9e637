"""Runs in the environment of transformer-lens: python transformer_lens_peer.py FAMILY FOLDER OUT.safetensors

Patches with transformer_lens.patching on the Hugging Face model of FOLDER and writes down the tables.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "faces" / "hooked_transformer"))

NAMES = [
    "resid_pre",
    "resid_mid",
    "attn_out",
    "mlp_out",
    "attn_head_out_by_pos",
    "attn_head_q_by_pos",
    "attn_head_k_by_pos",
    "attn_head_v_by_pos",
    "attn_head_pattern_by_pos",
    "attn_head_pattern_dest_src_pos",
    "attn_head_out_all_pos",
    "attn_head_q_all_pos",
    "attn_head_k_all_pos",
    "attn_head_v_all_pos",
    "attn_head_pattern_all_pos",
    "attn_head_all_pos_every",
    "attn_head_by_pos_every",
    "block_every",
]
CLEAN, CORRUPTED = [[5, 17, 33, 2, 48, 9, 21]], [[11, 3, 3, 57, 8, 30, 22]]


ROWS = [[1, 3, 0], [0, 2, 1], [1, 6, 1]]


def average_setter(corrupted, index, clean):  # type: ignore[no-untyped-def]
    """A setter that no library has: the average of both runs, one head at one position."""
    corrupted[:, index[1], index[2]] = (corrupted[:, index[1], index[2]] + clean[:, index[1], index[2]]) / 2
    return corrupted


def metric(logits):  # type: ignore[no-untyped-def]
    """One number, as the original wants it."""
    return (logits[:, -1, 3] - logits[:, -1, 5] + logits[:, 2, 7]).mean()


def main() -> None:
    """Patch with every function."""
    import pandas
    import torch
    from safetensors.torch import save_file
    from transformer_lens import patching

    # tqdm of the original writes to stderr only
    spec = Path(__file__).parents[1] / "faces" / "hooked_transformer" / "transformer_lens_peer.py"
    import importlib.util

    loader = importlib.util.spec_from_file_location("face_peer", spec)
    face_peer = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(face_peer)
    family, folder, out = sys.argv[1:]
    model = face_peer.build(family, folder, False)
    with torch.no_grad():
        _, clean = model.run_with_cache(torch.tensor(CLEAN))
        found = {}
        for name in NAMES:
            function = getattr(patching, f"get_act_patch_{name}", None)
            if function is None or (family != "gpt2" and name.endswith("_every") and "head" in name):
                continue
            found[name] = function(model, torch.tensor(CORRUPTED), clean, metric).float().contiguous()
        index = pandas.DataFrame(ROWS, columns=["layer", "pos", "head"])
        arguments = (model, torch.tensor(CORRUPTED), clean, metric, average_setter, "z")
        found["rows"] = patching.generic_activation_patch(*arguments, index_df=index)
        found["setter"], frame = patching.generic_activation_patch(
            *arguments, index_axis_names=["layer", "pos", "head_index"], return_index_df=True
        )
        found["setter"] = found["setter"].contiguous()
        found["frame"] = torch.tensor(frame.to_numpy()).contiguous()
    save_file(found, out)


if __name__ == "__main__":
    main()
