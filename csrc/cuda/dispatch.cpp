// The one dispatch site of the GPU stages: from the device's architecture, types, head sizes and
// whatever else kernels are compiled for to their instances.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/dense_mask.h"
#include "common/device.h"
#include "gpu_path.h"
#include "ragged_stage.h"
#include "select/stage.h"
#include "sm80/attend/stage.h"
#include "sm80/backward/stage.h"
#include "sm80/estimate/stage.h"
#include "sm90/attend/stage.h"
#include "sm90/backward/stage.h"
#include "sm90/estimate/stage.h"
#include "sm90/quantized_attend/stage.h"
#include "stages.h"

namespace rrattn::cuda {

namespace {

// The stages of an architecture.
struct Sm90 {
  template <DataType kDataType, int kHeadDim, int kKeyStride>
  using EstimateStage = sm90::estimate::Stage<kDataType, kHeadDim, kKeyStride>;
  template <DataType kDataType, int kHeadDim, int kHeadDimV>
  using AttendStage = sm90::attend::Stage<kDataType, kHeadDim, kHeadDimV>;
  template <DataType kDataType, int kHeadDim>
  using QuantizedAttendStage = sm90::quantized_attend::Stage<kDataType, kHeadDim>;
  template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic>
  using BackwardStage = sm90::backward::Stage<kDataType, kHeadDim, kHeadDimV, kDeterministic>;
};

// The portable kernels have none of head size 96 of their own: those of 128 are for it too. Nor has
// portable attention any for values of 192: those of 256 are.
template <sm80::TileTable kTable>
struct Sm80 {
  template <DataType kDataType, int kHeadDim, int kKeyStride>
  using EstimateStage = sm80::estimate::Stage<kDataType, kHeadDim, kKeyStride, kTable>;
  template <DataType kDataType, int kHeadDim, int kHeadDimV>
  using AttendStage =
      sm80::attend::Stage<kDataType, kHeadDim == 96 ? 128 : (kHeadDimV == 192 ? 256 : kHeadDim),
                          kHeadDimV == 96 ? 128 : (kHeadDimV == 192 ? 256 : kHeadDimV), kTable>;
  template <DataType kDataType, int kHeadDim, int kHeadDimV, bool kDeterministic>
  using BackwardStage =
      sm80::backward::Stage<kDataType, kHeadDim == 96 ? 128 : kHeadDim,
                            kHeadDimV == 96 ? 128 : kHeadDimV, kDeterministic, kTable>;
};

// Each function calls `use` with a value as std::integral_constant, or the type that stands for it.

// By the current GPU. Stages of an architecture that is not built are not even named, as nothing
// could link them.
template <typename Use>
auto with_architecture(const Use& use) {
  constexpr std::string_view kArchs = RRATTN_CUDA_ARCHS;
  const GpuPath path = choose_gpu_path(current_gpu(), kArchs, wanted_gpu_path());
  if constexpr (has_hopper_kernels(kArchs)) {
    if (path.hopper) return use(Sm90());
  }
  if constexpr (has_portable_kernels(kArchs)) {
    switch (path.table) {
      case sm80::TileTable::k99KB:
        return use(Sm80<sm80::TileTable::k99KB>());
      case sm80::TileTable::k163KB:
        return use(Sm80<sm80::TileTable::k163KB>());
      case sm80::TileTable::k227KB:
        return use(Sm80<sm80::TileTable::k227KB>());
    }
  }
  throw std::logic_error("choose_gpu_path chose kernels that are not built");
}

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

// The head size of queries and keys that the estimate is built for, and that has room for these.
template <typename Use>
auto with_head_dim(const Heads& heads, const Use& use) {
  if (heads.head_dim <= 64) return use(std::integral_constant<int, 64>());
  if (heads.head_dim <= 128) return use(std::integral_constant<int, 128>());
  return use(std::integral_constant<int, 256>());
}

// The head sizes of queries and keys and of values that attention is built for, as two arguments.
template <typename Use>
auto with_attend_head_dims(const Heads& heads, const Use& use) {
  constexpr std::integral_constant<int, 64> k64;
  constexpr std::integral_constant<int, 96> k96;
  constexpr std::integral_constant<int, 128> k128;
  constexpr std::integral_constant<int, 192> k192;
  constexpr std::integral_constant<int, 256> k256;
  const int64_t larger = std::max(heads.head_dim, heads.head_dim_v);
  if (larger <= 64) return use(k64, k64);
  if (larger <= 96) return use(k96, k96);
  if (larger <= 128) return use(k128, k128);
  if (larger <= 192) return heads.head_dim_v <= 128 ? use(k192, k128) : use(k192, k192);
  return use(k256, k256);
}

// The same of the gradients.
template <typename Use>
auto with_backward_head_dims(const Heads& heads, const Use& use) {
  constexpr std::integral_constant<int, 64> k64;
  constexpr std::integral_constant<int, 96> k96;
  constexpr std::integral_constant<int, 128> k128;
  constexpr std::integral_constant<int, 256> k256;
  const int64_t larger = std::max(heads.head_dim, heads.head_dim_v);
  if (larger <= 64) return use(k64, k64);
  if (larger <= 96) return use(k96, k96);
  if (larger <= 128) return use(k128, k128);
  return heads.head_dim_v <= 128 ? use(k256, k128) : use(k256, k256);
}

// The head size that attention in eight bits is built for.
template <typename Use>
auto with_quantized_head_dim(const Heads& heads, const Use& use) {
  const int64_t larger = std::max(heads.head_dim, heads.head_dim_v);
  if (larger <= 64) return use(std::integral_constant<int, 64>());
  if (larger <= 128) return use(std::integral_constant<int, 128>());
  throw std::invalid_argument("head_dim is " + std::to_string(larger) +
                              ", but with quantization on a GPU must be at most 128");
}

template <typename Use>
auto with_key_stride(int64_t key_stride, const Use& use) {
  switch (key_stride) {
    case 1:
      return use(std::integral_constant<int, 1>());
    case 2:
      return use(std::integral_constant<int, 2>());
    case 4:
      return use(std::integral_constant<int, 4>());
    case 8:
      return use(std::integral_constant<int, 8>());
    case 16:
      return use(std::integral_constant<int, 16>());
    case 32:
      return use(std::integral_constant<int, 32>());
    case 64:
      return use(std::integral_constant<int, 64>());
    default:
      throw std::invalid_argument("key_stride is " + std::to_string(key_stride) +
                                  ", but on a GPU must be one of 1, 2, 4, 8, 16, 32, 64");
  }
}

template <typename Use>
auto with_bool(bool value, const Use& use) {
  return value ? use(std::true_type()) : use(std::false_type());
}

// Each calls `use` with the Stage for a call's parameters.

template <typename Use>
auto with_stage(const EstimateParams& params, const Use& use) {
  return with_architecture([&](auto architecture) {
    return with_data_type(params.heads, [&](auto data_type) {
      return with_head_dim(params.heads, [&](auto head_dim) {
        return with_key_stride(params.sampling.key_stride, [&](auto key_stride) {
          return use(typename decltype(architecture)::template EstimateStage<
                     decltype(data_type)::value, decltype(head_dim)::value,
                     decltype(key_stride)::value>());
        });
      });
    });
  });
}

constexpr int64_t kMaxMaskWords = 256;
constexpr int64_t kMaxKeys = kMaxMaskWords * kMaskWordBits * kBlockSize;

// Rows of the mask by their words, up to 1M tokens. The kernels are those of all architectures.
template <typename Use>
auto with_stage(const SelectParams& params, const Use& use) {
  return with_architecture([&](auto) {
    const int64_t num_words = params.visibility.num_mask_words();
    if (num_words <= 2) return use(select::Stage<1, 2>());
    if (num_words <= 8) return use(select::Stage<1, 8>());
    if (num_words <= 32) return use(select::Stage<2, 16>());
    if (num_words <= 64) return use(select::Stage<4, 16>());
    if (num_words <= kMaxMaskWords) return use(select::Stage<8, 32>());
    throw std::invalid_argument("seqlen_k is " + std::to_string(params.visibility.seqlen_k) +
                                ", but must be at most " + std::to_string(kMaxKeys) + " on a GPU");
  });
}

template <typename Use>
auto with_stage(const AttendParams& params, const Use& use) {
  return with_architecture([&](auto architecture) {
    return with_data_type(params.heads, [&](auto data_type) {
      return with_attend_head_dims(params.heads, [&](auto head_dim, auto head_dim_v) {
        return use(
            typename decltype(architecture)::template AttendStage<decltype(data_type)::value,
                                                                  decltype(head_dim)::value,
                                                                  decltype(head_dim_v)::value>());
      });
    });
  });
}

// Attention in eight bits, which Hopper's kernels alone have. `use` returns a Result.
template <typename Result, typename Use>
Result with_quantized_stage(const AttendParams& params, const Use& use) {
  return with_architecture([&](auto architecture) -> Result {
    if constexpr (std::is_same_v<decltype(architecture), Sm90>) {
      return with_data_type(params.heads, [&](auto data_type) {
        return with_quantized_head_dim(params.heads, [&](auto head_dim) {
          return use(typename Sm90::QuantizedAttendStage<decltype(data_type)::value,
                                                         decltype(head_dim)::value>());
        });
      });
    }
    throw std::invalid_argument("the GPU is " + current_gpu().name +
                                " with portable kernels, but rrattn runs attention with "
                                "quantization on: CPU, GPU with Hopper's kernels");
  });
}

template <typename Use>
auto with_stage(const BackwardParams& params, const Use& use) {
  return with_architecture([&](auto architecture) {
    return with_data_type(params.heads, [&](auto data_type) {
      return with_backward_head_dims(params.heads, [&](auto head_dim, auto head_dim_v) {
        return with_bool(params.deterministic, [&](auto deterministic) {
          return use(typename decltype(architecture)::template BackwardStage<
                     decltype(data_type)::value, decltype(head_dim)::value,
                     decltype(head_dim_v)::value, decltype(deterministic)::value>());
        });
      });
    });
  });
}

template <typename Use>
auto with_stage(const DenseMaskParams&, const Use& use) {
  return with_architecture([&](auto) { return use(DenseMaskStage()); });
}

template <typename Params>
int64_t workspace_bytes(const Params& params) {
  return with_stage(params, [&](auto stage) { return stage.workspace_bytes(params); });
}

template <typename Params>
void launch(const Params& params) {
  with_stage(params, [&](auto stage) { stage.launch(params); });
}

// The stages of a ragged batch. Their kernels are those for the most keys that a request may have.
template <typename Use>
void with_ragged_stages(const RaggedParams& batch, const Use& use) {
  if (batch.max_seqlen_k > kMaxKeys) {
    throw std::invalid_argument(
        "max_seqlen_k is " + std::to_string(batch.max_seqlen_k) + ", but must be at most " +
        std::to_string(kMaxKeys) +
        " on a GPU; where it is not given, it is what block_tables or key have room for");
  }
  SelectParams longest = batch.select;
  longest.visibility.seqlen_k = batch.max_seqlen_k;
  with_stage(batch.estimate, use);
  with_stage(longest, use);
  with_stage(batch.attend, use);
}

EstimateTiles ragged_tiles(const RaggedParams& batch) {
  return with_stage(batch.estimate, [](auto stage) { return stage.ragged_tiles(); });
}

bool is_empty(const RaggedParams& batch) {
  return batch.num_requests == 0 || batch.num_tokens == 0 || batch.attend.visibility.num_heads == 0;
}

}  // namespace

int64_t estimate_workspace_bytes(const EstimateParams& params) { return workspace_bytes(params); }
int64_t select_workspace_bytes(const SelectParams& params) { return workspace_bytes(params); }
int64_t attend_workspace_bytes(const AttendParams& params) { return workspace_bytes(params); }
int64_t quantized_attend_workspace_bytes(const AttendParams& params) {
  return with_quantized_stage<int64_t>(params,
                                       [&](auto stage) { return stage.workspace_bytes(params); });
}
int64_t backward_workspace_bytes(const BackwardParams& params) { return workspace_bytes(params); }
int64_t dense_mask_workspace_bytes(const DenseMaskParams& params) {
  return workspace_bytes(params);
}

// The plan comes first, and behind it what each stage takes in turn.
int64_t ragged_workspace_bytes(const RaggedParams& batch) {
  if (is_empty(batch)) return 0;
  const RaggedPlan plan = plan_in(nullptr, batch, ragged_tiles(batch));
  int64_t most = 0;
  with_ragged_stages(
      batch, [&](auto stage) { most = std::max(most, stage.ragged_workspace_bytes(batch, plan)); });
  return plan.bytes + most;
}

void run_estimate(const EstimateParams& params) { launch(params); }
void run_select(const SelectParams& params) { launch(params); }
void run_attend(const AttendParams& params) { launch(params); }
void check_quantized_attend(int64_t head_dim) {
  AttendParams params;
  params.heads = {1, head_dim, head_dim, DataType::kBFloat16};
  with_quantized_stage<void>(params, [](auto) {});
}
void run_quantized_attend(const AttendParams& params) {
  with_quantized_stage<void>(params, [&](auto stage) { stage.launch(params); });
}
void run_backward(const BackwardParams& params) { launch(params); }
void run_dense_mask(const DenseMaskParams& params) { launch(params); }

void run_ragged(const RaggedParams& batch) {
  if (is_empty(batch)) return;
  const EstimateTiles tiles = ragged_tiles(batch);
  const RaggedPlan plan = plan_in(batch.execution.workspace, batch, tiles);
  void* of_stage = static_cast<char*>(batch.execution.workspace) + plan.bytes;
  make_plan(batch, plan, tiles);
  with_ragged_stages(batch, [&](auto stage) { stage.launch_ragged(batch, plan, of_stage); });
}

}  // namespace rrattn::cuda
