// Several calls of a stage that run as one: those of the requests of a ragged batch, each with lengths
// of its own and perhaps with keys and values in the pages of a cache. On a CPU a usual call is one of
// these, without pages, and the list of a batch is made from lengths in host memory. On a GPU the
// lengths are in its own memory, where the list is made by its first kernel.
#pragma once

#include <algorithm>
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

  // What is added to `row` times the row stride, for where the row lies: the same for all of its page.
  RRATTN_HOST_DEVICE int64_t offset(const Rows& rows, int64_t row) const {
    if (table == nullptr) return 0;
    // In 32 bits, which is all that rows are counted in: division is faster there.
    const uint32_t page = static_cast<uint32_t>(row) / static_cast<uint32_t>(page_size);
    return table[page] * rows.batch_stride - page * page_size * rows.row_stride;
  }
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
  RRATTN_HOST_DEVICE explicit AttendCall(const AttendParams& params)
      : params(params), lse_head_stride(params.visibility.seqlen_q) {}
};

// At least one, of the same heads, settings and execution; of several, each has a batch of 1.
template <typename Call>
struct Calls {
  const Call* first;
  int64_t count;

  const Call& operator[](int64_t i) const { return first[i]; }
};

// A ragged batch: what its requests have in common, and the tables of what each has of its own.
struct RaggedParams {
  // As of one call of all queries. A request's differ in lengths and in where their rows begin.
  EstimateParams estimate;
  SelectParams select;
  AttendParams attend;
  int64_t num_tokens = 0;                 // rows of query
  int64_t num_requests = 0;               // B
  const int32_t* cu_seqlens_q = nullptr;  // [B + 1]
  const int32_t* seqlens_k = nullptr;     // [B]
  const int32_t* block_tables = nullptr;  // [B, table_width]; null: no pages
  int64_t table_width = 0;
  int64_t num_pages = 0;
  int64_t page_size = 0;
  const uint8_t* keep_last = nullptr;  // [B], in place of that of the rules; or null
  // On a GPU, where lengths are not known before it runs, what there is room for.
  int64_t max_seqlen_k = 0;  // keys of a request
  int64_t max_num_keys = 0;  // keys of all requests; without pages rows of key
  Execution execution;
};

// No fewer than the query blocks of all requests.
inline int64_t max_m_blocks(const RaggedParams& batch) {
  const int64_t requests = std::min(batch.num_requests, batch.num_tokens);
  return (batch.num_tokens + requests * (kBlockSize - 1)) / kBlockSize;
}

// Where a request is among all of them.
struct RequestPlace {
  int64_t first_query = 0, seqlen_q = 0;
  int64_t first_key = 0, seqlen_k = 0;  // first_key: 0 with pages
  int64_t first_word = 0;               // of its block mask
};

// All stages of one request.
struct RequestCalls {
  EstimateCall estimate;
  SelectParams select;
  AttendCall attend;
};

// Whether the threshold keeps every visible block of every head, whatever the scores are.
RRATTN_HOST_DEVICE inline bool keeps_all(const KeepRules& rules, int64_t num_heads) {
  for (int64_t head = 0; head < num_heads; ++head) {
    if (rules.threshold_of(head) != 1) return false;
  }
  return true;
}

// The same rows from a later one on.
RRATTN_HOST_DEVICE inline Rows rows_from(Rows rows, int64_t row, DataType dtype) {
  rows.data = static_cast<char*>(rows.data) + row * rows.row_stride * size_of(dtype);
  return rows;
}

// The calls of request b, but for its block scores and pooled keys.
RRATTN_HOST_DEVICE inline RequestCalls calls_of_request(const RaggedParams& batch, int64_t b,
                                                        const RequestPlace& place) {
  const int64_t num_heads = batch.attend.visibility.num_heads;
  const DataType dtype = batch.attend.heads.dtype;
  const Visibility visibility{1, place.seqlen_q, place.seqlen_k, num_heads, true, {}};
  RequestCalls calls;
  EstimateCall& estimate = calls.estimate;
  SelectParams& select = calls.select;
  AttendCall& attend = calls.attend;
  estimate.params = batch.estimate, select = batch.select, attend.params = batch.attend;
  estimate.params.visibility = select.visibility = attend.params.visibility = visibility;
  if (batch.block_tables != nullptr) {
    attend.pages = {batch.block_tables + b * batch.table_width, batch.page_size};
    estimate.pages = attend.pages;
  }
  attend.params.query = rows_from(batch.attend.query, place.first_query, dtype);
  attend.params.key = rows_from(batch.attend.key, place.first_key, dtype);
  attend.params.value = rows_from(batch.attend.value, place.first_key, dtype);
  attend.params.out = rows_from(batch.attend.out, place.first_query, dtype);
  attend.params.lse = batch.attend.lse + place.first_query;
  attend.lse_head_stride = batch.num_tokens;
  estimate.params.query = attend.params.query;
  estimate.params.key = attend.params.key;
  select.block_mask = batch.select.block_mask + place.first_word;
  attend.params.block_mask = select.block_mask;
  select.rules.keep_local = std::min(select.rules.keep_local, visibility.num_n_blocks());
  if (batch.keep_last != nullptr) select.rules.keep_last = batch.keep_last[b] != 0;
  if ((select.rules.keep_last && visibility.num_m_blocks() == 1) ||
      keeps_all(select.rules, num_heads)) {
    // Every visible block is kept, so there are no scores to read.
    estimate.scores_wanted = false;
    select.rules.threshold = 1;
    select.rules.head_thresholds = nullptr;
  }
  return calls;
}

// All stages of the requests of a ragged batch that have queries. Their block scores are a part of
// the workspace, so their pointers are still missing here.
struct RaggedCalls {
  std::vector<EstimateCall> estimate;
  std::vector<SelectParams> select;
  std::vector<AttendCall> attend;
};

}  // namespace rrattn
