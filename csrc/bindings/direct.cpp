// The stages on any arrays that speak DLPack, without Paddle. The caller allocates the outputs.
// Users call this module through rrattn/direct.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "../core/overlap.h"
#include "../cpu/cpu_quota.h"
#include "devices.h"
#include "dlpack.h"
#include "settings.h"
#include "shapes.h"

namespace py = pybind11;

namespace rrattn {

namespace {

ElementType element_type(const std::string& name) {
  if (name == "float32") return ElementType::kFloat32;
  if (name == "float16") return ElementType::kFloat16;
  if (name == "bfloat16") return ElementType::kBFloat16;
  if (name == "int32") return ElementType::kInt32;
  if (name == "bool") return ElementType::kBool;
  return ElementType::kOther;
}

std::string type_name(const DLDataType& type) {
  const std::string bits = std::to_string(type.bits);
  if (type.lanes != 1) return "vectors of " + std::to_string(type.lanes);
  switch (type.code) {
    case 0:
      return "int" + bits;
    case 1:
      return "uint" + bits;
    case 2:
      return "float" + bits;
    case 4:
      return "bfloat" + bits;
    case 5:
      return "complex" + bits;
    case 6:
      return "bool";
    default:
      return "DLPack type " + std::to_string(type.code);
  }
}

std::string device_name(const DLDevice& device) {
  if (device.device_type == 1) return "cpu";
  if (device.device_type == 2) return "cuda:" + std::to_string(device.device_id);
  return "DLPack device " + std::to_string(device.device_type);
}

// An Array over a Python object's memory, which `keeper` keeps alive.
struct Borrowed {
  py::object keeper;
  Array array;
  int64_t bytes = 0;
};

enum class Access { kRead, kWrite };

// Completes an array that has its shape. `strides` are in elements; null: contiguous.
void finish(Borrowed& borrowed, const int64_t* strides) {
  Array& array = borrowed.array;
  array.strides.resize(array.shape.size());
  int64_t contiguous = 1;  // and, at the end, the number of elements
  for (size_t i = array.shape.size(); i-- > 0; contiguous *= array.shape[i]) {
    array.strides[i] = strides ? strides[i] : contiguous;
  }
  borrowed.bytes = contiguous * array.element_bytes;
}

// Borrows an array in host memory by NumPy's own protocol. It takes longer than DLPack, but also
// gives read-only arrays, which NumPy's DLPack does not.
Borrowed borrow_by_interface(const py::object& object, const char* name, Access access) {
  const py::dict interface = object.attr("__array_interface__");
  const auto [data, read_only] = interface["data"].cast<std::pair<uintptr_t, bool>>();
  if (read_only && access == Access::kWrite) {
    throw std::invalid_argument(std::string(name) + " is read-only, but is to be written");
  }
  Borrowed borrowed{object, {}};
  Array& array = borrowed.array;
  array.data = reinterpret_cast<void*>(data);
  const auto type = interface["typestr"].cast<std::string>();  // such as "<f4"
  array.element_bytes = std::stoll(type.substr(2));
  const std::string bits = std::to_string(8 * array.element_bytes);
  array.type_name = type[0] == '>'   ? type
                    : type[1] == 'f' ? "float" + bits
                    : type[1] == 'i' ? "int" + bits
                    : type[1] == 'u' ? "uint" + bits
                    : type[1] == 'b' ? "bool"
                                     : type;
  array.device = "cpu";
  array.shape = interface["shape"].cast<std::vector<int64_t>>();
  std::vector<int64_t> strides;
  if (interface.contains("strides") && !interface["strides"].is_none()) {
    strides = interface["strides"].cast<std::vector<int64_t>>();  // in bytes
    for (int64_t& stride : strides) {
      if (stride % array.element_bytes != 0) {
        throw std::invalid_argument(std::string(name) + " has a stride of " +
                                    std::to_string(stride) + " bytes, but must have multiples of " +
                                    std::to_string(array.element_bytes));
      }
      stride /= array.element_bytes;
    }
  }
  finish(borrowed, strides.empty() ? nullptr : strides.data());
  return borrowed;
}

Borrowed borrow_by_dlpack(const py::object& object, bool on_cpu) {
  using py::literals::operator""_a;
  // On a GPU, -1 asks the exporter not to wait for any stream: the order of work on streams is up
  // to the caller.
  py::capsule capsule =
      on_cpu ? object.attr("__dlpack__")() : object.attr("__dlpack__")("stream"_a = -1);
  const auto* managed = static_cast<const DLManagedTensor*>(capsule.get_pointer());
  const DLTensor& tensor = managed->dl_tensor;
  Borrowed borrowed{capsule, {}};
  Array& array = borrowed.array;
  array.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  array.element_bytes = tensor.dtype.bits * tensor.dtype.lanes / 8;
  array.type_name = type_name(tensor.dtype);
  array.device = device_name(tensor.device);
  if (tensor.device.device_type == 2) array.gpu = tensor.device.device_id;
  array.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  finish(borrowed, tensor.strides);
  return borrowed;
}

// `halves` names the 16-bit float type that uint16 stands for, for array libraries without that
// type. Empty: uint16 stands for itself.
Borrowed borrow(const py::object& object, const char* name, Access access,
                const std::string& halves) {
  if (!py::hasattr(object, "__dlpack__")) {
    throw py::type_error(std::string(name) + " is a " +
                         py::type::of(object).attr("__name__").cast<std::string>() +
                         ", but must be an array with __dlpack__");
  }
  Borrowed borrowed;
  try {
    // Paddle gives the device type as an enumeration that is not an int.
    const py::int_ device_type(py::tuple(object.attr("__dlpack_device__")())[0]);
    const bool on_cpu = device_type.cast<int>() == 1;
    try {
      borrowed = borrow_by_dlpack(object, on_cpu);
    } catch (const py::error_already_set&) {
      if (!on_cpu || !py::hasattr(object, "__array_interface__")) throw;
      borrowed = borrow_by_interface(object, name, access);
    }
  } catch (const py::error_already_set& error) {
    throw std::invalid_argument(std::string(name) + " cannot be had in place: " + error.what());
  }
  Array& array = borrowed.array;
  array.name = name;
  if (reinterpret_cast<intptr_t>(array.data) % std::max<int64_t>(array.element_bytes, 1) != 0) {
    throw std::invalid_argument(array.name +
                                " lies at an address that is no multiple of its elements' " +
                                std::to_string(array.element_bytes) + " bytes");
  }
  if (!halves.empty() && array.type_name == "uint16") array.type_name = halves;
  array.type = element_type(array.type_name);
  return borrowed;
}

// All arrays of one call, alive until it ends.
class Arrays {
 public:
  explicit Arrays(const std::optional<std::string>& dtype) : dtype_(dtype.value_or("")) {
    if (dtype && *dtype != "float32" && *dtype != "float16" && *dtype != "bfloat16") {
      throw std::invalid_argument("dtype is " + *dtype +
                                  ", but must be float32, float16 or bfloat16");
    }
  }
  const Array& read(const py::object& object, const char* name) {
    return add(object, name, Access::kRead);
  }
  const Array& write(const py::object& object, const char* name) {
    return add(object, name, Access::kWrite);
  }
  // The same for arrays whose elements have the call's dtype.
  const Array& read_values(const py::object& object, const char* name) {
    return check_dtype(read(object, name));
  }
  const Array& write_values(const py::object& object, const char* name) {
    return check_dtype(write(object, name));
  }
  OptionalArray read_optional(const py::object& object, const char* name) {
    if (object.is_none()) return std::nullopt;
    return read(object, name);
  }
  OptionalArray write_optional(const py::object& object, const char* name) {
    if (object.is_none()) return std::nullopt;
    return write(object, name);
  }
  // Throws if the workspace, which is written, shares memory with any of them.
  void require_apart(const Array& workspace) const {
    for (const auto& borrowed : borrowed_) {
      if (share_memory(workspace, borrowed->array)) {
        throw std::invalid_argument("workspace shares memory with " + borrowed->array.name +
                                    ", but must have its own");
      }
    }
  }

 private:
  const Array& add(const py::object& object, const char* name, Access access) {
    borrowed_.push_back(std::make_unique<Borrowed>(borrow(object, name, access, dtype_)));
    return borrowed_.back()->array;
  }
  const Array& check_dtype(const Array& array) const {
    if (!dtype_.empty() && array.type_name != dtype_) {
      throw std::invalid_argument(array.name + " has dtype " + array.type_name + ", but dtype is " +
                                  dtype_);
    }
    return array;
  }

  std::string dtype_;
  std::vector<std::unique_ptr<Borrowed>> borrowed_;
};

using Scale = std::optional<float>;  // none: 1 / sqrt(head_dim)
using Name = std::optional<std::string>;

float scale_for(const Array& query, const Scale& softmax_scale) {
  return softmax_scale ? *softmax_scale : default_softmax_scale(query);
}

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

// Runs the stage on the device of its arrays, unless size_only, and returns the bytes of workspace
// that it needs.
template <typename Params>
int64_t run(const Stage<Params>& stage, Params params, const Arrays& arrays, const Array& first,
            const Options& options) {
  const Kernel<Params>& kernel = stage.kernel_for(first);
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
                              const py::object& startend_row_indices,
                              const py::object& block_scores, bool causal, int64_t stride,
                              int64_t head_offset, const Scale& softmax_scale, const Name& dtype,
                              const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.read_values(query, "query");
  return run(kEstimate,
             estimate_params(first, arrays.read_values(key, "key"),
                             arrays.read_optional(startend_row_indices, "startend_row_indices"),
                             arrays.write(block_scores, "block_scores"), causal,
                             {stride, head_offset, scale_for(first, softmax_scale)}),
             arrays, first, options);
}

int64_t select_blocks(const py::object& block_scores, const py::object& head_thresholds,
                      const py::object& startend_row_indices, const py::object& block_mask,
                      bool causal, int64_t seqlen_q, int64_t seqlen_k, const KeepRules& rules,
                      const Options& options) {
  Arrays arrays(std::nullopt);
  const Array& first = arrays.read(block_scores, "block_scores");
  return run(
      kSelect,
      select_params(first, arrays.read_optional(head_thresholds, "threshold"),
                    arrays.read_optional(startend_row_indices, "startend_row_indices"),
                    arrays.write(block_mask, "block_mask"), causal, seqlen_q, seqlen_k, rules),
      arrays, first, options);
}

int64_t block_sparse_attention(const py::object& query, const py::object& key,
                               const py::object& value, const py::object& block_mask,
                               const py::object& startend_row_indices, const py::object& out,
                               const py::object& lse, bool causal, const Scale& softmax_scale,
                               const Name& dtype, const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.read_values(query, "query");
  return run(
      kAttend,
      attend_params(first, arrays.read_values(key, "key"), arrays.read_values(value, "value"),
                    arrays.read(block_mask, "block_mask"),
                    arrays.read_optional(startend_row_indices, "startend_row_indices"),
                    arrays.write_values(out, "out"), arrays.write(lse, "lse"), causal,
                    scale_for(first, softmax_scale)),
      arrays, first, options);
}

int64_t block_sparse_attention_backward(const py::object& query, const py::object& key,
                                        const py::object& value, const py::object& block_mask,
                                        const py::object& out, const py::object& lse,
                                        const py::object& grad_out,
                                        const py::object& startend_row_indices,
                                        const py::object& grad_query, const py::object& grad_key,
                                        const py::object& grad_value, bool causal,
                                        const Scale& softmax_scale, bool deterministic,
                                        const Name& dtype, const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.read_values(query, "query");
  return run(
      kBackward,
      backward_params(
          first, arrays.read_values(key, "key"), arrays.read_values(value, "value"),
          arrays.read(block_mask, "block_mask"),
          arrays.read_optional(startend_row_indices, "startend_row_indices"),
          arrays.read_values(out, "out"), arrays.read(lse, "lse"),
          arrays.read_values(grad_out, "grad_out"), arrays.write_values(grad_query, "grad_query"),
          arrays.write_values(grad_key, "grad_key"), arrays.write_values(grad_value, "grad_value"),
          causal, scale_for(first, softmax_scale), deterministic),
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

// All three stages. Of what they hand on, block_scores, block_mask and lse, the workspace has what
// was not asked for, and behind it the workspace of each stage in turn.
int64_t rr_attention(const py::object& query, const py::object& key, const py::object& value,
                     const py::object& head_thresholds, const py::object& startend_row_indices,
                     const py::object& out, const py::object& lse, const py::object& block_mask,
                     const py::object& block_scores, bool causal, int64_t stride,
                     int64_t head_offset, const Scale& softmax_scale, const KeepRules& rules,
                     const Name& dtype, const Options& options) {
  Arrays arrays(dtype);
  const Array& q = arrays.read_values(query, "query");
  const Array& k = arrays.read_values(key, "key");
  const Array& v = arrays.read_values(value, "value");
  const OptionalArray rows = arrays.read_optional(startend_row_indices, "startend_row_indices");
  const OptionalArray thresholds = arrays.read_optional(head_thresholds, "threshold");
  const Array& o = arrays.write_values(out, "out");
  const OptionalArray given_lse = arrays.write_optional(lse, "lse");
  const OptionalArray given_mask = arrays.write_optional(block_mask, "block_mask");
  const OptionalArray given_scores = arrays.write_optional(block_scores, "block_scores");
  const Kernel<EstimateParams>& estimate = kEstimate.kernel_for(q);
  const Kernel<SelectParams>& select = kSelect.kernel_for(q);
  const Kernel<AttendParams>& attend = kAttend.kernel_for(q);
  const float scale = scale_for(q, softmax_scale);

  struct Plan {
    EstimateParams estimate;
    SelectParams select;
    AttendParams attend;
    int64_t scratch_bytes;
  };
  const auto plan_at = [&](intptr_t workspace) {
    Scratch scratch(workspace, q);
    const Shape scores = scores_shape(q.shape, k.shape);
    const auto taken = [&](const OptionalArray& given, const char* name, ElementType type,
                           const char* type_name, const Shape& shape) {
      return given ? *given : scratch.take(name, type, type_name, shape);
    };
    const Array block_scores =
        taken(given_scores, "block_scores", ElementType::kFloat32, "float32", scores);
    const Array block_mask =
        taken(given_mask, "block_mask", ElementType::kInt32, "int32", mask_shape(scores));
    const Array lse = taken(given_lse, "lse", ElementType::kFloat32, "float32", lse_shape(q.shape));
    Plan plan{estimate_params(q, k, rows, block_scores, causal, {stride, head_offset, scale}),
              select_params(block_scores, thresholds, rows, block_mask, causal, q.shape[1],
                            k.shape[1], rules),
              attend_params(q, k, v, block_mask, rows, o, lse, causal, scale), scratch.bytes()};
    // A stage looks at its own arrays alone.
    std::vector<const Array*> inputs = {&q, &k, &v};
    if (rows) inputs.push_back(&*rows);
    if (thresholds) inputs.push_back(&*thresholds);
    require_own_memory({&o, &lse, &block_mask, &block_scores}, inputs, &q);
    for (Execution* execution :
         {&plan.estimate.execution, &plan.select.execution, &plan.attend.execution}) {
      *execution = options.execution();
      execution->workspace = scratch.end();
    }
    return plan;
  };

  const DeviceGuard guard(q.gpu);
  // Until there is a workspace, what will lie in it stands at an address where no memory is.
  const Plan sizes = plan_at(intptr_t{1} << 62);
  const int64_t bytes = sizes.scratch_bytes + std::max({estimate.workspace_bytes(sizes.estimate),
                                                        select.workspace_bytes(sizes.select),
                                                        attend.workspace_bytes(sizes.attend)});
  if (options.size_only) return bytes;
  const Workspace workspace(bytes, arrays, q, options);
  const Plan plan = plan_at(reinterpret_cast<intptr_t>(workspace.data()));
  py::gil_scoped_release unlocked;
  estimate.run(plan.estimate);
  select.run(plan.select);
  attend.run(plan.attend);
  return bytes;
}

int64_t startend_rows_from_dense(const py::object& mask, const py::object& start_rows,
                                 const py::object& verdict, const Name& dtype,
                                 const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.read(mask, "mask");
  return run(kDenseMask,
             dense_mask_params(first, arrays.write(start_rows, "start_rows"),
                               arrays.write(verdict, "verdict")),
             arrays, first, options);
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
  py::class_<Options>(module, "Options")
      .def(py::init<std::optional<int>, py::object, int64_t, bool>(), py::kw_only(),
           py::arg("num_threads") = none, py::arg("workspace") = none, py::arg("stream") = 0,
           py::arg("size_only") = false);
  module.def("estimate_block_scores", &estimate_block_scores, py::arg("query"), py::arg("key"),
             py::arg("startend_row_indices") = none, py::kw_only(), py::arg("block_scores"),
             py::arg("causal"), py::arg("stride"), py::arg("head_offset") = 0,
             py::arg("softmax_scale") = none, py::arg("dtype") = none, py::arg("options"));
  module.def("select_blocks", &select_blocks, py::arg("block_scores"),
             py::arg("head_thresholds") = none, py::arg("startend_row_indices") = none,
             py::kw_only(), py::arg("block_mask"), py::arg("causal"), py::arg("seqlen_q"),
             py::arg("seqlen_k"), py::arg("rules"), py::arg("options"));
  module.def("block_sparse_attention", &block_sparse_attention, py::arg("query"), py::arg("key"),
             py::arg("value"), py::arg("block_mask"), py::arg("startend_row_indices") = none,
             py::kw_only(), py::arg("out"), py::arg("lse"), py::arg("causal"),
             py::arg("softmax_scale") = none, py::arg("dtype") = none, py::arg("options"));
  module.def("block_sparse_attention_backward", &block_sparse_attention_backward, py::arg("query"),
             py::arg("key"), py::arg("value"), py::arg("block_mask"), py::arg("out"),
             py::arg("lse"), py::arg("grad_out"), py::arg("startend_row_indices") = none,
             py::kw_only(), py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"),
             py::arg("causal"), py::arg("softmax_scale") = none, py::arg("deterministic") = false,
             py::arg("dtype") = none, py::arg("options"));
  module.def("rr_attention", &rr_attention, py::arg("query"), py::arg("key"), py::arg("value"),
             py::arg("head_thresholds") = none, py::arg("startend_row_indices") = none,
             py::kw_only(), py::arg("out"), py::arg("lse") = none, py::arg("block_mask") = none,
             py::arg("block_scores") = none, py::arg("causal"), py::arg("stride"),
             py::arg("head_offset") = 0, py::arg("softmax_scale") = none, py::arg("rules"),
             py::arg("dtype") = none, py::arg("options"));
  module.def("startend_rows_from_dense", &startend_rows_from_dense, py::arg("mask"), py::kw_only(),
             py::arg("start_rows"), py::arg("verdict"), py::arg("dtype") = none,
             py::arg("options"));
  module.def("available_simd", &cpu::available_simd);
  module.def("set_simd", &cpu::set_simd);
  module.def("simd", [] { return std::string(cpu::kernels().name); });
  module.def("default_num_threads", &cpu::default_num_threads);
  module.def("_cpu_quota", &cpu::cpu_quota);  // for its test
}

}  // namespace rrattn
