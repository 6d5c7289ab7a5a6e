// The gradients of block-sparse attention on GPUs from Ampere on.
//
//   query [B, Lq, Hq, D], key [B, Lk, Hkv, D], value [B, Lk, Hkv, Dv], block_mask, out, lse,
//   grad_out [B, Lq, Hq, Dv]  ->  grad_query, grad_key, grad_value, as query, key and value
//
// A thread block takes some keys of a key head, and goes through the queries that selected them, or a
// part of these (common/backward/work.cuh), a tile at each step:
//
//   S = Q K^T - lse / scale,  P = exp(scale S),  dP = dO V^T - delta,  dS = P dP
//   dV += P^T dO,  dK += dS^T Q,  dQ = dS K
//
// lse / scale and delta are what the accumulators of S and dP start from, negated. dV and dK stay in
// registers, dQ is added to sums in memory, and so are dV and dK where walks are cut into parts.
#pragma once

#include "../../common/softmax.cuh"
#include "../../common/store_row.cuh"
#include "steps.cuh"

namespace rrattn::cuda::sm80::backward {

template <typename Traits, bool kUnseenKeys>
class ItemGradients {
  using Element = typename Traits::Element;
  using SharedStorage = typename Traits::SharedStorage;
  using Place = typename Traits::Place;
  using KeyTurn = typename Traits::KeyTurn;
  static constexpr auto kTiles = Traits::kTiles;
  static constexpr int kQueries = Traits::kQueries, kKeys = Traits::kKeys;
  static constexpr int kBlockTiles = kBlockSize / kQueries;
  using ScorePart = typename Traits::ScorePart;
  using GradValuePart = typename Traits::GradValuePart;
  using GradKeyPart = typename Traits::GradKeyPart;
  using GradQueryPart = typename Traits::GradQueryPart;
  using Scores = typename ScorePart::Sums;
  static constexpr int kRowScores = ScorePart::kColumns / 4;  // of a row, in one thread

 public:
  __device__ ItemGradients(const KernelParams& params, SharedStorage& shared)
      : params_(params),
        shared_(shared),
        place_(shared.place),
        lane_(static_cast<int>(threadIdx.x) % 32) {}

  // Takes an item; false: none is left.
  __device__ bool take() {
    if (threadIdx.x < 32) {
      Place place;
      const bool any = take_place<Traits>(params_, place);
      if (lane_ == 0) {
        shared_.any_item = any;
        if (any) {
          shared_.place = place;
          begin_plan(shared_.plan, params_, place);
        }
      }
    }
    __syncthreads();
    return shared_.any_item;
  }

  __device__ void run() {
    clear_sums(grad_key_);
    clear_sums(grad_value_);
    take_steps();
    leave();
  }

 private:
  __device__ void take_steps() {
    const BackwardParams& backward = params_.backward;
    copy_keys<Traits::kHeadDim>(shared_.key, backward.key, backward.heads.head_dim,
                                params_.aligned_key);
    copy_keys<Traits::kHeadDimV>(shared_.value, backward.value, backward.heads.head_dim_v,
                                 params_.aligned_value);
    // The first warp plans ahead. The plan lies in shared memory, since the sums take the registers.
    if (threadIdx.x < 32) plan_blocks(shared_.plan, params_, place_, 0);
    __syncthreads();
    if (block(0).first_query < 0) return;
    copy_numbers(0);
    copy_queries(0);
    copy_grad_out(0);
    commit_copies();
    if constexpr (kUnseenKeys) {
      wait_for_copies<0>();
      __syncthreads();  // the keys are there
      clear_bad_rows();
    }
    bool more = true;
    for (int step = 0; more; ++step) {
      wait_for_copies<0>();
      __syncthreads();  // the step's tiles are there, and all warps are done with the last step
      more = block(step + 1).first_query >= 0;
      if (more) {
        copy_numbers(step + 1);
        if (kTiles.query_slots == 2) copy_queries(step + 1);
        if (kTiles.grad_out_slots == 2) copy_grad_out(step + 1);
      }
      commit_copies();
      if (threadIdx.x < 32) plan_blocks(shared_.plan, params_, place_, step / kBlockTiles);
      compute_scores(step);
      __syncthreads();  // P and dS are there
      typename GradQueryPart::Sums grad_query;
      clear_sums(grad_query);
      multiply_add<Element, kKeys>(
          grad_query,
          FirstOperand<kQueries, false>(shared_address(shared_.grad_scores),
                                        GradQueryPart::first_row()),
          SecondOperand<kKeys, true>(shared_address(shared_.key), GradQueryPart::first_column()));
      // dQ goes to memory beside the next product, which else would wait for it.
      multiply_add<Element, kQueries>(
          grad_value_,
          FirstOperand<kQueries, true>(shared_address(shared_.probabilities),
                                       GradValuePart::first_row()),
          SecondOperand<kQueries, true>(grad_out_tile(step), GradValuePart::first_column()),
          [&](int part, int parts) { add_grad_query(step, grad_query, part, parts); });
      if (kTiles.grad_out_slots == 1) {
        __syncthreads();  // all warps are done with dO
        if (more) copy_grad_out(step + 1);
        commit_copies();
      }
      multiply_add<Element, kQueries>(
          grad_key_,
          FirstOperand<kQueries, true>(shared_address(shared_.grad_scores),
                                       GradKeyPart::first_row()),
          SecondOperand<kQueries, true>(query_tile(step), GradKeyPart::first_column()));
      if (kTiles.query_slots == 1) {
        __syncthreads();  // all warps are done with the queries
        if (more) copy_queries(step + 1);
        commit_copies();
      }
    }
  }

  // The block of a step, and its tiles: of each block from the last to the first.
  __device__ const PlannedBlock& block(int step) const {
    return shared_.plan.blocks[step / kBlockTiles % decltype(shared_.plan)::kSlots];
  }
  __device__ static int row_in_block(int step) {
    return (kBlockTiles - 1 - step % kBlockTiles) * kQueries;
  }
  __device__ uint32_t query_tile(int step) const {
    return shared_address(shared_.query[step % kTiles.query_slots]);
  }
  __device__ uint32_t grad_out_tile(int step) const {
    return shared_address(shared_.grad_out[step % kTiles.grad_out_slots]);
  }
  __device__ float* score_start(int step) const { return shared_.score_start[step % 2]; }
  __device__ float* grad_score_start(int step) const { return shared_.grad_score_start[step % 2]; }

  // Start to copy a step's tiles and the numbers of its rows.
  __device__ void copy_queries(int step) const {
    const BackwardParams& backward = params_.backward;
    copy_rows<Traits::kHeadDim>(query_tile(step), block(step).query, backward.query, step,
                                backward.heads.head_dim, params_.aligned_query);
  }
  __device__ void copy_grad_out(int step) const {
    const BackwardParams& backward = params_.backward;
    copy_rows<Traits::kHeadDimV>(grad_out_tile(step), block(step).grad_out, backward.grad_out, step,
                                 backward.heads.head_dim_v, params_.aligned_grad_out);
  }
  template <int kColumns>
  __device__ void copy_rows(uint32_t to, const void* block_rows, const Rows& rows, int step,
                            int64_t head_dim, bool aligned) const {
    using Copy = TileCopy<kQueries, kColumns, Traits::kThreads>;
    const int first = row_in_block(step), thread = thread_here();
    Copy::start(
        to,
        static_cast<const Element*>(block_rows) + first * rows.row_stride +
            Copy::offset(rows.row_stride, thread),
        rows.row_stride,
        static_cast<int>(params_.backward.visibility.seqlen_q) - block(step).first_query - first,
        static_cast<int>(head_dim), aligned, thread);
  }
  // The first warp has the plan to do.
  __device__ void copy_numbers(int step) const {
    const int number = (thread_here() - 32) * 4;
    static_assert(2 * kQueries / 4 <= Traits::kThreads - 32);
    if (number < 0 || number >= 2 * kQueries) return;
    const bool of_scores = number < kQueries;
    const int row = number % kQueries;
    copy_async(shared_address((of_scores ? score_start(step) : grad_score_start(step)) + row),
               (of_scores ? params_.workspace.score_start : params_.workspace.grad_score_start) +
                   row_of(step) + row,
               true);
  }
  // Of the step's first query, in [B, Hq, Mq, kBlockSize].
  __device__ int64_t row_of(int step) const {
    const Visibility& visibility = params_.backward.visibility;
    const int head = place_.batch * static_cast<int>(visibility.num_heads) + block(step).head;
    const int rows = static_cast<int>(visibility.num_m_blocks()) * kBlockSize;
    return int64_t{head} * rows + first_query(step);
  }
  __device__ int first_query(int step) const {
    return block(step).first_query + row_in_block(step);
  }

  // Starts to copy the item's keys or their values.
  template <int kColumns>
  __device__ void copy_keys(Element* to, const Rows& rows, int64_t head_dim, bool aligned) const {
    using Copy = TileCopy<kKeys, kColumns, Traits::kThreads>;
    const int first = place_.first_key();
    Copy::start(shared_address(to),
                static_cast<const Element*>(rows.data) + place_.batch * rows.batch_stride +
                    place_.key_head * rows.head_stride + first * rows.row_stride +
                    Copy::offset(rows.row_stride),
                rows.row_stride, static_cast<int>(params_.backward.visibility.seqlen_k) - first,
                static_cast<int>(head_dim), aligned);
  }

  // Writes P and dS to shared memory.
  __device__ void compute_scores(int step) {
    Scores scores, grad_scores;
    start_from(score_start(step), scores);
    multiply_add<Element, Traits::kHeadDim>(
        scores, FirstOperand<kQueries, false>(query_tile(step), ScorePart::first_row()),
        SecondOperand<kKeys, false>(shared_address(shared_.key), ScorePart::first_column()));
    if (block(step).masked || (kUnseenKeys && shared_.any_not_finite)) hide(step, scores);
    start_from(grad_score_start(step), grad_scores);
    // P is computed and stored beside the product for dP, which leaves the time for it.
    const TilePlace probabilities = score_place(shared_.probabilities);
    multiply_add<Element, Traits::kHeadDimV>(
        grad_scores, FirstOperand<kQueries, false>(grad_out_tile(step), ScorePart::first_row()),
        SecondOperand<kKeys, false>(shared_address(shared_.value), ScorePart::first_column()),
        [&](int part, int parts) {
          for_each_pair(part, parts, [&](int m, int i) {
            for (int j = i; j < i + 2; ++j)
              scores[m](j) = exp2_approx(scores[m](j) * params_.score_scale);
            store_pair(scores, m, i, probabilities);
          });
        });
#pragma unroll
    for (int m = 0; m < ScorePart::kFragments; ++m) {
#pragma unroll
      for (int i = 0; i < cute::size(scores[m]); ++i) grad_scores[m](i) *= scores[m](i);
    }
    const TilePlace to = score_place(shared_.grad_scores);
    for_each_pair(0, 1, [&](int m, int i) { store_pair(grad_scores, m, i, to); });
  }

  // Sets the scores of each query to its number.
  __device__ void start_from(const float* of_query, Scores& scores) const {
    // In deterministic mode there is no register for the place either.
    const int thread = Traits::kDeterministic ? thread_here() : static_cast<int>(threadIdx.x);
#pragma unroll
    for (int m = 0; m < ScorePart::kFragments; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float number = of_query[score_row(thread, m, half)];
#pragma unroll
        for (int i = 0; i < kRowScores; ++i) scores[m](accumulator_index(half, i)) = number;
      }
    }
  }

  // A thread's rows of the tile, and its first column.
  __device__ static int score_row(int thread, int m, int half) {
    return ScorePart::first_row(thread) + m * 16 + thread % 32 / 4 + half * 8;
  }
  __device__ static int score_column(int thread) {
    return ScorePart::first_column(thread) + thread % 4 * 2;
  }

  // Calls `use` with the fragment and the first number of each of a part of the pairs of scores that lie
  // side by side in a row.
  template <typename Use>
  __device__ static void for_each_pair(int part, int parts, const Use& use) {
    constexpr int kPairs = ScorePart::kColumns / 4, kAll = ScorePart::kFragments * kPairs;
    const int each = (kAll + parts - 1) / parts;
#pragma unroll
    for (int j = part * each; j < min((part + 1) * each, kAll); ++j)
      use(j / kPairs, j % kPairs * 2);
  }

  // The place of the thread's first score in a tile of P or dS. Above a head size of 128, where the loop
  // spills anyway and runs 2% faster so, it is that of the warp's column, and the thread's comes later.
  static constexpr bool kColumnInPlace = Traits::kHeadDim <= 128;
  __device__ TilePlace score_place(const Element* tile) const {
    const auto thread = static_cast<int>(threadIdx.x);
    return TilePlace::of<kQueries>(
        shared_address(tile), score_row(thread, 0, 0),
        kColumnInPlace ? score_column(thread) : ScorePart::first_column(thread));
  }
  __device__ void store_pair(const Scores& scores, int m, int i, const TilePlace& to) const {
    const uint32_t at = to.template at<kQueries>(m * 16 + i % 4 / 2 * 8, i / 4 * 8) +
                        (kColumnInPlace ? 0 : lane_ % 4 * 4);
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at),
                 "r"(pack_two<Element>(scores[m](i), scores[m](i + 1)))
                 : "memory");
  }

  // Adds a part of dQ = dS K to the sums in the workspace, which are in the order of the accumulators.
  __device__ void add_grad_query(int step, const typename GradQueryPart::Sums& grad_query, int part,
                                 int parts) const {
    constexpr int kSums = GradQueryPart::kColumns / 2, kAll = GradQueryPart::kFragments * kSums;
    const int64_t row = row_of(step);
    uint32_t* to = params_.workspace.grad_query + row * Traits::kHeadDim + threadIdx.x;
    const int each = (kAll + parts - 1) / parts;
#pragma unroll
    for (int j = part * each; j < min((part + 1) * each, kAll); ++j) {
      const int m = j / kSums, i = j % kSums;
      uint32_t* at = to + j * Traits::kThreads;
      if constexpr (Traits::kDeterministic) {
        const float query_scale =
            params_.workspace
                .query_scale[row + GradQueryPart::first_row() + m * 16 + lane_ / 4 + i % 4 / 2 * 8];
        const float scaled = grad_query[m](i) * (query_scale * key_scale(i));
        atomicAdd(reinterpret_cast<int*>(at), __float2int_rn(scaled));
      } else {
        atomicAdd(reinterpret_cast<float*>(at), grad_query[m](i));
      }
    }
  }
  __device__ float key_scale(int i) const {
    const int64_t key_head = place_.batch * params_.backward.heads.num_heads_k + place_.key_head;
    return params_.workspace.key_scale[key_head * Traits::kHeadDim + GradQueryPart::first_column() +
                                       i / 4 * 8 + lane_ % 4 * 2 + i % 2];
  }

  // Gives hidden scores a probability of 0, and makes visible ones NaN where the key or its value is
  // not finite.
  __device__ void hide(int step, Scores& scores) const {
    const Visibility& visibility = params_.backward.visibility;
    const int end_key = static_cast<int>(visibility.seqlen_k);
    const float hidden = copysignf(INFINITY, -params_.score_scale);  // whose probability is 0
    const int thread = thread_here();
    if (kUnseenKeys && shared_.any_not_finite) {
      for_each_score(thread, scores, [&](float& score, int, int column) {
        // Not for queries past the end or that see nothing.
        if (is_not_finite(column) && score != hidden) score = NAN;
      });
    }
    // The ends of the columns, and of those that the tile's first row sees.
    const int first = first_query(step), end = end_key - place_.first_key();
    const int causal_end = first + static_cast<int>(visibility.shift()) + 1 - place_.first_key();
    for_each_score(thread, scores, [&](float& score, int row, int column) {
      if (column >= (visibility.causal ? min(causal_end + row, end) : end)) score = hidden;
    });
    const RowBounds& layout = visibility.row_bounds;
    if (layout.data == nullptr) return;
    const int32_t* bounds =
        row_bounds_of(layout, place_.batch, visibility.bounds_head(block(step).head));
#pragma unroll
    for (int i = 0; i < kRowScores; ++i) {
      const int key = place_.first_key() + score_column(thread) + accumulator_column(i);
      if (key >= end_key) break;
      const KeyBounds key_bounds = load_key_bounds(layout, visibility.causal, bounds, key);
      for_each_row(thread, scores, i, [&](float& score, int row) {
        if (key_bounds.mask(first + row)) score = hidden;
      });
    }
  }

  // Calls `use` with each of the thread's scores, its row and its column in the tile.
  template <typename Use>
  __device__ void for_each_score(int thread, Scores& scores, const Use& use) const {
#pragma unroll
    for (int i = 0; i < kRowScores; ++i) {
      const int column = score_column(thread) + accumulator_column(i);
      for_each_row(thread, scores, i, [&](float& score, int row) { use(score, row, column); });
    }
  }
  // The same of a column.
  template <typename Use>
  __device__ void for_each_row(int thread, Scores& scores, int i, const Use& use) const {
#pragma unroll
    for (int m = 0; m < ScorePart::kFragments; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        use(scores[m](accumulator_index(half, i)), score_row(thread, m, half));
    }
  }

  // Zeroes keys and values that hold a NaN or infinity: even times a probability of 0 it would make
  // queries NaN that do not see it. Queries that do see it are given NaN by `hide`. Also zeroes
  // keys and values that no query sees and that are so large that dP may overflow.
  __device__ void clear_bad_rows() {
    constexpr bool kIsBFloat16 = std::is_same_v<Element, cutlass::bfloat16_t>;
    constexpr uint32_t kInfinity = kIsBFloat16 ? 0x7f80 : 0x7c00;
    constexpr uint32_t kLarge = kIsBFloat16 ? 0x5d80 : kInfinity;  // 2^60
    static_assert(2 * kKeys <= Traits::kThreads);
    const int thread = static_cast<int>(threadIdx.x);
    bool not_finite = false;
    if (thread < 2 * kKeys) {  // whole warps
      const bool of_key = thread < kKeys;
      const uint32_t tile = shared_address(of_key ? shared_.key : shared_.value);
      const int row = thread % kKeys, columns = of_key ? Traits::kHeadDim : Traits::kHeadDimV;
      // The chunks of a panel in an order that puts the threads on different banks.
      const auto chunk = [&](int i) {
        return tile + tile_offset<kKeys>(row, i / 8 * kPanel + (i + row) % 8 * 8);
      };
      uint32_t largest = 0;  // magnitude: its bits sort like it
#pragma unroll 4
      for (int i = 0; i < columns / 8; ++i) {
        uint32_t words[4];
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(chunk(i))
                     : "memory");
        for (const uint32_t two : words)
          largest = max(largest, max(two & 0x7fff, two >> 16 & 0x7fff));
      }
      not_finite = largest >= kInfinity;
      if (largest >= kLarge) {
        const BackwardParams& backward = params_.backward;
        const bool seen =
            seen_by_group(backward.visibility, group_size(backward.visibility, backward.heads),
                          place_.batch, place_.key_head, place_.first_key() + row);
        if (not_finite || !seen) {
          for (int i = 0; i < columns / 8; ++i) {
            store_chunk(chunk(i), make_uint4(0, 0, 0, 0));
          }
        }
        not_finite = not_finite && seen;
      }
      const uint32_t bits = __ballot_sync(~0u, not_finite);
      if (lane_ == 0) shared_.not_finite[thread / 32] = bits;
    }
    const bool any = __syncthreads_or(not_finite);
    if (thread == 0) shared_.any_not_finite = any;
  }

  // Whether a key of the item or its value is not finite.
  __device__ bool is_not_finite(int key) const {
    const uint32_t* bits = shared_.not_finite + key / 32;
    return (bits[0] | bits[kKeys / 32]) >> key % 32 & 1;
  }

  template <typename Sums, int kFragments>
  __device__ static void clear_sums(Sums (&sums)[kFragments]) {
#pragma unroll
    for (int m = 0; m < kFragments; ++m) cute::clear(sums[m]);
  }

  // Stores dK and dV of the item, or, in the turns of the items of its keys, adds them up.
  __device__ void leave() {
    const BackwardParams& backward = params_.backward;
    const KeySums& key_sums = params_.key_sums;
    const bool any_steps = shared_.plan.planned > 0;
    if (threadIdx.x == 0) shared_.turn = turn_of_item(any_steps);
    __syncthreads();  // the turn has come
    const KeyTurn& turn = shared_.turn;
    if (turn.any_sums() && (any_steps || turn.last())) {
      const auto add = [](float4* sums, auto& grad) {
        rrattn::cuda::backward::add_sums<Traits::kThreads>(sums, grad);
      };
      for_each_fragment(grad_key_, key_sums.key, turn.slot(), add);
      for_each_fragment(grad_value_, key_sums.value, turn.slot(), add);
    }
    if (turn.last()) {
      store(grad_key_, GradKeyPart::first_row(), GradKeyPart::first_column(),
            backward.softmax_scale, backward.grad_key, backward.heads.head_dim,
            params_.aligned_grad_key);
      store(grad_value_, GradValuePart::first_row(), GradValuePart::first_column(), 1,
            backward.grad_value, backward.heads.head_dim_v, params_.aligned_grad_value);
    } else if (any_steps) {
      const auto store = [](float4* sums, const auto& grad) {
        rrattn::cuda::backward::store_sums<Traits::kThreads>(sums, grad);
      };
      for_each_fragment(grad_key_, key_sums.key, turn.slot(), store);
      for_each_fragment(grad_value_, key_sums.value, turn.slot(), store);
    }
    if (!is_cut()) return;
    __syncthreads();  // all threads have written to the sums, or read them
    if (thread_here() == 0) turn.end();
  }
  // Whether the walk of the item's keys is cut into parts.
  __device__ bool is_cut() const {
    return params_.order.num_parts > 1 && place_.part != kWholeWalk;
  }
  __device__ KeyTurn turn_of_item(bool any_steps) const {
    if (!is_cut()) return {};
    const BackwardParams& backward = params_.backward;
    const WorkOrder& order = params_.order;
    const int first_window = place_.first_window(backward.visibility, order);
    const int parts_before = place_.window(order) == first_window ? first_window : 0;
    return {backward, order, params_.key_sums.tickets, place_, parts_before, any_steps, 1, 0};
  }
  // Calls `use` with the thread's first sums in a slot and its accumulators, of each fragment.
  template <typename Sums, int kFragments, typename Use>
  __device__ static void for_each_fragment(Sums (&grad)[kFragments], float* sums, int slot,
                                           const Use& use) {
    constexpr int kFours = decltype(cute::size(grad[0]))::value / 4 * Traits::kThreads;
    float4* of_slot = reinterpret_cast<float4*>(sums) + int64_t{slot} * kFragments * kFours;
#pragma unroll
    for (int m = 0; m < kFragments; ++m) use(of_slot + m * kFours + threadIdx.x, grad[m]);
  }

  // Stores `scale` times the warp's part of dK or dV.
  template <typename Sums, int kFragments>
  __device__ void store(const Sums (&sums)[kFragments], int first_row, int first_column,
                        float scale, const Rows& rows, int64_t head_dim, bool aligned) const {
    const int lane = thread_here() % 32;
#pragma unroll
    for (int m = 0; m < kFragments; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t key = place_.first_key() + first_row + m * 16 + lane / 4 + half * 8;
        Element* row = static_cast<Element*>(rows.data) + place_.batch * rows.batch_stride +
                       place_.key_head * rows.head_stride + key * rows.row_stride;
        store_row(sums[m], half, scale, row + first_column,
                  key < params_.backward.visibility.seqlen_k,
                  static_cast<int>(head_dim) - first_column, aligned);
      }
    }
  }

  const KernelParams& params_;
  SharedStorage& shared_;
  const Place& place_;
  const int lane_;
  typename GradKeyPart::Sums grad_key_;
  typename GradValuePart::Sums grad_value_;
};

// kUnseenKeys: whether some blocks may hold keys that no query sees.
template <typename Traits, bool kUnseenKeys>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(const __grid_constant__ KernelParams params) {
  extern __shared__ __align__(kTileAlignment) char shared_memory[];
  ItemGradients<Traits, kUnseenKeys> item(
      params, *reinterpret_cast<typename Traits::SharedStorage*>(shared_memory));
  if (item.take()) item.run();
}

}  // namespace rrattn::cuda::sm80::backward
