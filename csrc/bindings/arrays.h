// Python's arrays as the kernels' arguments: borrowed in place, by DLPack or NumPy's own protocol.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "../core/overlap.h"
#include "dlpack.h"

namespace py = pybind11;

namespace rrattn {

inline ElementType element_type(const std::string& name) {
  if (name == "float32") return ElementType::kFloat32;
  if (name == "float16") return ElementType::kFloat16;
  if (name == "bfloat16") return ElementType::kBFloat16;
  if (name == "int32") return ElementType::kInt32;
  if (name == "bool") return ElementType::kBool;
  return ElementType::kOther;
}

inline std::string type_name(const DLDataType& type) {
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

inline std::string device_name(const DLDevice& device) {
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
inline void finish(Borrowed& borrowed, const int64_t* strides) {
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
inline Borrowed borrow_by_interface(const py::object& object, const char* name, Access access) {
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

inline Borrowed borrow_by_dlpack(const py::object& object, bool on_cpu) {
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
inline Borrowed borrow(const py::object& object, const char* name, Access access,
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

}  // namespace rrattn
