// What a column of the block mask selects: the query blocks of a key block, of all heads of the group.
#pragma once

#include "../bit_walk.cuh"
#include "../block_masking.cuh"
#include "workspace.cuh"

namespace rrattn::cuda::backward {

// The query blocks that selected a key block and see it, head by head, those of a head from the last
// to the first. All lanes of a warp call it together.
class QueryBlocks {
 public:
  __device__ QueryBlocks(const BackwardParams& params, const Workspace& workspace, int batch,
                         int key_head, int n_block)
      : visibility_(params.visibility),
        workspace_(workspace),
        batch_(batch),
        key_head_(key_head),
        n_block_(n_block),
        // A division of 64 bits would take more registers than Hopper's producer has.
        group_(static_cast<int>(visibility_.num_heads) /
               static_cast<int>(params.heads.num_heads_k)),
        num_m_blocks_(static_cast<int>(visibility_.num_m_blocks())) {}

  // Goes to the next one; false: none is left.
  __device__ bool next() {
    for (;;) {
      m_block_ = walk_.next();
      if (m_block_ < 0) {
        if (++head_ == (key_head_ + 1) * group_) return false;
        bounds_ = span_bounds_of(visibility_, kBlockSize, workspace_.block_bounds, batch_, head_);
        walk_ = BitWalk(
            workspace_.transposed_mask +
                ((batch_ * visibility_.num_heads + head_) * visibility_.num_n_blocks() + n_block_) *
                    ceil_div(num_m_blocks_, kMaskWordBits),
            num_m_blocks_);
        continue;
      }
      kind_ = classify_block(visibility_, bounds_, m_block_, n_block_);
      if (kind_ != BlockKind::kHidden) return true;
    }
  }

  // Of the one that it went to last:
  __device__ int m_block() const { return m_block_; }
  __device__ int head() const { return head_; }  // query head
  // Whether some of its scores may be hidden.
  __device__ bool masked() const {
    return has_hidden_scores(visibility_, kind_, m_block_, n_block_);
  }

 private:
  const Visibility& visibility_;
  const Workspace& workspace_;
  const int batch_, key_head_, n_block_, group_, num_m_blocks_;
  int head_ = key_head_ * group_ - 1, m_block_ = -1;
  BlockKind kind_ = BlockKind::kHidden;
  const SpanBounds* bounds_ = nullptr;
  BitWalk walk_{nullptr, 0};
};

}  // namespace rrattn::cuda::backward
