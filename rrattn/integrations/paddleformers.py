"""RRAttention in PaddleFormers models, and in those of PaddleFleet that come from there (`paddlefleet.transformers`).

Their layers look attention functions up in a table: see `attention_table.py`. ERNIE 4.5 VL's do not, and get a function
of their own while they are enabled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable

from .attention_table import FLAG, NAME, AttentionTableLibrary
from .common import attend, core_of

if TYPE_CHECKING:
    from types import ModuleType

    from paddle import Tensor
    from paddle.nn import Layer

# Model types whose models rrattn is tested with: those of the configs that attention layers have.
FAMILIES = frozenset(
    {
        "deepseek_v3",
        "ernie4_5",
        "ernie4_5_moe",
        "ernie4_5_moe_vl",
        "gemma3_text",
        "glm4_moe",
        "glm4v_moe_text",
        "glm_ocr_text",
        "gpt_oss",
        "llama",
        "paddleocr_vl",
        "phi3",
        "qwen2",
        "qwen2_5_vl_text",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
    }
)

_ERNIE_VL = ".transformers.ernie4_5_moe_vl.model.modeling"  # after the package
_ERNIE_VL_ATTENTION = "Ernie4_5_Attention"
_ERNIE_VL_FUNCTIONS = ("core_attn", "_flash_attention_wrapper")  # of which one is its attn_func


class ErnieVLAttention:
    """The `attn_func` of an attention layer of ERNIE 4.5 VL.

    Parameters
    ----------
    layer : paddle.nn.Layer
        The attention layer; its RRAttention is attached to it.
    original : callable
        Its `attn_func` before.
    """

    def __init__(self, layer: Layer, original: Callable[..., Any]) -> None:
        self.layer = layer
        self.original = original

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_start_row_indices: Tensor | None = None,
        seq_length: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attends; after the flag was changed, by the original.

        Parameters
        ----------
        q : Tensor
            [B, Lq, Hq, D], the last Lq positions of the keys; position embedding applied.
        k, v : Tensor
            [B, Lk, Hkv, D], the cache included.
        attention_mask : Tensor, optional
            bool with True for visible, or additive, [B, 1, Lq, Lk]. Unused where there are row indices, as in the
            original.
        attn_mask_start_row_indices : Tensor, optional
            int32 [B, 1 | Hkv, Lk]: packed documents.
        seq_length : int, optional
            Lq, which q says as well.

        Returns
        -------
        tuple of Tensor and None
            [B, Lq, Hq * D], and no attention weights.

        Raises
        ------
        ValueError
            For dropout in training, and a mask that rrattn cannot express.
        """
        core, config = core_of(self.layer), self.layer.config
        assert core is not None, "a layer has this function while it is enabled"
        if getattr(config, FLAG) != NAME:
            core.last_selection = None  # no longer what the layer attended last
            dense: tuple[Tensor, Tensor | None] = self.original(
                q, k, v, attention_mask, attn_mask_start_row_indices, seq_length
            )
            return dense
        dropout = config.attention_probs_dropout_prob
        if dropout and self.layer.training:
            raise ValueError(
                f"rrattn does not support attention dropout; set attention_probs_dropout_prob to 0.0, got {dropout}"
            )
        mask = attention_mask if attn_mask_start_row_indices is None else None
        out = attend(core, q, k, v, mask, attn_mask_start_row_indices, causal=True)
        return out.reshape([0, 0, out.shape[2] * out.shape[3]]), None


class PaddleFormers(AttentionTableLibrary):
    """Beside the layers that look up the table, those of ERNIE 4.5 VL."""

    def is_attention(self, layer: Layer) -> bool:
        return super().is_attention(layer) or self._is_ernie_vl(layer)

    def _is_ernie_vl(self, layer: Layer) -> bool:
        known = self.package + _ERNIE_VL, _ERNIE_VL_ATTENTION
        return any((base.__module__, base.__name__) == known for base in type(layer).__mro__)

    def replacements(self, layer: Layer) -> dict[str, object]:
        if not self._is_ernie_vl(layer):
            return super().replacements(layer)
        function = layer.attn_func
        if getattr(function, "__name__", None) not in _ERNIE_VL_FUNCTIONS:
            raise ValueError(
                f"rrattn does not support the attn_func {function!r} of {type(layer).__name__}; it must be one of "
                f"{', '.join(_ERNIE_VL_FUNCTIONS)}, as without cachekv_quant"
            )
        return {"attn_func": ErnieVLAttention(layer, function)}


LIBRARY = PaddleFormers("paddleformers", "PaddleFormers", FAMILIES)
FLEET_LIBRARY = PaddleFormers("paddlefleet", "PaddleFleet", FAMILIES)
_BY_PACKAGE = {library.package: library for library in (LIBRARY, FLEET_LIBRARY)}


def register(interface_module: ModuleType) -> None:
    """Adds "rrattn" to the table in a library's `nn.attention.interface`."""
    _library_of(interface_module).register(interface_module)


def watch(model_module: ModuleType) -> None:
    """Makes models of a library's `transformers.model_utils` notice a flag without effect."""
    _library_of(model_module).watch(model_module)


def library_of(model: Layer) -> PaddleFormers | None:
    """The library among these whose attention layers a model has; None where it has none."""
    for library in _BY_PACKAGE.values():
        if any(library.is_attention(layer) and hasattr(layer, "layer_idx") for layer in model.sublayers(True)):
            return library
    return None


def _library_of(module: ModuleType) -> PaddleFormers:
    return _BY_PACKAGE[module.__name__.partition(".")[0]]
