"""A stand-in for FastDeploy, which has no release to install: its attention backends by contract.

Names, constructors, calls and the layout of the cache are those of github.com/PaddlePaddle/FastDeploy, in
fastdeploy/model_executor/layers/attention: flash_attn_backend.py at commit d735f6b91a5d and attention_selecter.py at
bc403a034620; in fastdeploy/platforms: cuda.py at 084f709bccaf and base.py at 03454962065e. What its operators compute
is written down naively, without position embeddings.
"""

import enum
import sys
from importlib import import_module
from types import ModuleType, SimpleNamespace

import numpy as np
import paddle


class _Backend(enum.Enum):
    NATIVE_ATTN = enum.auto()
    APPEND_ATTN = enum.auto()
    FLASH_ATTN = enum.auto()


class CUDAPlatform:
    device_name = "gpu"

    @classmethod
    def get_attention_backend_cls(cls, selected_backend):
        if selected_backend == _Backend.FLASH_ATTN:
            return "fastdeploy.model_executor.layers.attention.flash_attn_backend.FlashAttentionBackend"
        raise ValueError("Invalid attention backend you specified.")


def get_attention_backend(name):
    """The class that the engine takes for FD_ATTENTION_BACKEND=name."""
    platforms = sys.modules["fastdeploy.platforms"]
    path = platforms.current_platform.get_attention_backend_cls(platforms._Backend.__members__.get(name))
    module, _, attribute = path.rpartition(".")
    return getattr(import_module(module), attribute)


class FlashAttentionBackend:
    """Prefill by `flash_attn_func` over gathered keys, decoding over the pages."""

    flash_attn_func = None

    def __init__(
        self, fd_config, kv_num_heads, num_heads, head_dim, encoder_block_shape_q=-1, decoder_block_shape_q=-1
    ):
        self.kv_num_heads, self.num_heads, self.head_dim = kv_num_heads, num_heads, head_dim
        self.block_size = fd_config.cache_config.block_size
        self.attn_outputsize_tp = num_heads * head_dim
        if self.flash_attn_func is None:
            raise RuntimeError("there is no GPU to look at")
        self.encoder_block_shape_q, self.decoder_block_shape_q = encoder_block_shape_q, decoder_block_shape_q
        self.attention_metadata = None

    def get_kv_cache_shape(self, max_num_blocks, kv_cache_quant_type=None):
        shape = [max_num_blocks, self.kv_num_heads, self.block_size, self.head_dim]
        return shape, shape

    def init_attention_metadata(self, forward_meta):
        lengths = forward_meta.seq_lens_decoder + forward_meta.seq_lens_this_time
        self.attention_metadata = SimpleNamespace(
            cu_seqlens_q=forward_meta.cu_seqlens_q,
            cu_seqlens_k=paddle.concat([paddle.zeros([1], "int32"), lengths.cumsum().astype("int32")]),
            any_prefill=bool((forward_meta.seq_lens_encoder > 0).any()),
        )

    def forward_mixed(self, q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta):
        metadata = self.attention_metadata
        caches = forward_meta.caches[2 * layer.layer_id : 2 * layer.layer_id + 2]
        rows, keys, values = self.write_cache_and_gather(qkv, caches, forward_meta)
        decoded = self.append_attention(rows, keys, values, forward_meta)
        if not metadata.any_prefill:
            return decoded
        out = self.flash_attn_func(
            rows,
            paddle.concat(keys),
            paddle.concat(values),
            metadata.cu_seqlens_q,
            metadata.cu_seqlens_k,
            max_seqlen_q=max(forward_meta.seq_lens_this_time.tolist()),
            max_seqlen_k=max(len(key) for key in keys),
            causal=True,
            **self.flash_attn_kwargs,
        )[0].reshape([-1, self.attn_outputsize_tp])
        begins = forward_meta.cu_seqlens_q.tolist()
        for b, encoder in enumerate(forward_meta.seq_lens_encoder.tolist()):
            if encoder == 0:
                out[begins[b] : begins[b + 1]] = decoded[begins[b] : begins[b + 1]]
        return out

    def write_cache_and_gather(self, qkv, caches, forward_meta):
        """(queries [T, Hq, D], keys and values of each request), once those of the batch are in the pages."""
        rows = qkv.reshape([len(qkv), -1, self.head_dim])
        query, *new = paddle.split(rows, [self.num_heads, self.kv_num_heads, self.kv_num_heads], axis=1)
        gathered = [], []
        begins = forward_meta.cu_seqlens_q.tolist()
        for b, before in enumerate(forward_meta.seq_lens_decoder.tolist()):
            end = before + begins[b + 1] - begins[b]
            pages = forward_meta.block_tables[b].tolist()
            for cache, part, found in zip(caches, new, gathered):
                for token in range(before, end):
                    row = part[begins[b] + token - before]
                    cache[pages[token // self.block_size], :, token % self.block_size] = row
                used = paddle.concat([cache[page] for page in pages[: -(-end // self.block_size)]], axis=1)
                found.append(used.transpose([1, 0, 2])[:end])
        return query, *gathered

    def append_attention(self, query, keys, values, forward_meta):
        """Dense attention of what decodes, zeros elsewhere: [T, Hq * D]."""
        out = np.zeros(query.shape, np.float32)
        begins = forward_meta.cu_seqlens_q.tolist()
        group = self.num_heads // self.kv_num_heads
        for b, encoder in enumerate(forward_meta.seq_lens_encoder.tolist()):
            for row in range(begins[b], begins[b + 1] if encoder == 0 else begins[b]):
                for head in range(self.num_heads):
                    key, value = (x[b][:, head // group].numpy() for x in (keys, values))
                    score = key @ query[row, head].numpy() * self.head_dim**-0.5
                    probability = np.exp(score - score.max())
                    out[row, head] = probability @ value / probability.sum()
        return paddle.to_tensor(out).reshape([len(out), -1])


def install(monkeypatch):
    """Puts the stand-in where `import fastdeploy...` finds it, with an enumeration that nothing was added to."""
    backends = enum.Enum("_Backend", [member.name for member in _Backend])
    platform = type("CUDAPlatform", (CUDAPlatform,), {})
    monkeypatch.setattr(sys.modules[__name__], "_Backend", backends)
    folder = "fastdeploy.model_executor.layers.attention"
    modules = {
        "fastdeploy": {},
        "fastdeploy.platforms": {"_Backend": backends, "current_platform": platform()},
        "fastdeploy.model_executor": {},
        "fastdeploy.model_executor.layers": {},
        folder: {},
        f"{folder}.flash_attn_backend": {"FlashAttentionBackend": FlashAttentionBackend},
    }
    for name, members in modules.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, attribute = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], attribute, module)
    monkeypatch.delitem(sys.modules, "rrattn.integrations.fastdeploy", raising=False)
    monkeypatch.delitem(sys.modules, "rrattn.integrations.fastdeploy_plugin", raising=False)
