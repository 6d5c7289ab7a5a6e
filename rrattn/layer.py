"""RRAttention as a Paddle layer, with a view on what its last call selected."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Callable

import paddle
from paddle import nn

from . import arguments
from .config import BLOCK_SIZE, CAUSAL, RRAttentionConfig, required_config
from .functional import block_sparse_attention, checked_tensor, records_gradient, rr_attention, unified
from .masks import WORD_BITS, block_density

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paddle import Tensor

    from .config import Sampling

# A layer keeps its last block mask, with the row bounds that it was selected under, up to this size, and only the
# density of larger ones: at 1M tokens and 32 heads a mask takes 268 MB, and a model has many layers.
MASK_BYTES_KEPT = 64 << 20


def every_block(batch_size: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """A block mask that leaves out nothing. Every bit is set: those of absent blocks do no harm."""
    blocks, words = -(-seqlen_q // BLOCK_SIZE), -(-seqlen_k // (WORD_BITS * BLOCK_SIZE))
    return paddle.full([batch_size, num_heads, blocks, words], -1, dtype="int32")


class BlockSelection:
    """Which blocks one call of attention attended.

    Attributes
    ----------
    block_mask : Tensor or None
        int32 [B, Hq, Mq, ceil(Mk / 32)] (see `rrattn.masks`); None when it was larger than MASK_BYTES_KEPT, or it and
        startend_row_indices were together.
    startend_row_indices : Tensor or None
        int32 [B, 1|Hkv|Hq, Lk, 1|2|4], as they were; None where there were none, or where block_mask is None.
    causal : bool
    seqlen_q, seqlen_k : int
    """

    block_mask: Tensor | None
    startend_row_indices: Tensor | None

    def __init__(
        self,
        block_mask: Tensor,
        startend_row_indices: Tensor | None = None,
        *,
        causal: bool,
        seqlen_q: int,
        seqlen_k: int,
    ) -> None:
        self.causal = causal
        self.seqlen_q = seqlen_q
        self.seqlen_k = seqlen_k
        self._density: Tensor | None = None
        self.block_mask, self.startend_row_indices = block_mask, startend_row_indices
        kept = [block_mask] if startend_row_indices is None else [block_mask, startend_row_indices]
        if sum(tensor.size * 4 for tensor in kept) > MASK_BYTES_KEPT:
            self._density = self.density
            self.block_mask = self.startend_row_indices = None
        elif startend_row_indices is not None:
            self.startend_row_indices = startend_row_indices.detach().clone()  # whose owner may change it

    @property
    def density(self) -> Tensor:
        """float32 [B, Hq]: the share of the visible blocks that were attended. Counted when first read."""
        if self._density is None:
            assert self.block_mask is not None, "it is dropped for its density"
            self._density = block_density(
                self.block_mask,
                self.startend_row_indices,
                causal=self.causal,
                seqlen_q=self.seqlen_q,
                seqlen_k=self.seqlen_k,
            )
        return self._density


class RRAttention(nn.Layer):
    """Block-sparse attention that selects its blocks by round-robin sampling (arXiv 2602.05853).

    The layer has no parameters. A single query over a longer key is a decoding step: it attends densely, which
    costs less than to select. So does a call with fewer keys than the config's min_length, and every call if the
    config's dense_layers name layer 0, which is this one. Gradients follow Paddle's usual rules, in train() and eval()
    alike: they flow where an input requires them, and nothing is kept for backward where none does or under
    `paddle.no_grad`. A static graph that is traced for any batch or length always selects; if the layer is dense, it
    selects every block.

    Parameters
    ----------
    config : RRAttentionConfig, optional
        Default: RRAttentionConfig().
    threshold : float or sequence of float, optional
        This layer's threshold, one for all heads or one per query head. Default: the config's, which must then be
        for one layer.

    Raises
    ------
    TypeError
        For a config that is not an RRAttentionConfig.
    ValueError
        For a threshold that is not allowed, or a config for another number of layers.

    Attributes
    ----------
    last_selection : BlockSelection or None
        What the last call attended; decoding steps and traced (static graph) calls leave it as it is.
    """

    def __init__(
        self, config: RRAttentionConfig | None = None, *, threshold: float | Sequence[float] | None = None
    ) -> None:
        super().__init__()
        config = RRAttentionConfig() if config is None else required_config(config)
        if threshold is not None:
            config = replace(config, threshold=(arguments.thresholds(threshold, depth=1),))
        self.config = config
        self.dense = self.config.layer_is_dense(0, 1)
        self.threshold = 1.0 if self.dense else self.config.layer_threshold(0, 1)
        self.last_selection: BlockSelection | None = None
        self._threshold_tensor: Tensor | None = None
        self._observer: Callable[..., tuple[Tensor, Tensor | None]] | None = (
            None  # of rrattn.collect_stats: runs _attend and counts
        )

    @property
    def last_density(self) -> Tensor | None:
        """float32 [B, Hq]: density of the last call that selected blocks; None before the first."""
        return None if self.last_selection is None else self.last_selection.density

    @unified  # to_static would make tensors of open sizes, which are -1 here
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        startend_row_indices: Tensor | None = None,
        *,
        causal: bool = CAUSAL,
        softmax_scale: float | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attends the selected blocks.

        Parameters
        ----------
        query : Tensor
            [B, Lq, Hq, D] float32, bfloat16 or float16. Queries are the last Lq positions of the keys.
        key, value : Tensor
            [B, Lk, Hkv, D] and [B, Lk, Hkv, Dv], of the query's dtype; Hq % Hkv == 0.
        startend_row_indices : Tensor, optional
            int32 [B, 1|Hkv|Hq, Lk, 1|2|4], FlashMask row bounds.
        causal : bool
        softmax_scale : float, optional
            Used where the config sets none. Default: 1 / sqrt(D).
        sink : Tensor, optional
            [Hq], a logit for each query head that joins the softmax of each row: see :func:`rrattn.rr_attention`.

        Returns
        -------
        Tensor
            [B, Lq, Hq, Dv], of the query's dtype.

        Raises
        ------
        ValueError, TypeError
            As :func:`rrattn.rr_attention`.
        """
        for tensor, name in ((query, "query"), (key, "key"), (value, "value")):
            if len(checked_tensor(tensor, name).shape) != 4:
                raise ValueError(
                    f"{name} has {len(tensor.shape)} dimensions, shape {list(tensor.shape)}, but must have 4: "
                    "[batch, length, heads, head size]"
                )
        causal = arguments.flag(causal, "causal")
        scale = arguments.softmax_scale(softmax_scale)
        if self.config.softmax_scale is not None:
            scale = self.config.softmax_scale
        attend: Callable[..., tuple[Tensor, Tensor | None]] = self._attend
        if self._observer is not None and paddle.in_dynamic_mode():
            attend = self._observer
        out, block_mask = attend(query, key, value, startend_row_indices, causal=causal, softmax_scale=scale, sink=sink)
        if block_mask is not None:
            self.last_selection = BlockSelection(
                block_mask, startend_row_indices, causal=causal, seqlen_q=query.shape[1], seqlen_k=key.shape[1]
            )
        return out

    if TYPE_CHECKING:
        __call__ = forward

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        startend_row_indices: Tensor | None,
        *,
        causal: bool,
        softmax_scale: float | None,
        sink: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(out, block mask); no block mask from decoding steps and while tracing."""
        config = self.config
        eager = paddle.in_dynamic_mode()
        batch_size, seqlen_q, num_heads, _ = query.shape
        seqlen_k = key.shape[1]
        decoding = seqlen_q == 1 and seqlen_k > 1
        known = min(batch_size, seqlen_q, seqlen_k) > 0  # while tracing, a size may be open
        if known and (decoding or self.attends_densely(seqlen_k)):
            block_mask = every_block(batch_size, num_heads, seqlen_q, seqlen_k)
            out = block_sparse_attention(
                query,
                key,
                value,
                block_mask,
                startend_row_indices,
                causal=causal,
                softmax_scale=softmax_scale,
                deterministic=config.deterministic,
                compensate=False,  # nothing is left out
                quantization=None if decoding else config.quantization,
                sink=sink,
            )
            return out, block_mask if eager and not decoding else None
        sampling: Sampling = {**config.sampling(), "softmax_scale": softmax_scale}
        result = rr_attention(
            query,
            key,
            value,
            startend_row_indices,
            causal=causal,
            training=not eager or records_gradient(query, key, value, sink),
            threshold=self.threshold_for(query),
            deterministic=config.deterministic,
            compensate=config.compensate,
            quantization=config.quantization,
            sink=sink,
            return_block_mask=eager,
            **sampling,
            **config.keep_rules(),
        )
        return result if eager else (result, None)

    def attends_densely(self, seqlen_k: int) -> bool:
        """Whether prefills over this many keys attend every block by the settings."""
        return self.dense or seqlen_k < self.config.min_length

    def extra_repr(self) -> str:
        return "dense" if self.dense else f"threshold={self.threshold}, stride={self.config.stride}"

    def threshold_for(self, query: Tensor) -> float | Tensor:
        """A float as it is; one per head as a tensor beside the query, made once per device."""
        if isinstance(self.threshold, (int, float)):
            return float(self.threshold)
        if not paddle.in_dynamic_mode():
            return paddle.to_tensor(list(self.threshold), dtype="float32")
        if self._threshold_tensor is None or self._threshold_tensor.place != query.place:
            self._threshold_tensor = paddle.to_tensor(list(self.threshold), dtype="float32", place=query.place)
        return self._threshold_tensor
