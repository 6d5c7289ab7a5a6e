// Several calls of a stage that run as one, on a CPU: those of the requests of a ragged batch, each
// with lengths of its own and perhaps with keys and values in the pages of a cache. A usual call is
// one of these, without pages.
#pragma once

#include <cstdint>
#include <vector>

#include "params.h"

namespace rrattn {

constexpr int64_t kPageUnit = 64;  // a page has this many tokens, or a multiple of a block

// Where the keys and values of a request lie: row r in row r % page_size of page
// table[r / page_size]. Their tensors are [pages, page_size, Hkv, D], so the batch stride of `Rows`
// is the step from page to page.
struct Pages {
  const int32_t* table = nullptr;  // [ceil(Lk / page_size)]; null: one after the other, no pages
  int64_t page_size = 0;
};

// The estimate's strides of keys, kept beside the pages: the sum of the keys of a stride and behind
// it their variance. A stride divides a page, so none lies in two pages.
struct PooledPages {
  float* data = nullptr;  // [pages, Hkv, page_size / key_stride, D + 1]; null: none are kept
  int64_t num_cached =
      0;  // tokens of the request whose strides are there: those before its queries
};

struct EstimateCall {
  EstimateParams params;
  Pages pages;
  PooledPages pooled;
  bool scores_wanted = true;  // else only `pooled` is brought up to date, if there is one
};

struct AttendCall {
  AttendParams params;
  Pages pages;
  int64_t lse_head_stride = 0;  // from one head's log-sum-exps to the next one's

  AttendCall() = default;
  explicit AttendCall(const AttendParams& params)
      : params(params), lse_head_stride(params.visibility.seqlen_q) {}
};

// At least one, of the same heads, settings and execution; of several, each has a batch of 1.
template <typename Call>
struct Calls {
  const Call* first;
  int64_t count;

  const Call& operator[](int64_t i) const { return first[i]; }
};

// All stages of the requests of a ragged batch that have queries. Their block scores are a part of
// the workspace, so their pointers are still missing here.
struct RaggedCalls {
  std::vector<EstimateCall> estimate;
  std::vector<SelectParams> select;
  std::vector<AttendCall> attend;
};

}  // namespace rrattn
