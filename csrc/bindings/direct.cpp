// The stages on any arrays that speak DLPack, without Paddle. The caller allocates the outputs;
// rrattn/direct.py is the face of this module.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "../cpu/cpu_quota.h"
#include "devices.h"
#include "dlpack.h"

namespace py = pybind11;

namespace rrattn {

namespace {

ElementType element_type(const std::string& name) {
  if (name == "float32") return ElementType::kFloat32;
  if (name == "float16") return ElementType::kFloat16;
  if (name == "bfloat16") return ElementType::kBFloat16;
  if (name == "int32") return ElementType::kInt32;
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
    default:
      return "DLPack type " + std::to_string(type.code);
  }
}

std::string device_name(const DLDevice& device) {
  if (device.device_type == 1) return "cpu";
  if (device.device_type == 2) return "cuda:" + std::to_string(device.device_id);
  return "DLPack device " + std::to_string(device.device_type);
}

// An Array over a Python object's memory, which the capsule keeps alive.
struct Borrowed {
  py::capsule capsule;
  Array array;
  int64_t bytes;
};

// `halves` is what 16-bit integers stand for, where the array library has no such type; empty:
// nothing.
Borrowed borrow(const py::object& object, const char* name, const std::string& halves) {
  if (!py::hasattr(object, "__dlpack__")) {
    throw py::type_error(std::string(name) + " is a " +
                         py::str(py::type::of(object)).cast<std::string>() +
                         ", but must be an array with __dlpack__");
  }
  // On a GPU, -1 asks the exporter not to wait for any stream: the caller's stream is in the
  // caller's hands.
  const bool on_cpu = object.attr("__dlpack_device__")().cast<std::pair<int, int>>().first == 1;
  using py::literals::operator""_a;
  Borrowed borrowed{
      on_cpu ? object.attr("__dlpack__")() : object.attr("__dlpack__")("stream"_a = -1), {}, 0};
  const auto* managed = static_cast<const DLManagedTensor*>(borrowed.capsule.get_pointer());
  const DLTensor& tensor = managed->dl_tensor;
  Array& array = borrowed.array;
  array.name = name;
  array.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  array.type_name = type_name(tensor.dtype);
  if (!halves.empty() && array.type_name == "uint16") array.type_name = halves;
  array.type = element_type(array.type_name);
  array.device = device_name(tensor.device);
  if (tensor.device.device_type == 2) array.gpu = tensor.device.device_id;
  array.shape.assign(tensor.shape, tensor.shape + tensor.ndim);
  array.strides.resize(tensor.ndim);
  int64_t contiguous = 1;  // and, at the end, the number of elements
  for (int i = tensor.ndim; i-- > 0; contiguous *= tensor.shape[i]) {
    array.strides[i] = tensor.strides ? tensor.strides[i] : contiguous;
  }
  borrowed.bytes = contiguous * tensor.dtype.bits / 8;
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
  const Array& operator()(const py::object& object, const char* name) {
    borrowed_.push_back(std::make_unique<Borrowed>(borrow(object, name, dtype_)));
    return borrowed_.back()->array;
  }
  // One that holds elements of the call's dtype.
  const Array& values(const py::object& object, const char* name) {
    const Array& array = (*this)(object, name);
    if (!dtype_.empty() && array.type_name != dtype_) {
      throw std::invalid_argument(array.name + " has dtype " + array.type_name + ", but dtype is " +
                                  dtype_);
    }
    return array;
  }
  OptionalArray optional(const py::object& object, const char* name) {
    if (object.is_none()) return std::nullopt;
    return (*this)(object, name);
  }

 private:
  std::string dtype_;
  std::vector<std::unique_ptr<Borrowed>> borrowed_;
};

using Scale = std::optional<double>;
using Name = std::optional<std::string>;

// How a stage is to run. The defaults are in direct.py.
struct Options {
  std::optional<int> num_threads;
  py::object workspace;
  int64_t stream;
  bool size_only;
};

// Runs the stage on the arrays' device, or with size_only tells what workspace it needs.
template <typename Params>
int64_t run(const Stage<Params>& stage, Params params, const Array& first, const Options& options) {
  const Kernel<Params>& kernel = stage.kernel_for(first);
  params.execution.num_threads = options.num_threads.value_or(cpu::default_num_threads());
  params.execution.stream = reinterpret_cast<void*>(options.stream);
  if (params.execution.num_threads < 1) {
    throw std::invalid_argument("num_threads is " + std::to_string(params.execution.num_threads) +
                                ", but must be at least 1");
  }
  const DeviceGuard guard(first.gpu);
  const int64_t bytes = kernel.workspace_bytes(params);
  if (options.size_only) return bytes;

  std::unique_ptr<char[]> own;
  std::optional<Borrowed> given;
  if (!options.workspace.is_none()) {
    given = borrow(options.workspace, "workspace", "");
    if (given->array.device != first.device) {
      throw std::invalid_argument("workspace is on " + given->array.device + ", but must be on " +
                                  first.device);
    }
  }
  if ((!given && first.gpu >= 0) || (given && given->bytes < bytes)) {
    throw std::invalid_argument("workspace has " + std::to_string(given ? given->bytes : 0) +
                                " bytes, but must have at least " + std::to_string(bytes));
  }
  if (!given) own.reset(new char[bytes]);
  params.execution.workspace = given ? given->array.data : own.get();
  py::gil_scoped_release unlocked;
  kernel.run(params);
  return bytes;
}

int64_t estimate_block_scores(const py::object& query, const py::object& key,
                              const py::object& block_scores,
                              const py::object& startend_row_indices, bool causal, int64_t stride,
                              int64_t head_offset, Scale softmax_scale, const Name& dtype,
                              const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.values(query, "query");
  return run(kEstimate,
             estimate_params(first, arrays.values(key, "key"),
                             arrays.optional(startend_row_indices, "startend_row_indices"),
                             arrays(block_scores, "block_scores"), causal, stride, head_offset,
                             softmax_scale),
             first, options);
}

int64_t select_blocks(const py::object& block_scores, const py::object& block_mask,
                      const py::object& startend_row_indices, double threshold,
                      const py::object& head_thresholds, bool causal, int64_t seqlen_q,
                      int64_t seqlen_k, bool keep_sink, bool keep_last, int64_t keep_local,
                      const Options& options) {
  Arrays arrays(std::nullopt);
  const Array& first = arrays(block_scores, "block_scores");
  return run(kSelect,
             select_params(first, arrays.optional(startend_row_indices, "startend_row_indices"),
                           arrays(block_mask, "block_mask"), threshold,
                           arrays.optional(head_thresholds, "threshold"), causal, seqlen_q,
                           seqlen_k, keep_sink, keep_last, keep_local),
             first, options);
}

int64_t block_sparse_attention(const py::object& query, const py::object& key,
                               const py::object& value, const py::object& block_mask,
                               const py::object& out, const py::object& lse,
                               const py::object& startend_row_indices, bool causal,
                               Scale softmax_scale, const Name& dtype, const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.values(query, "query");
  return run(kAttend,
             attend_params(first, arrays.values(key, "key"), arrays.values(value, "value"),
                           arrays(block_mask, "block_mask"),
                           arrays.optional(startend_row_indices, "startend_row_indices"),
                           arrays.values(out, "out"), arrays(lse, "lse"), causal, softmax_scale),
             first, options);
}

int64_t block_sparse_attention_backward(const py::object& query, const py::object& key,
                                        const py::object& value, const py::object& block_mask,
                                        const py::object& out, const py::object& lse,
                                        const py::object& grad_out, const py::object& grad_query,
                                        const py::object& grad_key, const py::object& grad_value,
                                        const py::object& startend_row_indices, bool causal,
                                        Scale softmax_scale, const Name& dtype, bool deterministic,
                                        const Options& options) {
  Arrays arrays(dtype);
  const Array& first = arrays.values(query, "query");
  return run(kBackward,
             backward_params(
                 first, arrays.values(key, "key"), arrays.values(value, "value"),
                 arrays(block_mask, "block_mask"),
                 arrays.optional(startend_row_indices, "startend_row_indices"),
                 arrays.values(out, "out"), arrays(lse, "lse"), arrays.values(grad_out, "grad_out"),
                 arrays.values(grad_query, "grad_query"), arrays.values(grad_key, "grad_key"),
                 arrays.values(grad_value, "grad_value"), causal, softmax_scale, deterministic),
             first, options);
}

}  // namespace

PYBIND11_MODULE(_direct, module) {
  py::class_<Options>(module, "Options")
      .def(py::init<std::optional<int>, py::object, int64_t, bool>());
  module.def("estimate_block_scores", &estimate_block_scores);
  module.def("select_blocks", &select_blocks);
  module.def("block_sparse_attention", &block_sparse_attention);
  module.def("block_sparse_attention_backward", &block_sparse_attention_backward);
  module.def("available_simd", &cpu::available_simd);
  module.def("set_simd", &cpu::set_simd);
  module.def("simd", [] { return std::string(cpu::kernels().name); });
  module.def("default_num_threads", &cpu::default_num_threads);
  module.def("_cpu_quota", &cpu::cpu_quota);  // for its test
}

}  // namespace rrattn
