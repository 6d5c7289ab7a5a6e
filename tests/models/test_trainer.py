"""PaddleFormers' own trainer runs rrattn when its YAML says so: examples/pretrain.yaml, each run a process."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

pytest.importorskip("paddleformers")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

FLAG = "attn_impl" if metadata.version("paddleformers") == "1.0.0" else "_attn_implementation"
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
    "fuse_rms_norm": False,  # an operator for GPUs
}


@pytest.fixture
def folder(tmp_path):
    """A current folder for the trainer: a model without weights, whose tokenizer is one of bytes, and text."""
    model = tmp_path / "model"
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(model)
    lines = ({"text": " ".join(str(i * i) for i in range(n, n + 400))} for n in range(20))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def losses(folder, attn_impl, **settings):
    """The loss of each step."""
    (folder / "model" / "config.json").write_text(json.dumps({**LLAMA, **settings}))
    run, named = (EXAMPLES / "pretrain.yaml").read_text(), "attn_impl: rrattn\n"
    assert named in run
    (folder / "run.yaml").write_text(run.replace(named, f"{FLAG}: {attn_impl}\n"))
    command = [sys.executable, str(EXAMPLES / "pretrain.py"), "train", "run.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}  # where it is not installed
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return [float(loss) for loss in re.findall(r" loss: ([\d.]+),", run.stdout + run.stderr)]


def test_the_yaml_names_rrattn(folder):
    dense = losses(folder, "eager")
    assert len(dense) == 3 and dense[-1] < dense[0]
    every_block = losses(folder, "rrattn", rrattn_threshold=1.0)
    assert every_block == pytest.approx(dense, abs=1e-5)
    sparse = losses(folder, "rrattn", rrattn_threshold=0.1, rrattn_keep_last=False, rrattn_keep_local=0)
    assert len(sparse) == 3 and max(abs(a - b) for a, b in zip(sparse, dense)) > 1e-4
