// The Paddle operators: check, allocate the outputs, fill the parameter structs, run.
//
//   rrattn_estimate      query, key                     -> block_scores
//   rrattn_select        block_scores                   -> block_mask
//   rrattn_attend        query, key, value, block_mask  -> out, lse
//   rrattn_rr_attention  query, key, value              -> out, lse, block_mask   (the three above)
//   rrattn_ragged        the same for requests of several lengths
//
// The last two have gradients, over the block mask of the forward pass; the selection carries none.
// With a sink they are operators of their own, rrattn_attend_with_sink and so on: Paddle's static
// graphs have no gradient for an input that may be absent.
#include <algorithm>
#include <cstring>

#include "../core/ragged_arguments.h"
#include "../cpu/ragged.h"
#include "devices.h"
#include "paddle/common/ddim.h"
#include "paddle/extension.h"
#include "paddle/phi/core/enforce.h"
#include "settings.h"
#include "shapes.h"

// Paddle's exception and its helpers are in one of these namespaces, depending on its version.
namespace common::enforce {}
namespace phi::enforce {}

namespace rrattn {

namespace paddle_enforce {
using namespace common::enforce;
using namespace phi::enforce;
}  // namespace paddle_enforce

#if defined(RRATTN_WITH_CUDA)
// paddle_stream.cpp
void* stream_of(const paddle::Tensor& tensor);
void fill_with_zeros(paddle::Tensor& tensor, int64_t bytes);
#endif

namespace {

using paddle::Tensor;
using OptionalTensor = paddle::optional<Tensor>;
using OptionalShape = paddle::optional<Shape>;
using DType = paddle::DataType;

// Throws Paddle's exception, with this message alone unless Paddle was asked for the call stack
// (FLAGS_call_stack_level).
[[noreturn]] void raise(const common::ErrorSummary& error, const std::string& message) {
  paddle_enforce::EnforceNotMet exception(error, __FILE__, __LINE__);
  if (paddle_enforce::GetCallStackLevel() <= 1) exception.set_error_str(message);
  throw exception;
}

// Paddle turns its own exceptions into Python's and ends the process on any other, so every
// function that it calls goes through here.
template <typename Function, typename... Arguments>
auto guarded(const Function& function, Arguments&&... arguments) {
  try {
    return function(std::forward<Arguments>(arguments)...);
  } catch (const std::invalid_argument& error) {
    raise(common::errors::InvalidArgument("%s", error.what()), error.what());
  } catch (const std::bad_alloc&) {
    constexpr const char* kMessage = "rrattn found no memory";
    raise(common::errors::ResourceExhausted("%s", kMessage), kMessage);
  } catch (const std::runtime_error& error) {
    raise(common::errors::External("%s", error.what()), error.what());
  } catch (const std::logic_error& error) {
    raise(common::errors::Unimplemented("%s", error.what()), error.what());
  }
}

template <auto kFunction>
struct Guarded;

template <typename Result, typename... Arguments, Result (*kFunction)(Arguments...)>
struct Guarded<kFunction> {
  static Result call(Arguments... arguments) { return guarded(kFunction, arguments...); }
};

// The same for a kernel that takes its attributes as one struct: Paddle gives them one by one, after
// the tensors.
template <auto kFunction, typename Attributes, typename Settings = SettingsOf<Attributes>>
struct Operator;

template <typename Attributes, typename... Tensors, typename... Values,
          std::vector<Tensor> (*kFunction)(const Attributes&, Tensors...)>
struct Operator<kFunction, Attributes, std::tuple<Setting<Values>...>> {
  static std::vector<Tensor> call(Tensors... tensors, Values... values) {
    return guarded(kFunction, settings_from<Attributes>(values...), tensors...);
  }
};

const char* type_name(bool) { return "bool"; }
const char* type_name(int64_t) { return "int64_t"; }
const char* type_name(float) { return "float"; }
const char* type_name(const std::string&) { return "std::string"; }

// These attributes as PD_BUILD_OP takes them: "causal: bool" and so on.
template <typename Attributes>
std::vector<std::string> attributes() {
  Attributes defaults;
  return std::apply(
      [](auto... setting) {
        return std::vector<std::string>{std::string(setting.name) + ": " +
                                        type_name(setting.value)...};
      },
      settings_of(defaults));
}

struct EstimateAttributes {
  bool causal = false;
  Sampling sampling;
};

struct SelectAttributes {
  bool causal = false;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  KeepRules rules;
};

// `deterministic` is for the gradients, which take their attributes from the forward pass.
struct AttendAttributes {
  bool causal = false;
  float softmax_scale = 0;
  bool deterministic = false;
  bool compensate = false;
  std::string quantization;
};

struct RRAttentionAttributes {
  bool causal = false;
  Sampling sampling;
  KeepRules rules;
  bool deterministic = false;
  bool compensate = false;
  std::string quantization;
};

auto settings_of(EstimateAttributes& attributes) {
  return std::tuple_cat(std::make_tuple(Setting{"causal", attributes.causal}),
                        settings_of(attributes.sampling));
}

auto settings_of(SelectAttributes& attributes) {
  return std::tuple_cat(std::make_tuple(Setting{"causal", attributes.causal},
                                        Setting{"seqlen_q", attributes.seqlen_q},
                                        Setting{"seqlen_k", attributes.seqlen_k}),
                        settings_of(attributes.rules));
}

auto settings_of(AttendAttributes& attributes) {
  return std::make_tuple(Setting{"causal", attributes.causal},
                         Setting{"softmax_scale", attributes.softmax_scale},
                         Setting{"deterministic", attributes.deterministic},
                         Setting{"compensate", attributes.compensate},
                         Setting{"quantization", attributes.quantization});
}

auto settings_of(RRAttentionAttributes& attributes) {
  return std::tuple_cat(std::make_tuple(Setting{"causal", attributes.causal}),
                        settings_of(attributes.sampling), settings_of(attributes.rules),
                        std::make_tuple(Setting{"deterministic", attributes.deterministic},
                                        Setting{"compensate", attributes.compensate},
                                        Setting{"quantization", attributes.quantization}));
}

int gpu_of(const Tensor& tensor) { return tensor.is_gpu() ? tensor.place().GetDeviceId() : -1; }

// The name of its device, as paddle.set_device takes it.
std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_gpu()) return "gpu:" + std::to_string(gpu_of(tensor));
  return tensor.place().DebugString();
}

Array describe(const Tensor& tensor, const char* name) {
  Array array;
  array.name = name;
  array.shape = tensor.shape();
  for (int i = 0; i < tensor.strides().size(); ++i) array.strides.push_back(tensor.strides()[i]);
  array.data =
      array.shape.size() && tensor.numel() == 0 ? nullptr : const_cast<void*>(tensor.data());
  switch (tensor.dtype()) {
    case DType::FLOAT32:
      array.type = ElementType::kFloat32;
      break;
    case DType::FLOAT16:
      array.type = ElementType::kFloat16;
      break;
    case DType::BFLOAT16:
      array.type = ElementType::kBFloat16;
      break;
    case DType::INT32:
      array.type = ElementType::kInt32;
      break;
    case DType::BOOL:
      array.type = ElementType::kBool;
      break;
    default:
      break;
  }
  array.type_name = phi::DataTypeToString(tensor.dtype());
  array.element_bytes = phi::SizeOf(tensor.dtype());
  array.gpu = gpu_of(tensor);
  array.device = device_name(tensor);
  return array;
}

OptionalArray describe(const OptionalTensor& tensor, const char* name) {
  if (!tensor) return std::nullopt;
  return describe(*tensor, name);
}

Shape start_rows_shape(const Shape& mask) {
  require_rank("mask", mask, 4, "[batch, 1 | num_heads, seqlen_q, seqlen_k]");
  return {mask[0], mask[1], mask[3], 1};
}

// Runs a kernel on the device of its first tensor, with a workspace from Paddle's allocator. On a
// GPU both belong to Paddle's stream: whatever runs there next may reuse the workspace's memory,
// and nothing has to wait.
template <typename Params>
void run(const Kernel<Params>& kernel, Params params, const Tensor& first) {
  const DeviceGuard guard(gpu_of(first));
#if defined(RRATTN_WITH_CUDA)
  if (first.is_gpu()) params.execution.stream = stream_of(first);
#endif
  params.execution.num_threads = cpu::default_num_threads();
  const int64_t bytes = std::max<int64_t>(kernel.workspace_bytes(params), 1);
  Tensor workspace = paddle::empty({bytes}, DType::UINT8, first.place());
  params.execution.workspace = workspace.data();
  kernel.run(params);
}

// Zeros in the shape, dtype and memory of a tensor.
Tensor zeros_like(const Tensor& tensor) {
  Tensor zeros = paddle::empty(tensor.shape(), tensor.dtype(), tensor.place());
  const int64_t bytes = zeros.numel() * static_cast<int64_t>(phi::SizeOf(zeros.dtype()));
  if (tensor.is_cpu()) memset(zeros.data(), 0, bytes);
#if defined(RRATTN_WITH_CUDA)
  // Not by a kernel of Paddle's, which some builds lack on the GPUs that rrattn runs on.
  if (tensor.is_gpu()) fill_with_zeros(zeros, bytes);
#endif
  return zeros;
}

std::vector<Tensor> estimate(const EstimateAttributes& attributes, const Tensor& query,
                             const Tensor& key, const OptionalTensor& startend_row_indices,
                             const OptionalTensor& sink) {
  const Kernel<EstimateParams>& kernel = kEstimate.kernel_for(describe(query, "query"));
  Tensor block_scores =
      paddle::empty(scores_shape(query.shape(), key.shape()), DType::FLOAT32, query.place());
  run(kernel,
      estimate_params(describe(query, "query"), describe(key, "key"),
                      describe(startend_row_indices, "startend_row_indices"),
                      describe(sink, "sink"), describe(block_scores, "block_scores"),
                      attributes.causal, attributes.sampling),
      query);
  return {block_scores};
}

std::vector<Tensor> select(const SelectAttributes& attributes, const Tensor& block_scores,
                           const OptionalTensor& startend_row_indices,
                           const OptionalTensor& head_thresholds) {
  const Kernel<SelectParams>& kernel = kSelect.kernel_for(describe(block_scores, "block_scores"));
  Tensor block_mask =
      paddle::empty(mask_shape(block_scores.shape()), DType::INT32, block_scores.place());
  run(kernel,
      select_params(describe(block_scores, "block_scores"), describe(head_thresholds, "threshold"),
                    describe(startend_row_indices, "startend_row_indices"),
                    describe(block_mask, "block_mask"), attributes.causal, attributes.seqlen_q,
                    attributes.seqlen_k, attributes.rules),
      block_scores);
  return {block_mask};
}

std::vector<Tensor> attend_blocks(const AttendAttributes& attributes, const Tensor& query,
                                  const Tensor& key, const Tensor& value, const Tensor& block_mask,
                                  const OptionalTensor& startend_row_indices,
                                  const OptionalTensor& sink) {
  const Kernel<AttendParams>& kernel =
      attend_kernel_for(describe(query, "query"), attributes.quantization, attributes.compensate);
  check_ranks(query.shape(), key.shape());
  Tensor out = paddle::empty(out_shape(query.shape(), value.shape()), query.dtype(), query.place());
  Tensor lse = paddle::empty(lse_shape(query.shape()), DType::FLOAT32, query.place());
  run(kernel,
      attend_params(describe(query, "query"), describe(key, "key"), describe(value, "value"),
                    describe(block_mask, "block_mask"),
                    describe(startend_row_indices, "startend_row_indices"), describe(sink, "sink"),
                    describe(out, "out"), describe(lse, "lse"), attributes.causal,
                    attributes.softmax_scale, attributes.compensate),
      query);
  return {out, lse};
}

std::vector<Tensor> attend(const AttendAttributes& attributes, const Tensor& query,
                           const Tensor& key, const Tensor& value, const Tensor& block_mask,
                           const OptionalTensor& startend_row_indices) {
  return attend_blocks(attributes, query, key, value, block_mask, startend_row_indices, {});
}

std::vector<Tensor> attend_with_sink(const AttendAttributes& attributes, const Tensor& query,
                                     const Tensor& key, const Tensor& value,
                                     const Tensor& block_mask,
                                     const OptionalTensor& startend_row_indices,
                                     const Tensor& sink) {
  return attend_blocks(attributes, query, key, value, block_mask, startend_row_indices, sink);
}

// Of an output that the loss does not depend on the gradient is not initialized.
std::vector<Tensor> gradients(const AttendAttributes& attributes, const Tensor& query,
                              const Tensor& key, const Tensor& value, const Tensor& block_mask,
                              const OptionalTensor& startend_row_indices,
                              const OptionalTensor& sink, const Tensor& out, const Tensor& lse,
                              const Tensor& grad_out, const Tensor& grad_lse) {
  if (attributes.compensate) {
    throw std::invalid_argument(
        "compensate is True, but attention that is compensated has no gradients: train with "
        "compensate=False");
  }
  if (quantization_of(attributes.quantization) != Quantization::kNone) {
    throw std::invalid_argument("quantization is \"" + attributes.quantization +
                                "\", but attention in eight bits has no gradients: train with "
                                "quantization=None");
  }
  const Kernel<BackwardParams>& kernel = kBackward.kernel_for(describe(query, "query"));
  std::vector<Tensor> grads;
  for (const Tensor& tensor : {query, key, value}) {
    grads.push_back(paddle::empty(tensor.shape(), tensor.dtype(), tensor.place()));
  }
  OptionalArray grad_sink;
  if (sink) {
    grads.push_back(paddle::empty(sink->shape(), DType::FLOAT32, query.place()));
    grad_sink = describe(grads.back(), "grad_sink");
  }
  const Tensor grad_out_rows = grad_out.initialized() ? grad_out : zeros_like(out);
  OptionalArray grad_lse_rows;
  if (grad_lse.initialized()) grad_lse_rows = describe(grad_lse, "grad_lse");
  run(kernel,
      backward_params(describe(query, "query"), describe(key, "key"), describe(value, "value"),
                      describe(block_mask, "block_mask"),
                      describe(startend_row_indices, "startend_row_indices"),
                      describe(sink, "sink"), describe(out, "out"), describe(lse, "lse"),
                      describe(grad_out_rows, "grad_out"), grad_lse_rows,
                      describe(grads[0], "grad_query"), describe(grads[1], "grad_key"),
                      describe(grads[2], "grad_value"), grad_sink, attributes.causal,
                      attributes.softmax_scale, attributes.deterministic),
      query);
  return grads;
}

std::vector<Tensor> attend_backward(const AttendAttributes& attributes, const Tensor& query,
                                    const Tensor& key, const Tensor& value,
                                    const Tensor& block_mask,
                                    const OptionalTensor& startend_row_indices, const Tensor& out,
                                    const Tensor& lse, const Tensor& grad_out,
                                    const Tensor& grad_lse) {
  return gradients(attributes, query, key, value, block_mask, startend_row_indices, {}, out, lse,
                   grad_out, grad_lse);
}

std::vector<Tensor> attend_with_sink_backward(
    const AttendAttributes& attributes, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& block_mask, const OptionalTensor& startend_row_indices, const Tensor& sink,
    const Tensor& out, const Tensor& lse, const Tensor& grad_out, const Tensor& grad_lse) {
  return gradients(attributes, query, key, value, block_mask, startend_row_indices, sink, out, lse,
                   grad_out, grad_lse);
}

std::vector<Tensor> all_stages(const RRAttentionAttributes& attributes, const Tensor& query,
                               const Tensor& key, const Tensor& value,
                               const OptionalTensor& startend_row_indices,
                               const OptionalTensor& head_thresholds, const OptionalTensor& sink) {
  // Throws before the other stages run in vain.
  attend_kernel_for(describe(query, "query"), attributes.quantization, attributes.compensate);
  const bool causal = attributes.causal;
  const Tensor block_scores =
      estimate({causal, attributes.sampling}, query, key, startend_row_indices, sink)[0];
  const Tensor block_mask = select({causal, query.shape()[1], key.shape()[1], attributes.rules},
                                   block_scores, startend_row_indices, head_thresholds)[0];
  std::vector<Tensor> outputs =
      attend_blocks({causal, attributes.sampling.softmax_scale, attributes.deterministic,
                     attributes.compensate, attributes.quantization},
                    query, key, value, block_mask, startend_row_indices, sink);
  outputs.push_back(block_mask);
  return outputs;
}

std::vector<Tensor> rr_attention(const RRAttentionAttributes& attributes, const Tensor& query,
                                 const Tensor& key, const Tensor& value,
                                 const OptionalTensor& startend_row_indices,
                                 const OptionalTensor& head_thresholds) {
  return all_stages(attributes, query, key, value, startend_row_indices, head_thresholds, {});
}

std::vector<Tensor> rr_attention_with_sink(const RRAttentionAttributes& attributes,
                                           const Tensor& query, const Tensor& key,
                                           const Tensor& value,
                                           const OptionalTensor& startend_row_indices,
                                           const OptionalTensor& head_thresholds,
                                           const Tensor& sink) {
  return all_stages(attributes, query, key, value, startend_row_indices, head_thresholds, sink);
}

// The gradients as an operator of its own, for who keeps no graph of the forward pass, as
// attention over ranks that gather keys and values again. Without a sink its gradient is empty.
std::vector<Tensor> attend_gradients(const AttendAttributes& attributes, const Tensor& query,
                                     const Tensor& key, const Tensor& value,
                                     const Tensor& block_mask,
                                     const OptionalTensor& startend_row_indices,
                                     const OptionalTensor& sink, const Tensor& out,
                                     const Tensor& lse, const Tensor& grad_out) {
  std::vector<Tensor> grads = gradients(attributes, query, key, value, block_mask,
                                        startend_row_indices, sink, out, lse, grad_out, Tensor());
  if (!sink) grads.push_back(paddle::empty({0}, DType::FLOAT32, query.place()));
  return grads;
}

// The same gradients, from inputs in another order.
std::vector<Tensor> rr_attention_backward(const AttendAttributes& attributes, const Tensor& query,
                                          const Tensor& key, const Tensor& value,
                                          const OptionalTensor& startend_row_indices,
                                          const Tensor& out, const Tensor& lse,
                                          const Tensor& block_mask, const Tensor& grad_out,
                                          const Tensor& grad_lse) {
  return gradients(attributes, query, key, value, block_mask, startend_row_indices, {}, out, lse,
                   grad_out, grad_lse);
}

std::vector<Tensor> rr_attention_with_sink_backward(
    const AttendAttributes& attributes, const Tensor& query, const Tensor& key, const Tensor& value,
    const OptionalTensor& startend_row_indices, const Tensor& sink, const Tensor& out,
    const Tensor& lse, const Tensor& block_mask, const Tensor& grad_out, const Tensor& grad_lse) {
  return gradients(attributes, query, key, value, block_mask, startend_row_indices, sink, out, lse,
                   grad_out, grad_lse);
}

// pooled_keys is brought up to date in its memory.
std::vector<Tensor> ragged(const RaggedSettings& settings, const Tensor& query, const Tensor& key,
                           const Tensor& value, const Tensor& cu_seqlens_q, const Tensor& seqlens_k,
                           const OptionalTensor& block_tables, const OptionalTensor& keep_last,
                           const OptionalTensor& head_thresholds, const OptionalTensor& sink,
                           OptionalTensor& pooled_keys) {
  const RaggedArrays arrays{
      describe(query, "query"),         describe(key, "key"),
      describe(value, "value"),         describe(cu_seqlens_q, "cu_seqlens_q"),
      describe(seqlens_k, "seqlens_k"), describe(block_tables, "block_tables"),
      describe(keep_last, "keep_last"), describe(head_thresholds, "threshold"),
      describe(sink, "sink"),           describe(pooled_keys, "pooled_keys")};
  const bool on_gpu = !query.is_cpu();
  if (on_gpu) kRaggedOnGpu.kernel_for(arrays.query);  // throws where there is none
  std::vector<RequestLengths> lengths;
  if (!on_gpu) lengths = ragged_lengths(arrays, settings);
  const Shape of_query = query.shape();
  require_rank("query", of_query, 3, "[tokens, num_heads, head_dim]");
  const int64_t mask_words =
      on_gpu ? max_mask_words(arrays, settings) : ragged_mask_words(lengths, of_query[1]);
  Tensor out =
      paddle::empty({of_query[0], of_query[1], value.shape().back()}, query.dtype(), query.place());
  Tensor lse = paddle::empty({of_query[1], of_query[0]}, DType::FLOAT32, query.place());
  Tensor block_mask = paddle::empty({mask_words}, DType::INT32, query.place());
  if (on_gpu) {
    run(kRaggedOnGpu.kernel_for(arrays.query),
        ragged_params(arrays, describe(out, "out"), describe(lse, "lse"),
                      describe(block_mask, "block_mask"), settings),
        query);
    return {out, lse, block_mask};
  }
  const RaggedCalls calls =
      ragged_calls(arrays, lengths, describe(out, "out"), describe(lse, "lse"),
                   describe(block_mask, "block_mask"), settings);
  Execution execution;
  execution.num_threads = cpu::default_num_threads();
  const int64_t bytes = cpu::ragged_workspace_bytes(calls, execution.num_threads);
  Tensor workspace = paddle::empty({std::max<int64_t>(bytes, 1)}, DType::UINT8, query.place());
  execution.workspace = workspace.data();
  cpu::run_ragged(calls, execution);
  return {out, lse, block_mask};
}

std::vector<Tensor> dense_mask(const Tensor& mask) {
  const Kernel<DenseMaskParams>& kernel = kDenseMask.kernel_for(describe(mask, "mask"));
  Tensor start_rows = paddle::empty(start_rows_shape(mask.shape()), DType::INT32, mask.place());
  Tensor verdict = paddle::empty({2}, DType::INT32, mask.place());
  run(kernel,
      dense_mask_params(describe(mask, "mask"), describe(start_rows, "start_rows"),
                        describe(verdict, "verdict")),
      mask);
  return {start_rows, verdict};
}

// Without these Paddle would leave out attention's part of second-order gradients, without an
// error.
std::vector<Tensor> refuse_second_order() {
  throw std::logic_error(
      "rrattn has no second-order gradients: what paddle.grad(..., create_graph=True) gives "
      "through its attention cannot be differentiated again");
}

using OptionalDType = paddle::optional<DType>;

std::vector<Shape> dense_mask_shape(const Shape& mask) { return {start_rows_shape(mask), {2}}; }
std::vector<DType> dense_mask_dtype(DType) { return {DType::INT32, DType::INT32}; }

std::vector<Shape> estimate_shape(const Shape& query, const Shape& key, const OptionalShape&,
                                  const OptionalShape&) {
  return {scores_shape(query, key)};
}
std::vector<DType> estimate_dtype(DType, DType, const OptionalDType&, const OptionalDType&) {
  return {DType::FLOAT32};
}

std::vector<Shape> select_shape(const Shape& block_scores, const OptionalShape&,
                                const OptionalShape&) {
  return {mask_shape(block_scores)};
}
std::vector<DType> select_dtype(DType, const OptionalDType&, const OptionalDType&) {
  return {DType::INT32};
}

std::vector<Shape> attend_shape(const Shape& query, const Shape&, const Shape& value, const Shape&,
                                const OptionalShape&) {
  return {out_shape(query, value), lse_shape(query)};
}
std::vector<DType> attend_dtype(DType query, DType, DType, DType, const OptionalDType&) {
  return {query, DType::FLOAT32};
}

std::vector<Shape> attend_with_sink_shape(const Shape& query, const Shape&, const Shape& value,
                                          const Shape&, const OptionalShape&, const Shape&) {
  return {out_shape(query, value), lse_shape(query)};
}
std::vector<DType> attend_with_sink_dtype(DType query, DType, DType, DType, const OptionalDType&,
                                          DType) {
  return {query, DType::FLOAT32};
}

std::vector<Shape> attend_gradients_shape(const Shape& query, const Shape& key, const Shape& value,
                                          const Shape&, const OptionalShape&,
                                          const OptionalShape& sink, const Shape&, const Shape&,
                                          const Shape&) {
  return {query, key, value, sink ? *sink : Shape{0}};
}
std::vector<DType> attend_gradients_dtype(DType query, DType key, DType value, DType,
                                          const OptionalDType&, const OptionalDType&, DType, DType,
                                          DType) {
  return {query, key, value, DType::FLOAT32};
}

std::vector<Shape> rr_attention_shape(const Shape& query, const Shape& key, const Shape& value,
                                      const OptionalShape&, const OptionalShape&) {
  return {out_shape(query, value), lse_shape(query), mask_shape(scores_shape(query, key))};
}
std::vector<DType> rr_attention_dtype(DType query, DType, DType, const OptionalDType&,
                                      const OptionalDType&) {
  return {query, DType::FLOAT32, DType::INT32};
}

std::vector<Shape> rr_attention_with_sink_shape(const Shape& query, const Shape& key,
                                                const Shape& value, const OptionalShape&,
                                                const OptionalShape&, const Shape&) {
  return {out_shape(query, value), lse_shape(query), mask_shape(scores_shape(query, key))};
}
std::vector<DType> rr_attention_with_sink_dtype(DType query, DType, DType, const OptionalDType&,
                                                const OptionalDType&, DType) {
  return {query, DType::FLOAT32, DType::INT32};
}

}  // namespace

}  // namespace rrattn

PD_BUILD_OP(rrattn_estimate)
    .Inputs({"Query", "Key", paddle::Optional("StartendRowIndices"), paddle::Optional("Sink")})
    .Outputs({"BlockScores"})
    .Attrs(rrattn::attributes<rrattn::EstimateAttributes>())
    .SetKernelFn(PD_KERNEL(rrattn::Operator<rrattn::estimate, rrattn::EstimateAttributes>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(rrattn::Guarded<rrattn::estimate_shape>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(rrattn::estimate_dtype));

PD_BUILD_OP(rrattn_select)
    .Inputs({"BlockScores", paddle::Optional("StartendRowIndices"),
             paddle::Optional("HeadThresholds")})
    .Outputs({"BlockMask"})
    .Attrs(rrattn::attributes<rrattn::SelectAttributes>())
    .SetKernelFn(PD_KERNEL(rrattn::Operator<rrattn::select, rrattn::SelectAttributes>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(rrattn::Guarded<rrattn::select_shape>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(rrattn::select_dtype));

PD_BUILD_OP(rrattn_attend)
    .Inputs({"Query", "Key", "Value", "BlockMask", paddle::Optional("StartendRowIndices")})
    .Outputs({"Out", "Lse"})
    .Attrs(rrattn::attributes<rrattn::AttendAttributes>())
    .SetKernelFn(PD_KERNEL(rrattn::Operator<rrattn::attend, rrattn::AttendAttributes>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(rrattn::Guarded<rrattn::attend_shape>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(rrattn::attend_dtype));

PD_BUILD_GRAD_OP(rrattn_attend)
    .Inputs({"Query", "Key", "Value", "BlockMask", paddle::Optional("StartendRowIndices"), "Out",
             "Lse", paddle::Grad("Out"), paddle::Grad("Lse")})
    .Outputs({paddle::Grad("Query"), paddle::Grad("Key"), paddle::Grad("Value")})
    .Attrs(rrattn::attributes<rrattn::AttendAttributes>())
    .SetKernelFn(
        PD_KERNEL(rrattn::Operator<rrattn::attend_backward, rrattn::AttendAttributes>::call));

PD_BUILD_DOUBLE_GRAD_OP(rrattn_attend)
    .Inputs({"Query", "Key", "Value", "BlockMask", paddle::Optional("StartendRowIndices"), "Out",
             "Lse", paddle::Grad("Out"), paddle::Grad("Lse"),
             paddle::Optional(paddle::Grad(paddle::Grad("Query"))),
             paddle::Optional(paddle::Grad(paddle::Grad("Key"))),
             paddle::Optional(paddle::Grad(paddle::Grad("Value")))})
    .Outputs({paddle::Grad(paddle::Grad("Out"))})
    .SetKernelFn(PD_KERNEL(rrattn::Guarded<rrattn::refuse_second_order>::call));

PD_BUILD_OP(rrattn_attend_with_sink)
    .Inputs({"Query", "Key", "Value", "BlockMask", paddle::Optional("StartendRowIndices"), "Sink"})
    .Outputs({"Out", "Lse"})
    .Attrs(rrattn::attributes<rrattn::AttendAttributes>())
    .SetKernelFn(
        PD_KERNEL(rrattn::Operator<rrattn::attend_with_sink, rrattn::AttendAttributes>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(rrattn::Guarded<rrattn::attend_with_sink_shape>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(rrattn::attend_with_sink_dtype));

PD_BUILD_GRAD_OP(rrattn_attend_with_sink)
    .Inputs({"Query", "Key", "Value", "BlockMask", paddle::Optional("StartendRowIndices"), "Sink",
             "Out", "Lse", paddle::Grad("Out"), paddle::Grad("Lse")})
    .Outputs({paddle::Grad("Query"), paddle::Grad("Key"), paddle::Grad("Value"),
              paddle::Grad("Sink")})
    .Attrs(rrattn::attributes<rrattn::AttendAttributes>())
    .SetKernelFn(PD_KERNEL(
        rrattn::Operator<rrattn::attend_with_sink_backward, rrattn::AttendAttributes>::call));

PD_BUILD_DOUBLE_GRAD_OP(rrattn_attend_with_sink)
    .Inputs({"Query", "Key", "Value", "BlockMask", paddle::Optional("StartendRowIndices"), "Sink",
             "Out", "Lse", paddle::Grad("Out"), paddle::Grad("Lse"),
             paddle::Optional(paddle::Grad(paddle::Grad("Query"))),
             paddle::Optional(paddle::Grad(paddle::Grad("Key"))),
             paddle::Optional(paddle::Grad(paddle::Grad("Value"))),
             paddle::Optional(paddle::Grad(paddle::Grad("Sink")))})
    .Outputs({paddle::Grad(paddle::Grad("Out"))})
    .SetKernelFn(PD_KERNEL(rrattn::Guarded<rrattn::refuse_second_order>::call));

PD_BUILD_OP(rrattn_attend_gradients)
    .Inputs({"Query", "Key", "Value", "BlockMask", paddle::Optional("StartendRowIndices"),
             paddle::Optional("Sink"), "Out", "Lse", "GradOut"})
    .Outputs({"GradQuery", "GradKey", "GradValue", "GradSink"})
    .Attrs(rrattn::attributes<rrattn::AttendAttributes>())
    .SetKernelFn(
        PD_KERNEL(rrattn::Operator<rrattn::attend_gradients, rrattn::AttendAttributes>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(rrattn::Guarded<rrattn::attend_gradients_shape>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(rrattn::attend_gradients_dtype));

PD_BUILD_OP(rrattn_rr_attention)
    .Inputs({"Query", "Key", "Value", paddle::Optional("StartendRowIndices"),
             paddle::Optional("HeadThresholds")})
    .Outputs({"Out", "Lse", "BlockMask"})
    .Attrs(rrattn::attributes<rrattn::RRAttentionAttributes>())
    .SetKernelFn(
        PD_KERNEL(rrattn::Operator<rrattn::rr_attention, rrattn::RRAttentionAttributes>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(rrattn::Guarded<rrattn::rr_attention_shape>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(rrattn::rr_attention_dtype));

PD_BUILD_GRAD_OP(rrattn_rr_attention)
    .Inputs({"Query", "Key", "Value", paddle::Optional("StartendRowIndices"), "Out", "Lse",
             "BlockMask", paddle::Grad("Out"), paddle::Grad("Lse")})
    .Outputs({paddle::Grad("Query"), paddle::Grad("Key"), paddle::Grad("Value")})
    .Attrs(rrattn::attributes<rrattn::AttendAttributes>())
    .SetKernelFn(
        PD_KERNEL(rrattn::Operator<rrattn::rr_attention_backward, rrattn::AttendAttributes>::call));

PD_BUILD_DOUBLE_GRAD_OP(rrattn_rr_attention)
    .Inputs({"Query", "Key", "Value", paddle::Optional("StartendRowIndices"), "Out", "Lse",
             "BlockMask", paddle::Grad("Out"), paddle::Grad("Lse"),
             paddle::Optional(paddle::Grad(paddle::Grad("Query"))),
             paddle::Optional(paddle::Grad(paddle::Grad("Key"))),
             paddle::Optional(paddle::Grad(paddle::Grad("Value")))})
    .Outputs({paddle::Grad(paddle::Grad("Out"))})
    .SetKernelFn(PD_KERNEL(rrattn::Guarded<rrattn::refuse_second_order>::call));

PD_BUILD_OP(rrattn_rr_attention_with_sink)
    .Inputs({"Query", "Key", "Value", paddle::Optional("StartendRowIndices"),
             paddle::Optional("HeadThresholds"), "Sink"})
    .Outputs({"Out", "Lse", "BlockMask"})
    .Attrs(rrattn::attributes<rrattn::RRAttentionAttributes>())
    .SetKernelFn(PD_KERNEL(
        rrattn::Operator<rrattn::rr_attention_with_sink, rrattn::RRAttentionAttributes>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(rrattn::Guarded<rrattn::rr_attention_with_sink_shape>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(rrattn::rr_attention_with_sink_dtype));

PD_BUILD_GRAD_OP(rrattn_rr_attention_with_sink)
    .Inputs({"Query", "Key", "Value", paddle::Optional("StartendRowIndices"), "Sink", "Out", "Lse",
             "BlockMask", paddle::Grad("Out"), paddle::Grad("Lse")})
    .Outputs({paddle::Grad("Query"), paddle::Grad("Key"), paddle::Grad("Value"),
              paddle::Grad("Sink")})
    .Attrs(rrattn::attributes<rrattn::AttendAttributes>())
    .SetKernelFn(PD_KERNEL(
        rrattn::Operator<rrattn::rr_attention_with_sink_backward, rrattn::AttendAttributes>::call));

PD_BUILD_DOUBLE_GRAD_OP(rrattn_rr_attention_with_sink)
    .Inputs({"Query", "Key", "Value", paddle::Optional("StartendRowIndices"), "Sink", "Out", "Lse",
             "BlockMask", paddle::Grad("Out"), paddle::Grad("Lse"),
             paddle::Optional(paddle::Grad(paddle::Grad("Query"))),
             paddle::Optional(paddle::Grad(paddle::Grad("Key"))),
             paddle::Optional(paddle::Grad(paddle::Grad("Value"))),
             paddle::Optional(paddle::Grad(paddle::Grad("Sink")))})
    .Outputs({paddle::Grad(paddle::Grad("Out"))})
    .SetKernelFn(PD_KERNEL(rrattn::Guarded<rrattn::refuse_second_order>::call));

PD_BUILD_OP(rrattn_ragged)
    .Inputs({"Query", "Key", "Value", "CuSeqlensQ", "SeqlensK", paddle::Optional("BlockTables"),
             paddle::Optional("KeepLast"), paddle::Optional("HeadThresholds"),
             paddle::Optional("Sink"), paddle::Optional("PooledKeys")})
    .Outputs({"Out", "Lse", "BlockMask", paddle::Optional("PooledKeysOut")})
    .SetInplaceMap({{paddle::Optional("PooledKeys"), paddle::Optional("PooledKeysOut")}})
    .Attrs(rrattn::attributes<rrattn::RaggedSettings>())
    .SetKernelFn(PD_KERNEL(rrattn::Operator<rrattn::ragged, rrattn::RaggedSettings>::call));

PD_BUILD_OP(rrattn_dense_mask)
    .Inputs({"Mask"})
    .Outputs({"StartRows", "Verdict"})
    .SetKernelFn(PD_KERNEL(rrattn::Guarded<rrattn::dense_mask>::call))
    .SetInferShapeFn(PD_INFER_SHAPE(rrattn::Guarded<rrattn::dense_mask_shape>::call))
    .SetInferDtypeFn(PD_INFER_DTYPE(rrattn::dense_mask_dtype));
