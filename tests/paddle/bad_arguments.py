"""Bad arguments: for each stage, what to change in good ones, and the error that must come of it.

An error names the value and what is allowed. Each entry is (changed arguments, pattern of the message).
"""

import numpy as np

B, LQ, LK, HQ, HKV, D = 2, 200, 300, 4, 2, 16
MQ, MK = 2, 3


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def integers(*shape):
    return np.zeros(shape, np.int32)


def good():
    """Arguments that every stage accepts."""
    return {
        "query": zeros(B, LQ, HQ, D),
        "key": zeros(B, LK, HKV, D),
        "value": zeros(B, LK, HKV, D),
        "block_scores": zeros(B, HQ, MQ, MK),
        "block_mask": integers(B, HQ, MQ, 1),
        "startend_row_indices": None,
        "causal": True,
    }


BAD_QUERY_KEY = {
    "query of rank 3": ({"query": zeros(LQ, HQ, D)}, r"query has 3 dimensions.*\[200, 4, 16\].*must have 4"),
    "key of rank 5": ({"key": zeros(1, B, LK, HKV, D)}, r"key has 5 dimensions.*must have 4"),
    "query dtype": (
        {"query": zeros(B, LQ, HQ, D, dtype=np.float64)},
        "query has dtype float64.*float32, float16 or bfloat16",
    ),
    "integer query": (
        {"query": integers(B, LQ, HQ, D)},
        "query has dtype int32.*float32, float16 or bfloat16",
    ),
    "mixed dtypes": (
        {"key": zeros(B, LK, HKV, D, dtype=np.float16)},
        "key has dtype float16.*must have float32",
    ),
    "head counts": (
        {"key": zeros(B, LK, 3, D), "value": zeros(B, LK, 3, D)},
        "query has 4 heads and key has 3.*multiple",
    ),
    "no key heads": (
        {"key": zeros(B, LK, 0, D), "value": zeros(B, LK, 0, D)},
        "query has 4 heads and key has 0",
    ),
    "batch sizes": (
        {"key": zeros(3, LK, HKV, D), "value": zeros(3, LK, HKV, D)},
        "key has batch size 3.*query, 2",
    ),
    "head dims": ({"key": zeros(B, LK, HKV, 24)}, "key has head_dim 24.*query, 16"),
    "more queries than keys": (
        {"key": zeros(B, 199, HKV, D), "value": zeros(B, 199, HKV, D)},
        "seqlen_q is 200 and seqlen_k is 199.*causal.*at most seqlen_k",
    ),
    "bounds of rank 3": (
        {"startend_row_indices": integers(1, LK, 1)},
        "startend_row_indices has 3 dimensions.*must have 4",
    ),
    "bounds length": (
        {"startend_row_indices": integers(B, 1, 299, 1)},
        r"startend_row_indices has length 299.*\(300\)",
    ),
    "bounds dtype": (
        {"startend_row_indices": zeros(B, 1, LK, 1, dtype=np.int64)},
        "startend_row_indices has dtype int64.*must have int32",
    ),
    "bounds heads": (
        {"startend_row_indices": integers(B, 3, LK, 1)},
        r"startend_row_indices has 3 heads.*1, num_heads_k.*num_heads \(4\)",
    ),
    "bounds batch": (
        {"startend_row_indices": integers(3, 1, LK, 1)},
        "startend_row_indices has batch size 3.*must have 2",
    ),
    "no bounds": (
        {"startend_row_indices": integers(B, 1, LK, 0)},
        "startend_row_indices has 0 bounds.*1 or 2.*True",
    ),
    "4 bounds, causal": (
        {"startend_row_indices": integers(B, 1, LK, 4)},
        "has 4 bounds.*1 or 2.*causal is True",
    ),
    "1 bound, not causal": (
        {"startend_row_indices": integers(B, 1, LK, 1), "causal": False},
        "has 1 bounds.*2 or 4.*causal is False",
    ),
    "3 bounds, not causal": (
        {"startend_row_indices": integers(B, 1, LK, 3), "causal": False},
        "has 3 bounds.*2 or 4.*causal is False",
    ),
    **{
        f"head_dim {d}": (
            {"query": zeros(B, LQ, HQ, d), "key": zeros(B, LK, HKV, d), "value": zeros(B, LK, HKV, d)},
            f"head_dim is {d},.*multiple of 8.*256",
        )
        for d in (0, 4, 12, 264)
    },
    **{
        f"softmax_scale {x}": ({"softmax_scale": x}, f"softmax_scale is {x}.*finite")
        for x in (float("nan"), float("inf"))
    },
    **{
        f"softmax_scale {x!r}": ({"softmax_scale": x}, rf"softmax_scale is {shown}, .*finite")
        for x, shown in (
            ("0.1", "'0.1'"),
            (True, "True"),
            ([0.1], r"\[0.1\]"),
            (1e300, r"1e\+300, which is inf in float32"),
            (-(10**400), r"-10*\.\.\.0*, which is -inf in float32"),
        )
    },
}

BAD_VALUE = {
    "value of rank 3": ({"value": zeros(LK, HKV, D)}, r"value has .*\[300, 2, 16\].*must have"),
    "value dtype": (
        {"value": zeros(B, LK, HKV, D, dtype=np.float16)},
        "value has dtype float16.*must have float32",
    ),
    "value heads": ({"value": zeros(B, LK, 4, D)}, r"value has shape \[2, 300, 4, 16\].*\[2, 300, 2, 16\]"),
    "value length": (
        {"value": zeros(B, 299, HKV, D)},
        r"value has shape \[2, 299, 2, 16\].*\[2, 300, 2, 16\]",
    ),
    **{
        f"head_dim {d} of value": (
            {"value": zeros(B, LK, HKV, d)},
            f"head_dim of value is {d},.*multiple of 8.*256",
        )
        for d in (0, 4, 12, 264)
    },
}

BAD_SINK = {
    "sinks for 3 heads": ({"sink": zeros(3)}, r"sink has shape \[3\], but must have \[4\]: \[num_heads\]"),
    "sinks of rank 2": ({"sink": zeros(1, HQ)}, r"sink has shape \[1, 4\], but must have \[4\]"),
    "no sinks": ({"sink": zeros(0)}, r"sink has shape \[0\], but must have"),
    "sink dtype": ({"sink": zeros(HQ, dtype=np.float64)}, "sink has dtype float64, but must have float32"),
}

BAD_SAMPLING = {
    **{f"stride {s}": ({"stride": s}, f"stride is {s},.*divisor of 128.*2.*64") for s in (-8, 0, 1, 7, 48, 128)},
    **{
        f"stride {s!r}": ({"stride": s}, f"stride is {s!r}, .*an integer and a divisor of 128.*2.*64")
        for s in (8.0, True, "8", None, 2**70)
    },
    **{
        f"head_offset {h!r}": ({"head_offset": h}, f"head_offset is {h!r}, .*integer of at least 0")
        for h in (1.5, True, "0", None, 2**70)
    },
    "head_offset": ({"head_offset": -1}, "head_offset is -1,.*at least 0"),
}

BAD_THRESHOLD = {
    **{
        f"threshold {tau!r}": ({"threshold": tau}, rf"threshold is {shown}, but must be .*\(0, 1\]")
        for tau, shown in (
            (0.0, "0.0"),
            (-0.5, "-0.5"),
            (1.5, "1.5"),
            (float("nan"), "nan"),
            (float("inf"), "inf"),
            (1e-60, "1e-60, which is 0 in float32"),
            ("0.5", "'0.5'"),
            (True, "True"),
            (None, "None"),
            ([0.5] * 4, r"\[0.5, 0.5, 0.5, 0.5\]"),
        )
    },
    **{
        f"threshold[2] {tau}": (
            {"threshold": np.array([0.5, 1, tau, 0.9], np.float32)},
            rf"threshold\[2\] is {tau}\b.*\(0, 1\]",
        )
        for tau in (0, -1, 2, np.nan)
    },
    "thresholds for 3 heads": (
        {"threshold": np.full(3, 0.5, np.float32)},
        r"threshold has shape \[3\].*\[4\]",
    ),
    "no thresholds": ({"threshold": np.zeros(0, np.float32)}, r"threshold has shape \[0\], but must have"),
    "threshold dtype": ({"threshold": np.full(4, 0.5)}, "threshold has dtype float64.*must have float32"),
}


def bad_flags(*names):
    """What is no True or False, though Python would take it for one."""
    return {
        f"{name} {value!r}": ({name: value}, f"{name} is {value!r}, but must be True or False")
        for name in names
        for value in ("False", 0, 1, None)
    }


BAD_KEEP = {
    **{
        f"keep_local {value!r}": ({"keep_local": value}, rf"keep_local is {value!r}, .*integer of at least 0")
        for value in (-1, -(2**70), True, 1.5, "1", None)
    },
    **bad_flags("keep_sink", "keep_last"),
}

BAD_SCORES = {
    "scores of rank 3": ({"block_scores": zeros(HQ, MQ, MK)}, "block_scores has 3 dimensions.*must have 4"),
    "scores dtype": (
        {"block_scores": zeros(B, HQ, MQ, MK, dtype=np.float16)},
        "block_scores has dtype float16.*must have float32",
    ),
    "scores shape": (
        {"block_scores": zeros(B, HQ, MQ, 4)},
        r"block_scores has shape \[2, 4, 2, 4\].*\[2, 4, 2, 3\]",
    ),
    "lengths": ({"seqlen_q": LK + 1}, "seqlen_q is 301 and seqlen_k is 300.*causal.*at most seqlen_k"),
    "negative length": ({"seqlen_q": -1}, "seqlen_q is -1.*from 0"),
    **{
        f"{name} {value!r}": ({name: value}, f"{name} is {value!r}, but must be an integer from 0 to")
        for name in ("seqlen_q", "seqlen_k")
        for value in (300.0, True, "300", None, 2**31)
    },
}

BAD_MASK = {
    "mask of rank 3": ({"block_mask": integers(HQ, MQ, 1)}, "block_mask has 3 dimensions.*must have 4"),
    "mask dtype": (
        {"block_mask": zeros(B, HQ, MQ, 1, dtype=np.int64)},
        "block_mask has dtype int64.*must have int32",
    ),
    "a boolean mask": (
        {"block_mask": zeros(B, HQ, MQ, 1, dtype=bool)},
        "block_mask has dtype .*must have int32",
    ),
    "mask words": (
        {"block_mask": integers(B, HQ, MQ, MK)},
        r"block_mask has shape \[2, 4, 2, 3\].*\[2, 4, 2, 1\]",
    ),
    "mask heads": (
        {"block_mask": integers(B, HKV, MQ, 1)},
        r"block_mask has shape \[2, 2, 2, 1\].*\[2, 4, 2, 1\]",
    ),
}

SHARED_BOUNDS = {name: BAD_QUERY_KEY[name] for name in BAD_QUERY_KEY if "bound" in name}
BAD_CAUSAL = bad_flags("causal")
BAD_COMPENSATE = bad_flags("compensate")
BAD_QUANTIZATION = {
    f"quantization {value!r}": (
        {"quantization": value},
        f"quantization is {value!r}, but must be None or 'qk_int8_pv_fp8'",
    )
    for value in ("int8", "", True, 8)
} | {
    "compensated quantization": (
        {"quantization": "qk_int8_pv_fp8", "compensate": True},
        "quantization is .qk_int8_pv_fp8., but attention in eight bits is not compensated",
    )
}
STAGES = {
    "estimate": {**BAD_QUERY_KEY, **BAD_CAUSAL, **BAD_SAMPLING, **BAD_SINK},
    "select": {**SHARED_BOUNDS, **BAD_CAUSAL, **BAD_THRESHOLD, **BAD_KEEP, **BAD_SCORES},
    "attend": {
        **BAD_QUERY_KEY,
        **BAD_CAUSAL,
        **BAD_VALUE,
        **BAD_MASK,
        **BAD_COMPENSATE,
        **BAD_QUANTIZATION,
        **BAD_SINK,
    },
    "backward": {**BAD_QUERY_KEY, **BAD_CAUSAL, **BAD_VALUE, **BAD_MASK, **BAD_SINK},
    "rr_attention": {
        **BAD_QUERY_KEY,
        **BAD_CAUSAL,
        **BAD_VALUE,
        **BAD_SAMPLING,
        **BAD_THRESHOLD,
        **BAD_KEEP,
        **BAD_COMPENSATE,
        **BAD_QUANTIZATION,
        **BAD_SINK,
    },
}
KEEP_RULES = {"keep_sink", "keep_last", "keep_local"}
KEYWORDS = {
    "estimate": {"stride", "head_offset", "softmax_scale", "sink"},
    "select": {"threshold", "seqlen_q", "seqlen_k", *KEEP_RULES},
    "attend": {"softmax_scale", "compensate", "quantization", "sink"},
    "backward": {"softmax_scale", "sink", "grad_lse", "grad_sink"},
    "rr_attention": {
        "stride",
        "head_offset",
        "softmax_scale",
        "threshold",
        *KEEP_RULES,
        "compensate",
        "quantization",
        "sink",
    },
}
