// The stages that are built once for each instruction set, as a table.
#pragma once

#include "attend.h"
#include "backward.h"
#include "estimate.h"
#include "quantized_attend.h"

namespace rrattn::cpu::RRATTN_SIMD {

constexpr Kernels make_kernels(const char* name) {
  return {
      name,        estimate_workspace_bytes,         run_estimate,         attend_workspace_bytes,
      run_attend,  quantized_attend_workspace_bytes, run_quantized_attend, backward_workspace_bytes,
      run_backward};
}

}  // namespace rrattn::cpu::RRATTN_SIMD
