#include "ragged.h"

#include <algorithm>

#include "kernels.h"

namespace rrattn::cpu {

namespace {

template <typename Call>
Calls<Call> list(const std::vector<Call>& calls) {
  return {calls.data(), static_cast<int64_t>(calls.size())};
}

// In bytes, rounded up so that what follows starts on a line.
int64_t scores_bytes(const EstimateCall& call) {
  if (!call.scores_wanted) return 0;
  const Visibility& visibility = call.params.visibility;
  const int64_t count =
      visibility.num_heads * visibility.num_m_blocks() * visibility.num_n_blocks();
  return ceil_div(count * static_cast<int64_t>(sizeof(float)), 64) * 64;
}

void set_execution(RaggedCalls& calls, const Execution& execution) {
  for (EstimateCall& call : calls.estimate) call.params.execution = execution;
  for (SelectParams& params : calls.select) params.execution = execution;
  for (AttendCall& call : calls.attend) call.params.execution = execution;
}

// Of a workspace the block scores of all requests are the first part, the stages' own the second.
int64_t all_scores_bytes(const RaggedCalls& calls) {
  int64_t bytes = 0;
  for (const EstimateCall& call : calls.estimate) bytes += scores_bytes(call);
  return bytes;
}

}  // namespace

int64_t ragged_workspace_bytes(const RaggedCalls& calls, int num_threads) {
  if (calls.attend.empty()) return 0;
  RaggedCalls sized = calls;
  Execution execution;
  execution.num_threads = num_threads;
  set_execution(sized, execution);
  return all_scores_bytes(sized) + std::max({estimate_workspace_bytes(list(sized.estimate)),
                                             select_workspace_bytes(list(sized.select)),
                                             attend_workspace_bytes(list(sized.attend))});
}

void run_ragged(RaggedCalls calls, const Execution& execution) {
  if (calls.attend.empty()) return;
  char* next_scores = static_cast<char*>(execution.workspace);
  for (size_t i = 0; i < calls.estimate.size(); ++i) {
    calls.estimate[i].params.block_scores = reinterpret_cast<float*>(next_scores);
    calls.select[i].block_scores = reinterpret_cast<float*>(next_scores);
    next_scores += scores_bytes(calls.estimate[i]);
  }
  Execution of_stage = execution;
  of_stage.workspace = next_scores;
  set_execution(calls, of_stage);
  run_estimate(list(calls.estimate));
  run_select(list(calls.select));
  run_attend(list(calls.attend));
}

}  // namespace rrattn::cpu
