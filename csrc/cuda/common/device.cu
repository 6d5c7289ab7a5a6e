#include <vector>

#include "device.h"
#include "launch.cuh"

namespace rrattn::cuda {

namespace {

std::vector<Gpu> find_gpus() {
  int count = 0;
  RRATTN_CUDA_CHECK(cudaGetDeviceCount(&count));
  std::vector<Gpu> gpus;
  for (int device = 0; device < count; ++device) {
    cudaDeviceProp properties;
    RRATTN_CUDA_CHECK(cudaGetDeviceProperties(&properties, device));
    gpus.push_back({properties.name,
                    {properties.major, properties.minor},
                    static_cast<int>(properties.sharedMemPerBlockOptin)});
  }
  return gpus;
}

}  // namespace

const Gpu& current_gpu() {
  static const std::vector<Gpu> gpus = find_gpus();
  int device = 0;
  RRATTN_CUDA_CHECK(cudaGetDevice(&device));
  return gpus.at(device);
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
