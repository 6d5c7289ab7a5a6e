"""RRAttention for PaddlePaddle: dynamic block-sparse attention for long contexts (arXiv 2602.05853).

Where Paddle is not installed, only :mod:`rrattn.direct` is there, the kernels on plain arrays.
"""

import importlib.util as _importlib_util

if _importlib_util.find_spec("paddle") is not None:
    from .config import BLOCK_SIZE, RRAttentionConfig
    from .functional import block_sparse_attention, estimate_block_scores, rr_attention, select_blocks
    from .integrations import disable, enable, layer_densities, layer_selections
    from .layer import BlockSelection, RRAttention
    from .masks import block_density, dense_block_mask, pack_block_mask, unpack_block_mask
    from .published import (
        patch_ernie_attention,
        patch_llama_attention,
        patch_qwen_attention,
        rrattn_estimate,
        rrattn_prefill,
    )
    from .stats import collect_stats

    __all__ = [
        "BLOCK_SIZE",
        "BlockSelection",
        "RRAttention",
        "RRAttentionConfig",
        "block_density",
        "block_sparse_attention",
        "collect_stats",
        "dense_block_mask",
        "disable",
        "enable",
        "estimate_block_scores",
        "layer_densities",
        "layer_selections",
        "pack_block_mask",
        "patch_ernie_attention",
        "patch_llama_attention",
        "patch_qwen_attention",
        "rr_attention",
        "rrattn_estimate",
        "rrattn_prefill",
        "select_blocks",
        "unpack_block_mask",
    ]
