// What the values of a dense mask mean, and which masks are FlashMask bounds.
//
// Query row r stands at position r + Lk - Lq of the keys. A mask fits when the rows that see a key
// lie side by side, or are none: they begin at the row of the key's own position (at row 0 for a
// cached key, which lies before all rows), and once the key is hidden from a row, it stays hidden
// from all later ones. Then the number of rows that see a key says which rows they are.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "params.h"

namespace rrattn {

// Bits of a verdict.
constexpr int32_t kNeitherSeenNorHidden = 1;  // a value is a bias; verdict[1] has its bits
constexpr int32_t kNotCausal = 2;             // or a key is seen again after it was hidden

// verdict[1] where no value is a bias.
constexpr int32_t kNoValue = std::numeric_limits<int32_t>::min();

// An additive mask shows a key with 0 and hides it with -9984 or less: bfloat16 rounds -1e4 to
// that.
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
// kLimit and kInfinity are bits of magnitudes, which sort like the magnitudes.
template <uint16_t kLimit, uint16_t kInfinity>
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

// The bits of a value, as verdict[1] holds them.
RRATTN_HOST_DEVICE inline int32_t bits_of(float value) {
  int32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
RRATTN_HOST_DEVICE inline int32_t bits_of(uint16_t value) { return value; }
RRATTN_HOST_DEVICE inline int32_t bits_of(uint8_t value) { return value; }

// The row from which on a key is hidden. `own_row` is the row of the key's own position, negative
// for a cached key.
RRATTN_HOST_DEVICE inline int32_t start_row(int64_t own_row, int32_t rows_that_see) {
  if (rows_that_see == 0) return 0;
  return static_cast<int32_t>(own_row > 0 ? own_row : 0) + rows_that_see;
}

}  // namespace rrattn
