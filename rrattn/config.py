"""Settings of RRAttention: the sole home of their defaults."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

BLOCK_SIZE = 128
"""Tokens in a block, of queries and of keys: the unit of sparsity."""

STRIDES = (2, 4, 8, 16, 32, 64)
"""Sample strides that can be used: divisors of the block size that leave at least two samples in a block."""


@dataclass(frozen=True)
class RRAttentionConfig:
    """Settings of RRAttention (arXiv 2602.05853) for a model.

    Parameters
    ----------
    stride : int
        Sample stride in tokens: one query in `stride` is sampled, keys are summed over `stride` tokens. A larger one
        estimates faster and less finely. One of 2, 4, 8, 16, 32, 64; the paper uses 8 and 16.
    threshold : float or sequence
        Share of the estimated attention mass to keep, in (0, 1]; 1 keeps every block (dense attention). A sequence has
        one entry per layer, each a float or a sequence of one float per query head.
    keep_sink : bool
        Always keep the first visible key block of a row (the attention sink).
    keep_last : bool
        Keep every visible block of the last query block row, where a prompt's question is and its answer begins: one
        row of a call. In a prefill by chunks it is a row of each chunk, in a pack of sequences that of the last one; to
        select what one prefill does, chunks but the last need False.
    keep_local : int
        When causal, always keep this many visible key blocks directly before those of the row's own positions, which
        are kept anyway; 0: none. Tokens at the start of a block look back over its edge, but are too few to count much
        in its mass. No effect when not causal, where a row has no own positions. With this rule and keep_last a small
        model came to 99.9% of dense quality, with keep_last alone to 96.0%, with this alone to 93.3%, with neither to
        89.5% (tools/evaluate.md).
    head_offset : int
        Number of the first query head, for heads sharded over ranks: the sampled positions depend on it.
    softmax_scale : float, optional
        Default: 1 / sqrt(head_dim), or what the model asks for.
    dense_layers : sequence of int
        Layers, counted from 0, that attend every block they see. Default: none.
    min_length : int
        With fewer keys than this, in tokens, every layer attends every block it sees: selecting pays from some length
        on that depends on device, model and threshold. Default: 0, off, since in a prefill by chunks each chunk counts
        the keys so far, so that the first ones may attend more than one prefill of the whole would.

    Raises
    ------
    ValueError
        With the value and what is allowed.
    """

    stride: int = 8
    threshold: float | Sequence[float | Sequence[float]] = 0.95
    keep_sink: bool = True
    keep_last: bool = True
    keep_local: int = 1
    head_offset: int = 0
    softmax_scale: float | None = None
    dense_layers: Sequence[int] = ()
    min_length: int = 0

    def __post_init__(self):
        if self.stride not in STRIDES:
            raise ValueError(f"stride is {self.stride}, but must be one of {', '.join(map(str, STRIDES))}")
        for name in ("keep_local", "head_offset", "min_length"):
            _check_count(getattr(self, name), name)
        if not isinstance(self.dense_layers, (list, tuple)) or not all(map(_is_count, self.dense_layers)):
            raise ValueError(f"dense_layers is {self.dense_layers!r}, but must be a sequence of integers of at least 0")
        if self.softmax_scale is not None and not math.isfinite(self.softmax_scale):
            raise ValueError(f"softmax_scale is {self.softmax_scale}, but must be finite")
        for name in ("keep_sink", "keep_last"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but must be True or False")
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        object.__setattr__(self, "threshold", _checked(self.threshold, "threshold", depth=2))

    @classmethod
    def from_json(cls, path: str | Path) -> RRAttentionConfig:
        """The settings in a JSON file, an object of any of the fields by name; defaults for the others.

        `tools/calibrate.py` writes such a file, with a threshold for each layer or head.

        Raises
        ------
        ValueError
            When the file holds no JSON object, a name that is no setting, or a value that is not allowed.
        """
        try:
            given = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        known = [field.name for field in fields(cls)]
        if not isinstance(given, dict):
            raise ValueError(f"{path} holds a {type(given).__name__}, but must hold an object of {', '.join(known)}")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(f"{path} sets {', '.join(unknown)}, but the settings are {', '.join(known)}")
        return cls(**given)

    def to_json(self, path: str | Path) -> None:
        """Writes all settings into a file that `from_json` reads."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    def layer_threshold(self, layer_index: int, num_layers: int) -> float | tuple[float, ...]:
        """The threshold of one layer: a float, or a tuple of one float per query head.

        Raises
        ------
        ValueError
            When thresholds are given per layer, but not for `num_layers` layers.
        """
        if isinstance(self.threshold, float):
            return self.threshold
        if len(self.threshold) != num_layers:
            raise ValueError(
                f"threshold has {len(self.threshold)} entries, but the model has {num_layers} layers: "
                "give one float, or one entry per layer"
            )
        return self.threshold[layer_index]

    def layer_is_dense(self, layer_index: int, num_layers: int) -> bool:
        """Whether one layer attends every block it sees.

        Raises
        ------
        ValueError
            When `dense_layers` names a layer beyond the last of `num_layers`.
        """
        absent = [layer for layer in self.dense_layers if layer >= num_layers]
        if absent:
            raise ValueError(f"dense_layers names layer {absent[0]}, but the model has {num_layers} layers, from 0 on")
        return layer_index in self.dense_layers


def int64_count(value, name):
    """An integer of at least 0 for the kernels, whose int64 holds no more: a larger one is cut to that.

    Raises
    ------
    ValueError
        For anything else, True and False among it.
    """
    _check_count(value, name)
    return min(value, 2**63 - 1)


def _check_count(value, name):
    if not _is_count(value):
        raise ValueError(f"{name} is {value!r}, but must be an integer of at least 0")


def _is_count(value):
    """Whether this is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _checked(threshold, name, depth):
    """A float in (0, 1], or tuples of such to the given depth."""
    if isinstance(threshold, (list, tuple)) and depth > 0:
        return tuple(_checked(entry, f"{name}[{i}]", depth - 1) for i, entry in enumerate(threshold))
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold <= 1:
        raise ValueError(f"{name} is {threshold!r}, but must be in (0, 1]")
    return float(threshold)


# What the functions of the published release (`rrattn.published`) start from, each as it was there.
PUBLISHED_PREFILL = RRAttentionConfig(threshold=0.8, keep_sink=False, keep_last=False, keep_local=0)
PUBLISHED_ESTIMATE = RRAttentionConfig(threshold=0.9, keep_sink=False, keep_last=False, keep_local=0)
PUBLISHED_PATCH = RRAttentionConfig(threshold=0.9, keep_last=True, keep_local=0)
