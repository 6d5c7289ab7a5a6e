#include "arguments.h"

#include <algorithm>
#include <cmath>
#include <tuple>

#include "checks.h"
#include "overlap.h"
#include "quantization.h"

namespace rrattn {

namespace {

DataType data_type(const Array& array) {
  switch (array.type) {
    case ElementType::kFloat32:
      return DataType::kFloat32;
    case ElementType::kFloat16:
      return DataType::kFloat16;
    case ElementType::kBFloat16:
      return DataType::kBFloat16;
    default:
      fail(array.name, " has dtype ", array.type_name,
           ", but must have float32, float16 or bfloat16");
  }
}

// A [B, L, H, D] tensor where it lies, without a copy.
Rows rows_of(const Array& array) {
  if (!is_empty(array) && array.shape[3] != 1 && array.strides[3] != 1) {
    fail(array.name, " has strides ", to_string(array.strides),
         ", but its last dimension must be contiguous (stride 1)");
  }
  return {array.data, array.strides[0], array.strides[1], array.strides[2]};
}

// A tensor that must have this shape, and the dtype and device of the query. Its strides may differ.
Rows rows_like(const Array& array, const std::vector<int64_t>& shape, const Array& query,
               const char* meaning) {
  require_shape(array, shape, meaning);
  require_type(array, query.type, query.type_name.c_str());
  require_same_device(array, query);
  return rows_of(array);
}

// The shape of one tensor [B, L, H, D] with the head size of another.
std::vector<int64_t> with_head_dim_of(const Array& model, const Array& value) {
  return {model.shape[0], model.shape[1], model.shape[2], value.shape[3]};
}

constexpr const char* kQueryMeaning = "[batch, seqlen_q, num_heads, head_dim]";
constexpr const char* kKeyMeaning = "[batch, seqlen_k, num_heads_k, head_dim]";
constexpr const char* kValueMeaning = "[batch, seqlen_k, num_heads_k, head_dim of value]";
constexpr const char* kOutMeaning = "[batch, seqlen_q, num_heads, head_dim of value]";

RowBounds row_bounds(const OptionalArray& indices, const Visibility& visibility,
                     int64_t num_heads_k, const Array& first) {
  if (!indices) return {};
  require_rank(indices->name, indices->shape, 4,
               "[batch, 1 | num_heads_k | num_heads, seqlen_k, bounds]");
  require_type(*indices, ElementType::kInt32, "int32");
  require_same_device(*indices, first);
  const std::vector<int64_t>& shape = indices->shape;
  if (shape[0] != visibility.batch) {
    fail(indices->name, " has batch size ", shape[0], ", but must have ", visibility.batch);
  }
  if (shape[1] != 1 && shape[1] != visibility.num_heads &&
      (num_heads_k == 0 || shape[1] != num_heads_k)) {
    fail(indices->name, " has ", shape[1], " heads, but must have 1, num_heads_k",
         num_heads_k ? " (" + std::to_string(num_heads_k) + ")" : "", " or num_heads (",
         visibility.num_heads, ")");
  }
  if (shape[2] != visibility.seqlen_k) {
    fail(indices->name, " has length ", shape[2], ", but must have seqlen_k (", visibility.seqlen_k,
         ")");
  }
  if (visibility.causal ? shape[3] != 1 && shape[3] != 2 : shape[3] != 2 && shape[3] != 4) {
    fail(indices->name, " has ", shape[3], " bounds, but must have ",
         visibility.causal ? "1 or 2" : "2 or 4", " when causal is ",
         visibility.causal ? "True" : "False");
  }
  return {static_cast<const int32_t*>(indices->data),
          static_cast<int>(shape[3]),
          shape[1],
          indices->strides[0],
          indices->strides[1],
          indices->strides[2],
          indices->strides[3]};
}

void check_lengths(int64_t seqlen_q, int64_t seqlen_k, bool causal) {
  if (seqlen_q < 0 || seqlen_q > kMaxLength || seqlen_k < 0 || seqlen_k > kMaxLength) {
    fail("seqlen_q is ", seqlen_q, " and seqlen_k is ", seqlen_k, ", but both must be from 0 to ",
         kMaxLength);
  }
  if (causal && seqlen_q > seqlen_k) {
    fail("seqlen_q is ", seqlen_q, " and seqlen_k is ", seqlen_k,
         ", but when causal is True seqlen_q must be at most seqlen_k (queries are the last "
         "positions of the keys)");
  }
}

void check_head_dim(int64_t head_dim, const char* name) {
  if (head_dim < 8 || head_dim > 256 || head_dim % 8 != 0) {
    fail(name, " is ", head_dim, ", but must be a multiple of 8 from 8 to 256");
  }
}

struct QueryKey {
  Visibility visibility;
  Heads heads;
};

QueryKey check_query_key(const Array& query, const Array& key,
                         const OptionalArray& startend_row_indices, bool causal) {
  require_rank(query.name, query.shape, 4, kQueryMeaning);
  require_rank(key.name, key.shape, 4, kKeyMeaning);
  QueryKey found;
  Visibility& visibility = found.visibility;
  Heads& heads = found.heads;
  visibility = {query.shape[0], query.shape[1], key.shape[1], query.shape[2], causal, {}};
  heads.num_heads_k = key.shape[2];
  heads.head_dim = query.shape[3];
  heads.dtype = data_type(query);
  require_type(key, query.type, query.type_name.c_str());
  require_same_device(key, query);
  if (key.shape[0] != visibility.batch) {
    fail("key has batch size ", key.shape[0], ", but must have that of query, ", visibility.batch);
  }
  if (key.shape[3] != heads.head_dim) {
    fail("key has head_dim ", key.shape[3], ", but must have that of query, ", heads.head_dim);
  }
  check_head_dim(heads.head_dim, "head_dim");
  if (heads.num_heads_k == 0 ? visibility.num_heads != 0
                             : visibility.num_heads % heads.num_heads_k != 0) {
    fail("query has ", visibility.num_heads, " heads and key has ", heads.num_heads_k,
         ", but the number of query heads must be a multiple of the number of key heads");
  }
  check_lengths(visibility.seqlen_q, visibility.seqlen_k, causal);
  visibility.row_bounds = row_bounds(startend_row_indices, visibility, heads.num_heads_k, query);
  return found;
}

float check_scale(float softmax_scale) {
  if (!std::isfinite(softmax_scale)) {
    fail("softmax_scale is ", softmax_scale, ", but must be finite");
  }
  return softmax_scale;
}

Sampling check_sampling(Sampling sampling) {
  if (sampling.stride < 2 || sampling.stride > 64 || kBlockSize % sampling.stride != 0) {
    fail("stride is ", sampling.stride,
         ", but must be a divisor of 128 from 2 to 64: 2, 4, 8, 16, 32 or 64");
  }
  if (sampling.key_stride < 1 || sampling.key_stride > 64 ||
      kBlockSize % sampling.key_stride != 0) {
    fail("key_stride is ", sampling.key_stride,
         ", but must be a divisor of 128 from 1 to 64: 1, 2, 4, 8, 16, 32 or 64");
  }
  if (sampling.head_offset < 0) {
    fail("head_offset is ", sampling.head_offset, ", but must be at least 0");
  }
  sampling.head_offset %= sampling.stride;  // only the phase counts; sums with it stay small
  check_scale(sampling.softmax_scale);
  if (!(sampling.spread >= 0 && std::isfinite(sampling.spread))) {
    fail("spread is ", sampling.spread, ", but must be finite and at least 0");
  }
  return sampling;
}

void check_threshold(float threshold, const std::string& name) {
  if (!(threshold > 0 && threshold <= 1)) fail(name, " is ", threshold, ", but must be in (0, 1]");
}

// `first` is the array whose device counts.
KeepRules check_keep_rules(KeepRules rules, const OptionalArray& head_thresholds,
                           const Visibility& visibility, const Array& first) {
  if (head_thresholds) {
    require_type(*head_thresholds, ElementType::kFloat32, "float32");
    require_same_device(*head_thresholds, first);
    if (head_thresholds->shape != std::vector<int64_t>{1}) {
      require_shape(*head_thresholds, {visibility.num_heads},
                    "[num_heads], one for each query head, or [1]");
    }
    require_contiguous(*head_thresholds);
    const int64_t count = head_thresholds->shape[0];
    rules.head_thresholds = static_cast<const float*>(head_thresholds->data);
    rules.head_threshold_stride = count == 1 ? 0 : 1;
    // Device memory is not read here. A threshold outside (0, 1] in it keeps every visible block.
    for (int64_t h = 0; first.device == "cpu" && h < count; ++h) {
      check_threshold(rules.head_thresholds[h], "threshold[" + std::to_string(h) + "]");
    }
  } else {
    check_threshold(rules.threshold, "threshold");
  }
  if (rules.keep_local < 0) fail("keep_local is ", rules.keep_local, ", but must be at least 0");
  rules.keep_local = std::min(rules.keep_local, visibility.num_n_blocks());
  if (!(rules.min_share >= 0 && rules.min_share <= 1)) {
    fail("min_share is ", rules.min_share, ", but must be in [0, 1]");
  }
  return rules;
}

const uint32_t* check_block_mask(const Array& block_mask, const Visibility& visibility,
                                 const Array& first) {
  require_rank(block_mask.name, block_mask.shape, 4,
               "[batch, num_heads, query blocks, words of 32 key blocks]");
  require_type(block_mask, ElementType::kInt32, "int32");
  require_same_device(block_mask, first);
  require_shape(block_mask,
                {visibility.batch, visibility.num_heads, visibility.num_m_blocks(),
                 visibility.num_mask_words()},
                "[batch, num_heads, ceil(seqlen_q / 128), ceil(ceil(seqlen_k / 128) / 32)]");
  require_contiguous(block_mask);
  return static_cast<const uint32_t*>(block_mask.data);
}

float* check_block_scores(const Array& block_scores, const Visibility& visibility) {
  require_type(block_scores, ElementType::kFloat32, "float32");
  require_shape(block_scores,
                {visibility.batch, visibility.num_heads, visibility.num_m_blocks(),
                 visibility.num_n_blocks()},
                "[batch, num_heads, ceil(seqlen_q / 128), ceil(seqlen_k / 128)]");
  require_contiguous(block_scores);
  return static_cast<float*>(block_scores.data);
}

void require_floats(const Array& array, const std::vector<int64_t>& shape, const char* meaning,
                    const Array& first) {
  require_type(array, ElementType::kFloat32, "float32");
  require_same_device(array, first);
  require_shape(array, shape, meaning);
}

// One number for each row, as the log-sum-exp. Of any strides.
RowNumbers row_numbers_of(const Array& array, const Visibility& visibility, const Array& first) {
  require_floats(array, {visibility.batch, visibility.num_heads, visibility.seqlen_q},
                 "[batch, num_heads, seqlen_q]", first);
  return {static_cast<const float*>(array.data), array.strides[0], array.strides[1],
          array.strides[2]};
}

// One number for each query head, as the sink. Null where there is none.
float* check_head_floats(const OptionalArray& array, const Visibility& visibility,
                         const Array& first) {
  if (!array) return nullptr;
  require_floats(*array, {visibility.num_heads}, "[num_heads], one for each query head", first);
  require_contiguous(*array);
  return static_cast<float*>(array->data);
}

AttendParams check_attend(const Array& query, const Array& key, const Array& value,
                          const Array& block_mask, const OptionalArray& startend_row_indices,
                          const OptionalArray& sink, const Array& out, const Array& lse,
                          bool causal, float softmax_scale) {
  AttendParams params;
  const QueryKey checked = check_query_key(query, key, startend_row_indices, causal);
  params.visibility = checked.visibility;
  params.heads = checked.heads;
  params.query = rows_of(query);
  params.key = rows_of(key);
  require_rank(value.name, value.shape, 4, kValueMeaning);
  params.value = rows_like(value, with_head_dim_of(key, value), query, kValueMeaning);
  check_head_dim(value.shape[3], "head_dim of value");
  params.heads.head_dim_v = value.shape[3];
  params.block_mask = check_block_mask(block_mask, params.visibility, query);
  params.sink = check_head_floats(sink, params.visibility, query);
  params.softmax_scale = check_scale(softmax_scale);
  params.out = rows_like(out, with_head_dim_of(query, value), query, kOutMeaning);
  row_numbers_of(lse, params.visibility, query);
  require_contiguous(lse);
  params.lse = static_cast<float*>(lse.data);
  return params;
}

// All of `arrays`, and those of `optional` that were given.
std::vector<const Array*> present(std::vector<const Array*> arrays,
                                  const std::vector<const OptionalArray*>& optional) {
  for (const OptionalArray* array : optional) {
    if (*array) arrays.push_back(&**array);
  }
  return arrays;
}

}  // namespace

std::string to_string(const std::vector<int64_t>& numbers) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < numbers.size(); ++i) text << (i ? ", " : "") << numbers[i];
  text << "]";
  return text.str();
}

bool is_empty(const Array& array) {
  return std::find(array.shape.begin(), array.shape.end(), 0) != array.shape.end();
}

void require_rank(const std::string& name, const std::vector<int64_t>& shape, size_t rank,
                  const char* meaning) {
  if (shape.size() != rank) {
    fail(name, " has ", shape.size(), " dimensions, shape ", to_string(shape), ", but must have ",
         rank, ": ", meaning);
  }
}

Quantization quantization_of(const std::string& name) {
  if (name.empty()) return Quantization::kNone;
  if (name == "qk_int8_pv_fp8") return Quantization::kQkInt8PvFp8;
  fail("quantization is \"", name, "\", but must be \"qk_int8_pv_fp8\" or none");
}

float default_softmax_scale(const Array& query) {
  const int64_t head_dim = query.shape.empty() ? 0 : query.shape.back();
  return head_dim > 0 ? static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim))) : 1;
}

EstimateParams estimate_params(const Array& query, const Array& key,
                               const OptionalArray& startend_row_indices, const OptionalArray& sink,
                               const Array& block_scores, bool causal, const Sampling& sampling) {
  EstimateParams params;
  const QueryKey checked = check_query_key(query, key, startend_row_indices, causal);
  params.visibility = checked.visibility;
  params.heads = checked.heads;
  params.query = rows_of(query);
  params.key = rows_of(key);
  params.sink = check_head_floats(sink, params.visibility, query);
  params.sampling = check_sampling(sampling);
  require_same_device(block_scores, query);
  params.block_scores = check_block_scores(block_scores, params.visibility);
  require_own_memory({&block_scores}, present({&query, &key}, {&startend_row_indices, &sink}));
  return params;
}

SelectParams select_params(const Array& block_scores, const OptionalArray& head_thresholds,
                           const OptionalArray& startend_row_indices, const Array& block_mask,
                           bool causal, int64_t seqlen_q, int64_t seqlen_k,
                           const KeepRules& rules) {
  SelectParams params;
  require_rank(block_scores.name, block_scores.shape, 4,
               "[batch, num_heads, ceil(seqlen_q / 128), ceil(seqlen_k / 128)]");
  check_lengths(seqlen_q, seqlen_k, causal);
  params.visibility = {block_scores.shape[0], seqlen_q, seqlen_k,
                       block_scores.shape[1], causal,   {}};
  params.block_scores = check_block_scores(block_scores, params.visibility);
  // The number of key heads is not known here: it may be any divisor of the number of query heads.
  const int64_t index_heads = startend_row_indices && startend_row_indices->shape.size() == 4
                                  ? startend_row_indices->shape[1]
                                  : 1;
  const bool divides = index_heads > 0 && params.visibility.num_heads % index_heads == 0;
  params.visibility.row_bounds =
      row_bounds(startend_row_indices, params.visibility, divides ? index_heads : 0, block_scores);
  params.rules = check_keep_rules(rules, head_thresholds, params.visibility, block_scores);
  params.block_mask =
      const_cast<uint32_t*>(check_block_mask(block_mask, params.visibility, block_scores));
  require_own_memory({&block_mask},
                     present({&block_scores}, {&startend_row_indices, &head_thresholds}));
  return params;
}

AttendParams attend_params(const Array& query, const Array& key, const Array& value,
                           const Array& block_mask, const OptionalArray& startend_row_indices,
                           const OptionalArray& sink, const Array& out, const Array& lse,
                           bool causal, float softmax_scale, bool compensate) {
  AttendParams params = check_attend(query, key, value, block_mask, startend_row_indices, sink, out,
                                     lse, causal, softmax_scale);
  params.compensate = compensate;
  // `out` may be the query: a row of queries is read before its result is written, and whatever
  // writes the result is the only reader of that row.
  require_own_memory({&out, &lse},
                     present({&query, &key, &value, &block_mask}, {&startend_row_indices, &sink}),
                     &query);
  return params;
}

BackwardParams backward_params(const Array& query, const Array& key, const Array& value,
                               const Array& block_mask, const OptionalArray& startend_row_indices,
                               const OptionalArray& sink, const Array& out, const Array& lse,
                               const Array& grad_out, const OptionalArray& grad_lse,
                               const Array& grad_query, const Array& grad_key,
                               const Array& grad_value, const OptionalArray& grad_sink, bool causal,
                               float softmax_scale, bool deterministic) {
  const AttendParams forward = check_attend(query, key, value, block_mask, startend_row_indices,
                                            sink, out, lse, causal, softmax_scale);
  BackwardParams params;
  params.visibility = forward.visibility;
  params.heads = forward.heads;
  params.query = forward.query;
  params.key = forward.key;
  params.value = forward.value;
  params.block_mask = forward.block_mask;
  params.sink = forward.sink;
  params.out = forward.out;
  params.lse = forward.lse;
  params.softmax_scale = forward.softmax_scale;
  params.grad_out = rows_like(grad_out, out.shape, query, kOutMeaning);
  if (grad_lse) params.grad_lse = row_numbers_of(*grad_lse, params.visibility, query);
  params.grad_query = rows_like(grad_query, query.shape, query, kQueryMeaning);
  params.grad_key = rows_like(grad_key, key.shape, query, kKeyMeaning);
  params.grad_value = rows_like(grad_value, value.shape, query, kValueMeaning);
  if (sink.has_value() != grad_sink.has_value()) {
    fail(sink ? "sink" : "grad_sink", " is given, but ", sink ? "grad_sink" : "sink",
         " is not: give both or neither");
  }
  params.grad_sink = check_head_floats(grad_sink, params.visibility, query);
  params.deterministic = deterministic;
  require_own_memory(present({&grad_query, &grad_key, &grad_value}, {&grad_sink}),
                     present({&query, &key, &value, &block_mask, &out, &lse, &grad_out},
                             {&startend_row_indices, &sink, &grad_lse}));
  return params;
}

DenseMaskParams dense_mask_params(const Array& mask, const Array& start_rows,
                                  const Array& verdict) {
  DenseMaskParams params;
  require_rank(mask.name, mask.shape, 4, "[batch, 1 | num_heads, seqlen_q, seqlen_k]");
  const auto mask_type = [&] {
    switch (mask.type) {
      case ElementType::kBool:
        return MaskType::kBool;
      case ElementType::kFloat32:
        return MaskType::kFloat32;
      case ElementType::kFloat16:
        return MaskType::kFloat16;
      case ElementType::kBFloat16:
        return MaskType::kBFloat16;
      default:
        fail(mask.name, " has dtype ", mask.type_name,
             ", but must have bool, float32, float16 or bfloat16");
    }
  };
  params.type = mask_type();
  const auto& [batch, num_heads, seqlen_q, seqlen_k] =
      std::tie(mask.shape[0], mask.shape[1], mask.shape[2], mask.shape[3]);
  check_lengths(seqlen_q, seqlen_k, true);
  params.batch = batch;
  params.num_heads = num_heads;
  params.seqlen_q = seqlen_q;
  params.seqlen_k = seqlen_k;
  params.mask = mask.data;
  params.batch_stride = mask.strides[0];
  params.head_stride = mask.strides[1];
  params.row_stride = mask.strides[2];
  params.key_stride = mask.strides[3];
  const auto written = [&](const Array& output, const std::vector<int64_t>& shape,
                           const char* meaning) {
    require_type(output, ElementType::kInt32, "int32");
    require_same_device(output, mask);
    require_shape(output, shape, meaning);
    require_contiguous(output);
    return static_cast<int32_t*>(output.data);
  };
  params.start_rows =
      written(start_rows, {batch, num_heads, seqlen_k, 1}, "[batch, 1 | num_heads, seqlen_k, 1]");
  params.verdict = written(verdict, {2}, "[faults, value]");
  require_own_memory({&start_rows, &verdict}, {&mask});
  return params;
}

}  // namespace rrattn
