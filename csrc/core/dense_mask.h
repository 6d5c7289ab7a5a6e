// What the values of a dense mask mean, and which masks are FlashMask bounds.
//
// Query row r is position r + Lk - Lq of the keys. A key may be seen first by the row of its own
// position (a cached one before all rows: by row 0), and once hidden from a row has to stay hidden
// from all later ones. Then the number of rows that see it says which do.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "params.h"

namespace rrattn {

// Bits of a verdict.
constexpr int32_t kNeitherSeenNorHidden = 1;  // a value is a bias: verdict[1] has its bits
constexpr int32_t kNotCausal = 2;             // or has holes: see above

constexpr int32_t kNoValue =
    std::numeric_limits<int32_t>::min();  // verdict[1] without such a value

// Additive masks show what is 0 and hide what is at most -9984, as which bfloat16 knows -1e4.
struct BoolMask {
  using Storage = uint8_t;
  RRATTN_HOST_DEVICE static bool shows(uint8_t value) { return value != 0; }
  RRATTN_HOST_DEVICE static bool hides(uint8_t value) { return value == 0; }
};
struct Float32Mask {
  using Storage = float;
  RRATTN_HOST_DEVICE static bool shows(float value) { return value == 0; }
  RRATTN_HOST_DEVICE static bool hides(float value) { return value <= -9984.f; }
};
template <uint16_t kLimit, uint16_t kInfinity>  // magnitudes, whose bits are in their order
struct HalfMask {
  using Storage = uint16_t;
  RRATTN_HOST_DEVICE static bool shows(uint16_t value) { return (value & 0x7fff) == 0; }
  RRATTN_HOST_DEVICE static bool hides(uint16_t value) {
    return value >= (0x8000 | kLimit) && value <= (0x8000 | kInfinity);
  }
};
using Float16Mask = HalfMask<0x70e0, 0x7c00>;
using BFloat16Mask = HalfMask<0x461c, 0x7f80>;

// Calls `use` with the meaning of this type's values.
template <typename Use>
void with_mask_type(MaskType type, const Use& use) {
  switch (type) {
    case MaskType::kBool:
      return use(BoolMask());
    case MaskType::kFloat32:
      return use(Float32Mask());
    case MaskType::kFloat16:
      return use(Float16Mask());
    case MaskType::kBFloat16:
      return use(BFloat16Mask());
  }
}

// A value as verdict[1] has it.
RRATTN_HOST_DEVICE inline int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
RRATTN_HOST_DEVICE inline int32_t bits_of(uint16_t value) { return value; }
RRATTN_HOST_DEVICE inline int32_t bits_of(uint8_t value) { return value; }

// `own_row` is that of the key's position, negative for a cached key.
RRATTN_HOST_DEVICE inline int32_t start_row(int64_t own_row, int32_t rows_that_see) {
  if (rows_that_see == 0) return 0;
  return static_cast<int32_t>(own_row > 0 ? own_row : 0) + rows_that_see;
}

}  // namespace rrattn
