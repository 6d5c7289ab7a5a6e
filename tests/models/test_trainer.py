"""PaddleFormers' own trainer runs rrattn when its YAML says so: a few steps of pretraining, each run a process."""

import json
import re
import subprocess
import sys

import pytest

pytest.importorskip("paddleformers")
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

SCRIPT = """
import rrattn
from paddleformers.cli.launcher import launch

launch()
"""
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
}
RUN = """
stage: PT
continue_training: false
model_name_or_path: {folder}
attn_impl: {attn_impl}
train_dataset_path: {folder}/text.jsonl
train_dataset_type: erniekit
train_dataset_prob: "1.0"
eval_dataset_path: {folder}/text.jsonl
eval_dataset_type: erniekit
eval_dataset_prob: "1.0"
max_seq_len: 1024
packing: true
do_train: true
max_steps: 3
per_device_train_batch_size: 1
learning_rate: 1.0e-2
logging_steps: 1
output_dir: {folder}/out
device: cpu
fp16_opt_level: O1
template_backend: jinja
report_to: none
seed: 1
"""


@pytest.fixture
def folder(tmp_path):
    """A model without weights, a tokenizer of bytes, and text."""
    vocabulary = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    lines = ({"text": " ".join(str(i * i) for i in range(n, n + 400))} for n in range(20))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def losses(folder, attn_impl, **settings):
    """The loss of each step."""
    (folder / "config.json").write_text(json.dumps({**LLAMA, **settings}))
    (folder / "run.yaml").write_text(RUN.format(folder=folder, attn_impl=attn_impl))
    command = [sys.executable, "-c", SCRIPT, "train", str(folder / "run.yaml")]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return [float(loss) for loss in re.findall(r" loss: ([\d.]+),", run.stdout + run.stderr)]


def test_the_yaml_names_rrattn(folder):
    dense = losses(folder, "eager")
    assert len(dense) == 3 and dense[-1] < dense[0]
    every_block = losses(folder, "rrattn", rrattn_threshold=1.0)
    assert every_block == pytest.approx(dense, abs=1e-5)
    sparse = losses(folder, "rrattn", rrattn_threshold=0.1, rrattn_keep_last=False, rrattn_keep_local=0)
    assert len(sparse) == 3 and max(abs(a - b) for a, b in zip(sparse, dense)) > 1e-4
