"""The probe, a byte-level LLaMA of trained weights (examples/probe) in PaddleFormers, and text to feed to it."""

import os
from importlib import metadata, util
from pathlib import Path

import numpy as np
import paddle
from paddleformers.transformers import LlamaForCausalLM

from rrattn.command_line import check_input_file

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
    """A text file that an installation brings, NumPy's licences or Python's language reference; None if too short."""
    licences = [file.locate() for file in metadata.files("numpy") or () if file.name.startswith("LICENSE")]
    reference = util.find_spec("pydoc_data.topics")
    for path in map(Path, [*licences, *([reference.origin] if reference else [])]):
        if path.is_file() and path.stat().st_size >= num_bytes:
            return path
    return None


def choose_document(parser, path, num_bytes, options):
    """The file that a program's user names, or where it is None the default document, of at least `num_bytes` bytes.

    Where there is none, the program ends by `parser.error`; `options` say there what takes so many bytes.
    """
    if path is None:
        path = default_document(num_bytes)
        if path is None:
            parser.error(f"this installation brings no text of the {num_bytes:,} bytes for {options}: name a file")
        return path
    check_input_file(parser, "FILE", path)
    size = path.stat().st_size
    if size < num_bytes:
        parser.error(f"FILE {path} holds {size:,} bytes, fewer than the {num_bytes:,} for {options}")
    return path


def read_tokens(path):
    """The bytes of a file as tokens, int64 [1, number of bytes]."""
    data = Path(path).read_bytes()
    return paddle.to_tensor(np.frombuffer(data, dtype=np.uint8).astype(np.int64)[None])


def read_document(path, num_tokens):
    """Tokens of the beginning of a file as the probe reads a document, after a byte 0: int64 [1, num_tokens]."""
    data = Path(path).read_bytes()
    tokens = np.frombuffer(b"\0" + data[: num_tokens - 1], dtype=np.uint8)
    return paddle.to_tensor(tokens.astype(np.int64)[None])
