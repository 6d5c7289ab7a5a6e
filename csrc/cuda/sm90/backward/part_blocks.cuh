// What a column of the block mask selects of some parts of its walk.
#pragma once

#include "../../common/bit_walk.cuh"
#include "../../common/block_masking.cuh"
#include "config.cuh"

namespace rrattn::cuda::sm90::backward {

// The query blocks of an item's parts that selected its key block and see it, part by part and head by
// head, those of a head from the last to the first. All lanes of a warp call it together.
template <int kKeys>
class PartBlocks {
 public:
  // parts: those of the item that hold any, of kPartsAtOnce.
  __device__ PartBlocks(const KernelParams& params, const Place<kKeys>& place, uint32_t parts)
      : params_(params), place_(place), parts_(parts) {}

  // Goes to the next one; false: none is left.
  __device__ bool next() {
    const Visibility& visibility = params_.backward.visibility;
    const Workspace& workspace = params_.workspace;
    for (;;) {
      m_block_ = walk_.next();
      if (m_block_ < 0) {
        if (head_ == last_head_) {
          if (parts_ == 0) return false;
          start_part();
        }
        ++head_;
        bounds_ =
            span_bounds_of(visibility, kBlockSize, workspace.block_bounds, place_.batch, head_);
        const int64_t row =
            (place_.batch * visibility.num_heads + head_) * visibility.num_n_blocks() +
            place_.n_block();
        const int64_t row_words =
            ceil_div(static_cast<int>(visibility.num_m_blocks()), kMaskWordBits);
        walk_ =
            BitWalk(workspace.transposed_mask + row * row_words + first_m_block_ / kMaskWordBits,
                    num_m_blocks_);
        continue;
      }
      m_block_ += first_m_block_;
      kind_ = classify_block(visibility, bounds_, m_block_, place_.n_block());
      if (kind_ != BlockKind::kHidden) return true;
    }
  }

  // Of the one that it went to last:
  __device__ int m_block() const { return m_block_; }
  __device__ int head() const { return head_; }  // query head
  // Whether some of its scores may be hidden.
  __device__ bool masked() const {
    return has_hidden_scores(params_.backward.visibility, kind_, m_block_, place_.n_block());
  }
  __device__ bool bounded() const { return kind_ == BlockKind::kPartial; }  // by FlashMask

 private:
  // Goes to before the first head of the next part.
  __device__ void start_part() {
    const WorkOrder& order = params_.order;
    const Visibility& visibility = params_.backward.visibility;
    // A division of 64 bits would take more registers than the producer has.
    const int group = static_cast<int>(visibility.num_heads) /
                      static_cast<int>(params_.backward.heads.num_heads_k);
    const int part = place_.part / kPartsAtOnce * kPartsAtOnce + __ffs(parts_) - 1;
    parts_ &= parts_ - 1;
    const int first_head = part / order.windows * order.part_heads;
    head_ = place_.key_head * group + first_head - 1;
    last_head_ = head_ + min(order.part_heads, group - first_head);
    first_m_block_ = part % order.windows * order.part_blocks;
    num_m_blocks_ =
        min(order.part_blocks, static_cast<int>(visibility.num_m_blocks()) - first_m_block_);
  }

  const KernelParams& params_;
  const Place<kKeys>& place_;
  uint32_t parts_;
  int head_ = 0, last_head_ = 0;  // of the part
  int first_m_block_, num_m_blocks_;
  int m_block_ = -1;
  BlockKind kind_ = BlockKind::kHidden;
  const SpanBounds* bounds_ = nullptr;
  BitWalk walk_{nullptr, 0};
};

}  // namespace rrattn::cuda::sm90::backward
