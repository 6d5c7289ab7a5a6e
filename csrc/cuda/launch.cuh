// What every launcher needs: checked calls, the size of the GPU, and a bump allocator over the
// workspace.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../core/params.h"

#define RRATTN_CUDA_CHECK(call)                                                                \
  do {                                                                                         \
    const cudaError_t status_ = (call);                                                        \
    if (status_ != cudaSuccess) {                                                              \
      throw std::runtime_error(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " + \
                               cudaGetErrorString(status_));                                   \
    }                                                                                          \
  } while (0)

namespace rrattn::cuda {

// Multiprocessors of the current device. It must be a Hopper GPU, the only one these kernels are
// built for.
inline int num_multiprocessors() {
  int device = 0, major = 0, minor = 0, count = 0;
  RRATTN_CUDA_CHECK(cudaGetDevice(&device));
  RRATTN_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  RRATTN_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  RRATTN_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  if (major != 9 || minor != 0) {
    throw std::invalid_argument("the GPU has compute capability " + std::to_string(major) + "." +
                                std::to_string(minor) +
                                ", but this build of rrattn supports: 9.0 (Hopper)");
  }
  return count;
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
