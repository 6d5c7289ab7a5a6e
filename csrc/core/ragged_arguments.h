// The arguments of a ragged batch, checked. On a CPU they are made into the calls of its requests:
// unlike other arguments, the lengths and pages are read here. On a GPU, in whose memory they are, they
// are not.
#pragma once

#include <vector>

#include "arguments.h"
#include "ragged.h"

namespace rrattn {

struct RaggedSettings {
  bool heads_first = true;  // pages are [pages, Hkv, page_size, D], else [pages, page_size, Hkv, D]
  Sampling sampling;
  KeepRules rules;
  bool compensate = false;
  int64_t max_seqlen_k = 0;  // the most keys of a request; 0: as many as the arrays have room for
  int64_t max_num_keys = 0;  // the most of all requests; 0: the same
};

inline auto settings_of(RaggedSettings& settings) {
  return std::tuple_cat(std::make_tuple(Setting{"heads_first", settings.heads_first}),
                        settings_of(settings.sampling), settings_of(settings.rules),
                        std::make_tuple(Setting{"compensate", settings.compensate},
                                        Setting{"max_seqlen_k", settings.max_seqlen_k},
                                        Setting{"max_num_keys", settings.max_num_keys}));
}

// Queries are the last of a request's tokens and see the keys up to their own.
struct RaggedArrays {
  Array query;       // [tokens, Hq, D]
  Array key, value;  // [tokens of keys, Hkv, D | Dv], or with block_tables pages of them
  Array
      cu_seqlens_q;  // [B + 1] int32: where the queries of each request begin, and the last ones end
  Array seqlens_k;   // [B] int32
  OptionalArray block_tables;     // [B, pages of a request] int32
  OptionalArray keep_last;        // [B] bool, in place of that of the settings
  OptionalArray head_thresholds;  // [Hq] or [1] float32
  OptionalArray sink;             // [Hq] float32
  OptionalArray pooled_keys;  // [pages, Hkv, page_size / key_stride, D + 1] float32, written too
};

// Of each request, its number of queries and of keys.
struct RequestLengths {
  int64_t first_query, seqlen_q, seqlen_k;
};

// Checks the lengths and pages. Everything else is checked by ragged_calls.
std::vector<RequestLengths> ragged_lengths(const RaggedArrays& arrays,
                                           const RaggedSettings& settings);

// Words of the block masks of all requests, [Hq, Mq, ceil(Mk / 32)] one after the other.
int64_t ragged_mask_words(const std::vector<RequestLengths>& lengths, int64_t num_heads);

//   out         [tokens, Hq, Dv]
//   lse         [Hq, tokens] float32, contiguous
//   block_mask  [ragged_mask_words()] int32, contiguous
RaggedCalls ragged_calls(const RaggedArrays& arrays, const std::vector<RequestLengths>& lengths,
                         const Array& out, const Array& lse, const Array& block_mask,
                         const RaggedSettings& settings);

// The same of a batch on a GPU: block_mask is [max_mask_words()].
RaggedParams ragged_params(const RaggedArrays& arrays, const Array& out, const Array& lse,
                           const Array& block_mask, const RaggedSettings& settings);

// No fewer words than the block masks of all requests have, whatever their lengths are.
int64_t max_mask_words(const RaggedArrays& arrays, const RaggedSettings& settings);

}  // namespace rrattn
