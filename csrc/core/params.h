// The parameters of every stage, on any device: plain structs of pointers, sizes and strides.
//
// Strides are counted in elements. A stage is `run_<stage>(const <Stage>Params&)`, in namespace
// `cpu` or `cuda`; it allocates nothing, so the caller hands it a workspace of
// `<stage>_workspace_bytes(params)`.
#pragma once

#include <cstdint>
#include <tuple>

#if defined(__CUDACC__)
#define RRATTN_HOST_DEVICE __host__ __device__
#else
#define RRATTN_HOST_DEVICE
#endif

namespace rrattn {

constexpr int kBlockSize = 128;    // tokens of a block of queries or of keys: the unit of sparsity
constexpr int kMaskWordBits = 32;  // key blocks in a word of the packed block mask

// Block scores that come from a softmax lie in [0, kScoreEnd), where the fixed-point sums of 8,192
// blocks stay far inside int64. The selection keeps every visible block of a row in which a score
// is outside or NaN.
constexpr float kScoreEnd = 0x1p18f;

enum class DataType { kFloat32, kFloat16, kBFloat16 };

RRATTN_HOST_DEVICE inline int64_t size_of(DataType dtype) {
  return dtype == DataType::kFloat32 ? 4 : 2;
}

RRATTN_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A [B, L, H, D] tensor whose D elements lie side by side.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

// One number for each row, [B, H, L] float32.
struct RowNumbers {
  const float* data = nullptr;
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t row_stride = 0;

  RRATTN_HOST_DEVICE float at(int64_t batch, int64_t head, int64_t row) const {
    return data[batch * batch_stride + head * head_stride + row * row_stride];
  }
};

// FlashMask: the row intervals that are masked for each key, [B, num_heads, Lk, num_bounds] int32.
struct RowBounds {
  const int32_t* data = nullptr;  // null: no FlashMask
  int num_bounds = 0;             // 1 or 2 when causal, 2 or 4 when not
  int64_t num_heads = 1;          // 1, the number of key heads or the number of query heads
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  int64_t key_stride = 0;
  int64_t bound_stride = 0;
};

// Which queries see which keys. All stages have it.
struct Visibility {
  int64_t batch = 0;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  int64_t num_heads = 0;  // query heads
  bool causal = false;    // bottom-right aligned: query i sees keys up to i + shift()
  RowBounds row_bounds;

  RRATTN_HOST_DEVICE int64_t shift() const { return seqlen_k - seqlen_q; }
  RRATTN_HOST_DEVICE int64_t num_m_blocks() const { return ceil_div(seqlen_q, kBlockSize); }
  RRATTN_HOST_DEVICE int64_t num_n_blocks() const { return ceil_div(seqlen_k, kBlockSize); }
  // Rows of the block mask, [B, Hq, Mq], and words of each.
  RRATTN_HOST_DEVICE int64_t num_mask_rows() const { return batch * num_heads * num_m_blocks(); }
  RRATTN_HOST_DEVICE int64_t num_mask_words() const {
    return ceil_div(num_n_blocks(), kMaskWordBits);
  }
  // How many spans of span_length keys have bounds, [B, bounds heads, spans]: 0 without FlashMask.
  RRATTN_HOST_DEVICE int64_t num_span_bounds(int64_t span_length) const {
    return row_bounds.data ? batch * row_bounds.num_heads * ceil_div(seqlen_k, span_length) : 0;
  }
  // The FlashMask head that applies to query head h (heads of a group lie side by side).
  RRATTN_HOST_DEVICE int64_t bounds_head(int64_t h) const {
    return h * row_bounds.num_heads / num_heads;
  }
};

struct Heads {
  int64_t num_heads_k = 0;
  int64_t head_dim = 0;    // D, of queries and keys
  int64_t head_dim_v = 0;  // Dv, of values and outputs; the estimate has none
  DataType dtype = DataType::kFloat32;
};

struct Execution {
  void* workspace = nullptr;  // in the memory of the device that runs the stage
  int num_threads = 1;        // CPU only
  void* stream = nullptr;     // GPU only: a cudaStream_t
};

// One of a struct of settings, by the name that users and operators know it by.
template <typename Value>
struct Setting {
  const char* name;
  Value& value;
};
template <typename Value>
Setting(const char*, Value&) -> Setting<Value>;

// How the estimate samples.
struct Sampling {
  int64_t stride = 0;  // of the queries
  int64_t key_stride = 0;
  int64_t head_offset = 0;
  float softmax_scale = 0;
  float spread = 0;  // how much the variance within a stride of keys adds to its score
};

inline auto settings_of(Sampling& sampling) {
  return std::make_tuple(
      Setting{"stride", sampling.stride}, Setting{"key_stride", sampling.key_stride},
      Setting{"head_offset", sampling.head_offset},
      Setting{"softmax_scale", sampling.softmax_scale}, Setting{"spread", sampling.spread});
}

// Which blocks the selection keeps: those that hold `threshold` of a row's mass, and by the other
// rules some more (kept_by_rule in geometry.h).
struct KeepRules {
  float threshold = 0;                     // tau of every head, without head_thresholds
  const float* head_thresholds = nullptr;  // [Hq], or one for all heads, or null
  int64_t head_threshold_stride = 0;       // 1 or 0
  bool keep_sink = true;                   // the first visible key block
  bool keep_last = false;                  // all visible ones of the last row of blocks
  int64_t keep_local = 0;                  // key blocks before the row's own; at most Mk
  float min_share = 0;  // a block whose share of the row's mass is below this share of an average
                        // visible block's does not count towards a threshold below 1

  RRATTN_HOST_DEVICE float threshold_of(int64_t head) const {
    return head_thresholds ? head_thresholds[head * head_threshold_stride] : threshold;
  }
};

// Both bindings offer what is listed here.
inline auto settings_of(KeepRules& rules) {
  return std::make_tuple(
      Setting{"threshold", rules.threshold}, Setting{"keep_sink", rules.keep_sink},
      Setting{"keep_last", rules.keep_last}, Setting{"keep_local", rules.keep_local},
      Setting{"min_share", rules.min_share});
}

struct EstimateParams {
  Visibility visibility;
  Heads heads;
  Rows query;                   // [B, Lq, Hq, D]
  Rows key;                     // [B, Lk, Hkv, D]
  const float* sink = nullptr;  // [Hq], logits that join each row's softmax; or null
  Sampling sampling;
  float* block_scores = nullptr;  // [B, Hq, Mq, Mk], written whole
  Execution execution;
};

struct SelectParams {
  Visibility visibility;
  const float* block_scores = nullptr;  // [B, Hq, Mq, Mk]
  KeepRules rules;
  uint32_t* block_mask = nullptr;  // [B, Hq, Mq, ceil(Mk / 32)], written whole
  Execution execution;
};

struct AttendParams {
  Visibility visibility;
  Heads heads;
  Rows query;                            // [B, Lq, Hq, D]
  Rows key;                              // [B, Lk, Hkv, D]
  Rows value;                            // [B, Lk, Hkv, Dv]
  const uint32_t* block_mask = nullptr;  // [B, Hq, Mq, ceil(Mk / 32)]
  const float* sink = nullptr;           // [Hq], logits that join each row's softmax; or null
  float softmax_scale = 0;
  bool compensate = false;  // means stand in for key blocks (stood_in_for in geometry.h)
  Rows out;                 // [B, Lq, Hq, Dv], written whole
  float* lse = nullptr;     // [B, Hq, Lq], of all that joins the softmax; written whole
  Execution execution;
};

struct BackwardParams {
  Visibility visibility;
  Heads heads;
  Rows query;                            // [B, Lq, Hq, D]
  Rows key;                              // [B, Lk, Hkv, D]
  Rows value;                            // [B, Lk, Hkv, Dv]
  const uint32_t* block_mask = nullptr;  // [B, Hq, Mq, ceil(Mk / 32)]
  const float* sink = nullptr;           // [Hq], as in the forward pass
  Rows out;                              // [B, Lq, Hq, Dv], of the forward pass
  const float* lse = nullptr;            // [B, Hq, Lq], of the forward pass
  float softmax_scale = 0;
  Rows grad_out;               // [B, Lq, Hq, Dv]
  RowNumbers grad_lse;         // [B, Hq, Lq]; no data: zeros
  Rows grad_query;             // [B, Lq, Hq, D], written whole
  Rows grad_key;               // [B, Lk, Hkv, D], written whole
  Rows grad_value;             // [B, Lk, Hkv, Dv], written whole
  float* grad_sink = nullptr;  // [Hq], written whole; null without sink
  bool deterministic = false;  // the same bits on every run; the CPU's always are
  Execution execution;
};

enum class MaskType { kBool, kFloat32, kFloat16, kBFloat16 };

// A dense attention mask. If it is causal with padding, packed documents or a sliding window, it is
// the same as one FlashMask bound per key.
struct DenseMaskParams {
  int64_t batch = 0, num_heads = 0, seqlen_q = 0, seqlen_k = 0;
  MaskType type = MaskType::kBool;
  const void* mask = nullptr;  // [B, H, Lq, Lk]; see dense_mask.h
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, key_stride = 0;
  int32_t* start_rows = nullptr;  // [B, H, Lk], written whole: rows from here on do not see the key
  int32_t* verdict = nullptr;  // [2], written whole: the faults, and the bits of a value at fault
  Execution execution;
};

}  // namespace rrattn
