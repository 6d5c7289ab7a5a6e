"""A stand-in for PaddleFleet, which has no release to install: the contract of its core attention.

Names, constructor, call and cache are those of src/paddlefleet/transformer/{attention,dot_product_attention}.py at
github.com/PaddlePaddle/PaddleFleet (2026); the attention itself is written down naively, as a dense twin.
"""

import enum
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import paddle
from paddle import nn


class AttnMaskType(enum.Enum):
    padding = 1
    causal = 2
    no_mask = 3


class ProcessGroupCollection:
    def __init__(self, **groups):
        vars(self).update(groups)

    @classmethod
    def use_mpu_process_groups(cls, required_pgs=None):
        return cls(**{name: None for name in required_pgs})


@dataclass
class TransformerConfig:
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    attention_dropout: float = 0.0
    softmax_type: str = "vanilla"
    softmax_scale: float = None
    sliding_window: tuple = None
    apply_query_key_layer_scaling: bool = False
    gpt_model_use_experimental_version: bool = False
    cp_balance_mode: str = "dualchunk_allgather"


class ContextParallel:
    """What get_context_parallel_world_size and fleet's group tell, set by the tests."""

    size = 1


class UlyssesAlltoAll:
    """All-to-all over ranks that run one after another in one process.

    The group knows the whole of every tensor that enters: a rank's share is cut from it, after a check that the rank
    brought its own part. What leaves is put together from the heads that the ranks left there in an earlier round.
    """

    @staticmethod
    def apply(tensor, scatter_idx, gather_idx, batch_dim_idx, group):
        assert batch_dim_idx == 0 and {scatter_idx, gather_idx} == {1, 2}
        if scatter_idx == 2:
            whole = group.whole[len(group.entered)]
            group.entered.append(tensor)
            assert (paddle.split(whole, group.world_size, axis=1)[group.rank] == tensor).all()
            return paddle.split(whole, group.world_size, axis=2)[group.rank]
        group.heads[group.rank] = tensor
        parts = [paddle.split(heads, group.world_size, axis=1)[group.rank] for heads in group.heads.values()]
        return paddle.concat(parts, axis=2)


class DotProductAttention(nn.Layer):
    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        is_mtp_layer=False,
        is_swa=False,
        attention_dropout=None,
        softmax_scale=None,
        cp_comm_type=None,
        pg_collection=None,
        k_channels=None,
        v_channels=None,
        num_attention_heads=None,
        num_key_value_heads=None,
        **kwargs,
    ):
        super().__init__()
        self.config = config
        self.context_parallel_size = ContextParallel.size
        self.hybrid_mla_cp_mode = getattr(config, "hybrid_mla_cp_mode", None)
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.is_swa = is_swa
        self.k_channels = k_channels or config.head_dim
        self.v_channels = v_channels or config.head_dim
        self.num_attention_heads = num_attention_heads or config.num_attention_heads
        self.num_key_value_heads = num_key_value_heads or config.num_key_value_heads
        assert hasattr(pg_collection, "tp")
        self.softmax_scale = softmax_scale or self.k_channels**-0.5
        self.attention_dropout = nn.Dropout(
            config.attention_dropout if attention_dropout is None else attention_dropout
        )
        self.softmax_offset = None if config.softmax_type == "vanilla" else paddle.zeros([self.num_attention_heads])

    def forward(
        self,
        query,
        key,
        value,
        attention_mask,
        attn_mask_startend_row_indices=None,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
        use_rr_flash_attention=False,
        past_key_values=None,
        layer_idx=None,
        use_cache=False,
        x=None,
        qr=None,
    ):
        """Dense; its row indices have one bound."""
        if use_cache and past_key_values is not None:
            key, value = past_key_values.update(key, value, layer_idx)
        seqlen_q, seqlen_k = query.shape[1], key.shape[1]
        visible = paddle.tril(paddle.ones([seqlen_q, seqlen_k], dtype="bool"), diagonal=seqlen_k - seqlen_q)
        if attn_mask_startend_row_indices is not None:
            start = attn_mask_startend_row_indices[:, :, None, :, 0]  # [B, 1, 1, Lk]
            visible = visible & (paddle.arange(seqlen_q, dtype="int32").reshape([-1, 1]) < start)
        elif attention_mask is not None and seqlen_q > 1:
            visible = visible & ~attention_mask
        groups = query.shape[2] // key.shape[2]
        key, value = (tensor.repeat_interleave(groups, axis=2) for tensor in (key, value))
        scores = self.softmax_scale * paddle.einsum("bqhd,bkhd->bhqk", query, key)
        scores = paddle.where(visible, scores, paddle.full_like(scores, -1e9))
        out = paddle.einsum("bhqk,bkhd->bqhd", nn.functional.softmax(scores), value)
        return out.reshape([0, 0, -1])


class SelfAttention(nn.Layer):
    """Builds its core attention as PaddleFleet's build_spec_layer call does, and calls it in the same way."""

    def __init__(self, config, core_attention, layer_number, pg_collection):
        super().__init__()
        self.config, self.layer_number = config, layer_number
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.projections = nn.LayerList(
            [nn.Linear(config.hidden_size, heads * config.head_dim, bias_attr=False) for heads in sizes]
        )
        self.attn_mask_type = AttnMaskType.causal
        self.core_attention = core_attention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=self.attn_mask_type,
            attention_type="self",
            is_mtp_layer=False,
            is_swa=False,
            k_channels=config.head_dim,
            v_channels=config.head_dim,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            cp_comm_type=None,
            softmax_scale=config.softmax_scale,
            pg_collection=pg_collection,
        )

    def forward(self, hidden, attention_mask=None, attn_mask_startend_row_indices=None, **cache):
        head_dim = self.config.head_dim
        query, key, value = (project(hidden).reshape([0, 0, -1, head_dim]) for project in self.projections)
        return hidden + self.core_attention(
            query,
            key,
            value,
            attention_mask,
            attn_mask_startend_row_indices,
            attn_mask_type=self.attn_mask_type,
            attention_bias=None,
            packed_seq_params=None,
            use_rr_flash_attention=False,
            past_key_values=cache.get("past_key_values"),
            layer_idx=self.layer_number,
            use_cache=cache.get("use_cache", False),
        )


class GPTModel(nn.Layer):
    def __init__(self, config, core_attention):
        super().__init__()
        self.config = config
        groups = ProcessGroupCollection(tp=None, cp=None)
        layers = [SelfAttention(config, core_attention, i, groups) for i in range(config.num_hidden_layers)]
        self.layers = nn.LayerList(layers)

    def forward(self, hidden, **inputs):
        for layer in self.layers:
            hidden = layer(hidden, **inputs)
        return hidden


class Cache:
    """update(key, value, layer_idx), as PaddleFormers' DynamicCache for [B, S, H, D]."""

    def __init__(self):
        self.states = {}

    def update(self, key, value, layer_idx):
        if layer_idx in self.states:
            held = self.states[layer_idx]
            key, value = paddle.concat([held[0], key], axis=1), paddle.concat([held[1], value], axis=1)
        self.states[layer_idx] = key, value
        return key, value


_MODULES = {
    "paddlefleet": (),
    "paddlefleet.context_parallel_utils": (UlyssesAlltoAll,),
    "paddlefleet.process_groups_config": (ProcessGroupCollection,),
    "paddlefleet.models": (),
    "paddlefleet.models.gpt": (GPTModel,),
    "paddlefleet.transformer": (),
    "paddlefleet.transformer.attention": (SelfAttention,),
    "paddlefleet.transformer.dot_product_attention": (DotProductAttention,),
    "paddlefleet.transformer.enums": (AttnMaskType,),
}


def install(monkeypatch):
    """Puts the stand-in where `import paddlefleet...` finds it."""
    for name, members in _MODULES.items():
        module = ModuleType(name)
        for member in members:
            monkeypatch.setattr(member, "__module__", name)
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "rrattn.integrations.paddlefleet", raising=False)


def group(rank, world_size, **others):
    return SimpleNamespace(rank=rank, world_size=world_size, **others)
