"""Settings of RRAttention, and the only place where their defaults stand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict, cast

from . import arguments

BLOCK_SIZE = 128
"""Tokens in a block, of queries and of keys: the unit of sparsity."""

MAX_SEQLEN_K_ON_GPU = 1 << 20
"""Keys that a GPU selects from at most (csrc/cuda/dispatch.cpp)."""

CAUSAL = False
"""What calls are that do not say, as `paddle.nn.functional.scaled_dot_product_attention` and `flashmask_attention`."""


class Sampling(TypedDict, total=False):
    """How to estimate: keyword arguments of :func:`rrattn.estimate_block_scores`."""

    stride: int
    key_stride: int | None
    head_offset: int
    softmax_scale: float | None
    spread: float


class KeepRules(TypedDict, total=False):
    """What to keep by other rules than the threshold: keyword arguments of :func:`rrattn.select_blocks`."""

    keep_sink: bool
    keep_last: bool
    keep_local: int
    min_share: float


class Settings(Sampling, KeepRules, total=False):
    """Any fields of :class:`RRAttentionConfig`: keyword arguments of :func:`rrattn.enable`."""

    threshold: float | Sequence[float | Sequence[float]]
    dense_layers: Sequence[int]
    min_length: int
    deterministic: bool | None
    compensate: bool
    quantization: str | None


@dataclass(frozen=True)
class RRAttentionConfig:
    """Settings of RRAttention (arXiv 2602.05853) for a model.

    Parameters
    ----------
    stride : int
        Sample stride in tokens: one query in `stride` is sampled. A larger one estimates faster and less finely. One of
        2, 4, 8, 16, 32, 64; the paper uses 8 and 16.
    key_stride : int, optional
        Tokens over which keys are summed, one of 1, 2, 4, 8, 16, 32, 64. A smaller one estimates more finely, at as
        many times the products. Default: `stride`, as in the paper.
    spread : float
        How much the variance within a stride of keys adds to its score, at least 0. Mean keys understate strides in
        which a few keys stand out; 1 adds what the variance adds on average to the mean of the exponentials, 0 nothing,
        as in the paper.
    threshold : float or sequence
        Share of the estimated attention mass to keep, in (0, 1]; 1 keeps every block (dense attention). The true mass
        in the kept blocks is another share, often a smaller one: 0.95 kept 90.9% in a model of 135 million weights over
        8,192 tokens, and `rrattn.collect_stats` tells it of yours. A sequence has one entry per layer, each a float or
        a sequence of one float per query head.
    keep_sink : bool
        Always keep the first visible key block of a row (the attention sink).
    keep_last : bool
        Keep every visible block of the last query block row of a call, where a prompt's question is and its answer
        begins. In a prefill by chunks each chunk has such a row: to select what one prefill does, all chunks but the
        last need False. In a pack of sequences it is the row of the last one.
    keep_local : int
        When causal, always keep this many visible key blocks directly before those of the row's own positions, which
        are kept anyway; 0: none. Tokens at the start of a block look back over its edge, but are too few to count much
        in its mass. No effect when not causal, where a row has no own positions. With this rule and keep_last a small
        model came to 99.9% of dense quality, with keep_last alone to 96.0%, with this alone to 93.3%, with neither to
        89.5% (docs/quality.md).
    min_share : float
        Below a threshold of 1: a block whose share of the row's estimated mass is less than `min_share` times that of
        an average block that the row sees is not kept for its mass, from 0 (the paper) to 1. Rows whose mass is spread
        over many blocks would else keep nearly all of them. A high threshold with a least share is better than a lower
        one without: a public model of 135 million weights lost 0.52% at 32.7% of the blocks with the defaults, and
        0.79% at 31.5% with 0.95 and neither least share nor spread (docs/quality.md).
    head_offset : int
        Number of the first query head, for heads sharded over ranks: the sampled positions depend on it.
    softmax_scale : float, optional
        Default: 1 / sqrt(head_dim), or what the model asks for.
    dense_layers : sequence of int
        Layers, counted from 0, that attend every block they see. Default: none.
    min_length : int
        With fewer keys than this, in tokens, every layer attends every block it sees. From which length on it pays to
        select depends on device, model and threshold. Default: 0, off, since in a prefill by chunks each chunk counts
        only the keys so far: the first chunks might attend more than one prefill of the whole would.
    deterministic : bool, optional
        Gradients with the same bits on every run, on a GPU too, where that takes 4 to 22% longer (H200); on a CPU
        they always are. Default: as Paddle's FLAGS_cudnn_deterministic says when attention is called.
    compensate : bool
        Let the mean key and value of a block stand in for it where it is not selected but wholly visible, rather than
        leave it out. For inference alone: a call that would record gradients is refused.
    quantization : str, optional
        "qk_int8_pv_fp8": attention multiplies numbers of eight bits, INT8 queries and keys, and FP8 probabilities and
        values (docs/quantization.md). The estimate and decoding steps stay as they are. On a CPU and on Hopper (there
        for head sizes up to 128), for inference alone, and without `compensate`. Default: none.

    Numbers and flags may be NumPy's, and sequences arrays of NumPy or iterators; they are kept as plain Python.

    Raises
    ------
    ValueError
        With the value and what is allowed.
    """

    stride: int = 8
    key_stride: int | None = None
    threshold: float | Sequence[float | Sequence[float]] = 0.98
    keep_sink: bool = True
    keep_last: bool = True
    keep_local: int = 1
    min_share: float = 0.25
    head_offset: int = 0
    softmax_scale: float | None = None
    spread: float = 1.0
    dense_layers: Sequence[int] = ()
    min_length: int = 0
    deterministic: bool | None = None
    compensate: bool = False
    quantization: str | None = None

    def __post_init__(self) -> None:
        checked: Settings = {
            **self.sampling(),
            **self.keep_rules(),
            "threshold": arguments.thresholds(self.threshold, depth=2),
            "dense_layers": arguments.counts(self.dense_layers, "dense_layers"),
            "min_length": arguments.count(self.min_length, "min_length"),
            "deterministic": arguments.optional_flag(self.deterministic, "deterministic"),
            "compensate": arguments.flag(self.compensate, "compensate"),
            "quantization": arguments.quantization(self.quantization),
        }
        refuse_compensated_quantization(self.compensate, self.quantization)
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def sampling(self) -> Sampling:
        """How to estimate, as keyword arguments of :func:`rrattn.estimate_block_scores`."""
        return checked_sampling(self.stride, self.key_stride, self.head_offset, self.softmax_scale, self.spread)

    def keep_rules(self) -> KeepRules:
        """What to keep by other rules than the threshold, as keyword arguments of :func:`rrattn.select_blocks`."""
        return checked_keep_rules(self.keep_sink, self.keep_last, self.keep_local, self.min_share)

    @classmethod
    def from_json(cls, path: str | PathLike[str]) -> RRAttentionConfig:
        """The settings in a JSON file, an object of any of the fields by name; defaults for the others.

        `rrattn calibrate` writes such a file, with a threshold for each layer or head.

        Raises
        ------
        ValueError
            When the file holds no JSON object, a name that is no setting or stands there twice, or a value that is not
            allowed.
        """
        try:
            given = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_settings_named_once)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if not isinstance(given, dict):
            raise ValueError(f"{path} holds a {type(given).__name__}, but must hold an object of {', '.join(SETTINGS)}")
        unknown = [name for name in given if name not in SETTINGS]
        if unknown:
            raise ValueError(f"{path} sets {', '.join(unknown)}, but the settings are {', '.join(SETTINGS)}")
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def to_json(self, path: str | PathLike[str]) -> None:
        """Writes all settings into a file that `from_json` reads."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

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
        return cast("float | tuple[float, ...]", self.threshold[layer_index])  # as arguments.thresholds made it

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


SETTINGS = tuple(field.name for field in fields(RRAttentionConfig))
"""The names of all settings."""


def checked_sampling(
    stride: object, key_stride: object, head_offset: object, softmax_scale: object, spread: object
) -> Sampling:
    """How to estimate, by name, as plain Python."""
    return {
        "stride": arguments.sample_stride(stride),
        "key_stride": arguments.key_stride(key_stride),
        "head_offset": arguments.head_offset(head_offset),
        "softmax_scale": arguments.softmax_scale(softmax_scale),
        "spread": arguments.spread(spread),
    }


def sampling_of_call(stride: object, key_stride: object, *others: object) -> Sampling:
    """The same of a call, where keys have the stride of the queries unless they have their own."""
    return checked_sampling(stride, stride if key_stride is None else key_stride, *others)


def checked_keep_rules(keep_sink: object, keep_last: object, keep_local: object, min_share: object) -> KeepRules:
    """The keep rules besides the threshold, by name, as plain Python."""
    return {
        "keep_sink": arguments.flag(keep_sink, "keep_sink"),
        "keep_last": arguments.flag(keep_last, "keep_last"),
        "keep_local": arguments.int64_count(keep_local, "keep_local"),
        "min_share": arguments.min_share(min_share),
    }


def refuse_compensated_quantization(compensate: bool, quantization: str | None) -> None:
    """Raises ValueError for the two together, which no kernel has."""
    if compensate and quantization is not None:
        raise ValueError(
            f"quantization is {quantization!r}, but attention in eight bits is not compensated: give compensate=False"
        )


def required_config(config: object) -> RRAttentionConfig:
    """The config itself.

    Raises
    ------
    TypeError
        For anything else, with how to write it as a config.
    """
    if not isinstance(config, RRAttentionConfig):
        raise TypeError(
            f"config is {arguments.shown(config)}, but must be an RRAttentionConfig: "
            "write rrattn.RRAttentionConfig(threshold=0.9), or rrattn.RRAttentionConfig(**settings) where settings are "
            "a dict"
        )
    return config


def _settings_named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict. Refuses a name that stands there twice, of which a dict would keep the last."""
    names = [name for name, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is set more than once")
    return dict(pairs)


# The defaults of the functions of the published release (`rrattn.published`), as they were there.
_PUBLISHED = RRAttentionConfig(keep_local=0, min_share=0.0, spread=0.0, compensate=False)  # what came later is off
PUBLISHED_PREFILL = replace(_PUBLISHED, threshold=0.8, keep_sink=False, keep_last=False)
PUBLISHED_ESTIMATE = replace(_PUBLISHED, threshold=0.9, keep_sink=False, keep_last=False)
PUBLISHED_TRAINING = replace(_PUBLISHED, threshold=1.0, keep_last=True)
PUBLISHED_PATCH = replace(_PUBLISHED, threshold=0.9, keep_last=True)
