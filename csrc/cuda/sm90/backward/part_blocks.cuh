// What a column of the block mask selects of a part of its walk.
#pragma once

#include "../../common/bit_walk.cuh"
#include "../../common/block_masking.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm90::backward {

// The query blocks of an item's part that selected its key block and see it, head by head, those of
// a head from the last to the first. All lanes of a warp call it together.
template <int kKeys>
class PartBlocks {
 public:
  __device__ PartBlocks(const KernelParams& params, const Place<kKeys>& place, int parts_before)
      : params_(params),
        batch_(place.batch),
        key_head_(place.key_head),
        n_block_(place.n_block()),
        parts_left_(parts_before),
        part_(place.part - parts_before) {
    start_part();
  }

  // Goes to the next one; false: none is left.
  __device__ bool next() {
    const Visibility& visibility = params_.backward.visibility;
    const Workspace& workspace = params_.workspace;
    for (;;) {
      m_block_ = walk_.next();
      if (m_block_ < 0) {
        if (head_ == last_head_) {
          if (parts_left_ == 0) return false;
          --parts_left_;
          ++part_;
          start_part();
        }
        ++head_;
        bounds_ = span_bounds_of(visibility, kBlockSize, workspace.block_bounds, batch_, head_);
        const int64_t row =
            (batch_ * visibility.num_heads + head_) * visibility.num_n_blocks() + n_block_;
        const int64_t row_words =
            ceil_div(static_cast<int>(visibility.num_m_blocks()), kMaskWordBits);
        walk_ =
            BitWalk(workspace.transposed_mask + row * row_words + first_m_block_ / kMaskWordBits,
                    num_m_blocks_);
        continue;
      }
      m_block_ += first_m_block_;
      kind_ = classify_block(visibility, bounds_, m_block_, n_block_);
      if (kind_ != BlockKind::kHidden) return true;
    }
  }

  // Of the one that it went to last:
  __device__ int m_block() const { return m_block_; }
  __device__ int head() const { return head_; }  // query head
  // Whether some of its scores may be hidden.
  __device__ bool masked() const {
    return has_hidden_scores(params_.backward.visibility, kind_, m_block_, n_block_);
  }
  __device__ bool bounded() const { return kind_ == BlockKind::kPartial; }  // by FlashMask

 private:
  // Goes to the part's start, before its first head.
  __device__ void start_part() {
    const Visibility& visibility = params_.backward.visibility;
    // A division of 64 bits would take more registers than the producer has.
    const int group = static_cast<int>(visibility.num_heads) /
                      static_cast<int>(params_.backward.heads.num_heads_k);
    const WorkOrder::Part part =
        params_.order.part_of(part_, group, static_cast<int>(visibility.num_m_blocks()));
    head_ = key_head_ * group + part.first_head - 1;
    last_head_ = head_ + part.heads;
    first_m_block_ = part.first_block, num_m_blocks_ = part.blocks;
  }

  const KernelParams& params_;
  const int batch_, key_head_, n_block_;
  int parts_left_, part_;
  int head_, last_head_, first_m_block_, num_m_blocks_;
  int m_block_ = -1;
  BlockKind kind_ = BlockKind::kHidden;
  const SpanBounds* bounds_ = nullptr;
  BitWalk walk_{nullptr, 0};
};

}  // namespace rrattn::cuda::sm90::backward
