// The GPU that is the current one of this thread. Needs no header of CUDA.
#pragma once

#include <string>

namespace rrattn::cuda {

struct ComputeCapability {
  int major, minor;
};

struct Gpu {
  std::string name;
  ComputeCapability capability;
  int shared_bytes;  // of memory that a thread block can have
};

const Gpu& current_gpu();

// Makes a GPU the current one of this thread, as launches on its streams demand, and the former
// one again at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);  // -1, no GPU: changes nothing
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = -1;
};

}  // namespace rrattn::cuda
