"""A stand-in for PaddleFleet, which has no release to install: its core attention by contract, and a GPTModel over it.

Names, constructors, calls and cache are those of src/paddlefleet/{models/gpt/gpt_model,transformer/attention,
transformer/dot_product_attention,transformer/multi_latent_attention}.py at github.com/PaddlePaddle/PaddleFleet (2026);
the computation itself is written down naively, as a dense twin.
"""

import enum
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import paddle
from paddle import nn
from paddle.distributed.fleet.utils import recompute


class AttnMaskType(enum.Enum):
    padding = 1
    causal = 2
    no_mask = 3


class ProcessGroupCollection:
    tp_group = None  # what parallel_state tells, set by the tests

    def __init__(self, **groups):
        vars(self).update(groups)

    @classmethod
    def use_mpu_process_groups(cls, required_pgs=("tp", "cp")):
        return cls(**{name: cls.tp_group if name == "tp" else None for name in required_pgs})


@dataclass
class TransformerConfig:
    vocab_size: int = 97
    hidden_size: int = 64
    intermediate_size: int = 96
    num_hidden_layers: int = 2
    num_nextn_predict_layers: int = 0
    num_empty_layers_add_in_head: int = 0
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    attention_bias: bool = False
    use_qk_norm: bool = False
    multi_latent_attention: bool = False
    kv_lora_rank: int = 24
    qk_nope_head_dim: int = 16
    qk_rope_head_dim: int = 8
    v_head_dim: int = None
    attention_dropout: float = 0.0
    softmax_type: str = "vanilla"
    add_full_attention_sink_bias: bool = False
    add_swa_attention_sink_bias: bool = False
    softmax_scale: float = None
    sliding_window: tuple = None
    window_attn_skip_freq: object = None
    head_wise_swa_ratio: float = 0.0
    apply_query_key_layer_scaling: bool = False
    gpt_model_use_experimental_version: bool = False
    cp_balance_mode: str = "dualchunk_allgather"
    recompute_core_attention: bool = False
    params_dtype: str = "float32"


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
        self.is_mtp_layer = is_mtp_layer
        self.is_swa = is_swa
        self.sliding_window = config.sliding_window if is_swa else None
        self.head_wise_swa_ratio = config.head_wise_swa_ratio
        self.k_channels = k_channels or config.head_dim
        self.v_channels = v_channels or config.head_dim
        self.num_attention_heads = num_attention_heads or config.num_attention_heads
        self.num_key_value_heads = num_key_value_heads or config.num_key_value_heads
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
        ranks = pg_collection.tp.world_size if pg_collection.tp is not None else 1
        self.num_attention_heads_per_partition = self.num_attention_heads // ranks
        self.softmax_scale = softmax_scale or self.k_channels**-0.5
        self.attention_dropout = nn.Dropout(
            config.attention_dropout if attention_dropout is None else attention_dropout
        )
        self.softmax_offset = self._softmax_offset()

    def _softmax_offset(self):
        config, shape = self.config, [self.num_attention_heads_per_partition]
        learned = config.add_swa_attention_sink_bias if self.is_swa else config.add_full_attention_sink_bias
        kind = "learnable" if learned else config.softmax_type
        if kind == "vanilla":
            return None
        if kind == "off-by-one":
            return paddle.zeros(shape)
        assert kind == "learnable"
        return self.create_parameter(shape, dtype=config.params_dtype, default_initializer=nn.initializer.Normal(1, 1))

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
        kv_compressed=None,
        k_pos_emb=None,
        q_absorbed=None,
        v_b_proj_weight=None,
    ):
        """Dense; its row indices have one bound."""
        if use_cache and past_key_values is not None:
            key, value = past_key_values.update(key, value, layer_idx)
        seqlen_q, seqlen_k = query.shape[1], key.shape[1]
        visible = paddle.ones([seqlen_q, seqlen_k], dtype="bool")
        if attn_mask_type is not AttnMaskType.no_mask:
            visible = paddle.tril(visible, diagonal=seqlen_k - seqlen_q)
        if attn_mask_startend_row_indices is not None:
            start = attn_mask_startend_row_indices[:, :, None, :, 0]  # [B, 1, 1, Lk]
            if self.sliding_window is not None:
                start = paddle.minimum(start, paddle.arange(seqlen_k, dtype="int32") + self.sliding_window[0])
            visible = visible & (paddle.arange(seqlen_q, dtype="int32").reshape([-1, 1]) < start)
        elif attention_mask is not None and seqlen_q > 1:
            visible = visible & ~attention_mask
        groups = query.shape[2] // key.shape[2]
        key, value = (tensor.repeat_interleave(groups, axis=2) for tensor in (key, value))
        scores = self.softmax_scale * paddle.einsum("bqhd,bkhd->bhqk", query, key)
        scores = paddle.where(visible, scores, paddle.full_like(scores, -1e9))
        if self.softmax_offset is not None:
            sink = self.softmax_offset.astype(scores.dtype).reshape([1, -1, 1, 1]).expand([*scores.shape[:3], 1])
            scores = paddle.concat([scores, sink], axis=-1)
        shares = nn.functional.softmax(scores)[..., :seqlen_k]
        return paddle.einsum("bhqk,bkhd->bqhd", shares, value).reshape([0, 0, -1])


class RMSNorm(nn.Layer):
    def __init__(self, size):
        super().__init__()
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x):
        return self.weight * x * paddle.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotated(x, begin):
    """[B, S, H, D], its halves rotated by the positions from `begin` on."""
    half = x.shape[-1] // 2
    angles = paddle.arange(begin, begin + x.shape[1], dtype="float32")[:, None, None] * 1e4 ** -(
        paddle.arange(half, dtype="float32") / half
    )
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return paddle.concat([first * cos - second * sin, second * cos + first * sin], axis=-1)


class SelfAttention(nn.Layer):
    """Builds its core attention as PaddleFleet's build_spec_layer call does, and calls it in the same way."""

    def __init__(
        self, config, core_attention, layer_number, pg_collection, is_mtp_layer=False, mask_type=AttnMaskType.causal
    ):
        super().__init__()
        self.config, self.layer_number, self.attn_mask_type = config, layer_number, mask_type
        # Empty layers in front count for the numbers, but not for the window.
        real_number = layer_number - config.num_empty_layers_add_in_head
        is_swa = config.sliding_window is not None and (
            config.window_attn_skip_freq is None or bool(config.window_attn_skip_freq[real_number])
        )
        self.k_channels, self.v_channels = self.channels()
        self.core_attention = core_attention(
            config=config,
            layer_number=layer_number,
            attn_mask_type=mask_type,
            attention_type="self",
            is_mtp_layer=is_mtp_layer,
            is_swa=is_swa,
            k_channels=self.k_channels,
            v_channels=self.v_channels,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            cp_comm_type=None,
            softmax_scale=config.softmax_scale,
            pg_collection=pg_collection,
        )
        self.o_proj = nn.Linear(config.num_attention_heads * self.v_channels, config.hidden_size, bias_attr=False)
        self.make_projections()

    def channels(self):
        return self.config.head_dim, self.config.v_head_dim or self.config.head_dim

    def make_projections(self):
        config = self.config
        bias = None if config.attention_bias else False
        sizes = (config.num_attention_heads, self.k_channels), (config.num_key_value_heads, self.k_channels)
        sizes = (*sizes, (config.num_key_value_heads, self.v_channels))
        self.projections = nn.LayerList(
            [nn.Linear(config.hidden_size, heads * size, bias_attr=bias) for heads, size in sizes]
        )
        norm = RMSNorm if config.use_qk_norm else lambda size: nn.Identity()
        self.q_norm, self.k_norm = norm(self.k_channels), norm(self.k_channels)

    def query_key_value(self, hidden, begin):
        sizes = (self.k_channels, self.k_channels, self.v_channels)
        heads = [project(hidden).reshape([0, 0, -1, size]) for project, size in zip(self.projections, sizes)]
        return rotated(self.q_norm(heads[0]), begin), rotated(self.k_norm(heads[1]), begin), heads[2], {}

    def forward(self, hidden, begin, attention_mask=None, attn_mask_startend_row_indices=None, **cache):
        query, key, value, extra = self.query_key_value(hidden, begin)
        arguments = {
            "attn_mask_type": self.attn_mask_type,
            "attention_bias": None,
            "packed_seq_params": None,
            "use_rr_flash_attention": False,
            **extra,
        }
        masks = (attention_mask, attn_mask_startend_row_indices)
        if self.config.recompute_core_attention and self.training:
            return self.o_proj(recompute(self.core_attention, query, key, value, *masks, **arguments))
        arguments |= {
            "past_key_values": cache.get("past_key_values"),
            "layer_idx": self.layer_number,
            "use_cache": cache.get("use_cache", False),
        }
        return self.o_proj(self.core_attention(query, key, value, *masks, **arguments))


class MLASelfAttention(SelfAttention):
    """Keys and values out of one latent vector: heads of values are smaller than those of keys."""

    def channels(self):
        return self.config.qk_nope_head_dim + self.config.qk_rope_head_dim, self.config.v_head_dim

    def make_projections(self):
        config, heads = self.config, self.config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.k_channels, bias_attr=False)
        self.kv_a_proj = nn.Linear(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, bias_attr=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + self.v_channels), bias_attr=False
        )

    def query_key_value(self, hidden, begin):
        nope, rope = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim
        query = self.q_proj(hidden).reshape([0, 0, -1, self.k_channels])
        query = paddle.concat([query[..., :nope], rotated(query[..., nope:], begin)], axis=-1)
        latent, position = self.kv_a_proj(hidden).split([self.config.kv_lora_rank, rope], axis=-1)
        latent = self.kv_a_layernorm(latent)
        both = self.kv_b_proj(latent).reshape([0, 0, -1, nope + self.v_channels])
        position = rotated(position.unsqueeze(2), begin).expand([-1, -1, both.shape[2], -1])
        key = paddle.concat([both[..., :nope], position], axis=-1)
        extra = {"x": hidden, "qr": None, "kv_compressed": latent, "k_pos_emb": position, "q_absorbed": None}
        return query, key, both[..., nope:], extra


class TransformerLayer(nn.Layer):
    def __init__(self, config, core_attention, layer_number, pg_collection, is_mtp_layer=False):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)
        attention = MLASelfAttention if config.multi_latent_attention else SelfAttention
        self.self_attn = attention(config, core_attention, layer_number, pg_collection, is_mtp_layer)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias_attr=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias_attr=False)

    def forward(self, hidden, begin, **inputs):
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), begin, **inputs)
        return hidden + self.down_proj(nn.functional.silu(self.up_proj(self.post_attention_layernorm(hidden))))


class GPTModel(nn.Layer):
    """Takes a dict of inputs, as PaddleFleet's does, which is a pipeline of layers; returns logits."""

    def __init__(self, config, core_attention=DotProductAttention):
        super().__init__()
        self.config = config
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        empty = config.num_empty_layers_add_in_head
        layers = [TransformerLayer(config, core_attention, empty + i, groups) for i in range(config.num_hidden_layers)]
        predicting = range(config.num_nextn_predict_layers)
        layers += [TransformerLayer(config, core_attention, i, groups, is_mtp_layer=True) for i in predicting]
        self.layers = nn.LayerList(layers)
        self.norm = RMSNorm(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias_attr=False)

    def forward(self, inputs):
        inputs = dict(inputs)
        hidden = self.embedding(inputs.pop("input_ids"))
        cache = inputs.get("past_key_values")
        begin = 0 if cache is None or not cache.states else next(iter(cache.states.values()))[0].shape[1]
        for layer in self.layers:
            hidden = layer(hidden, begin, **inputs)
        return self.lm_head(self.norm(hidden))


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
    "paddlefleet.transformer.multi_latent_attention": (MLASelfAttention,),
    "paddlefleet.transformer.transformer_layer": (TransformerLayer,),
}


def install(monkeypatch):
    """Puts the stand-in where `import paddlefleet...` finds it."""
    for name, members in _MODULES.items():
        module = ModuleType(name)
        for member in members:
            monkeypatch.setattr(member, "__module__", name)
            setattr(module, member.__name__, member)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, attribute = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], attribute, module)
    monkeypatch.delitem(sys.modules, "rrattn.integrations.paddlefleet", raising=False)


def group(rank, world_size, **others):
    return SimpleNamespace(rank=rank, world_size=world_size, **others)
