"""FastDeploy: an attention backend whose prefill attends block-sparsely. Decoding is the engine's own.

`rrattn.integrations.fastdeploy_plugin` makes it known to the engine, which takes it by FD_ATTENTION_BACKEND=RR_ATTN.
It is the engine's FlashAttentionBackend but for one step. That one applies position embeddings and writes keys and
values into the pages of the cache, gathers those of the prefix, from a quantized cache too, attends over them, and has
append attention decode. Only the attention of the prefill is rrattn's: `rrattn.serving.ragged_attention`.

Settings stand in the model's config.json as `rrattn_threshold`, `rrattn_stride` and so on, from where the engine puts
them into its model_config. A backend does not know whether a chunk of a prompt is its last, so `keep_last` holds for
each chunk.

The contract is that of flash_attn_backend.py in github.com/PaddlePaddle/FastDeploy at commit
d735f6b91a5da3ae1b6d52c2e659e37b40b667c8, of which PyPI has no release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import paddle

from ..serving import ragged_attention
from .common import Place, make_core, settings_of

try:
    from fastdeploy.model_executor.layers.attention.flash_attn_backend import FlashAttentionBackend
except ImportError as error:
    raise ImportError(
        "rrattn.integrations.fastdeploy needs FastDeploy, of which PyPI has no release: install it from "
        f"github.com/PaddlePaddle/FastDeploy ({error})"
    ) from error

if TYPE_CHECKING:
    from paddle import Tensor

    from ..layer import RRAttention


class RRAttentionBackend(FlashAttentionBackend):  # type: ignore[misc]  # FastDeploy ships no types
    """Prefill by rrattn, everything else as in FastDeploy's FlashAttentionBackend.

    Parameters
    ----------
    fd_config, kv_num_heads, num_heads, head_dim, encoder_block_shape_q, decoder_block_shape_q
        As the engine gives them: its config, and the heads of this tensor-parallel rank.

    Raises
    ------
    ValueError
        For settings that rrattn does not know or that do not fit the model, attention that is not causal, and
        `min_length` and `quantization`, which ragged batches do not have.
    """

    def __init__(
        self, fd_config: Any, kv_num_heads: int, num_heads: int, head_dim: int, *block_shapes: int, **more: int
    ):
        model_config, parallel_config = fd_config.model_config, fd_config.parallel_config
        settings = settings_of(model_config)
        if not getattr(model_config, "causal", True):
            raise ValueError("the model's causal is False, but rrattn's FastDeploy backend is for causal attention")
        if settings.min_length:
            raise ValueError(f"rrattn_min_length is {settings.min_length}, but must be 0 in FastDeploy")
        if settings.quantization:
            raise ValueError(f"rrattn_quantization is {settings.quantization!r}, but must be None in FastDeploy")
        ranks, num_layers = parallel_config.tensor_parallel_size, model_config.num_hidden_layers
        place = Place(num_layers, num_heads * ranks, ranks, parallel_config.tensor_parallel_rank)
        self._cores = [make_core(settings, place, i) for i in range(num_layers)]
        self._layer: Any = None
        # Found by the constructor of the engine's backend, which else looks at the GPU for one to take.
        self.flash_attn_func = self._attend
        self.flash_attn_kwargs: dict[str, Any] = {}
        super().__init__(fd_config, kv_num_heads, num_heads, head_dim, *block_shapes, **more)

    def forward_mixed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qkv: Tensor,
        compressed_kv: Tensor,
        k_pe: Tensor,
        layer: Any,
        forward_meta: Any,
    ) -> Tensor:
        """Attention of a batch with prompts and tokens to decode: [tokens, heads * head size].

        Raises
        ------
        ValueError
            For a layer with a sliding window.
        """
        window = getattr(layer, "sliding_window", 0)
        if window and window > 0:
            raise ValueError(f"layer {layer.layer_id} has sliding_window={window}, but rrattn prefills without windows")
        self._layer = layer
        out: Tensor = super().forward_mixed(q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta)
        return out

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        **sizes: object,
    ) -> tuple[Tensor, None]:
        """(out [T, Hq, D], None) of the layer that runs, called as Paddle's flash attention of unpadded sequences.

        `sizes` are the largest lengths and that attention is causal, which the lengths and the backend know already.
        """
        core: RRAttention = self._cores[self._layer.layer_id]
        with paddle.no_grad():
            out = ragged_attention(
                query,
                key,
                value,
                cu_seqlens_q,
                cu_seqlens_k[1:] - cu_seqlens_k[:-1],
                threshold=core.threshold_for(query),
                compensate=core.config.compensate,
                sink=getattr(self._layer, "sinks", None),
                **core.config.sampling(),
                **core.config.keep_rules(),
            )
        return out, None
