// The stages on any arrays that speak DLPack, without Paddle. The caller allocates the outputs.
// Users call this module through rrattn/direct.py.
#include "../core/ragged_arguments.h"
#include "../cpu/cpu_quota.h"
#include "../cpu/ragged.h"
#include "../cpu/work_queue.h"
#include "../cuda/gpu_path.h"
#include "arrays.h"
#include "devices.h"
#include "settings.h"
#include "shapes.h"

namespace rrattn {

namespace {

using Scale = std::optional<float>;  // none: 1 / sqrt(head_dim)
using Name = std::optional<std::string>;

float scale_for(const Array& query, const Scale& softmax_scale) {
  return softmax_scale ? *softmax_scale : default_softmax_scale(query);
}

// Sampling as it is given, of a query that may still have to tell the scale.
struct GivenSampling {
  int64_t stride, key_stride, head_offset;
  Scale softmax_scale;
  float spread;

  Sampling of(const Array& query) const {
    return {stride, key_stride, head_offset, scale_for(query, softmax_scale), spread};
  }
};

// How a call is to run.
struct Options {
  std::optional<int> num_threads;
  py::object workspace;
  int64_t stream;
  bool size_only;

  Execution execution() const {
    Execution execution;
    execution.num_threads = num_threads.value_or(cpu::default_num_threads());
    execution.stream = reinterpret_cast<void*>(stream);
    if (execution.num_threads < 1) {
      throw std::invalid_argument("num_threads is " + std::to_string(execution.num_threads) +
                                  ", but must be at least 1");
    }
    return execution;
  }
};

// At least `bytes` of scratch memory on the device of a call's arrays: the caller's, or on a CPU
// its own.
class Workspace {
 public:
  Workspace(int64_t bytes, const Arrays& arrays, const Array& first, const Options& options) {
    if (!options.workspace.is_none()) {
      given_ = borrow(options.workspace, "workspace", Access::kWrite, "");
      arrays.require_apart(given_->array);
      if (given_->array.device != first.device) {
        throw std::invalid_argument("workspace is on " + given_->array.device +
                                    ", but must be on " + first.device);
      }
    }
    if ((!given_ && first.gpu >= 0) || (given_ && given_->bytes < bytes)) {
      throw std::invalid_argument("workspace has " + std::to_string(given_ ? given_->bytes : 0) +
                                  " bytes, but must have at least " + std::to_string(bytes));
    }
    if (!given_) own_.reset(new char[bytes]);
  }
  void* data() const { return given_ ? given_->array.data : own_.get(); }

 private:
  std::optional<Borrowed> given_;
  std::unique_ptr<char[]> own_;
};

// Runs a kernel on the device of its arrays, unless size_only, and returns the bytes of workspace
// that it needs.
template <typename Params>
int64_t run(const Kernel<Params>& kernel, Params params, const Arrays& arrays, const Array& first,
            const Options& options) {
  params.execution = options.execution();
  const DeviceGuard guard(first.gpu);
  const int64_t bytes = kernel.workspace_bytes(params);
  if (options.size_only) return bytes;
  const Workspace workspace(bytes, arrays, first, options);
  params.execution.workspace = workspace.data();
  py::gil_scoped_release unlocked;
  kernel.run(params);
  return bytes;
}

int64_t estimate_block_scores(const py::object& query, const py::object& key,
                              const py::object& startend_row_indices, const py::object& sink,
                              const py::object& block_scores, bool causal,
                              const GivenSampling& sampling, const Name& dtype,
                              const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.read_values(query, "query");
  return run(
      kEstimate.kernel_for(first),
      estimate_params(first, arrays.read_values(key, "key"),
                      arrays.read_optional(startend_row_indices, "startend_row_indices"),
                      arrays.read_optional(sink, "sink"),
                      arrays.write(block_scores, "block_scores"), causal, sampling.of(first)),
      arrays, first, options);
}

int64_t select_blocks(const py::object& block_scores, const py::object& head_thresholds,
                      const py::object& startend_row_indices, const py::object& block_mask,
                      bool causal, int64_t seqlen_q, int64_t seqlen_k, const KeepRules& rules,
                      const Options& options) {
  Arrays arrays(std::nullopt);
  const Array& first = arrays.read(block_scores, "block_scores");
  return run(
      kSelect.kernel_for(first),
      select_params(first, arrays.read_optional(head_thresholds, "threshold"),
                    arrays.read_optional(startend_row_indices, "startend_row_indices"),
                    arrays.write(block_mask, "block_mask"), causal, seqlen_q, seqlen_k, rules),
      arrays, first, options);
}

int64_t block_sparse_attention(const py::object& query, const py::object& key,
                               const py::object& value, const py::object& block_mask,
                               const py::object& startend_row_indices, const py::object& sink,
                               const py::object& out, const py::object& lse, bool causal,
                               const Scale& softmax_scale, bool compensate,
                               const std::string& quantization, const Name& dtype,
                               const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.read_values(query, "query");
  return run(
      attend_kernel_for(first, quantization, compensate),
      attend_params(first, arrays.read_values(key, "key"), arrays.read_values(value, "value"),
                    arrays.read(block_mask, "block_mask"),
                    arrays.read_optional(startend_row_indices, "startend_row_indices"),
                    arrays.read_optional(sink, "sink"), arrays.write_values(out, "out"),
                    arrays.write(lse, "lse"), causal, scale_for(first, softmax_scale), compensate),
      arrays, first, options);
}

int64_t block_sparse_attention_backward(
    const py::object& query, const py::object& key, const py::object& value,
    const py::object& block_mask, const py::object& out, const py::object& lse,
    const py::object& grad_out, const py::object& startend_row_indices, const py::object& sink,
    const py::object& grad_lse, const py::object& grad_query, const py::object& grad_key,
    const py::object& grad_value, const py::object& grad_sink, bool causal,
    const Scale& softmax_scale, bool deterministic, const Name& dtype, const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.read_values(query, "query");
  return run(
      kBackward.kernel_for(first),
      backward_params(
          first, arrays.read_values(key, "key"), arrays.read_values(value, "value"),
          arrays.read(block_mask, "block_mask"),
          arrays.read_optional(startend_row_indices, "startend_row_indices"),
          arrays.read_optional(sink, "sink"), arrays.read_values(out, "out"),
          arrays.read(lse, "lse"), arrays.read_values(grad_out, "grad_out"),
          arrays.read_optional(grad_lse, "grad_lse"), arrays.write_values(grad_query, "grad_query"),
          arrays.write_values(grad_key, "grad_key"), arrays.write_values(grad_value, "grad_value"),
          arrays.write_optional(grad_sink, "grad_sink"), causal, scale_for(first, softmax_scale),
          deterministic),
      arrays, first, options);
}

// Contiguous arrays one after the other, from an address on, on the device of another array.
class Scratch {
 public:
  Scratch(intptr_t begin, const Array& like) : begin_(begin), end_(align(begin)), like_(like) {}

  Array take(const char* name, ElementType type, const char* type_name, Shape shape) {
    Borrowed taken;
    Array& array = taken.array;
    array.name = name;
    array.data = reinterpret_cast<void*>(end_);
    array.type = type;
    array.type_name = type_name;
    array.element_bytes = 4;
    array.device = like_.device;
    array.gpu = like_.gpu;
    array.shape = std::move(shape);
    finish(taken, nullptr);
    end_ = align(end_ + taken.bytes);
    return array;
  }
  void* end() const { return reinterpret_cast<void*>(end_); }
  int64_t bytes() const { return end_ - begin_ + kAlignment; }  // room to align the start

 private:
  static constexpr intptr_t kAlignment = 256;
  static intptr_t align(intptr_t at) { return (at + kAlignment - 1) / kAlignment * kAlignment; }
  intptr_t begin_, end_;
  const Array& like_;
};

// The parameters of all stages of a call.
struct Plan {
  EstimateParams estimate;
  SelectParams select;
  AttendParams attend;
  int64_t scratch_bytes;
};

// A call of all three stages. Of what they hand on, block_scores, block_mask and lse, the workspace
// has what was not given, and behind it the workspace of each stage in turn.
struct Pipeline {
  const Array &query, &key, &value;
  OptionalArray head_thresholds, startend_row_indices, sink;
  const Array& out;
  OptionalArray lse, block_mask, block_scores;
  bool causal;
  Sampling sampling;
  KeepRules rules;
  bool compensate;
  Execution execution;

  // Checks everything, for a workspace that begins at this address.
  Plan plan_at(intptr_t address) const {
    Scratch scratch(address, query);
    const Shape of_scores = scores_shape(query.shape, key.shape);
    const Array scores =
        block_scores ? *block_scores
                     : scratch.take("block_scores", ElementType::kFloat32, "float32", of_scores);
    const Array mask = block_mask ? *block_mask
                                  : scratch.take("block_mask", ElementType::kInt32, "int32",
                                                 mask_shape(of_scores));
    const Array row_lse =
        lse ? *lse : scratch.take("lse", ElementType::kFloat32, "float32", lse_shape(query.shape));
    Plan plan{estimate_params(query, key, startend_row_indices, sink, scores, causal, sampling),
              select_params(scores, head_thresholds, startend_row_indices, mask, causal,
                            query.shape[1], key.shape[1], rules),
              attend_params(query, key, value, mask, startend_row_indices, sink, out, row_lse,
                            causal, sampling.softmax_scale, compensate),
              scratch.bytes()};
    // Each of these has looked at the arrays of its own stage.
    std::vector<const Array*> inputs = {&query, &key, &value};
    if (head_thresholds) inputs.push_back(&*head_thresholds);
    if (startend_row_indices) inputs.push_back(&*startend_row_indices);
    if (sink) inputs.push_back(&*sink);
    require_own_memory({&out, &row_lse, &mask, &scores}, inputs, &query);
    plan.estimate.execution = execution;
    plan.estimate.execution.workspace = scratch.end();
    plan.select.execution = plan.attend.execution = plan.estimate.execution;
    return plan;
  }
};

int64_t rr_attention(const py::object& query, const py::object& key, const py::object& value,
                     const py::object& head_thresholds, const py::object& startend_row_indices,
                     const py::object& sink, const py::object& out, const py::object& lse,
                     const py::object& block_mask, const py::object& block_scores, bool causal,
                     const GivenSampling& sampling, const KeepRules& rules, bool compensate,
                     const std::string& quantization, const Name& dtype, const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.read_values(query, "query");
  const Kernel<EstimateParams>& estimate = kEstimate.kernel_for(first);
  const Kernel<SelectParams>& select = kSelect.kernel_for(first);
  const Kernel<AttendParams>& attend = attend_kernel_for(first, quantization, compensate);
  const Pipeline pipeline{first,
                          arrays.read_values(key, "key"),
                          arrays.read_values(value, "value"),
                          arrays.read_optional(head_thresholds, "threshold"),
                          arrays.read_optional(startend_row_indices, "startend_row_indices"),
                          arrays.read_optional(sink, "sink"),
                          arrays.write_values(out, "out"),
                          arrays.write_optional(lse, "lse"),
                          arrays.write_optional(block_mask, "block_mask"),
                          arrays.write_optional(block_scores, "block_scores"),
                          causal,
                          sampling.of(first),
                          rules,
                          compensate,
                          options.execution()};
  const DeviceGuard guard(first.gpu);
  // Before there is a workspace, what is to lie in it stands at an address where no memory is.
  const Plan sizes = pipeline.plan_at(intptr_t{1} << 62);
  const int64_t bytes = sizes.scratch_bytes + std::max({estimate.workspace_bytes(sizes.estimate),
                                                        select.workspace_bytes(sizes.select),
                                                        attend.workspace_bytes(sizes.attend)});
  if (options.size_only) return bytes;
  const Workspace workspace(bytes, arrays, first, options);
  const Plan plan = pipeline.plan_at(reinterpret_cast<intptr_t>(workspace.data()));
  py::gil_scoped_release unlocked;
  estimate.run(plan.estimate);
  select.run(plan.select);
  attend.run(plan.attend);
  return bytes;
}

// One after the other in a workspace: the outputs that were not given, and what the stages take.
int64_t ragged_attention(const py::object& query, const py::object& key, const py::object& value,
                         const py::object& cu_seqlens_q, const py::object& seqlens_k,
                         const py::object& block_tables, const py::object& keep_last,
                         const py::object& head_thresholds, const py::object& sink,
                         const py::object& pooled_keys, const py::object& out,
                         const py::object& lse, const py::object& block_mask, bool heads_first,
                         const GivenSampling& sampling, const KeepRules& rules, bool compensate,
                         int64_t max_seqlen_k, int64_t max_num_keys, const Name& dtype,
                         const Options& options) {
  Arrays arrays(dtype);
  OptionalArray pooled;
  if (!pooled_keys.is_none()) pooled = arrays.write(pooled_keys, "pooled_keys");
  const RaggedArrays given{arrays.read_values(query, "query"),
                           arrays.read_values(key, "key"),
                           arrays.read_values(value, "value"),
                           arrays.read(cu_seqlens_q, "cu_seqlens_q"),
                           arrays.read(seqlens_k, "seqlens_k"),
                           arrays.read_optional(block_tables, "block_tables"),
                           arrays.read_optional(keep_last, "keep_last"),
                           arrays.read_optional(head_thresholds, "threshold"),
                           arrays.read_optional(sink, "sink"),
                           pooled};
  const Array& written = arrays.write_values(out, "out");
  const OptionalArray given_lse = arrays.write_optional(lse, "lse");
  const OptionalArray given_mask = arrays.write_optional(block_mask, "block_mask");
  const RaggedSettings settings{
      heads_first, sampling.of(given.query), rules, compensate, max_seqlen_k, max_num_keys};
  const Shape& of_query = given.query.shape;
  // The outputs that are not given come first in the workspace.
  const auto lse_in = [&](Scratch& scratch) {
    return given_lse
               ? *given_lse
               : scratch.take("lse", ElementType::kFloat32, "float32", {of_query[1], of_query[0]});
  };
  const auto mask_in = [&](Scratch& scratch, int64_t words) {
    return given_mask ? *given_mask
                      : scratch.take("block_mask", ElementType::kInt32, "int32", {words});
  };
  Execution execution = options.execution();
  if (given.query.device != "cpu") {
    const Kernel<RaggedParams>& kernel = kRaggedOnGpu.kernel_for(given.query);
    const DeviceGuard guard(given.query.gpu);
    const int64_t mask_words = max_mask_words(given, settings);
    const auto plan_at = [&](intptr_t address) {
      Scratch scratch(address, given.query);
      const Array row_lse = lse_in(scratch), mask = mask_in(scratch, mask_words);
      RaggedParams params = ragged_params(given, written, row_lse, mask, settings);
      params.execution = execution;
      params.execution.workspace = scratch.end();
      return std::make_pair(params, scratch.bytes());
    };
    const auto [sizes, scratch_bytes] = plan_at(intptr_t{1} << 62);
    const int64_t bytes = scratch_bytes + kernel.workspace_bytes(sizes);
    if (options.size_only) return bytes;
    const Workspace workspace(bytes, arrays, given.query, options);
    const RaggedParams params = plan_at(reinterpret_cast<intptr_t>(workspace.data())).first;
    py::gil_scoped_release unlocked;
    kernel.run(params);
    return bytes;
  }
  const std::vector<RequestLengths> lengths = ragged_lengths(given, settings);
  const auto plan_at = [&](intptr_t address) {
    Scratch scratch(address, given.query);
    const Array row_lse = lse_in(scratch);
    const Array mask = mask_in(scratch, ragged_mask_words(lengths, of_query[1]));
    execution.workspace = scratch.end();
    return std::make_pair(ragged_calls(given, lengths, written, row_lse, mask, settings),
                          scratch.bytes());
  };
  const auto [sizes, scratch_bytes] = plan_at(intptr_t{1} << 62);
  const int64_t bytes = scratch_bytes + cpu::ragged_workspace_bytes(sizes, execution.num_threads);
  if (options.size_only) return bytes;
  const Workspace workspace(bytes, arrays, given.query, options);
  const RaggedCalls calls = plan_at(reinterpret_cast<intptr_t>(workspace.data())).first;
  py::gil_scoped_release unlocked;
  cpu::run_ragged(calls, execution);
  return bytes;
}

int64_t startend_rows_from_dense(const py::object& mask, const py::object& start_rows,
                                 const py::object& verdict, const Name& dtype,
                                 const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.read(mask, "mask");
  return run(kDenseMask.kernel_for(first),
             dense_mask_params(first, arrays.write(start_rows, "start_rows"),
                               arrays.write(verdict, "verdict")),
             arrays, first, options);
}

// (request, query block) in the order in which the threads take them, of requests of these numbers of
// queries and keys. For its test.
std::vector<std::pair<int, int>> work_order(
    const std::vector<std::pair<int64_t, int64_t>>& lengths) {
  std::vector<cpu::WorkRow> rows;
  for (size_t b = 0; b < lengths.size(); ++b) {
    const Visibility visibility{1, lengths[b].first, lengths[b].second, 1, true, {}};
    for (int64_t m_block = 0; m_block < visibility.num_m_blocks(); ++m_block) {
      rows.push_back({cpu::work_of_rows(visibility, m_block, 1), static_cast<int32_t>(b),
                      static_cast<int32_t>(m_block)});
    }
  }
  cpu::longest_first(rows.data(), static_cast<int64_t>(rows.size()));
  std::vector<std::pair<int, int>> order;
  for (const cpu::WorkRow& row : rows) order.emplace_back(row.call, row.row);
  return order;
}

// A class that is made from its settings, by name.
template <typename Settings, typename... Values>
void add_settings(py::module_& module, const char* name, std::tuple<Setting<Values>...> settings) {
  py::class_<Settings> added(module, name);
  std::apply(
      [&](auto... setting) {
        added.def(py::init(&settings_from<Settings, Values...>), py::kw_only(),
                  py::arg(setting.name)...);
      },
      settings);
}

}  // namespace

PYBIND11_MODULE(_direct, module) {
  const py::none none;
  KeepRules rules;
  add_settings<KeepRules>(module, "KeepRules", settings_of(rules));
  py::class_<GivenSampling>(module, "Sampling")
      .def(py::init<int64_t, int64_t, int64_t, Scale, float>(), py::kw_only(), py::arg("stride"),
           py::arg("key_stride"), py::arg("head_offset"), py::arg("softmax_scale"),
           py::arg("spread"));
  py::class_<Options>(module, "Options")
      .def(py::init<std::optional<int>, py::object, int64_t, bool>(), py::kw_only(),
           py::arg("num_threads") = none, py::arg("workspace") = none, py::arg("stream") = 0,
           py::arg("size_only") = false);
  module.def("estimate_block_scores", &estimate_block_scores, py::arg("query"), py::arg("key"),
             py::arg("startend_row_indices") = none, py::kw_only(), py::arg("sink") = none,
             py::arg("block_scores"), py::arg("causal"), py::arg("sampling"),
             py::arg("dtype") = none, py::arg("options"));
  module.def("select_blocks", &select_blocks, py::arg("block_scores"),
             py::arg("head_thresholds") = none, py::arg("startend_row_indices") = none,
             py::kw_only(), py::arg("block_mask"), py::arg("causal"), py::arg("seqlen_q"),
             py::arg("seqlen_k"), py::arg("rules"), py::arg("options"));
  module.def("block_sparse_attention", &block_sparse_attention, py::arg("query"), py::arg("key"),
             py::arg("value"), py::arg("block_mask"), py::arg("startend_row_indices") = none,
             py::kw_only(), py::arg("sink") = none, py::arg("out"), py::arg("lse"),
             py::arg("causal"), py::arg("softmax_scale") = none, py::arg("compensate"),
             py::arg("quantization"), py::arg("dtype") = none, py::arg("options"));
  module.def("block_sparse_attention_backward", &block_sparse_attention_backward, py::arg("query"),
             py::arg("key"), py::arg("value"), py::arg("block_mask"), py::arg("out"),
             py::arg("lse"), py::arg("grad_out"), py::arg("startend_row_indices") = none,
             py::kw_only(), py::arg("sink") = none, py::arg("grad_lse") = none,
             py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"),
             py::arg("grad_sink") = none, py::arg("causal"), py::arg("softmax_scale") = none,
             py::arg("deterministic") = false, py::arg("dtype") = none, py::arg("options"));
  module.def("rr_attention", &rr_attention, py::arg("query"), py::arg("key"), py::arg("value"),
             py::arg("head_thresholds") = none, py::arg("startend_row_indices") = none,
             py::kw_only(), py::arg("sink") = none, py::arg("out"), py::arg("lse") = none,
             py::arg("block_mask") = none, py::arg("block_scores") = none, py::arg("causal"),
             py::arg("sampling"), py::arg("rules"), py::arg("compensate"), py::arg("quantization"),
             py::arg("dtype") = none, py::arg("options"));
  module.def("ragged_attention", &ragged_attention, py::arg("query"), py::arg("key"),
             py::arg("value"), py::arg("cu_seqlens_q"), py::arg("seqlens_k"), py::kw_only(),
             py::arg("block_tables") = none, py::arg("keep_last") = none,
             py::arg("head_thresholds") = none, py::arg("sink") = none,
             py::arg("pooled_keys") = none, py::arg("out"), py::arg("lse") = none,
             py::arg("block_mask") = none, py::arg("heads_first"), py::arg("sampling"),
             py::arg("rules"), py::arg("compensate"), py::arg("max_seqlen_k"),
             py::arg("max_num_keys"), py::arg("dtype") = none, py::arg("options"));
  module.def("startend_rows_from_dense", &startend_rows_from_dense, py::arg("mask"), py::kw_only(),
             py::arg("start_rows"), py::arg("verdict"), py::arg("dtype") = none,
             py::arg("options"));
  module.def("available_simd", &cpu::available_simd);
  module.def("set_simd", &cpu::set_simd);
  module.def("simd", [] { return std::string(cpu::kernels().name); });
  module.def("available_gpu_paths", &cuda::available_gpu_paths);
  module.def("set_gpu_path", &cuda::set_gpu_path);
  module.def("gpu_path", [] { return std::string(cuda::wanted_gpu_path().name); });
  module.def("cuda_archs", &cuda::built_cuda_archs);
  module.def("gpu_kernels", [](int device, const std::string& path) {
    if (device < 0) {
      throw std::invalid_argument("device is " + std::to_string(device) +
                                  ", but must be 0 or more");
    }
    return gpu_kernels(device, cuda::gpu_path_of_name(path));
  });
  module.def("default_num_threads", &cpu::default_num_threads);
  module.def("_work_order", &work_order);
  module.def("_cpu_quota", &cpu::cpu_quota);  // for its test
}

}  // namespace rrattn
