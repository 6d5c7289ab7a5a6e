"""RRAttention for PaddlePaddle: dynamic block-sparse attention for long contexts (arXiv 2602.05853).

Where Paddle is not installed, only :mod:`rrattn.direct` is there, the kernels on plain arrays, and the config.

With Paddle, the import loads rrattn's operators into it and adds an import hook, a finder in `sys.meta_path`: should
PaddleFormers be imported later, its table of attention functions gets "rrattn" at that moment, so that
`config._attn_implementation = "rrattn"` works in either order of the imports. All other imports go on as usual, and no
model library is imported for it. See :mod:`rrattn.integrations`.
"""

import typing as _typing
from importlib import import_module as _import_module
from importlib import util as _importlib_util

from .config import BLOCK_SIZE, RRAttentionConfig

__version__ = "0.1.0"

_HAS_PADDLE = _importlib_util.find_spec("paddle") is not None
_LOADED_WHEN_ASKED_FOR = ("direct", "distributed", "serving", "visualize")

if _HAS_PADDLE:
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
_NEEDS_PADDLE = (
    *__all__,
    "distributed",
    "functional",
    "integrations",
    "layer",
    "masks",
    "published",
    "serving",
    "stats",
    "visualize",
)


if _typing.TYPE_CHECKING:  # where a __getattr__ would make every name one of the module's
    from . import direct as direct
    from . import distributed as distributed
    from . import serving as serving
    from . import visualize as visualize
else:

    def __getattr__(name):
        if name in _NEEDS_PADDLE and not _HAS_PADDLE:
            raise ImportError(
                f"rrattn.{name} needs Paddle, which is not installed. Install Paddle (pip install paddlepaddle), then "
                "rrattn again, so that its operators are built for it (pip install --no-build-isolation .). "
                "rrattn.direct works without."
            )
        if name in _LOADED_WHEN_ASKED_FOR:
            return _import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LOADED_WHEN_ASKED_FOR})
