// How the thread blocks of a persistent kernel share its items of work: each takes the next one
// when it is free.
#pragma once

#include <algorithm>
#include <cstdint>

namespace rrattn::cuda {

// The next item. All lanes of a warp call it together.
__device__ inline int take_item(int* next_item) {
  int item = 0;
  if (threadIdx.x % 32 == 0) item = atomicAdd(next_item, 1);
  return __shfl_sync(~0u, item, 0);
}

// What another thread block has released, and all that it wrote before.
__device__ inline int load_acquire(const int* value) {
  int found;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(found) : "l"(value) : "memory");
  return found;
}

struct WorkPlace {
  int head;   // over all batch entries
  int block;  // of the head, in the order of the work
};

// The order of the work. It goes section by section, each of some heads, so that what these read
// stays in the L2 cache. In a section it goes block by block, the heads of each one after the
// other: where blocks get shorter along the order, the longest of all heads come first.
__device__ inline WorkPlace place_of_item(int item, int num_heads, int num_blocks,
                                          int section_heads) {
  const int section = item / (section_heads * num_blocks);
  const int first_head = section * section_heads;
  const int heads = min(section_heads, num_heads - first_head);
  item -= first_head * num_blocks;
  return {first_head + item % heads, item / heads};
}

// As many heads as have at most `section_bytes` together, but at least 1.
inline int heads_in_section(int64_t section_bytes, int64_t head_bytes, int64_t num_heads) {
  return static_cast<int>(std::clamp<int64_t>(section_bytes / std::max<int64_t>(1, head_bytes), 1,
                                              std::max<int64_t>(1, num_heads)));
}

}  // namespace rrattn::cuda
