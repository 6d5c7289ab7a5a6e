// The one dispatch site of the GPU stages: from run-time types and head sizes to template
// instances.
#include <stdexcept>
#include <string>
#include <type_traits>

#include "attend_stage.h"
#include "backward_stage.h"
#include "estimate_stage.h"
#include "stages.h"

namespace rrattn::cuda {

namespace {

// Calls `use` with std::integral_constant of the element type.
template <typename Use>
auto with_data_type(const Heads& heads, const Use& use) {
  switch (heads.dtype) {
    case DataType::kFloat16:
      return use(std::integral_constant<DataType, DataType::kFloat16>());
    case DataType::kBFloat16:
      return use(std::integral_constant<DataType, DataType::kBFloat16>());
    default:
      throw std::invalid_argument(
          "query has dtype float32, but on a GPU must have float16 or bfloat16");
  }
}

// Calls `use` with the Stage for these heads.
template <template <DataType, int> class Stage, typename Use>
auto with_stage(const Heads& heads, const Use& use) {
  return with_data_type(heads, [&](auto type) {
    if (heads.head_dim <= 64) return use(Stage<type(), 64>());
    if (heads.head_dim <= 128) return use(Stage<type(), 128>());
    return use(Stage<type(), 256>());
  });
}

template <typename Use>
auto with_backward_stage(const Heads& heads, const Use& use) {
  if (heads.head_dim > 128) {
    throw std::invalid_argument("query has head_dim " + std::to_string(heads.head_dim) +
                                ", but for gradients on a GPU must have at most 128");
  }
  return with_data_type(heads, [&](auto type) { return use(BackwardStage<type()>()); });
}

bool has_no_rows(const Visibility& visibility) {
  return visibility.batch == 0 || visibility.num_heads == 0 || visibility.seqlen_q == 0 ||
         visibility.seqlen_k == 0;
}

}  // namespace

int64_t estimate_workspace_bytes(const EstimateParams& params) {
  return with_stage<EstimateStage>(params.heads,
                                   [&](auto stage) { return stage.workspace_bytes(params); });
}

void run_estimate(const EstimateParams& params) {
  with_stage<EstimateStage>(params.heads, [&](auto stage) {
    if (!has_no_rows(params.visibility)) stage.run(params);
  });
}

int64_t attend_workspace_bytes(const AttendParams& params) {
  return with_stage<AttendStage>(params.heads,
                                 [&](auto stage) { return stage.workspace_bytes(params); });
}

void run_attend(const AttendParams& params) {
  with_stage<AttendStage>(params.heads, [&](auto stage) {
    if (params.visibility.batch * params.visibility.num_heads * params.visibility.seqlen_q > 0) {
      stage.run(params);
    }
  });
}

int64_t backward_workspace_bytes(const BackwardParams& params) {
  return with_backward_stage(params.heads,
                             [&](auto stage) { return stage.workspace_bytes(params); });
}

void run_backward(const BackwardParams& params) {
  with_backward_stage(params.heads, [&](auto stage) { stage.run(params); });
}

}  // namespace rrattn::cuda
