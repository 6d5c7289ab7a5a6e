// How warp groups work together: barriers in shared memory (mbarrier), and rings of them.
//
// Unlike CUTLASS's, these also keep the compiler from moving ordinary loads and stores across them:
// an arrive releases all that its thread wrote before, and a wait acquires it.
#pragma once

#include <cstdint>

namespace rrattn::cuda::sm90 {

constexpr int kWarpGroup = 128;  // threads: four warps, which wgmma and setmaxnreg address together

class Barrier {
 public:
  __device__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address()), "r"(arrivals)
                 : "memory");
  }
  __device__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address()) : "memory");
  }
  // Arrives, and makes the phase wait for this many bytes of bulk copies too.
  __device__ void arrive_and_expect(uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address()),
                 "r"(bytes)
                 : "memory");
  }
  // Waits until the phase of this parity is over.
  __device__ void wait(uint32_t parity) {
    uint32_t done;
    do {
      asm volatile(
          "{\n"
          ".reg .pred p;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
          "selp.u32 %0, 1, 0, p;\n"
          "}\n"
          : "=r"(done)
          : "r"(address()), "r"(parity)
          : "memory");
    } while (!done);
  }
  __device__ uint64_t* raw() { return &state_; }

 private:
  __device__ uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(&state_));
  }
  uint64_t state_;
};

// Makes what this thread wrote to shared or global memory visible to wgmma and bulk copies that are
// started after a barrier. Waits until the writes have reached global memory, about a microsecond.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }
// The same for writes to shared memory alone, which is quick.
__device__ inline void fence_async_proxy_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A position in a ring of kSize slots, and the parity of the current round.
template <int kSize>
struct RingPosition {
  int slot = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++slot == kSize) {
      slot = 0;
      parity ^= 1;
    }
  }
};

}  // namespace rrattn::cuda::sm90
