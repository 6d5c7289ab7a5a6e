// The stages on the CPU. The same source is built three times, for one instruction set each; the
// best one that the machine runs is chosen when it is first needed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../core/params.h"
#include "../core/ragged.h"

namespace rrattn::cpu {

struct Kernels {
  const char* name;
  int64_t (*estimate_workspace_bytes)(const Calls<EstimateCall>&);
  void (*run_estimate)(const Calls<EstimateCall>&);
  int64_t (*attend_workspace_bytes)(const Calls<AttendCall>&);
  void (*run_attend)(const Calls<AttendCall>&);
  int64_t (*quantized_attend_workspace_bytes)(const AttendParams&);
  void (*run_quantized_attend)(const AttendParams&);
  int64_t (*backward_workspace_bytes)(const BackwardParams&);
  void (*run_backward)(const BackwardParams&);
};

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

// The kernels in use.
const Kernels& kernels();

// The names of the instruction sets that this machine can run, best first; and the choice of one of
// them (std::invalid_argument for any other name).
std::vector<std::string> available_simd();
void set_simd(const std::string& name);

int64_t estimate_workspace_bytes(const EstimateParams& params);
int64_t select_workspace_bytes(const SelectParams& params);
int64_t attend_workspace_bytes(const AttendParams& params);
int64_t quantized_attend_workspace_bytes(const AttendParams& params);
int64_t backward_workspace_bytes(const BackwardParams& params);
int64_t dense_mask_workspace_bytes(const DenseMaskParams& params);

void run_estimate(const EstimateParams& params);
void run_select(const SelectParams& params);
void run_attend(const AttendParams& params);
void run_quantized_attend(const AttendParams& params);  // without compensation
void run_backward(const BackwardParams& params);
void run_dense_mask(const DenseMaskParams& params);

// The same for several calls that run as one.
int64_t estimate_workspace_bytes(const Calls<EstimateCall>& calls);
int64_t select_workspace_bytes(const Calls<SelectParams>& calls);
int64_t attend_workspace_bytes(const Calls<AttendCall>& calls);

void run_estimate(const Calls<EstimateCall>& calls);
void run_select(const Calls<SelectParams>& calls);
void run_attend(const Calls<AttendCall>& calls);

}  // namespace rrattn::cpu
