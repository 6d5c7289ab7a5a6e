"""rrattn's own kernels on PyTorch tensors, through rrattn.direct: what takes all settings of an RRAttentionConfig.

They take float32 on a CPU; on a GPU, where they have no float32, tensors are rounded to float16 for them.
"""

from __future__ import annotations

import inspect

import torch

from rrattn.config import SETTINGS, RRAttentionConfig

from .baselines import num_blocks
from .torch_selection import visible_blocks


def check_device(device):
    """Raises ValueError where there is no build of rrattn for a device."""
    query = torch.ones(1, 128, 1, 64, device=device)
    try:
        attend(RRAttentionConfig(), 0, 1, query, query, query, 0.125)
    except (ImportError, ValueError, RuntimeError) as error:
        raise ValueError(f"rrattn has no build for {device}, which its settings by name need: {error}") from error


def attend(config, layer, num_layers, query, key, value, scale):
    """(mask bool [B, Hq, Mq, Mk], out float32 [B, Lq, Hq, D]) of the attention of a layer of a model, causal.

    Parameters
    ----------
    config : RRAttentionConfig
    layer, num_layers : int
    query, key, value : float32 [B, Lq, Hq, D], the last positions of the keys, and [B, Lk, Hkv, D]
    scale : float
        Where the config sets none.
    """
    from rrattn import direct  # takes a build, which the other methods do without

    dense = config.layer_is_dense(layer, num_layers) or key.shape[1] < config.min_length
    threshold = 1.0 if dense else config.layer_threshold(layer, num_layers)
    if not isinstance(threshold, float):
        threshold = torch.tensor(threshold, device=query.device)
    taken = inspect.signature(direct.rr_attention).parameters
    settings = {name: getattr(config, name) for name in SETTINGS if name in taken}
    settings["threshold"] = threshold
    if config.softmax_scale is None:
        settings["softmax_scale"] = scale
    if query.is_cuda:
        query, key, value = (x.half() for x in (query, key, value))
    (batch_size, seqlen_q, num_heads, _), seqlen_k = query.shape, key.shape[1]
    rows, cols = num_blocks(seqlen_q), num_blocks(seqlen_k)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    words = torch.empty(batch_size, num_heads, rows, -(-cols // 32), dtype=torch.int32, device=query.device)
    arguments = {"out": out, "block_mask": words, "causal": True, **settings}
    if query.is_cuda:
        arguments["stream"] = torch.cuda.current_stream(query.device).cuda_stream
    size = direct.rr_attention(query, key, value, **arguments, size_only=True)
    workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
    direct.rr_attention(query, key, value, **arguments, workspace=workspace)
    bits = words[..., None] >> torch.arange(32, device=query.device) & 1
    mask = bits.flatten(-2)[..., :cols].bool() & visible_blocks(seqlen_q, seqlen_k, query.device)
    return mask, out.float()
