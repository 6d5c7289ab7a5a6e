#include "device.h"
#include "launch.cuh"

namespace rrattn::cuda {

ComputeCapability current_compute_capability() {
  return {device_attribute(cudaDevAttrComputeCapabilityMajor),
          device_attribute(cudaDevAttrComputeCapabilityMinor)};
}

DeviceGuard::DeviceGuard(int device) {
  if (device < 0) return;
  int current = 0;
  RRATTN_CUDA_CHECK(cudaGetDevice(&current));
  if (current == device) return;
  RRATTN_CUDA_CHECK(cudaSetDevice(device));
  former_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (former_ >= 0) cudaSetDevice(former_);
}

}  // namespace rrattn::cuda
