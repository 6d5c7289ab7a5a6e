// Conversion to e4m3, numbers of eight bits with four of exponent and three of fraction.
#pragma once

#include <cstdint>

namespace rrattn::cuda::sm90::quantized_attend {

// Two numbers as e4m3, the first in the lower byte; those above 448, infinity too, become 448.
__device__ inline uint16_t to_e4m3(float a, float b) {
  uint16_t two;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %2, %1;\n" : "=h"(two) : "f"(a), "f"(b));
  return two;
}
__device__ inline uint32_t join(uint16_t low, uint16_t high) {
  uint32_t four;
  asm("mov.b32 %0, {%1, %2};\n" : "=r"(four) : "h"(low), "h"(high));
  return four;
}

}  // namespace rrattn::cuda::sm90::quantized_attend
