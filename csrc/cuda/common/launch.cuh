// What every launcher needs: checked calls, the size of the GPU, and a bump allocator over the
// workspace.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../../core/params.h"

#define RRATTN_CUDA_CHECK(call)                                                                \
  do {                                                                                         \
    const cudaError_t status_ = (call);                                                        \
    if (status_ != cudaSuccess) {                                                              \
      throw std::runtime_error(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " + \
                               cudaGetErrorString(status_));                                   \
    }                                                                                          \
  } while (0)

namespace rrattn::cuda {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  RRATTN_CUDA_CHECK(cudaGetDevice(&device));
  RRATTN_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

inline int num_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

inline cudaStream_t stream_of(const Execution& execution) {
  return static_cast<cudaStream_t>(execution.stream);
}

// Launches a kernel with the shared memory and the threads of its Traits.
template <typename Traits, typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), int num_thread_blocks, cudaStream_t stream,
                   const Arguments&... arguments) {
  constexpr int kSharedBytes = sizeof(typename Traits::SharedStorage);
  RRATTN_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  kernel<<<num_thread_blocks, Traits::kThreads, kSharedBytes, stream>>>(arguments...);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

// Launches a persistent kernel, which holds all shared memory of a multiprocessor: a thread block
// on each of them, but no more than there are items.
template <typename Traits, typename... Parameters, typename... Arguments>
void launch_persistent(void (*kernel)(Parameters...), int num_items, cudaStream_t stream,
                       const Arguments&... arguments) {
  launch_kernel<Traits>(kernel, std::min(num_items, num_multiprocessors()), stream, arguments...);
}

// Hands out pieces of the workspace, aligned to 1,024 bytes. Without a base it only counts.
class Arena {
 public:
  explicit Arena(void* base = nullptr)
      : base_(reinterpret_cast<intptr_t>(base)), at_(align(base_)) {}
  template <typename T>
  T* take(int64_t count) {
    const intptr_t at = at_;
    at_ = align(at_ + count * static_cast<int64_t>(sizeof(T)));
    return reinterpret_cast<T*>(at);
  }
  int64_t used() const { return at_ - base_ + 1024; }  // room to align the start

 private:
  static intptr_t align(intptr_t at) { return (at + 1023) / 1024 * 1024; }
  intptr_t base_, at_;
};

}  // namespace rrattn::cuda
