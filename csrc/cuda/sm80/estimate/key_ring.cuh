// The tiles of pooled keys that an item needs, one after the other, on their way through shared
// memory.
#pragma once

#include <cute/arch/copy_sm80.hpp>

#include "config.cuh"

namespace rrattn::cuda::sm80::estimate {

// All threads of a thread block copy, kKeySlots - 1 tiles ahead of the one that they compute on.
template <typename Traits, int kKeyStride>
class KeyRing {
  using Tile = typename Traits::Tile;
  static constexpr int kSlots = Traits::kKeySlots;

 public:
  __device__ KeyRing(const EstimateParams& params, const Workspace<Traits>& workspace,
                     const WorkLayout& layout, typename Traits::SharedStorage& shared)
      : params_(params), workspace_(workspace), layout_(layout), shared_(shared) {}

  // Begins to copy the first tiles of the item. No thread may be reading a slot any more.
  __device__ void start() {
    loading_tile_ = reading_tile_ = first_visible(0);
    loading_slot_ = reading_slot_ = 0;
    for (int slot = 0; slot < kSlots - 1; ++slot) load();
  }

  // Waits until the next tile is in slot(). False if there is none.
  __device__ bool wait() {
    if (reading_tile_ >= shared_.item.num_tiles) return false;
    // The tile's copies are the oldest of kSlots - 1 groups. Each thread waits for its own, and
    // then for the others.
    cute::cp_async_wait<kSlots - 2>();
    __syncthreads();
    // They have also read the tile before, whose slot is the next to load to.
    load();
    return true;
  }

  __device__ int tile() const { return reading_tile_; }
  __device__ int slot() const { return reading_slot_; }

  __device__ void advance() {
    reading_tile_ = first_visible(reading_tile_ + 1);
    reading_slot_ = next(reading_slot_);
  }

 private:
  __device__ static int next(int slot) { return slot == kSlots - 1 ? 0 : slot + 1; }

  // Tiles that FlashMask hides from all rows are left out.
  __device__ int first_visible(int tile) const {
    while (tile < shared_.item.num_tiles &&
           hides<kTileStrides * kKeyStride>(shared_.item, params_, workspace_.tile_bounds, tile)) {
      ++tile;
    }
    return tile;
  }

  // A group of copies for each call, of nothing at the end, so that a wait can count groups.
  __device__ void load() {
    if (loading_tile_ < shared_.item.num_tiles) {
      const int64_t tile =
          static_cast<int64_t>(shared_.item.key_head) * layout_.num_tiles + loading_tile_;
      copy<Tile::kElements * sizeof(typename Traits::Element)>(
          workspace_.pooled_keys + tile * Tile::kElements, shared_.slots.key[loading_slot_]);
      if (params_.sampling.spread > 0) {
        copy<Tile::kVariances * sizeof(float)>(workspace_.variances + tile * Tile::kVariances,
                                               shared_.slots.variance[loading_slot_]);
      }
      loading_tile_ = first_visible(loading_tile_ + 1);
      loading_slot_ = next(loading_slot_);
    }
    cute::cp_async_fence();
  }

  template <int kBytes>
  __device__ static void copy(const void* from, void* to) {
    constexpr int kVectors = kBytes / sizeof(uint4);
#pragma unroll
    for (int first = 0; first < kVectors; first += Traits::kThreads) {
      const int i = first + static_cast<int>(threadIdx.x);
      if (kVectors % Traits::kThreads == 0 || i < kVectors) {
        cute::SM80_CP_ASYNC_CACHEGLOBAL<uint4>::copy(static_cast<const uint4*>(from)[i],
                                                     static_cast<uint4*>(to)[i]);
      }
    }
  }

  const EstimateParams& params_;
  const Workspace<Traits>& workspace_;
  const WorkLayout& layout_;
  typename Traits::SharedStorage& shared_;
  int loading_tile_, reading_tile_;
  int loading_slot_, reading_slot_;
};

}  // namespace rrattn::cuda::sm80::estimate
