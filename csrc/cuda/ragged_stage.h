// What the stages need to run a ragged batch, without any header of CUDA.
//
// The calls of the requests, and the order of their work, are made on the GPU from the lengths in its
// memory, which the host never reads: it knows no more than the most that there may be, and what it
// launches and the memory that it takes are for that. Beside `workspace_bytes` and `launch`, a Stage has
// `ragged_workspace_bytes` and `launch_ragged`, which runs it for all requests of a plan.
#pragma once

#include "../core/ragged.h"

namespace rrattn::cuda {

// Into what a path divides the work of the estimate.
struct EstimateTiles {
  int strides;            // of a tile of pooled keys
  int row_tiles_of_item;  // of kTileQueries sampled queries
};

// A part of a request: its query block `index`, or in the estimate its item `index` of each key head.
struct RequestPart {
  int request, index;
};

struct RaggedEstimate;  // common/ragged_plan.cuh

// In the workspace. `first_...` count what the requests before each have, and at the end what all have.
struct RaggedPlan {
  int num_requests = 0;
  // The most of all requests: query blocks; and of one key head items and tiles of pooled keys.
  int max_row_blocks = 0, max_items = 0, max_tiles = 0;
  RaggedEstimate* estimate = nullptr;                                               // [B]
  SelectParams* select = nullptr;                                                   // [B]
  AttendCall* attend = nullptr;                                                     // [B]
  int *first_row_blocks = nullptr, *first_items = nullptr, *first_tiles = nullptr;  // [B + 1]
  int* first_keys = nullptr;          // [B]: its row of key; 0 with pages
  RequestPart* row_blocks = nullptr;  // [max_row_blocks], the longest first
  RequestPart* items = nullptr;       // [max_items], the longest first
  float* block_scores = nullptr;      // of each request [Hq, Mq, Mk], one after the other
  int64_t bytes = 0;

  RRATTN_HOST_DEVICE int num_row_blocks() const { return first_row_blocks[num_requests]; }
  RRATTN_HOST_DEVICE int num_items() const { return first_items[num_requests]; }
  RRATTN_HOST_DEVICE int num_tiles() const { return first_tiles[num_requests]; }
};

// Where a plan lies in a workspace; without one, how much it takes.
RaggedPlan plan_in(void* workspace, const RaggedParams& batch, EstimateTiles tiles);

// Fills it. A request whose queries are not in the batch has none, and one whose keys do not fit sees
// none.
void make_plan(const RaggedParams& batch, const RaggedPlan& plan, EstimateTiles tiles);

}  // namespace rrattn::cuda
