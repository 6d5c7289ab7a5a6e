"""Checkpoints of PaddleFormers and PaddleNLP: their tokens, stretches of text in them, and the model itself."""

from __future__ import annotations

import importlib
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import paddle

from .tokens import MOST_BYTE_TOKENS, Bytes, Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIBRARIES = ("paddleformers", "paddlenlp")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "spiece.model")
_BYTES_OF_A_TOKEN = 8  # so many at first are read for each, which few texts exceed


def codec_of(folder: str | Path) -> Bytes | Tokenizer:
    """The tokens of a checkpoint, whose weights are left alone: its tokenizer's, or bytes.

    Raises
    ------
    ValueError
        Where there is no tokenizer, and more tokens than bytes and a few special ones; where no model library is
        installed.
    """
    if any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        return Tokenizer(_transformers().AutoTokenizer.from_pretrained(str(folder)))
    vocab_size = config_of(folder).vocab_size
    if vocab_size > MOST_BYTE_TOKENS:
        raise ValueError(f"{folder} has {vocab_size} tokens, but no tokenizer")
    return Bytes()


def config_of(folder: str | Path) -> Any:
    """The config of a checkpoint, as the model library reads it."""
    return _transformers().AutoConfig.from_pretrained(str(folder))


def load_model(folder: str | Path, dtype: str) -> Any:
    """The model of a checkpoint, by AutoModelForCausalLM of the library that is installed, in evaluation mode."""
    model = _transformers().AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)
    if not paddle.device.get_device().startswith("gpu"):
        model.config.fuse_rms_norm = False  # an operator for GPUs
    model.eval()
    return model


def usual_dtype() -> str:
    """What the kernels of the device in use are made for: bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if paddle.device.get_device().startswith("gpu") else "float32"


def samples(codec: Bytes | Tokenizer, text: bytes, length: int, count: int) -> list[NDArray[np.int64]]:
    """Stretches of a text, as prefills read them, from places spread evenly over it.

    Parameters
    ----------
    text : bytes
        UTF-8, where the checkpoint has a tokenizer.
    length, count : int
        Tokens of a stretch, with what the tokenizer puts before a text; how many stretches.

    Returns
    -------
    list of int64 [length]

    Raises
    ------
    ValueError
        Where the text is too short for it: the stretches do not overlap.
    """
    found, needed = [], length - len(codec.start)
    edges = [len(text) * index // count for index in range(count + 1)]
    for begin, end in zip(edges, edges[1:]):
        part = text[begin:end]
        if begin:
            part = part[part.find(b"\n") + 1 :]  # a stretch begins with a line, and so with a whole letter
        tokens = codec.encode(part[: needed * _BYTES_OF_A_TOKEN])
        if len(tokens) < needed:
            tokens = codec.encode(part)
        if len(tokens) < needed:
            parts = f"a part of it, one of {count}, has" if count > 1 else "it has"
            raise ValueError(
                f"the text is of {len(text):,} bytes: {parts} {len(tokens):,} tokens, fewer than {needed:,}"
            )
        found.append(np.concatenate([codec.start, tokens[:needed]]))
    return found


@paddle.no_grad()
def prefill(model: Any, tokens: NDArray[np.int64]) -> None:
    """Runs the layers of a model over tokens, int64 [length], without the output head, whose logits are large."""
    model.base_model(paddle.to_tensor(tokens[None]), use_cache=False, return_dict=True)


def _transformers() -> Any:
    """The `transformers` of the library that is installed."""
    library = next((name for name in LIBRARIES if util.find_spec(name)), None)
    if library is None:
        raise ValueError(f"neither {' nor '.join(LIBRARIES)} is installed, of which one has to load the checkpoint")
    return importlib.import_module(f"{library}.transformers")
