"""The probe, a byte-level LLaMA of trained weights (examples/probe) in PaddleFormers, and text to feed to it."""

import os
from importlib import metadata, util
from pathlib import Path

import numpy as np
import paddle
from paddleformers.transformers import LlamaForCausalLM

NUM_BYTES = 256
MAX_TOKENS = 16384  # the probe's context
PROBE = Path(__file__).parent / "probe"


def load_probe():
    """The probe in float32 and evaluation mode."""
    model = LlamaForCausalLM.from_pretrained(str(PROBE), dtype="float32")
    model.config.fuse_rms_norm = False  # the fused kernel is for GPUs
    model.eval()
    return model


def use_all_cores():
    """Paddle's own matrix products run on one CPU core unless told otherwise; rrattn's use all of them."""
    paddle.base.core.set_num_threads(os.cpu_count())


def default_document(num_bytes):
    """A long text file that an installation brings: NumPy's licences, or Python's language reference."""
    licences = [file.locate() for file in metadata.files("numpy") or () if file.name.startswith("LICENSE")]
    reference = util.find_spec("pydoc_data.topics")
    for path in map(Path, [*licences, *([reference.origin] if reference else [])]):
        if path.is_file() and path.stat().st_size >= num_bytes:
            return path
    raise SystemExit(f"this installation brings no text of {num_bytes:,} bytes: name a file, or use fewer --tokens")


def read_tokens(path, length=0):
    """The bytes of a file as tokens, int64 [1, number of bytes].

    Raises
    ------
    SystemExit
        When the file holds fewer than `length`, those of one sequence.
    """
    data = Path(path).read_bytes()
    if len(data) < length:
        raise SystemExit(f"{path} holds {len(data):,} bytes, fewer than the {length:,} of one sequence")
    return paddle.to_tensor(np.frombuffer(data, dtype=np.uint8).astype(np.int64)[None])


def read_document(path, num_tokens):
    """Tokens of the beginning of a file as the probe reads a document, after a byte 0: int64 [1, num_tokens].

    Raises
    ------
    SystemExit
        When the file holds too few bytes.
    """
    data = Path(path).read_bytes()
    if len(data) < num_tokens - 1:
        raise SystemExit(f"{path} holds {len(data):,} bytes, fewer than the {num_tokens - 1:,} to read")
    tokens = np.frombuffer(b"\0" + data[: num_tokens - 1], dtype=np.uint8)
    return paddle.to_tensor(tokens.astype(np.int64)[None])
