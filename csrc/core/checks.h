// The checks that all kinds of arguments share.
#pragma once

#include <sstream>
#include <stdexcept>

#include "arguments.h"

namespace rrattn {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

constexpr int64_t kMaxLength = int64_t{1} << 30;  // row numbers and lane arithmetic are int32

inline void require_shape(const Array& array, const std::vector<int64_t>& shape,
                          const char* meaning) {
  if (array.shape != shape) {
    fail(array.name, " has shape ", to_string(array.shape), ", but must have ", to_string(shape),
         ": ", meaning);
  }
}

inline void require_type(const Array& array, ElementType type, const char* type_name) {
  if (array.type != type)
    fail(array.name, " has dtype ", array.type_name, ", but must have ", type_name);
}

inline void require_contiguous(const Array& array) {
  if (is_empty(array)) return;  // its strides mean nothing
  int64_t expected = 1;
  for (size_t i = array.shape.size(); i-- > 0;) {
    if (array.shape[i] != 1 && array.strides[i] != expected) {
      fail(array.name, " has strides ", to_string(array.strides), " for shape ",
           to_string(array.shape), ", but must be contiguous");
    }
    expected *= array.shape[i];
  }
}

inline void require_same_device(const Array& array, const Array& first) {
  if (array.device != first.device) {
    fail(array.name, " is on ", array.device, ", but ", first.name, " is on ", first.device,
         "; all tensors must be on the same device");
  }
}

}  // namespace rrattn
