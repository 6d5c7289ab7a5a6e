// Which parts of a walk are taken together.
//
// An item costs some microseconds besides its query blocks (common/backward/work.cuh). Where walks
// are cut as if half of the blocks were selected, but few are, most parts would have a block or none.
// So a part is merged into the next, until enough are selected.
#pragma once

#include "../../../core/params.h"
#include "../../common/backward/work.cuh"
#include "../../common/launch.cuh"

namespace rrattn::cuda::sm90::backward {

using rrattn::cuda::backward::WorkOrder;

struct MergedItem {
  int number;        // in the WorkOrder
  int parts_before;  // that it includes besides its own; < 0: a later item includes its own
};

// In the workspace.
struct MergedParts {
  MergedItem* all = nullptr;    // by number; null: walks are not cut, or none
  MergedItem* items = nullptr;  // that are left, by number
  int* num_items = nullptr;     // that are left
  void* memory = nullptr;
  size_t memory_bytes = 0;

  MergedParts(Arena& arena, const WorkOrder& order);

  // tiles_of_block: key tiles of a key block.
  void find(const BackwardParams& params, const uint32_t* transposed_mask, const WorkOrder& order,
            int tiles_of_block) const;
};

}  // namespace rrattn::cuda::sm90::backward
