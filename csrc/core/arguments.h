// The one place where arguments are checked. A binding describes each tensor as an Array and gets
// back the filled parameter struct, or std::invalid_argument with a message that names the value
// and what is allowed. The only elements read here are thresholds in host memory; none is written.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "params.h"

namespace rrattn {

enum class ElementType { kFloat32, kFloat16, kBFloat16, kInt32, kBool, kOther };

struct Array {
  std::string name;  // as the user knows it, for messages
  void* data = nullptr;
  ElementType type = ElementType::kOther;
  std::string type_name;
  int64_t element_bytes = 0;
  std::string device;  // "cpu", "cuda:0", ..., for messages and to compare
  int gpu = -1;        // number of the CUDA device that holds it; -1: none
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  // in elements
};

using OptionalArray = std::optional<Array>;

std::string to_string(const std::vector<int64_t>& numbers);
bool is_empty(const Array& array);

// Throws unless the shape has this many dimensions; `meaning` names them.
void require_rank(const std::string& name, const std::vector<int64_t>& shape, size_t rank,
                  const char* meaning);

// 1 / sqrt(head_dim) of a query [B, Lq, Hq, D]; 1 where that is no number.
float default_softmax_scale(const Array& query);

// The caller allocates the outputs, and the functions below check their shapes as those of inputs.
// These must be contiguous:
//
//   block_scores  [B, Hq, Mq, Mk]
//   block_mask    [B, Hq, Mq, ceil(Mk / 32)]
//   lse           [B, Hq, Lq], and so its gradient
//   sink          [Hq], and so its gradient
//
// Settings come as they were given, without the thresholds of single heads.
EstimateParams estimate_params(const Array& query, const Array& key,
                               const OptionalArray& startend_row_indices, const OptionalArray& sink,
                               const Array& block_scores, bool causal, const Sampling& sampling);

SelectParams select_params(const Array& block_scores, const OptionalArray& head_thresholds,
                           const OptionalArray& startend_row_indices, const Array& block_mask,
                           bool causal, int64_t seqlen_q, int64_t seqlen_k, const KeepRules& rules);

AttendParams attend_params(const Array& query, const Array& key, const Array& value,
                           const Array& block_mask, const OptionalArray& startend_row_indices,
                           const OptionalArray& sink, const Array& out, const Array& lse,
                           bool causal, float softmax_scale, bool compensate);

BackwardParams backward_params(const Array& query, const Array& key, const Array& value,
                               const Array& block_mask, const OptionalArray& startend_row_indices,
                               const OptionalArray& sink, const Array& out, const Array& lse,
                               const Array& grad_out, const OptionalArray& grad_lse,
                               const Array& grad_query, const Array& grad_key,
                               const Array& grad_value, const OptionalArray& grad_sink, bool causal,
                               float softmax_scale, bool deterministic);

//   mask        [B, H, Lq, Lk] bool, float32, float16 or bfloat16
//   start_rows  [B, H, Lk, 1] int32, contiguous
//   verdict     [2] int32, contiguous
DenseMaskParams dense_mask_params(const Array& mask, const Array& start_rows, const Array& verdict);

}  // namespace rrattn
