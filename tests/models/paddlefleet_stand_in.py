"""A stand-in for PaddleFleet, which has no release to install: its core attention by contract, and a GPTModel over it.

Names, constructors, calls and cache are those of src/paddlefleet/{models/gpt/gpt_model,transformer/attention,
transformer/dot_product_attention,transformer/multi_latent_attention}.py at github.com/PaddlePaddle/PaddleFleet (2026),
and context parallelism is that of context_parallel_utils.py and dot_product_attention.py there, at commit f5f9d731f83d;
the computation itself is written down naively, as a dense twin.
"""

import enum
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import paddle
import paddle.distributed as dist
from paddle import nn
from paddle.autograd import PyLayer
from paddle.distributed import fleet
from paddle.distributed.fleet.utils import recompute
from processes import ForEachRank, OfEachRank, all_reduce


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
    hybrid_mla_cp_mode: str = None
    experimental_dataflow: bool = False
    sequence_parallel: bool = False
    recompute_core_attention: bool = False
    params_dtype: str = "float32"


class ContextParallel:
    """What get_context_parallel_world_size tells, set by the tests."""

    size = 1


# Tokens that are split over ranks. gloo has neither all-to-all nor reduce_scatter: all_gather and all_reduce are in
# their place.


def held_chunks(mode, group):
    """(number of chunks of a sequence, those that this rank holds)."""
    if mode == "dualchunk_allgather":
        return 2 * group.world_size, (group.rank, 2 * group.world_size - 1 - group.rank)
    return group.world_size, (group.rank,)


def scatter(tensor, axis, mode, group):
    """This rank's part of a whole tensor."""
    number, held = held_chunks(mode, group)
    chunks = paddle.split(tensor, number, axis=axis)
    return paddle.concat([chunks[i] for i in held], axis=axis)


def all_gather(tensor, axis, mode, group):
    """The whole tensor of the ranks' parts."""
    parts = []
    dist.all_gather(parts, tensor.contiguous(), group=group)
    if mode == "dualchunk_allgather":
        first, last = zip(*(paddle.split(part, 2, axis=axis) for part in parts))
        parts = [*first, *last[::-1]]
    return paddle.concat(parts, axis=axis)


class AllGather(PyLayer):
    """Forward gathers, backward sums over the ranks and scatters: ContextParallelAllGatherOp, for any group."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.arguments = arguments[1:]
        return all_gather(*arguments)

    @staticmethod
    def backward(ctx, grad):
        return scatter(all_reduce(grad, ctx.arguments[-1]), *ctx.arguments)


class ReduceScatter(PyLayer):
    """Forward sums over the ranks and scatters, backward gathers."""

    @staticmethod
    def forward(ctx, tensor, *arguments):
        ctx.arguments = arguments
        return scatter(all_reduce(tensor, arguments[-1]), *arguments)

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad, *ctx.arguments)


class UlyssesAlltoAll(PyLayer):
    @staticmethod
    def forward(ctx, tensor, scatter_idx, gather_idx, batch_dim_idx, group):
        assert batch_dim_idx == 0
        ctx.arguments = gather_idx, scatter_idx, group
        return exchanged(tensor, scatter_idx, gather_idx, group)

    @staticmethod
    def backward(ctx, grad):
        return exchanged(grad, *ctx.arguments)


def exchanged(tensor, scatter_idx, gather_idx, group):
    parts = []
    dist.all_gather(parts, tensor.contiguous(), group=group)
    parts = [paddle.split(part, group.world_size, axis=scatter_idx)[group.rank] for part in parts]
    return paddle.concat(parts, axis=gather_idx)


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
        self.hybrid_mla_cp_mode = config.hybrid_mla_cp_mode
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
        """Dense; its row indices have one bound, or two."""
        if use_cache and past_key_values is not None:
            key, value = past_key_values.update(key, value, layer_idx)
        causal, rows = attn_mask_type is not AttnMaskType.no_mask, attn_mask_startend_row_indices
        if self.context_parallel_size > 1:
            return self._attend_in_context(query, key, value, rows, causal).reshape([0, 0, -1])
        positions = paddle.arange(key.shape[1] - query.shape[1], key.shape[1], dtype="int32")
        if rows is not None or query.shape[1] == 1:
            attention_mask = None
        out = self._attend(query, key, value, positions, rows, causal, self.softmax_offset, attention_mask)
        return out.reshape([0, 0, -1])

    def _attend(self, query, key, value, positions, rows, causal, softmax_offset, hidden=None):
        """Of queries at these positions of the keys; row indices of two bounds: [start, end) below the diagonal where
        causal, else all from `start` down, and all above `end`."""
        seqlen_k, positions = key.shape[1], positions.reshape([-1, 1])
        visible = paddle.ones([query.shape[1], seqlen_k], dtype="bool")
        if causal:
            visible = positions >= paddle.arange(seqlen_k, dtype="int32")
        if rows is not None:
            if rows.shape[1] > 1:
                rows = rows.repeat_interleave(query.shape[2] // rows.shape[1], axis=1)
            start = rows[:, :, None, :, 0]  # [B, 1 | H, 1, Lk]
            if self.sliding_window is not None:
                start = paddle.minimum(start, paddle.arange(seqlen_k, dtype="int32") + self.sliding_window[0])
            below = positions < start
            if rows.shape[-1] == 2:
                past_end = positions >= rows[:, :, None, :, 1]
                below = below | past_end if causal else below & past_end
            visible = visible & below
        if hidden is not None:
            visible = visible & ~hidden
        groups = query.shape[2] // key.shape[2]
        key, value = (tensor.repeat_interleave(groups, axis=2) for tensor in (key, value))
        scores = self.softmax_scale * paddle.einsum("bqhd,bkhd->bhqk", query, key)
        scores = paddle.where(visible, scores, paddle.full_like(scores, -1e9))
        if softmax_offset is not None:
            sink = softmax_offset.astype(scores.dtype).reshape([1, -1, 1, 1]).expand([*scores.shape[:3], 1])
            scores = paddle.concat([scores, sink], axis=-1)
        shares = nn.functional.softmax(scores)[..., :seqlen_k]
        return paddle.einsum("bhqk,bkhd->bqhd", shares, value)

    def _attend_in_context(self, query, key, value, rows, causal):
        group = fleet.get_hybrid_communicate_group().get_context_parallel_group()
        mode, sink = self.hybrid_mla_cp_mode or self.config.cp_balance_mode, self.softmax_offset
        seqlen = key.shape[1] * group.world_size
        if mode == "contiguous_a2a" and not (self.is_swa and self.config.multi_latent_attention):
            assert rows is not None and query.shape[2] == key.shape[2] == value.shape[2]
            if rows.shape[1] > 1:
                rows = paddle.split(rows, group.world_size, axis=1)[group.rank]
            if sink is not None:
                sink = paddle.split(sink, group.world_size)[group.rank]
            query, key, value = (UlyssesAlltoAll.apply(tensor, 2, 1, 0, group) for tensor in (query, key, value))
            out = self._attend(query, key, value, paddle.arange(seqlen, dtype="int32"), rows, causal, sink)
            return UlyssesAlltoAll.apply(out, 1, 2, 0, group)
        # With windows of multi-latent attention and "contiguous_a2a", PaddleFleet exchanges keys of a window alone
        # ("contiguous_swap2p"); the others are hidden.
        if rows is None:
            rows = paddle.full([key.shape[0], 1, seqlen, 1], seqlen, dtype="int32")
        if rows.shape[-1] == 1:
            diagonal = paddle.arange(seqlen, dtype="int32").reshape([1, 1, seqlen, 1])
            rows = paddle.concat([rows, diagonal.expand(rows.shape)], axis=-1)
        else:
            assert rows.shape[-1] == 2 and self.config.experimental_dataflow
        key, value = (AllGather.apply(tensor, 1, mode, group) for tensor in (key, value))
        positions = scatter(paddle.arange(seqlen, dtype="int32"), 0, mode, group)
        return self._attend(query, key, value, positions, rows, False, sink)


class RMSNorm(nn.Layer):
    def __init__(self, size):
        super().__init__()
        self.weight = self.create_parameter([size], default_initializer=nn.initializer.Constant(1.0))

    def forward(self, x):
        return self.weight * x * paddle.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotated(x, positions):
    """[B, S, H, D], its halves rotated by the positions [S]."""
    half = x.shape[-1] // 2
    angles = positions.astype("float32")[:, None, None] * 1e4 ** -(paddle.arange(half, dtype="float32") / half)
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
        self.tp = None if pg_collection.tp is None or pg_collection.tp.world_size == 1 else pg_collection.tp
        ranks = 1 if self.tp is None else self.tp.world_size
        self.heads, self.kv_heads = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
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
        self.o_proj = nn.Linear(self.heads * self.v_channels, config.hidden_size, bias_attr=False)
        self.make_projections()

    def channels(self):
        return self.config.head_dim, self.config.v_head_dim or self.config.head_dim

    def make_projections(self):
        config = self.config
        bias = None if config.attention_bias else False
        sizes = (self.heads, self.k_channels), (self.kv_heads, self.k_channels), (self.kv_heads, self.v_channels)
        self.projections = nn.LayerList(
            [nn.Linear(config.hidden_size, heads * size, bias_attr=bias) for heads, size in sizes]
        )
        norm = RMSNorm if config.use_qk_norm else lambda size: nn.Identity()
        self.q_norm, self.k_norm = norm(self.k_channels), norm(self.k_channels)

    def query_key_value(self, hidden, positions):
        sizes = (self.k_channels, self.k_channels, self.v_channels)
        heads = [project(hidden).reshape([0, 0, -1, size]) for project, size in zip(self.projections, sizes)]
        return rotated(self.q_norm(heads[0]), positions), rotated(self.k_norm(heads[1]), positions), heads[2], {}

    def forward(self, hidden, positions, attention_mask=None, attn_mask_startend_row_indices=None, **cache):
        if self.config.sequence_parallel:
            hidden = AllGather.apply(hidden, 1, "contiguous", self.tp)
        elif self.tp is not None:
            hidden = ForEachRank.apply(hidden, self.tp)
        out = self.o_proj(self.attend(hidden, positions, attention_mask, attn_mask_startend_row_indices, **cache))
        if self.config.sequence_parallel:
            return ReduceScatter.apply(out, 1, "contiguous", self.tp)
        return out if self.tp is None else OfEachRank.apply(out, self.tp)

    def attend(self, hidden, positions, *masks, **cache):
        query, key, value, extra = self.query_key_value(hidden, positions)
        arguments = {
            "attn_mask_type": self.attn_mask_type,
            "attention_bias": None,
            "packed_seq_params": None,
            "use_rr_flash_attention": False,
            **extra,
        }
        if self.config.recompute_core_attention and self.training:
            return recompute(self.core_attention, query, key, value, *masks, **arguments)
        arguments |= {
            "past_key_values": cache.get("past_key_values"),
            "layer_idx": self.layer_number,
            "use_cache": cache.get("use_cache", False),
        }
        return self.core_attention(query, key, value, *masks, **arguments)


class MLASelfAttention(SelfAttention):
    """Keys and values out of one latent vector: heads of values are smaller than those of keys."""

    def channels(self):
        return self.config.qk_nope_head_dim + self.config.qk_rope_head_dim, self.config.v_head_dim

    def make_projections(self):
        config, heads = self.config, self.heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.k_channels, bias_attr=False)
        self.kv_a_proj = nn.Linear(config.hidden_size, config.kv_lora_rank + config.qk_rope_head_dim, bias_attr=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + self.v_channels), bias_attr=False
        )

    def query_key_value(self, hidden, positions):
        nope, rope = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim
        query = self.q_proj(hidden).reshape([0, 0, -1, self.k_channels])
        query = paddle.concat([query[..., :nope], rotated(query[..., nope:], positions)], axis=-1)
        latent, position = self.kv_a_proj(hidden).split([self.config.kv_lora_rank, rope], axis=-1)
        latent = self.kv_a_layernorm(latent)
        both = self.kv_b_proj(latent).reshape([0, 0, -1, nope + self.v_channels])
        position = rotated(position.unsqueeze(2), positions).expand([-1, -1, both.shape[2], -1])
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

    def forward(self, hidden, positions, **inputs):
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), positions, **inputs)
        return hidden + self.down_proj(nn.functional.silu(self.up_proj(self.post_attention_layernorm(hidden))))


class GPTModel(nn.Layer):
    """Takes a dict of inputs, as PaddleFleet's does, which is a pipeline of layers; returns logits.

    With context parallelism the tokens are this rank's. With sequence parallelism a tensor-parallel rank has a part of
    these outside of attention, and returns the logits of that.
    """

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
        positions = paddle.arange(begin, begin + hidden.shape[1] * ContextParallel.size)
        if ContextParallel.size > 1:
            group = fleet.get_hybrid_communicate_group().get_context_parallel_group()
            positions = scatter(positions, 0, self.config.cp_balance_mode, group)
        if self.config.sequence_parallel:
            hidden = scatter(hidden, 1, "contiguous", ProcessGroupCollection.tp_group)
        for layer in self.layers:
            hidden = layer(hidden, positions, **inputs)
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
