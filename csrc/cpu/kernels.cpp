#include "kernels.h"

#include <atomic>
#include <stdexcept>

namespace rrattn::cpu {

namespace {

std::vector<const Kernels*> runnable_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kAvx512Kernels);
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    found.push_back(&kAvx2Kernels);
#endif
  found.push_back(&kBaselineKernels);
  return found;
}

std::atomic<const Kernels*>& kernels_in_use() {
  static std::atomic<const Kernels*> in_use{runnable_kernels().front()};
  return in_use;
}

}  // namespace

const Kernels& kernels() { return *kernels_in_use().load(); }

std::vector<std::string> available_simd() {
  std::vector<std::string> names;
  for (const Kernels* k : runnable_kernels()) names.push_back(k->name);
  return names;
}

void set_simd(const std::string& name) {
  std::string allowed;
  for (const Kernels* k : runnable_kernels()) {
    if (name == k->name) {
      kernels_in_use() = k;
      return;
    }
    allowed += std::string(allowed.empty() ? "" : ", ") + k->name;
  }
  throw std::invalid_argument("simd is \"" + name + "\", but this machine runs: " + allowed);
}

int64_t estimate_workspace_bytes(const Calls<EstimateCall>& calls) {
  return kernels().estimate_workspace_bytes(calls);
}
int64_t attend_workspace_bytes(const Calls<AttendCall>& calls) {
  return kernels().attend_workspace_bytes(calls);
}
int64_t estimate_workspace_bytes(const EstimateParams& params) {
  const EstimateCall call{params, {}, {}};
  return estimate_workspace_bytes(Calls<EstimateCall>{&call, 1});
}
int64_t attend_workspace_bytes(const AttendParams& params) {
  const AttendCall call(params);
  return attend_workspace_bytes(Calls<AttendCall>{&call, 1});
}
int64_t quantized_attend_workspace_bytes(const AttendParams& params) {
  return kernels().quantized_attend_workspace_bytes(params);
}
int64_t backward_workspace_bytes(const BackwardParams& params) {
  return kernels().backward_workspace_bytes(params);
}

void run_estimate(const Calls<EstimateCall>& calls) { kernels().run_estimate(calls); }
void run_attend(const Calls<AttendCall>& calls) { kernels().run_attend(calls); }
void run_estimate(const EstimateParams& params) {
  const EstimateCall call{params, {}, {}};
  run_estimate(Calls<EstimateCall>{&call, 1});
}
void run_attend(const AttendParams& params) {
  const AttendCall call(params);
  run_attend(Calls<AttendCall>{&call, 1});
}
void run_quantized_attend(const AttendParams& params) { kernels().run_quantized_attend(params); }
void run_backward(const BackwardParams& params) { kernels().run_backward(params); }

}  // namespace rrattn::cpu
