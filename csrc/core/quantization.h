// Attention in eight bits: what of it is the same on every device. docs/quantization.md has the
// formulas, rrattn/reference.py the oracle.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "params.h"

namespace rrattn {

enum class Quantization {
  kNone,
  kQkInt8PvFp8,  // INT8 products of queries and keys, FP8 (e4m3) products of probabilities and values
};

// By the name that users know: "qk_int8_pv_fp8", or "" for none. Throws std::invalid_argument for
// any other.
Quantization quantization_of(const std::string& name);

constexpr float kLargestInt8 = 127;  // -128 is not used
constexpr float kLargestE4m3 = 448;
constexpr float kSmallestNormalE4m3 = 0x1p-6f;

// Rows and blocks whose largest element is below this count as zeros: the inverse of a smaller
// number's scale might be infinite.
constexpr float kSmallestScaled = 0x1p-100f;

// The largest e4m3 number of a probability, which is 2^8 at most: a row's base is its largest score
// (as a power of two) rounded up to a whole number, so that another base changes all probabilities
// by a power of two.
constexpr float kProbabilityScale = 256;

// How many neighbouring elements of a row are turned together, by a Hadamard matrix, before they become
// INT8: the largest power of two that the head size is a multiple of.
RRATTN_HOST_DEVICE inline int64_t rotated_together(int64_t head_dim) {
  return head_dim & -head_dim;
}

// What INT8 numbers of a row or block are multiplied by to be `factor` times its elements: bfloat16,
// away from zero. The product of two such scales and 1.5 * 2^23 is exact in float32, which Hopper's
// kernel makes use of.
struct Int8Scale {
  float scale;
  float inverse;  // what elements are multiplied by to become INT8

  RRATTN_HOST_DEVICE Int8Scale(float largest, float factor)
      : scale(largest / kLargestInt8 * factor), inverse(0) {
    uint32_t bits;
    memcpy(&bits, &scale, sizeof(bits));
    bits = (bits + 0xffff) & 0xffff0000;
    memcpy(&scale, &bits, sizeof(bits));
    if (largest >= kSmallestScaled && scale != 0) inverse = factor / scale;
  }
};

// The exponent of the power of two that a column of values is divided by: the smallest one from -100
// on with which its largest element is an e4m3 number.
RRATTN_HOST_DEVICE inline int value_exponent(float largest) {
  if (largest < kSmallestScaled) return 0;
  int exponent;
  const float fraction = std::frexp(largest, &exponent);  // in [1/2, 1); 448 is 0.875 * 2^9
  exponent += (fraction > kLargestE4m3 * 0x1p-9f) - 9;
  return exponent < -100 ? -100 : exponent;
}

}  // namespace rrattn
