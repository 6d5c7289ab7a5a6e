// Moving tiles between tensors and the float32 buffers that the stages work on.
//
// A stage keeps one side of a score tile and lets the other stream past. The side that stays is
// packed into strips, [head_dim][kStrip], with its rows as columns: a row is a vector lane, so a
// softmax over the streaming side needs no operation across lanes. The streaming side is copied as
// it is, [row][head_dim].
#pragma once

#include "../core/geometry.h"
#include "../core/params.h"
#include "../core/ragged.h"
#include "simd.h"

namespace rrattn::cpu::RRATTN_SIMD {

constexpr int kStrips = kBlockSize / kStrip;  // strips of a block

RRATTN_INLINE float bfloat16_to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  memcpy(&f, &bits, sizeof(f));
  return f;
}

RRATTN_INLINE float float16_to_float(uint16_t x) {
  // Exponent and mantissa move to float32's places; the product corrects the bias, also of
  // denormals.
  uint32_t bits = static_cast<uint32_t>(x & 0x7fff) << 13;
  float magnitude;
  memcpy(&magnitude, &bits, sizeof(magnitude));
  magnitude *= 0x1p112f;
  memcpy(&bits, &magnitude, sizeof(bits));
  bits |= (x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u;  // infinity and NaN keep their exponent
  bits |= static_cast<uint32_t>(x & 0x8000) << 16;
  memcpy(&magnitude, &bits, sizeof(magnitude));
  return magnitude;
}

RRATTN_INLINE uint16_t float_to_bfloat16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(f == f ? rounded : (bits >> 16) | 0x40);
}

RRATTN_INLINE uint16_t float_to_float16(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof(bits));
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);  // NaN
  // 65520 and up round to infinity.
  if (bits >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);
  // Below 2^-14: adding 1/2 leaves the denormal mantissa, rounded, in the low bits.
  if (bits < 0x38800000) {
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    memcpy(&bits, &magnitude, sizeof(bits));
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xfff + ((bits >> 13) & 1)) >> 13));
}

inline void read_row(DataType dtype, const void* from, int64_t count, float* to) {
  const auto* halves = static_cast<const uint16_t*>(from);
  switch (dtype) {
    case DataType::kFloat32:
      memcpy(to, from, count * sizeof(float));
      break;
    case DataType::kFloat16:
      for (int64_t i = 0; i < count; ++i) to[i] = float16_to_float(halves[i]);
      break;
    case DataType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) to[i] = bfloat16_to_float(halves[i]);
      break;
  }
}

inline void write_row(DataType dtype, const float* from, int64_t count, void* to) {
  auto* halves = static_cast<uint16_t*>(to);
  switch (dtype) {
    case DataType::kFloat32:
      memcpy(to, from, count * sizeof(float));
      break;
    case DataType::kFloat16:
      for (int64_t i = 0; i < count; ++i) halves[i] = float_to_float16(from[i]);
      break;
    case DataType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) halves[i] = float_to_bfloat16(from[i]);
      break;
  }
}

inline char* row_at(const Rows& rows, DataType dtype, int64_t batch, int64_t row, int64_t head) {
  return static_cast<char*>(rows.data) +
         (batch * rows.batch_stride + row * rows.row_stride + head * rows.head_stride) *
             size_of(dtype);
}

// One head of a [B, L, H, D] tensor, or of a request's pages in it.
struct HeadView {
  char* first;  // its row 0, or that of page 0
  int64_t row_bytes, page_bytes;
  int64_t head_dim;
  DataType dtype;
  Pages pages;

  HeadView(const Rows& rows, DataType dtype, int64_t head_dim, int64_t batch, int64_t head,
           const Pages& pages)
      : first(row_at(rows, dtype, batch, 0, head)),
        row_bytes(rows.row_stride * size_of(dtype)),
        page_bytes(rows.batch_stride * size_of(dtype)),
        head_dim(head_dim),
        dtype(dtype),
        pages(pages) {}
  const char* at(int64_t row) const {
    if (pages.table == nullptr) return first + row * row_bytes;
    return first + pages.table[row / pages.page_size] * page_bytes +
           row % pages.page_size * row_bytes;
  }
  void read(int64_t row, float* to) const { read_row(dtype, at(row), head_dim, to); }
  void write(int64_t row, const float* from) const {
    write_row(dtype, from, head_dim, first + row * row_bytes);
  }
};

// A head of queries or keys, or of their gradients.
inline HeadView key_head_of(const Rows& rows, const Heads& heads, int64_t batch, int64_t head,
                            const Pages& pages = {}) {
  return HeadView(rows, heads.dtype, heads.head_dim, batch, head, pages);
}

// A head of values or outputs, or of their gradients.
inline HeadView value_head_of(const Rows& rows, const Heads& heads, int64_t batch, int64_t head,
                              const Pages& pages = {}) {
  return HeadView(rows, heads.dtype, heads.head_dim_v, batch, head, pages);
}

// Of a row of either.
inline int64_t largest_head_dim(const Heads& heads) {
  return heads.head_dim > heads.head_dim_v ? heads.head_dim : heads.head_dim_v;
}

// tile[kBlockSize][head_dim] = rows [first_row, first_row + num_rows), then zeros.
inline void read_tile(const HeadView& head, int64_t first_row, int64_t num_rows, float* tile) {
  for (int64_t r = 0; r < num_rows; ++r) head.read(first_row + r, tile + r * head.head_dim);
  memset(tile + num_rows * head.head_dim, 0,
         (kBlockSize - num_rows) * head.head_dim * sizeof(float));
}

// strip[head_dim][kStrip]: column c is row first_row + c * row_step, times scale; zeros from column
// num_columns on.
inline void read_strip(const HeadView& head, int64_t first_row, int64_t row_step,
                       int64_t num_columns, float scale, float* strip, float* row_buffer) {
  if (num_columns < kStrip) memset(strip, 0, head.head_dim * kStrip * sizeof(float));
  for (int64_t c = 0; c < num_columns; ++c) {
    head.read(first_row + c * row_step, row_buffer);
    for (int64_t d = 0; d < head.head_dim; ++d) strip[d * kStrip + c] = row_buffer[d] * scale;
  }
}

// Row first_row + c of the tensor = column c of strip, times column_scale[c].
inline void write_strip(const HeadView& head, int64_t first_row, int64_t num_columns,
                        const float* strip, const float* column_scale, float* row_buffer) {
  for (int64_t c = 0; c < num_columns; ++c) {
    for (int64_t d = 0; d < head.head_dim; ++d)
      row_buffer[d] = strip[d * kStrip + c] * column_scale[c];
    head.write(first_row + c, row_buffer);
  }
}

// How many of the `limit` rows or columns from `first` on lie before `end`: at least 0.
RRATTN_INLINE int64_t clip_count(int64_t first, int64_t end, int64_t limit) {
  const int64_t count = end - first;
  return count < 0 ? 0 : count < limit ? count : limit;
}

RRATTN_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// The lane numbers 0, 1, ... of a vector, from `first` on.
RRATTN_INLINE VecInt lane_indices(int32_t first) {
  VecInt lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = first + i;
  return lanes;
}

// A bump allocator over the workspace; every piece starts on a 64-byte line. Without a base it only
// counts, which is how the size of a workspace is found.
class Arena {
 public:
  explicit Arena(void* base = nullptr)
      : base_(reinterpret_cast<intptr_t>(base)), at_(round_up(base_, 64)) {}
  template <typename T>
  T* take(int64_t count) {
    const intptr_t at = at_;
    at_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return reinterpret_cast<T*>(at);
  }
  bool only_counts() const { return base_ == 0; }
  int64_t used() const { return at_ - base_; }
  char* rest() const { return reinterpret_cast<char*>(at_); }

 private:
  intptr_t base_, at_;
};

template <typename Scratch, typename Params>
int64_t scratch_bytes(const Params& params) {
  Arena arena;
  Scratch(arena, params);
  return arena.used();
}

// A thread's scratch, in the part of the workspace that `shared` has left over.
template <typename Scratch, typename Params>
Scratch thread_scratch(const Arena& shared, const Params& params, int thread) {
  Arena own(shared.rest() + thread * scratch_bytes<Scratch>(params));
  return Scratch(own, params);
}

// Bytes of a workspace: what `shared` counted, a scratch for each thread, and room to align the
// start.
template <typename Scratch, typename Params>
int64_t workspace_bytes(const Arena& shared, const Params& params) {
  return shared.used() + params.execution.num_threads * scratch_bytes<Scratch>(params) + 64;
}

}  // namespace rrattn::cpu::RRATTN_SIMD
