// The one dispatch site of the GPU stages: from run-time types and head sizes to template
// instances.
#include <stdexcept>

#include "attend_stage.h"
#include "estimate_stage.h"
#include "stages.h"

namespace rrattn::cuda {

namespace {

template <template <DataType, int> class Stage, DataType kDataType, typename Use>
auto with_head_dim(const Heads& heads, const Use& use) {
  if (heads.head_dim <= 64) return use(Stage<kDataType, 64>());
  if (heads.head_dim <= 128) return use(Stage<kDataType, 128>());
  return use(Stage<kDataType, 256>());
}

// Calls `use` with the Stage for these heads.
template <template <DataType, int> class Stage, typename Use>
auto with_stage(const Heads& heads, const Use& use) {
  switch (heads.dtype) {
    case DataType::kFloat16:
      return with_head_dim<Stage, DataType::kFloat16>(heads, use);
    case DataType::kBFloat16:
      return with_head_dim<Stage, DataType::kBFloat16>(heads, use);
    default:
      throw std::invalid_argument(
          "query has dtype float32, but on a GPU must have float16 or bfloat16");
  }
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

}  // namespace rrattn::cuda
