#include <cub/block/block_scan.cuh>

#include "ragged_plan.cuh"

namespace rrattn::cuda {

namespace {

constexpr int kThreads = 1024;

// What requests have together, counted in the order of the batch.
struct Counts {
  int64_t scores, words;
  int row_blocks, items, tiles;
};

struct Add {
  __device__ Counts operator()(const Counts& a, const Counts& b) const {
    return {a.scores + b.scores, a.words + b.words, a.row_blocks + b.row_blocks, a.items + b.items,
            a.tiles + b.tiles};
  }
};

// Items of a key head, and the tiles of pooled keys that they need.
__device__ int items_of(const RaggedEstimate& estimate) {
  return estimate.call.scores_wanted ? estimate.layout.num_items / estimate.layout.key_heads : 0;
}
__device__ int tiles_of(const RaggedEstimate& estimate) {
  return estimate.call.scores_wanted ? estimate.layout.num_tiles : 0;
}

// Fills all but the order of the work. One thread block goes through the requests.
__global__ void __launch_bounds__(kThreads)
    plan_requests_kernel(const __grid_constant__ RaggedParams batch,
                         const __grid_constant__ RaggedPlan plan, EstimateTiles tiles) {
  using KeyScan = cub::BlockScan<int64_t, kThreads>;
  using CountScan = cub::BlockScan<Counts, kThreads>;
  __shared__ union {
    typename KeyScan::TempStorage keys;
    typename CountScan::TempStorage counts;
  } scan;
  const int64_t num_heads = batch.attend.visibility.num_heads;
  int64_t keys_before = 0;
  Counts before{};
  for (int64_t first = 0; first < batch.num_requests; first += kThreads) {
    const int64_t b = first + threadIdx.x;
    const bool exists = b < batch.num_requests;
    RequestPlace place;
    if (exists) {
      const int64_t begin = batch.cu_seqlens_q[b], end = batch.cu_seqlens_q[b + 1];
      place.first_query = begin;
      if (begin >= 0 && begin <= end && end <= batch.num_tokens) place.seqlen_q = end - begin;
      place.seqlen_k = max(batch.seqlens_k[b], 0);
    }
    int64_t first_key, keys;
    KeyScan(scan.keys).ExclusiveSum(place.seqlen_k, first_key, keys);
    first_key += keys_before;
    keys_before += keys;
    if (batch.block_tables == nullptr) place.first_key = first_key;
    if (place.seqlen_k < place.seqlen_q || place.seqlen_k > batch.max_seqlen_k ||
        first_key + place.seqlen_k > batch.max_num_keys) {
      place.first_key = place.seqlen_k = 0;
    }
    const Visibility visibility{1, place.seqlen_q, place.seqlen_k, num_heads, true, {}};
    Counts own{};
    if (exists) {
      const RequestCalls calls = calls_of_request(batch, b, place);
      RaggedEstimate& estimate = plan.estimate[b];
      estimate = {calls.estimate, estimate::WorkLayout(calls.estimate.params, tiles.strides,
                                                       tiles.row_tiles_of_item)};
      if (place.seqlen_q == 0 || place.seqlen_k == 0) estimate.call.scores_wanted = false;
      own = {estimate.call.scores_wanted
                 ? num_heads * visibility.num_m_blocks() * visibility.num_n_blocks()
                 : 0,
             num_heads * visibility.num_m_blocks() * visibility.num_mask_words(),
             static_cast<int>(visibility.num_m_blocks()), items_of(estimate), tiles_of(estimate)};
    }
    __syncthreads();  // until all have read the scan of keys, whose memory that of the counts shares
    Counts at, all;
    CountScan(scan.counts).ExclusiveScan(own, at, Counts{}, Add{}, all);
    at = Add{}(before, at);
    before = Add{}(before, all);
    if (exists) {
      place.first_word = at.words;
      const RequestCalls calls = calls_of_request(batch, b, place);
      plan.select[b] = calls.select;
      plan.attend[b] = calls.attend;
      float* block_scores = plan.block_scores + at.scores;
      plan.select[b].block_scores = block_scores;
      plan.estimate[b].call.params.block_scores = block_scores;
      plan.first_row_blocks[b] = at.row_blocks;
      plan.first_items[b] = at.items;
      plan.first_tiles[b] = at.tiles;
      plan.first_keys[b] = static_cast<int>(place.first_key);
    }
    __syncthreads();  // until all have read the scan of counts
  }
  if (threadIdx.x == 0) {
    plan.first_row_blocks[plan.num_requests] = before.row_blocks;
    plan.first_items[plan.num_requests] = before.items;
    plan.first_tiles[plan.num_requests] = before.tiles;
  }
}

// The key blocks that the last row of a query block, or of an item of the estimate, may see.
__device__ int row_block_length(const RaggedPlan& plan, const RequestPart& part) {
  const Visibility& visibility = plan.attend[part.request].params.visibility;
  const int64_t end = min((int64_t{part.index} + 1) * kBlockSize, visibility.seqlen_q);
  return static_cast<int>(max(ceil_div(end + visibility.shift(), kBlockSize), int64_t{0}));
}
__device__ int item_length(const RaggedPlan& plan, const RequestPart& part, int row_tiles_of_item) {
  const RaggedEstimate& estimate = plan.estimate[part.request];
  const Visibility& visibility = estimate.call.params.visibility;
  const int row_tile = estimate.layout.num_row_tiles * estimate.layout.group_size - 1 -
                       part.index * row_tiles_of_item;
  const int64_t end = min((int64_t{row_tile / estimate.layout.group_size} + 1) *
                              estimate::kTileQueries * estimate.call.params.sampling.stride,
                          visibility.seqlen_q);
  return static_cast<int>(ceil_div(end + visibility.shift(), kBlockSize));
}

// Lists parts by their lengths, which are at most max_length, by counting how many there are of each.
// `ends` has room for max_length + 1.
template <typename LengthOf>
__device__ void list_longest_first(const int* firsts, int num_requests, RequestPart* list,
                                   int max_length, int* ends, const LengthOf& length_of) {
  using Scan = cub::BlockScan<int, kThreads>;
  __shared__ typename Scan::TempStorage scan;
  const int count = firsts[num_requests];
  const auto part_at = [&](int at) -> RequestPart {
    const int request = request_of(firsts, num_requests, at);
    return {request, at - firsts[request]};
  };
  for (int i = threadIdx.x; i <= max_length; i += kThreads) ends[i] = 0;
  __syncthreads();  // all counters are at zero
  for (int at = threadIdx.x; at < count; at += kThreads)
    atomicAdd(&ends[max_length - length_of(part_at(at))], 1);
  __syncthreads();  // all are counted
  // Each thread adds up some neighbouring lengths.
  const int own_lengths = max_length / kThreads + 1;
  const int begin = min(static_cast<int>(threadIdx.x) * own_lengths, max_length + 1);
  const int end = min(begin + own_lengths, max_length + 1);
  int own = 0, next = 0;
  for (int i = begin; i < end; ++i) own += ends[i];
  Scan(scan).ExclusiveSum(own, next);
  for (int i = begin; i < end; ++i) {
    const int of_length = ends[i];
    ends[i] = next;
    next += of_length;
  }
  __syncthreads();  // each length knows where its first part goes
  for (int at = threadIdx.x; at < count; at += kThreads) {
    const RequestPart part = part_at(at);
    list[atomicAdd(&ends[max_length - length_of(part)], 1)] = part;
  }
}

// The first thread block lists the query blocks, the second the items of the estimate.
__global__ void __launch_bounds__(kThreads)
    order_work_kernel(const __grid_constant__ RaggedPlan plan, int max_length,
                      int row_tiles_of_item) {
  extern __shared__ int ends[];
  if (blockIdx.x == 0) {
    list_longest_first(plan.first_row_blocks, plan.num_requests, plan.row_blocks, max_length, ends,
                       [&](const RequestPart& part) { return row_block_length(plan, part); });
  } else {
    list_longest_first(
        plan.first_items, plan.num_requests, plan.items, max_length, ends,
        [&](const RequestPart& part) { return item_length(plan, part, row_tiles_of_item); });
  }
}

}  // namespace

RaggedPlan plan_in(void* workspace, const RaggedParams& batch, EstimateTiles tiles) {
  Arena arena(workspace);
  RaggedPlan plan;
  plan.num_requests = static_cast<int>(batch.num_requests);
  plan.max_row_blocks = static_cast<int>(max_m_blocks(batch));
  // Of each request the last part of every kind may be a part in name only.
  const int64_t with_queries = std::min(batch.num_requests, batch.num_tokens);
  const int64_t group = group_size(batch.attend.visibility, batch.attend.heads);
  const int64_t row_tiles =
      batch.num_tokens / (batch.estimate.sampling.stride * estimate::kTileQueries) + with_queries;
  plan.max_items = static_cast<int>(row_tiles * group / tiles.row_tiles_of_item + with_queries);
  plan.max_tiles = static_cast<int>(
      batch.max_num_keys / (batch.estimate.sampling.key_stride * tiles.strides) + with_queries);
  plan.estimate = arena.take<RaggedEstimate>(plan.num_requests);
  plan.select = arena.take<SelectParams>(plan.num_requests);
  plan.attend = arena.take<AttendCall>(plan.num_requests);
  plan.first_row_blocks = arena.take<int>(plan.num_requests + 1);
  plan.first_items = arena.take<int>(plan.num_requests + 1);
  plan.first_tiles = arena.take<int>(plan.num_requests + 1);
  plan.first_keys = arena.take<int>(plan.num_requests);
  plan.row_blocks = arena.take<RequestPart>(plan.max_row_blocks);
  plan.items = arena.take<RequestPart>(plan.max_items);
  plan.block_scores = arena.take<float>(batch.attend.visibility.num_heads * plan.max_row_blocks *
                                        ceil_div(batch.max_seqlen_k, kBlockSize));
  plan.bytes = arena.used();
  return plan;
}

void make_plan(const RaggedParams& batch, const RaggedPlan& plan, EstimateTiles tiles) {
  const cudaStream_t stream = stream_of(batch.execution);
  plan_requests_kernel<<<1, kThreads, 0, stream>>>(batch, plan, tiles);
  RRATTN_CUDA_CHECK(cudaGetLastError());
  const int max_length = static_cast<int>(ceil_div(batch.max_seqlen_k, kBlockSize));
  const auto counters = static_cast<unsigned>((max_length + 1) * sizeof(int));
  order_work_kernel<<<2, kThreads, counters, stream>>>(plan, max_length, tiles.row_tiles_of_item);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda
