// Counting and walking the bits of a row of the packed block mask.
#pragma once

#include <cstdint>

namespace rrattn::cuda {

// How many bits before `end` are set. All lanes of a warp call it together.
__device__ inline int count_bits(const uint32_t* words, int end) {
  int count = 0;
  for (int word = static_cast<int>(threadIdx.x) % 32; word * 32 < end; word += 32) {
    const int bits = min(end - word * 32, 32);
    count += __popc(words[word] & ~0u >> (32 - bits));
  }
  return __reduce_add_sync(~0u, count);
}

// The set bits before `end`, from the last to the first. All lanes of a warp call it together; each
// holds one of 32 words.
class BitWalk {
 public:
  __device__ BitWalk(const uint32_t* words, int end)
      : words_(words), end_(end), first_word_((end + 31) / 32) {
    load();
  }

  // The next bit; < 0: none is left.
  __device__ int next() {
    while (bits_ == 0) {
      if (filled_words_ == 0) {
        if (first_word_ <= 0) return -1;
        load();
        continue;
      }
      word_ = 31 - __clz(filled_words_);
      filled_words_ ^= 1u << word_;
      bits_ = __shfl_sync(~0u, own_word_, word_);
    }
    const int bit = 31 - __clz(bits_);
    bits_ ^= 1u << bit;
    return (first_word_ + word_) * 32 + bit;
  }

 private:
  // The 32 words before first_word_.
  __device__ void load() {
    const int end_word = first_word_;
    first_word_ = max(first_word_ - 32, 0);
    const int word = first_word_ + static_cast<int>(threadIdx.x) % 32;
    own_word_ = word < end_word ? words_[word] : 0;
    if (end_ - word * 32 < 32 && own_word_ != 0) own_word_ &= (1u << (end_ - word * 32)) - 1;
    filled_words_ = __ballot_sync(~0u, own_word_ != 0);
  }

  const uint32_t* words_;
  int end_;
  int first_word_;
  uint32_t own_word_, filled_words_, bits_ = 0;
  int word_ = 0;
};

}  // namespace rrattn::cuda
