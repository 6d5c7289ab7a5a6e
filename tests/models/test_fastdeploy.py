"""rrattn's attention backend in FastDeploy, over a stand-in that has the contract of a commit."""

import re
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import fastdeploy_stand_in
import numpy as np
import paddle
import pytest

import rrattn

PAGE, HEADS, HEADS_K, HEAD_DIM, LAYERS = 64, 4, 2, 32, 2


@pytest.fixture
def plugin(monkeypatch):
    """rrattn.integrations.fastdeploy_plugin, over the stand-in."""
    fastdeploy_stand_in.install(monkeypatch)
    yield import_module("rrattn.integrations.fastdeploy_plugin")
    for name in ("fastdeploy", "fastdeploy_plugin"):
        sys.modules.pop(f"rrattn.integrations.{name}", None)


def config_of(ranks=1, rank=0, **model_config):
    return SimpleNamespace(
        model_config=SimpleNamespace(num_hidden_layers=LAYERS, head_dim=HEAD_DIM, **model_config),
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks, tensor_parallel_rank=rank),
        cache_config=SimpleNamespace(block_size=PAGE),
    )


def make_backend(plugin, **options):
    plugin.register()
    backend_class = fastdeploy_stand_in.get_attention_backend("RR_ATTN")
    return backend_class(config_of(**options), HEADS_K, HEADS, HEAD_DIM, encoder_block_shape_q=64)


class Engine:
    """Steps of requests over a cache of pages, each of (tokens in the cache, new tokens, whether it decodes)."""

    def __init__(self, backend):
        self.backend = backend
        self.rng = np.random.default_rng(0)
        shape, _ = backend.get_kv_cache_shape(30)
        self.caches = [paddle.zeros(shape) for _ in range(2 * LAYERS)]
        self.tables = paddle.to_tensor(self.rng.permutation(30).reshape(3, 10).astype("int32"))
        self.history = [[paddle.zeros([0, HEADS_K, HEAD_DIM])] * 2 for _ in range(3)]

    def step(self, requests, layer):
        """(out [tokens, Hq * D], (query, key, value) of each request, with all of its keys)."""
        before, new, decodes = zip(*requests)
        meta = SimpleNamespace(
            seq_lens_encoder=paddle.to_tensor([0 if d else n for n, d in zip(new, decodes)], "int32"),
            seq_lens_decoder=paddle.to_tensor(before, "int32"),
            seq_lens_this_time=paddle.to_tensor(new, "int32"),
            cu_seqlens_q=paddle.to_tensor(np.cumsum([0, *new]), "int32"),
            block_tables=self.tables,
            caches=self.caches,
        )
        rows = self.rng.standard_normal((sum(new), HEADS + 2 * HEADS_K, HEAD_DIM)).astype("float32")
        qkv = paddle.to_tensor(rows)
        self.backend.init_attention_metadata(meta)
        out = self.backend.forward_mixed(None, None, None, qkv.flatten(1), None, None, layer, meta)
        parts = []
        for b, own in enumerate(paddle.split(qkv, list(new))):
            query, *rows = paddle.split(own, [HEADS, HEADS_K, HEADS_K], axis=1)
            self.history[b] = [paddle.concat(pair) for pair in zip(self.history[b], rows)]
            parts.append((query, *self.history[b]))
        return out.reshape([-1, HEADS, HEAD_DIM]), parts


def layer_of(index=0, **options):
    return SimpleNamespace(layer_id=index, **options)


def assert_attends(out, parts, options):
    """Each request of a step as by its own call, with its own options."""
    first = 0
    for (query, key, value), own in zip(parts, options):
        expected = rrattn.rr_attention(*(x.unsqueeze(0) for x in (query, key, value)), causal=True, **own)[0]
        np.testing.assert_allclose(out[first : first + len(query)].numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)
        first += len(query)


def test_prompts_and_chunks_are_prefilled_sparsely_and_decoding_is_the_engines(plugin):
    backend = make_backend(plugin, rrattn_threshold=0.3, rrattn_keep_last=False, rrattn_min_share=0.0)
    engine, layer = Engine(backend), layer_of()
    sparse = {"threshold": 0.3, "keep_last": False, "min_share": 0.0}
    dense = {"threshold": 1.0}
    out, parts = engine.step([(0, 300, False), (0, 256, False), (0, 130, False)], layer)
    assert_attends(out, parts, [sparse] * 3)
    out, parts = engine.step([(300, 1, True), (256, 300, False), (130, 1, True)], layer)
    assert_attends(out, parts, [dense, sparse, dense])
    different = rrattn.rr_attention(*(x.unsqueeze(0) for x in parts[1]), causal=True, **dense)[0]
    assert float((out[1:301] - different).abs().max()) > 1e-2  # so it was sparse
    out, parts = engine.step([(301, 1, True), (556, 1, True), (131, 1, True)], layer)
    assert_attends(out, parts, [dense] * 3)


def test_thresholds_of_layers_and_heads_sinks_and_ranks(plugin):
    thresholds = [0.9, [0.2, 0.4, 0.6, 0.8, 0.3, 0.5, 0.7, 1.0]]
    backend = make_backend(plugin, ranks=2, rank=1, rrattn_threshold=thresholds, rrattn_compensate=True)
    sink = paddle.to_tensor([0.5, -1.0, 2.0, 0.0])
    for index, threshold in ((0, 0.9), (1, paddle.to_tensor(thresholds[1][4:]))):
        out, parts = Engine(backend).step(
            [(0, 300, False), (0, 5, False), (0, 200, False)], layer_of(index, sinks=sink)
        )
        own = {"threshold": threshold, "sink": sink, "head_offset": HEADS, "compensate": True}
        with paddle.no_grad():
            assert_attends(out, parts, [own] * 3)


def test_the_plugin_adds_its_name_to_the_closed_enumeration_once(plugin):
    before = len(sys.modules["fastdeploy.platforms"]._Backend)
    for _ in range(2):
        plugin.register()
    backends = sys.modules["fastdeploy.platforms"]._Backend
    assert len(backends) == before + 1
    member = backends.RR_ATTN
    assert backends["RR_ATTN"] is backends(member.value) is member and list(backends)[-1] is member
    assert member != backends.FLASH_ATTN and repr(member) and hash(member) is not None
    assert fastdeploy_stand_in.get_attention_backend("FLASH_ATTN") is fastdeploy_stand_in.FlashAttentionBackend
    with pytest.raises(ValueError, match="Invalid attention backend"):
        fastdeploy_stand_in.get_attention_backend("APPEND_ATTN")
    assert issubclass(fastdeploy_stand_in.get_attention_backend("RR_ATTN"), fastdeploy_stand_in.FlashAttentionBackend)


def test_the_installation_names_the_plugin_where_the_engine_looks(plugin):
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    group = r'^\[project\.entry-points\."fastdeploy\.model_register_plugins"\]\nrrattn = "([\w.]+):(\w+)"$'
    module, function = re.search(group, text, re.MULTILINE).groups()
    assert getattr(import_module(module), function) is plugin.register


@pytest.mark.parametrize(
    "settings, message",
    (
        ({"rrattn_min_length": 100}, "rrattn_min_length is 100, but must be 0 in FastDeploy"),
        ({"rrattn_quantization": "qk_int8_pv_fp8"}, "rrattn_quantization is 'qk_int8_pv_fp8', but must be None"),
        ({"causal": False}, "causal is False, but rrattn's FastDeploy backend is for causal attention"),
        ({"rrattn_treshold": 0.5}, "the model's config has rrattn_treshold, but rrattn knows"),
        ({"rrattn_threshold": [0.5] * 3}, "threshold has 3 entries, but the model has 2 layers"),
    ),
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(plugin, settings, message):
    with pytest.raises(ValueError, match=message):
        make_backend(plugin, **settings)


def test_windows_are_refused(plugin):
    engine = Engine(make_backend(plugin))
    with pytest.raises(ValueError, match="layer 1 has sliding_window=128, but rrattn prefills without windows"):
        engine.step([(0, 5, False)] * 3, layer_of(1, sliding_window=128))


def test_without_the_engine_the_backend_says_where_it_is():
    with pytest.raises(ImportError, match="needs FastDeploy, of which PyPI has no release"):
        import_module("rrattn.integrations.fastdeploy")
