// The kernels of each stage in this build, and the choice among them by the device of a call's
// first array. Both bindings use it.
#pragma once

#include <stdexcept>

#include "../core/arguments.h"
#include "../core/quantization.h"
#include "../core/ragged.h"
#include "../cpu/kernels.h"
#include "../cpu/parallel.h"
#include "../cuda/gpu_path.h"
#if defined(RRATTN_WITH_CUDA)
#include "../cuda/common/device.h"
#include "../cuda/stages.h"
#endif

namespace rrattn {

#if defined(RRATTN_WITH_CUDA)
using cuda::DeviceGuard;
#else
struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
#endif

template <typename Params>
struct Kernel {
  int64_t (*workspace_bytes)(const Params&) = nullptr;
  void (*run)(const Params&) = nullptr;
};

template <typename Params>
struct Stage {
  const char* name;
  Kernel<Params> cpu;
  Kernel<Params> gpu = {};  // empty: none in this build

  const Kernel<Params>& kernel_for(const Array& first) const {
    if (first.device == "cpu") return cpu;
    if (first.gpu >= 0 && gpu.run) return gpu;
    throw std::invalid_argument(first.name + " is on " + first.device +
                                ", but this build of rrattn runs " + name + " on: CPU" +
                                (gpu.run ? ", GPU" : ""));
  }
};

inline constexpr Stage<EstimateParams> kEstimate = {
    "estimate",
    {cpu::estimate_workspace_bytes, cpu::run_estimate},
#if defined(RRATTN_WITH_CUDA)
    {cuda::estimate_workspace_bytes, cuda::run_estimate},
#endif
};

inline constexpr Stage<SelectParams> kSelect = {
    "select",
    {cpu::select_workspace_bytes, cpu::run_select},
#if defined(RRATTN_WITH_CUDA)
    {cuda::select_workspace_bytes, cuda::run_select},
#endif
};

inline constexpr Stage<AttendParams> kAttend = {
    "attend",
    {cpu::attend_workspace_bytes, cpu::run_attend},
#if defined(RRATTN_WITH_CUDA)
    {cuda::attend_workspace_bytes, cuda::run_attend},
#endif
};

inline constexpr Stage<AttendParams> kQuantizedAttend = {
    "attention with quantization",
    {cpu::quantized_attend_workspace_bytes, cpu::run_quantized_attend},
#if defined(RRATTN_WITH_CUDA)
    {cuda::quantized_attend_workspace_bytes, cuda::run_quantized_attend},
#endif
};

// Attention as the user asked for it. What does not go together is refused here.
inline const Kernel<AttendParams>& attend_kernel_for(const Array& first,
                                                     const std::string& quantization,
                                                     bool compensate) {
  if (quantization_of(quantization) == Quantization::kNone) return kAttend.kernel_for(first);
  if (compensate) {
    throw std::invalid_argument("quantization is \"" + quantization +
                                "\", but attention in eight bits is not compensated: give "
                                "compensate=False");
  }
  const Kernel<AttendParams>& kernel = kQuantizedAttend.kernel_for(first);
#if defined(RRATTN_WITH_CUDA)
  if (first.gpu >= 0) {
    const DeviceGuard guard(first.gpu);
    cuda::check_quantized_attend(first.shape.empty() ? 0 : first.shape.back());
  }
#endif
  return kernel;
}

inline constexpr Stage<BackwardParams> kBackward = {
    "backward",
    {cpu::backward_workspace_bytes, cpu::run_backward},
#if defined(RRATTN_WITH_CUDA)
    {cuda::backward_workspace_bytes, cuda::run_backward},
#endif
};

inline constexpr Stage<DenseMaskParams> kDenseMask = {
    "dense masks",
    {cpu::dense_mask_workspace_bytes, cpu::run_dense_mask},
#if defined(RRATTN_WITH_CUDA)
    {cuda::dense_mask_workspace_bytes, cuda::run_dense_mask},
#endif
};

// All stages of a ragged batch. On a CPU they run from lengths that the host reads (cpu/ragged.h).
inline constexpr Stage<RaggedParams> kRaggedOnGpu = {
    "ragged batches",
    {},
#if defined(RRATTN_WITH_CUDA)
    {cuda::ragged_workspace_bytes, cuda::run_ragged},
#endif
};

#if defined(RRATTN_WITH_CUDA)
// The name of the kernels that a GPU gets by this path.
inline std::string gpu_kernels(int device, const cuda::WantedPath& wanted) {
  const DeviceGuard guard(device);
  return name_of(choose_gpu_path(cuda::current_gpu(), cuda::built_cuda_archs(), wanted));
}
#else
[[noreturn]] inline std::string gpu_kernels(int, const cuda::WantedPath&) {
  throw std::invalid_argument("this build of rrattn has no GPU kernels");
}
#endif

}  // namespace rrattn
