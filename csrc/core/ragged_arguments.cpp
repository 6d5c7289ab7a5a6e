#include "ragged_arguments.h"

#include <algorithm>
#include <utility>

#include "checks.h"
#include "overlap.h"

namespace rrattn {

namespace {

constexpr const char* kLengthsMeaning = "one for each request";

// Where no memory is: of arrays that are checked before they are there.
void* const kNowhere = reinterpret_cast<void*>(intptr_t{1} << 62);

void require_on_cpu(const Array& array) {
  if (array.device != "cpu") {
    fail(array.name, " is on ", array.device, ", but ragged batches run on a CPU only");
  }
}

// A list of int32 in host memory.
const int32_t* numbers_of(const Array& array, const std::vector<int64_t>& shape,
                          const char* meaning) {
  require_on_cpu(array);
  require_type(array, ElementType::kInt32, "int32");
  require_shape(array, shape, meaning);
  require_contiguous(array);
  return static_cast<const int32_t*>(array.data);
}

// [L, H, D] as a batch of one.
Array as_batch(Array array) {
  array.shape.insert(array.shape.begin(), 1);
  array.strides.insert(array.strides.begin(), 0);
  return array;
}

// Pages as [pages, page_size, Hkv, D], whatever their layout.
Array tokens_first(Array pages, bool heads_first) {
  if (heads_first) {
    std::swap(pages.shape[1], pages.shape[2]);
    std::swap(pages.strides[1], pages.strides[2]);
  }
  return pages;
}

// The keys or values of one request as far as their sizes go: all rows, or one page.
Array sample_of(const Array& rows, bool paged, bool heads_first) {
  if (!paged) return as_batch(rows);
  Array page = tokens_first(rows, heads_first);
  page.shape[0] = 1;
  return page;
}

const char* meaning_of_pages(bool heads_first) {
  return heads_first ? "[pages, num_heads_k, page size, head_dim]"
                     : "[pages, page size, num_heads_k, head_dim]";
}

void check_page_size(int64_t page_size) {
  if (page_size != kPageUnit && (page_size == 0 || page_size % kBlockSize != 0)) {
    fail("the page size is ", page_size, ", but must be 64 or a multiple of 128");
  }
}

void check_pages(const RaggedArrays& arrays, const std::vector<RequestLengths>& lengths,
                 bool heads_first) {
  const Array &key = arrays.key, &tables = *arrays.block_tables;
  const auto batch = static_cast<int64_t>(lengths.size());
  const int64_t page_size = key.shape[heads_first ? 2 : 1], num_pages = key.shape[0];
  check_page_size(page_size);
  require_rank(tables.name, tables.shape, 2, "[requests, pages of a request]");
  const int64_t width = tables.shape[1];
  const int32_t* table = numbers_of(tables, {batch, width}, "[requests, pages of a request]");
  for (int64_t b = 0; b < batch; ++b, table += width) {
    const int64_t used = ceil_div(lengths[b].seqlen_k, page_size);
    if (used > width) {
      fail("seqlens_k[", b, "] is ", lengths[b].seqlen_k, ", but must be at most ",
           width * page_size, ": block_tables has ", width, " pages of ", page_size,
           " tokens for each request");
    }
    for (int64_t i = 0; i < used; ++i) {
      if (table[i] < 0 || table[i] >= num_pages) {
        fail("block_tables[", b, ", ", i, "] is ", table[i], ", but must be from 0 to ",
             num_pages - 1, ": key has ", num_pages, " pages");
      }
    }
  }
}

void check_pooled_keys(const Array& pooled, const RaggedArrays& arrays, const Heads& heads,
                       int64_t page_size, int64_t key_stride) {
  if (!arrays.block_tables) {
    fail("pooled_keys is given, but must be None without block_tables: it lies beside the pages");
  }
  require_on_cpu(pooled);
  require_type(pooled, ElementType::kFloat32, "float32");
  require_shape(
      pooled, {arrays.key.shape[0], heads.num_heads_k, page_size / key_stride, heads.head_dim + 1},
      "[pages, num_heads_k, page size / key_stride, head_dim + 1]");
  require_contiguous(pooled);
}

const uint8_t* check_keep_last(const OptionalArray& keep_last, int64_t batch) {
  if (!keep_last) return nullptr;
  require_on_cpu(*keep_last);
  require_type(*keep_last, ElementType::kBool, "bool");
  require_shape(*keep_last, {batch}, kLengthsMeaning);
  require_contiguous(*keep_last);
  return static_cast<const uint8_t*>(keep_last->data);
}

// Whether the threshold keeps every visible block of every head, whatever the scores are.
bool keeps_all(const KeepRules& rules, int64_t num_heads) {
  for (int64_t head = 0; head < num_heads; ++head) {
    if (rules.threshold_of(head) != 1) return false;
  }
  return true;
}

// The same rows from a later one on.
Rows from(Rows rows, int64_t row, DataType dtype) {
  rows.data = static_cast<char*>(rows.data) + row * rows.row_stride * size_of(dtype);
  return rows;
}

}  // namespace

std::vector<RequestLengths> ragged_lengths(const RaggedArrays& arrays, bool heads_first) {
  const Array &query = arrays.query, &cu_seqlens = arrays.cu_seqlens_q;
  require_on_cpu(query);
  require_rank(query.name, query.shape, 3, "[tokens, num_heads, head_dim]");
  const bool paged = arrays.block_tables.has_value();
  for (const Array* array : {&arrays.key, &arrays.value}) {
    require_on_cpu(*array);
    require_rank(array->name, array->shape, paged ? 4 : 3,
                 paged ? meaning_of_pages(heads_first) : "[tokens, num_heads_k, head_dim]");
  }
  require_rank(cu_seqlens.name, cu_seqlens.shape, 1, "[requests + 1]");
  if (cu_seqlens.shape[0] == 0) fail(cu_seqlens.name, " is empty, but must begin with 0");
  const int64_t batch = cu_seqlens.shape[0] - 1;
  const int32_t* begins = numbers_of(cu_seqlens, {batch + 1}, "[requests + 1]");
  require_rank(arrays.seqlens_k.name, arrays.seqlens_k.shape, 1, "[requests]");
  const int32_t* seqlens_k = numbers_of(arrays.seqlens_k, {batch}, kLengthsMeaning);
  if (begins[0] != 0) fail("cu_seqlens_q[0] is ", begins[0], ", but must be 0");

  std::vector<RequestLengths> lengths;
  int64_t num_keys = 0;
  for (int64_t b = 0; b < batch; ++b) {
    if (begins[b + 1] < begins[b]) {
      fail("cu_seqlens_q[", b + 1, "] is ", begins[b + 1], ", but must be at least ", begins[b],
           ", which cu_seqlens_q[", b, "] is");
    }
    const int64_t seqlen_q = int64_t{begins[b + 1]} - begins[b];
    if (seqlens_k[b] < seqlen_q || seqlens_k[b] > kMaxLength) {
      fail("seqlens_k[", b, "] is ", seqlens_k[b], ", but must be from ", seqlen_q, " to ",
           kMaxLength, ": the request has ", seqlen_q, " queries, which are its last tokens");
    }
    num_keys += seqlens_k[b];
    lengths.push_back({begins[b], seqlen_q, seqlens_k[b]});
  }
  if (begins[batch] != query.shape[0]) {
    fail("cu_seqlens_q[", batch, "] is ", begins[batch], ", but must be ", query.shape[0],
         ", the number of tokens of query");
  }
  if (paged) {
    check_pages(arrays, lengths, heads_first);
  } else if (num_keys != arrays.key.shape[0]) {
    fail("seqlens_k adds up to ", num_keys, ", but must to ", arrays.key.shape[0],
         ", the number of tokens of key");
  }
  return lengths;
}

int64_t ragged_mask_words(const std::vector<RequestLengths>& lengths, int64_t num_heads) {
  int64_t words = 0;
  for (const RequestLengths& request : lengths) {
    words += num_heads * ceil_div(request.seqlen_q, kBlockSize) *
             ceil_div(ceil_div(request.seqlen_k, kBlockSize), kMaskWordBits);
  }
  return words;
}

RaggedCalls ragged_calls(const RaggedArrays& arrays, const std::vector<RequestLengths>& lengths,
                         const Array& out, const Array& lse, const Array& block_mask,
                         const RaggedSettings& settings) {
  const bool paged = arrays.block_tables.has_value(), heads_first = settings.heads_first;
  const Array &query = arrays.query, &key = arrays.key, &value = arrays.value;
  const int64_t num_tokens = query.shape[0], num_heads = query.shape[1];
  if (!std::equal(key.shape.begin(), key.shape.end() - 1, value.shape.begin())) {
    fail("value has shape ", to_string(value.shape), ", but must have that of key, ",
         to_string(key.shape), ", but for the head size");
  }
  require_shape(out, {num_tokens, num_heads, value.shape.back()},
                "[tokens, num_heads, head_dim of value]");
  require_type(lse, ElementType::kFloat32, "float32");
  require_shape(lse, {num_heads, num_tokens}, "[num_heads, tokens]");
  require_type(block_mask, ElementType::kInt32, "int32");
  require_shape(block_mask, {ragged_mask_words(lengths, num_heads)},
                "the words of all requests' masks, [num_heads, query blocks, words of 32 key "
                "blocks] one after the other");
  require_contiguous(block_mask);
  const auto batch = static_cast<int64_t>(lengths.size());
  const uint8_t* keep_last = check_keep_last(arrays.keep_last, batch);

  // The rest is checked as a usual call of all queries over the keys of one page or of all requests,
  // which has the same types, heads, strides and settings.
  const Array one_query = as_batch(query), one_out = as_batch(out), one_lse = as_batch(lse);
  const Array one_key = sample_of(key, paged, heads_first);
  const Array one_value = sample_of(value, paged, heads_first);
  Array scores, mask;
  scores.name = "block_scores";
  mask.name = "block_mask";
  scores.device = mask.device = "cpu";
  scores.data = mask.data = kNowhere;
  scores.type = ElementType::kFloat32;
  mask.type = ElementType::kInt32;
  const int64_t m_blocks = ceil_div(num_tokens, kBlockSize);
  const int64_t n_blocks = ceil_div(one_key.shape[1], kBlockSize);
  const int64_t words = ceil_div(n_blocks, kMaskWordBits);
  scores.shape = {1, num_heads, m_blocks, n_blocks};
  scores.strides = {num_heads * m_blocks * n_blocks, m_blocks * n_blocks, n_blocks, 1};
  mask.shape = {1, num_heads, m_blocks, words};
  mask.strides = {num_heads * m_blocks * words, m_blocks * words, words, 1};
  scores.element_bytes = mask.element_bytes = 4;
  const EstimateParams estimate = estimate_params(one_query, one_key, std::nullopt, arrays.sink,
                                                  scores, false, settings.sampling);
  scores.data = static_cast<char*>(kNowhere) + (intptr_t{1} << 61);
  const SelectParams select = select_params(scores, arrays.head_thresholds, std::nullopt, mask,
                                            false, num_tokens, one_key.shape[1], settings.rules);
  const AttendParams attend =
      attend_params(one_query, one_key, one_value, mask, std::nullopt, arrays.sink, one_out,
                    one_lse, false, settings.sampling.softmax_scale, settings.compensate);
  const int64_t page_size = paged ? one_key.shape[1] : 0;
  const int64_t key_stride = estimate.sampling.key_stride;
  if (arrays.pooled_keys) {
    check_pooled_keys(*arrays.pooled_keys, arrays, estimate.heads, page_size, key_stride);
  }
  std::vector<const Array*> outputs = {&out, &lse, &block_mask};
  std::vector<const Array*> inputs = {&query, &key, &value, &arrays.cu_seqlens_q,
                                      &arrays.seqlens_k};
  if (arrays.pooled_keys) outputs.push_back(&*arrays.pooled_keys);
  for (const OptionalArray* array :
       {&arrays.block_tables, &arrays.keep_last, &arrays.head_thresholds, &arrays.sink}) {
    if (*array) inputs.push_back(&**array);
  }
  require_own_memory(outputs, inputs, &query);

  RaggedCalls calls;
  int64_t first_key = 0, first_word = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const RequestLengths& request = lengths[b];
    if (request.seqlen_q > 0) {
      Visibility visibility{1, request.seqlen_q, request.seqlen_k, num_heads, true, {}};
      Pages pages;
      if (paged) {
        pages = {static_cast<const int32_t*>(arrays.block_tables->data) +
                     b * arrays.block_tables->shape[1],
                 page_size};
      }
      EstimateCall estimate_call{estimate, pages, {}};
      EstimateParams& estimated = estimate_call.params;
      estimated.visibility = visibility;
      estimated.query = from(estimate.query, request.first_query, estimate.heads.dtype);
      estimated.key = from(estimate.key, first_key, estimate.heads.dtype);
      if (arrays.pooled_keys) {
        estimate_call.pooled = {static_cast<float*>(arrays.pooled_keys->data),
                                request.seqlen_k - request.seqlen_q};
      }
      SelectParams selected = select;
      selected.visibility = visibility;
      selected.rules.keep_local = std::min(settings.rules.keep_local, visibility.num_n_blocks());
      if (keep_last) selected.rules.keep_last = keep_last[b] != 0;
      selected.block_mask = static_cast<uint32_t*>(block_mask.data) + first_word;
      if ((selected.rules.keep_last && visibility.num_m_blocks() == 1) ||
          keeps_all(selected.rules, num_heads)) {
        estimate_call.scores_wanted = false;
        selected.rules.threshold = 1;
        selected.rules.head_thresholds = nullptr;
      }
      AttendCall attend_call(attend);
      AttendParams& attended = attend_call.params;
      attend_call.pages = pages;
      attend_call.lse_head_stride = num_tokens;
      attended.visibility = visibility;
      attended.query = from(attend.query, request.first_query, attend.heads.dtype);
      attended.key = estimated.key;
      attended.value = from(attend.value, first_key, attend.heads.dtype);
      attended.block_mask = selected.block_mask;
      attended.out = from(attend.out, request.first_query, attend.heads.dtype);
      attended.lse = static_cast<float*>(lse.data) + request.first_query;
      first_word += num_heads * visibility.num_m_blocks() * visibility.num_mask_words();
      calls.estimate.push_back(estimate_call);
      calls.select.push_back(selected);
      calls.attend.push_back(attend_call);
    }
    if (!paged) first_key += request.seqlen_k;
  }
  return calls;
}

}  // namespace rrattn
