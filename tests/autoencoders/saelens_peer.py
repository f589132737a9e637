"""Run inside the environment of SAELens, never by pytest: `python saelens_peer.py write|read FOLDER`.

write: for each architecture and normalisation, random weights saved by SAELens' own `save_model` in
       FOLDER/<name>/, and inputs, encode, decode and forward in FOLDER/<name>.safetensors.
read:  the folders FOLDER/<name>/ that neuron_lens wrote, loaded by SAELens; the same tensors are written,
       for the inputs found in FOLDER/<name>.inputs.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_class
from safetensors.torch import load_file, save_file

D, S, HEADS = 6, 24, 2
NORMALISATIONS = ["none", "constant_norm_rescale", "layer_norm", "expected_average_only_in"]
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "topk": {"k": 3, "rescale_acts_by_decoder_norm": False},
    "topk-rescaled": {"k": 3, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": 3, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
}
TRANSCODERS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]


def cases() -> dict[str, dict[str, Any]]:
    """Name -> fields of the config."""
    found: dict[str, dict[str, Any]] = {}
    for name, fields in AUTOENCODERS.items():
        base = {"architecture": name.split("-")[0], "d_in": D, "d_sae": S, **fields}
        for normalisation in NORMALISATIONS:
            found[f"{name}.{normalisation}"] = {**base, "normalize_activations": normalisation}
        found[f"{name}.no_b_dec"] = {**base, "apply_b_dec_to_input": False}
        found[f"{name}.hook_z"] = {**base, "reshape_activations": "hook_z"}
    for name in TRANSCODERS:
        base = {"architecture": name, "d_in": D, "d_sae": S, "apply_b_dec_to_input": False}
        found[f"{name}.equal"] = {**base, "d_out": D}
        found[f"{name}.wider"] = {**base, "d_out": D + 2}
    return found


def results(sae: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        encoded = sae.encode(x)
        decoded = sae.decode(encoded)  # undoes the normalisation that encode just did
        out = {"x": x, "encode": encoded, "decode": decoded, "forward": sae(x)}
    return {name: tensor.contiguous().clone() for name, tensor in out.items()}


def write(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, fields in cases().items():
        sae_class, config_class = get_sae_class(fields["architecture"])
        sae = sae_class(config_class.from_dict(fields))
        with torch.no_grad():
            for key, parameter in sae.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
                if key == "threshold":
                    parameter.abs_()
        shape = (5, 4, HEADS, D // HEADS) if fields.get("reshape_activations") == "hook_z" else (5, 4, D)
        x = torch.randn(*shape, generator=generator) + 0.3
        sae.save_model(folder / name)
        save_file(results(sae, x), folder / f"{name}.safetensors")


def read(folder: Path) -> None:
    for path in sorted(folder.glob("*.inputs.safetensors")):
        name = path.name.removesuffix(".inputs.safetensors")
        sae = SAE.load_from_disk(folder / name)
        save_file(results(sae, load_file(path)["x"]), folder / f"{name}.safetensors")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
