// The one dispatch site of the GPU stages: from run-time types and head sizes to template
// instances.
#include <stdexcept>

#include "estimate_stage.h"
#include "stages.h"

namespace rrattn::cuda {

namespace {

// Calls `use` with the EstimateStage for these heads.
template <DataType kDataType, typename Use>
auto with_head_dim(const Heads& heads, const Use& use) {
  if (heads.head_dim <= 64) return use(EstimateStage<kDataType, 64>());
  if (heads.head_dim <= 128) return use(EstimateStage<kDataType, 128>());
  return use(EstimateStage<kDataType, 256>());
}

template <typename Use>
auto with_estimate_stage(const Heads& heads, const Use& use) {
  switch (heads.dtype) {
    case DataType::kFloat16:
      return with_head_dim<DataType::kFloat16>(heads, use);
    case DataType::kBFloat16:
      return with_head_dim<DataType::kBFloat16>(heads, use);
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
  return with_estimate_stage(params.heads,
                             [&](auto stage) { return stage.workspace_bytes(params); });
}

void run_estimate(const EstimateParams& params) {
  with_estimate_stage(params.heads, [&](auto stage) {
    if (!has_no_rows(params.visibility)) stage.run(params);
  });
}

}  // namespace rrattn::cuda
