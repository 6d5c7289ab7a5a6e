"""Calls of rrattn as its users write them, for mypy alone: test_packaging.py compares what it says of them.

A line that mypy must refuse ends in a comment, `wrong` and the kind of error; it must take all others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import paddle
from paddle import Tensor

import rrattn
from rrattn import direct


def functions(query: Tensor, key: Tensor, value: Tensor, rows: Tensor | None) -> Tensor:
    out = rrattn.rr_attention(query, key, value, rows, causal=True, threshold=0.9, stride=16, keep_local=2)
    per_head = rrattn.rr_attention(query, key, value, threshold=paddle.to_tensor([0.9, 0.8]), deterministic=None)
    _, lse = rrattn.rr_attention(query, key, value, causal=True, return_softmax_lse=True)
    _, _, block_mask = rrattn.rr_attention(query, key, value, return_softmax_lse=True, return_block_mask=True)
    scores = rrattn.estimate_block_scores(query, key, causal=True)
    block_mask = rrattn.select_blocks(scores, 0.9, causal=True, seqlen_q=query.shape[1], seqlen_k=key.shape[1])
    attended = rrattn.block_sparse_attention(query, key, value, block_mask, causal=True, compensate=True)
    sink = paddle.zeros([query.shape[2]])
    attended += rrattn.block_sparse_attention(query, key, value, block_mask, sink=sink)
    out, lse = rrattn.rr_attention(query, key, value, sink=sink, return_softmax_lse=True)
    rrattn.estimate_block_scores(query, key, sink=None)
    rrattn.rr_attention(query, key, value, sink=1.0)  # wrong: call-overload
    rrattn.estimate_block_scores(query, key, sink=[0.0])  # wrong: arg-type
    rrattn.rr_attention(query, key, 3)  # wrong: call-overload
    rrattn.rr_attention(query, key, value, treshold=0.9)  # wrong: call-overload
    rrattn.rr_attention(query, key, value, threshold="0.9")  # wrong: call-overload
    attended += rrattn.rr_attention(query, key, value, quantization="qk_int8_pv_fp8")
    rrattn.rr_attention(query, key, value, quantization=8)  # wrong: call-overload
    rrattn.rr_attention(query, key, value, compensate="yes")  # wrong: call-overload
    rrattn.rr_attention(query, key, value, return_block_mask=True).mean()  # wrong: attr-defined
    rrattn.estimate_block_scores(query, key, stride=0.5)  # wrong: arg-type
    rrattn.select_blocks(scores, 0.9, causal=True)  # wrong: call-arg
    rrattn.block_sparse_attention(query, key, value, None)  # wrong: call-overload
    rrattn.rr_atention(query, key, value)  # wrong: attr-defined
    rrattn.rrattn_prefill(query, key, [1.0])  # wrong: arg-type
    ratio: Tensor = rrattn.rrattn_prefill(query, key, value, threshold=0.8, causal=True)[1]
    trained, lse = rrattn.published.rr_attention(query, key, value, causal=True, return_softmax_lse=True)
    rrattn.published.rr_attention(query, key, value, dropout="0")  # wrong: call-overload
    out = rrattn.published.rr_attention(query, key, value, dropout=0.0) + trained
    return out + per_head + lse.mean() + attended + ratio


class Model(paddle.nn.Layer):
    """Stands for a library's, whose attributes a caller goes on to use."""

    tokens: int = 3


def models(model: Model, config: rrattn.RRAttentionConfig, path: Path) -> int:
    tokens: int = rrattn.enable(model, threshold=0.9, keep_last=False, dense_layers=[0]).tokens
    rrattn.enable(model, config)
    rrattn.enable(model, threshold=[0.9, (0.8, 0.7)], softmax_scale=None)
    rrattn.enable(model, treshold=0.9)  # wrong: call-arg
    rrattn.enable(model, threshold="high")  # wrong: arg-type
    rrattn.enable(model, 0.9)  # wrong: arg-type
    rrattn.enable(config)  # wrong: type-var
    for density in rrattn.layer_densities(rrattn.disable(model)):
        print("no prefill yet" if density is None else float(density.mean()))
        print(density.mean())  # wrong: union-attr
    with rrattn.collect_stats(model, mass_rows=8) as stats:
        seconds: float = stats.layers[0].prefill_seconds
    stats.plot(path, title="a title").savefig("elsewhere.png")
    stats.plot(title=3)  # wrong: arg-type
    print(stats.seconds)  # wrong: attr-defined
    rrattn.visualize.plot_layers(rrattn.layer_selections(model), heads=(0, 1), path=str(path))
    rrattn.visualize.plot_layers(rrattn.layer_densities(model))  # wrong: arg-type
    rrattn.patch_llama_attention(model, "rrattn", 0.9).tokens += 1
    rrattn.patch_llama_attention(model, threshold=None)  # wrong: arg-type
    return tokens + int(seconds)


def settings(query: Tensor, path: Path) -> rrattn.RRAttentionConfig:
    config = rrattn.RRAttentionConfig(threshold=[0.9, 0.8], stride=16, dense_layers=(0,))
    config.stride = 8  # wrong: misc
    config.to_json(path)
    rrattn.RRAttentionConfig.from_json("config.json").to_json(3)  # wrong: arg-type
    rrattn.RRAttentionConfig(stride="8")  # wrong: arg-type
    rrattn.RRAttentionConfig(treshold=0.9)  # wrong: call-arg
    layer = rrattn.RRAttention(config, threshold=[0.9, 0.8])
    out: Tensor = layer(query, query, query, causal=True)
    layer(query, query)  # wrong: call-arg
    print(layer.last_selection.density)  # wrong: union-attr
    if layer.last_selection is not None and layer.last_selection.block_mask is not None:
        bits: Tensor = rrattn.unpack_block_mask(layer.last_selection.block_mask, 3)
        rrattn.pack_block_mask(np.ones([1, 1, 3, 3], bool) & bits.numpy())
        rrattn.pack_block_mask(3)  # wrong: arg-type
    rows: Tensor = rrattn.masks.document_startend_rows([300, 212])
    rrattn.masks.document_startend_rows([[300, 212], [512]], causal=False)
    rrattn.masks.document_startend_rows(512)  # wrong: arg-type
    density: Tensor = rrattn.block_density(out, rows, causal=True, seqlen_q=512, seqlen_k=512)
    rrattn.block_density(density, 0.5, causal=True, seqlen_q=512, seqlen_k=512)  # wrong: arg-type
    return config


def arrays(query: Tensor) -> int:
    array, mask = np.ones([1, 200, 2, 8], np.float32), np.tril(np.ones([1, 1, 200, 200], bool))
    integers = np.zeros([1, 1, 200, 1], np.int32)
    size: int = direct.rr_attention(array, array, array, out=array, causal=True, threshold=array, num_threads=2)
    direct.rr_attention(query, query, query, out=query, threshold=0.9, workspace=array, size_only=True)
    direct.startend_rows_from_dense(mask, start_rows=integers, verdict=integers)
    direct.set_simd(direct.available_simd()[0])
    direct.set_gpu_path(direct.available_gpu_paths()[0])
    kernels: str = direct.gpu_kernels(1, path="portable")
    direct.gpu_kernels(kernels)  # wrong: arg-type
    direct.rr_attention(array, array, array)  # wrong: call-arg
    direct.rr_attention(array, array, array, out=[0.0])  # wrong: arg-type
    direct.rr_attention(array, array, array, out=array, threads=2)  # wrong: call-arg
    direct.set_simd(None)  # wrong: arg-type
    direct.set_gpu_path(None)  # wrong: arg-type
    return size + direct.default_num_threads()
