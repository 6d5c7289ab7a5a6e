#include "span_bounds.cuh"

namespace rrattn::cuda {

namespace {

// Fills bounds[B, bounds heads, ceil(Lk / span_length)]. Each span has a warp.
__global__ void span_bounds_kernel(Visibility visibility, int64_t span_length, SpanBounds* bounds) {
  const RowBounds& layout = visibility.row_bounds;
  const int64_t num_spans = ceil_div(visibility.seqlen_k, span_length);
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  if (i >= visibility.num_span_bounds(span_length)) return;
  const int lane = threadIdx.x % 32;
  const int64_t first_key = i % num_spans * span_length, head = i / num_spans;
  const int64_t end_key = min(first_key + span_length, visibility.seqlen_k);
  const int32_t* at = row_bounds_of(layout, head / layout.num_heads, head % layout.num_heads);
  SpanBounds span;
  for (int64_t key = first_key + lane; key < end_key; key += 32) {
    const KeyBounds key_bounds = load_key_bounds(layout, visibility.causal, at, key);
    span.lower.add(key_bounds.lower);
    span.upper.add(key_bounds.upper);
  }
  for (IntervalExtremes* extremes : {&span.lower, &span.upper}) {
    extremes->max_start = __reduce_max_sync(~0u, extremes->max_start);
    extremes->min_end = __reduce_min_sync(~0u, extremes->min_end);
    extremes->min_start = __reduce_min_sync(~0u, extremes->min_start);
    extremes->max_end = __reduce_max_sync(~0u, extremes->max_end);
  }
  if (lane == 0) bounds[i] = span;
}

}  // namespace

void compute_span_bounds(const Visibility& visibility, int64_t span_length, SpanBounds* bounds,
                         cudaStream_t stream) {
  const int64_t count = visibility.num_span_bounds(span_length);
  if (count == 0) return;
  span_bounds_kernel<<<static_cast<unsigned>(ceil_div(count, 8)), 256, 0, stream>>>(
      visibility, span_length, bounds);
  RRATTN_CUDA_CHECK(cudaGetLastError());
}

}  // namespace rrattn::cuda
