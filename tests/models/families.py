"""The families of models that rrattn is tested with, and a tiny random model of each of PaddleFormers'.

The tests run over these lists in the versions that are installed, so that a family that cannot be built fails, and the
tables of `docs/support.md` and the README are made from them (`python -m tools.support`).
"""

import copy
import importlib
import sys
from dataclasses import dataclass, field

VERSIONS = ("1.0.0", "1.2.0")  # of PaddleFormers
PADDLENLP = {"3.0.0b4": ("llama", "qwen2"), "2.8.1": ("llama",)}
# Of PaddleFormers 1.2.0, built as PaddleFleet's GPTModel over a stand-in (tests/models/test_gpt_provider.py), and of
# PaddleFormers' sources under PaddleFleet's name (tests/models/test_attention_table.py).
GPT_MODEL = ("qwen2", "qwen3")
UNDER_PADDLEFLEET = ("llama",)
# Families that PaddleFormers 1.2.0 has as GPTModel alone, and what is known of their core attention.
GPT_MODEL_ALONE = {
    "kimi_k2": ("Kimi K2", True),
    "minimax_m2": ("MiniMax M2", True),
    "qwen3_5": ("Qwen3.5", True),
    "qwen3_5_moe": ("Qwen3.5 MoE", True),
    "deepseek_v32": ("DeepSeek V3.2", False),
    "deepseek_v4": ("DeepSeek V4", False),
    "glm_moe_dsa": ("GLM-5", False),
}
VOCABULARY = 97
NUM_LAYERS = 2
WINDOW = 128

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,  # large enough for attention to have preferences
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ROUTED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_PICTURE_TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
_TOWER |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _positions(**more):
    """Of three axes, as a fresh dict: configs add to it."""
    return {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3], **more}


@dataclass(frozen=True)
class Family:
    """One family: how its tiny model is built, and what is particular to it."""

    name: str
    """Folder of its module in PaddleFormers' `transformers`."""
    title: str
    """As pages call it."""
    classes: str
    """Prefix of its config's and model's class."""
    model_type: str = ""
    """That of the config of its attention layers; its name where empty."""
    settings: dict = field(default_factory=dict)
    """Of the config of its text, beside the common ones."""
    tower: dict = None
    """Of the config of its tower for pictures, where it has one."""
    missing: dict = field(default_factory=dict)
    """Version -> a package that a CPU has none of, for which there is a stand-in; None for one without the family."""
    old_class: tuple = ()
    """Versions in which its newer class is PaddleFleet's GPTModel, so that the older one is tested."""
    dense: str = "eager"
    """The attention function that is its dense twin."""
    generates: bool = True
    """Whether the library generates with it, on a CPU and from text alone."""

    @property
    def attention_type(self):
        return self.model_type or self.name

    def versions(self):
        """Those that have it."""
        return [version for version in VERSIONS if self.missing.get(version, "") is not None]


_FLEET = {"1.2.0": "PaddleFleet"}
_ALWAYS_FLEET = {"1.0.0": "PaddleFleet", **_FLEET}
_NEW = ("1.2.0",)

FAMILIES = (
    Family("llama", "LLaMA", "Llama"),
    Family("qwen2", "Qwen2", "Qwen2", missing=_FLEET, old_class=_NEW),
    Family("qwen3", "Qwen3", "Qwen3", missing=_FLEET, old_class=_NEW),
    Family("qwen2_moe", "Qwen2 MoE", "Qwen2Moe", settings=_EXPERTS, missing=_FLEET, old_class=_NEW),
    Family("qwen3_moe", "Qwen3 MoE", "Qwen3Moe", settings=_EXPERTS, missing=_ALWAYS_FLEET, old_class=VERSIONS),
    Family(
        "qwen3_next",
        "Qwen3-Next",
        "Qwen3Next",
        settings={
            **_EXPERTS,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        missing=_ALWAYS_FLEET,
        dense="sdpa",  # its model makes no causal mask for "eager"
    ),
    Family("ernie4_5", "ERNIE 4.5", "Ernie4_5"),
    Family(
        "ernie4_5_moe",
        "ERNIE 4.5 MoE",
        "Ernie4_5_Moe",
        # without a layer of experts, which Paddle's CPU build lacks operators for
        settings={
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 32,
            "moe_layer_start_index": NUM_LAYERS,
            "num_nextn_predict_layers": 0,
        },
    ),
    Family("phi3", "Phi-3", "Phi3", settings={**_WINDOWS, "resid_pdrop": 0.0}),
    Family(
        "gemma3_text",
        "Gemma 3",
        "Gemma3",
        settings={**_WINDOWS, "head_dim": 256, "query_pre_attn_scalar": 256},
    ),
    Family(
        "gpt_oss",
        "GPT-OSS",
        "GptOss",
        settings={**_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Family(
        "glm4_moe",
        "GLM-4 MoE",
        "Glm4Moe",
        settings=_ROUTED_EXPERTS,
        missing=_ALWAYS_FLEET,
        old_class=VERSIONS,
    ),
    Family(
        "deepseek_v3",
        "DeepSeek V3",
        "DeepseekV3",
        settings={
            **_ROUTED_EXPERTS,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": NUM_LAYERS,
            "num_nextn_predict_layers": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "factor": 1.0},
        },
        missing={"1.0.0": "deep_ep", "1.2.0": "paddlefleet_ops"},
        generates=False,  # it puts heads one after another in its cache, not positions
    ),
    Family(
        "qwen2_5_vl",
        "Qwen2.5-VL",
        "Qwen2_5_VL",
        model_type="qwen2_5_vl_text",
        settings={"rope_scaling": _positions()},
        tower={**_TOWER, "fullatt_block_indexes": [1], "window_size": 16},
    ),
    Family(
        "qwen3_vl",
        "Qwen3-VL",
        "Qwen3VL",
        model_type="qwen3_vl_text",
        settings={"rope_scaling": _positions()},
        tower={**_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        old_class=VERSIONS,
    ),
    Family(
        "qwen3_vl_moe",
        "Qwen3-VL MoE",
        "Qwen3VLMoe",
        model_type="qwen3_vl_moe_text",
        settings={**_EXPERTS, "rope_scaling": _positions()},
        tower={**_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        missing=_ALWAYS_FLEET,
        old_class=VERSIONS,
    ),
    Family(
        "paddleocr_vl",
        "PaddleOCR-VL",
        "PaddleOCRVL",
        settings={"rope_scaling": _positions()},
        tower={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 4,
            "image_size": 28,
        },
        missing={"1.2.0": "Triton"},
    ),
    Family(
        "glm_ocr",
        "GLM-OCR",
        "GlmOcr",
        model_type="glm_ocr_text",
        settings={"rope_scaling": _positions()},
        tower=_TOWER,
        missing={"1.0.0": None},
    ),
    Family(
        "glm4v_moe",
        "GLM-4V MoE",
        "Glm4vMoe",
        model_type="glm4v_moe_text",
        settings={**_ROUTED_EXPERTS, "rope_parameters": _positions(rope_theta=10000.0), "partial_rotary_factor": 1.0},
        tower=_TOWER,
        missing={"1.0.0": None, "1.2.0": "paddlefleet_ops"},
    ),
    Family(
        "ernie4_5_moe_vl",
        "ERNIE 4.5 VL",
        "Ernie4_5_VLMoe",
        settings={
            "moe_num_experts": 0,  # experts are what Paddle's CPU build lacks operators for
            "pixel_hidden_size": 32,
            "spatial_conv_size": 2,
            "temporal_conv_size": 2,
            "im_patch_id": 90,
            "rope_3d": False,
            "apply_rope_fusion": False,
            "use_cache": False,
            "fuse_linear": False,
        },
        tower={
            "depth": 1,
            "embed_dim": 32,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 4,
            "spatial_merge_size": 2,
        },
        generates=False,  # without the types of its tokens
    ),
)
_SUFFIXES = ("Deprecated", "Decapitated", "")  # of classes that look up the table, where newer ones are PaddleFleet's
_CONFIGS = {"gemma3_text": "Gemma3TextConfig"}  # other than the prefix says
_OWN_PACKAGE = {"ernie4_5_moe_vl": ("model.configuration", "model.modeling_moe_vl")}


def build(family, **more):
    """A tiny model of a family in eval mode with random weights."""
    import paddle
    from missing_parts import stand_ins

    paddle.seed(0)
    folder = f"paddleformers.transformers.{family.name}"
    config_module, model_module = _OWN_PACKAGE.get(family.name, ("configuration", "modeling"))
    with stand_ins():
        configuration = importlib.import_module(f"{folder}.{config_module}")
        modeling = importlib.import_module(f"{folder}.{model_module}")
    kind = "ForCausalLM" if family.tower is None else "ForConditionalGeneration"
    names = [f"{family.classes}{kind}{suffix}" for suffix in _SUFFIXES]
    model_class = next(getattr(modeling, name) for name in names if hasattr(modeling, name))
    config_class = getattr(configuration, _CONFIGS.get(family.name, f"{family.classes}Config"))
    config = config_class(**_arguments(family, more))
    for part in (config, getattr(config, "text_config", config), getattr(config, "vision_config", config)):
        part.fuse_rms_norm = False
    for part in (config, getattr(config, "text_config", config)):
        part._attn_implementation = family.dense
        vars(part).update(more)  # what a constructor takes back, such as layers that predict further tokens
    if family.name == "ernie4_5_moe_vl":
        _without_async_copies()
    model = model_class(config)
    model.eval()
    return model


def _arguments(family, more):
    """Of a family's config; each time new dicts, which configs add to."""
    text, tower = copy.deepcopy({**_COMMON, **family.settings, **more}), copy.deepcopy(family.tower)
    if tower is None:
        return text
    if family.attention_type == family.name:  # the text's settings stand in the config itself
        return {**text, **_PICTURE_TOKENS, "vision_config": tower}
    return {"text_config": text, "vision_config": tower, **_PICTURE_TOKENS}


def _without_async_copies():
    """Paddle's CPU build has no AsyncLoad, with which ERNIE 4.5 VL brings two flags to the host."""
    modeling = sys.modules["paddleformers.transformers.ernie4_5_moe_vl.model.modeling_moe"]
    modeling.get_async_loader = lambda: None
    modeling.async_offload = lambda tensor, loader: (tensor, None)
