// The stages on the GPU. Everything runs on execution.stream, in order. Nothing is
// allocated and the host waits for nothing, so any sequence of stages can be captured in a CUDA
// graph.
#pragma once

#include <cstdint>

#include "../core/ragged.h"

namespace rrattn::cuda {

int64_t estimate_workspace_bytes(const EstimateParams& params);
int64_t select_workspace_bytes(const SelectParams& params);
int64_t attend_workspace_bytes(const AttendParams& params);
int64_t quantized_attend_workspace_bytes(const AttendParams& params);
int64_t backward_workspace_bytes(const BackwardParams& params);
int64_t dense_mask_workspace_bytes(const DenseMaskParams& params);
int64_t ragged_workspace_bytes(const RaggedParams& batch);

void run_estimate(const EstimateParams& params);
void run_select(const SelectParams& params);
void run_attend(const AttendParams& params);
// Throws where the current GPU has no kernel of attention in eight bits for a head size.
void check_quantized_attend(int64_t head_dim);
void run_quantized_attend(const AttendParams& params);  // without compensation
void run_backward(const BackwardParams& params);
void run_dense_mask(const DenseMaskParams& params);
void run_ragged(const RaggedParams& batch);  // all stages

}  // namespace rrattn::cuda
