#include "ragged_arguments.h"

#include <algorithm>
#include <utility>

#include "checks.h"
#include "overlap.h"

namespace rrattn {

namespace {

constexpr const char* kLengthsMeaning = "one for each request";

constexpr intptr_t kNowhere = intptr_t{1} << 61;  // where no memory is

// A list of int32 in the memory of the query's device.
const int32_t* numbers_of(const Array& array, const Array& query, const std::vector<int64_t>& shape,
                          const char* meaning) {
  require_same_device(array, query);
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

int64_t page_size_of(const RaggedArrays& arrays, bool heads_first) {
  return arrays.block_tables ? arrays.key.shape[heads_first ? 2 : 1] : 0;
}

// The pages of each of `batch` requests, [requests, pages of a request].
const int32_t* check_tables(const RaggedArrays& arrays, int64_t batch, bool heads_first) {
  check_page_size(page_size_of(arrays, heads_first));
  const Array& tables = *arrays.block_tables;
  require_rank(tables.name, tables.shape, 2, "[requests, pages of a request]");
  return numbers_of(tables, arrays.query, {batch, tables.shape[1]},
                    "[requests, pages of a request]");
}

void check_pages(const RaggedArrays& arrays, const std::vector<RequestLengths>& lengths,
                 bool heads_first) {
  const auto batch = static_cast<int64_t>(lengths.size());
  const int32_t* table = check_tables(arrays, batch, heads_first);
  const int64_t width = arrays.block_tables->shape[1];
  const int64_t page_size = page_size_of(arrays, heads_first), num_pages = arrays.key.shape[0];
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
  require_same_device(pooled, arrays.query);
  require_type(pooled, ElementType::kFloat32, "float32");
  require_shape(
      pooled, {arrays.key.shape[0], heads.num_heads_k, page_size / key_stride, heads.head_dim + 1},
      "[pages, num_heads_k, page size / key_stride, head_dim + 1]");
  require_contiguous(pooled);
}

const uint8_t* check_keep_last(const OptionalArray& keep_last, const Array& query, int64_t batch) {
  if (!keep_last) return nullptr;
  require_same_device(*keep_last, query);
  require_type(*keep_last, ElementType::kBool, "bool");
  require_shape(*keep_last, {batch}, kLengthsMeaning);
  require_contiguous(*keep_last);
  return static_cast<const uint8_t*>(keep_last->data);
}

// A contiguous array that is checked in place of many that are not there yet.
Array nowhere(const char* name, ElementType type, std::vector<int64_t> shape, intptr_t address,
              const Array& query) {
  Array array;
  array.name = name;
  array.data = reinterpret_cast<void*>(address);
  array.type = type;
  array.element_bytes = 4;
  array.device = query.device;
  array.gpu = query.gpu;
  array.shape = std::move(shape);
  array.strides.resize(array.shape.size());
  int64_t step = 1;
  for (size_t i = array.shape.size(); i-- > 0; step *= array.shape[i]) array.strides[i] = step;
  return array;
}

// What the requests have in common: types, heads, strides and settings are checked as those of a usual
// call of all queries over the keys of one page, or of all requests. The tables are checked before.
RaggedParams params_as_of_one_call(const RaggedArrays& arrays, int64_t batch, const Array& out,
                                   const Array& lse, const Array& block_mask,
                                   const RaggedSettings& settings) {
  const uint8_t* keep_last = check_keep_last(arrays.keep_last, arrays.query, batch);
  const bool paged = arrays.block_tables.has_value();
  const Array query = as_batch(arrays.query);
  const Array key = sample_of(arrays.key, paged, settings.heads_first);
  const Array value = sample_of(arrays.value, paged, settings.heads_first);
  const int64_t seqlen_q = query.shape[1], num_heads = query.shape[2], seqlen_k = key.shape[1];
  const int64_t m_blocks = ceil_div(seqlen_q, kBlockSize);
  const int64_t n_blocks = ceil_div(seqlen_k, kBlockSize);
  const Array scores = nowhere("block_scores", ElementType::kFloat32,
                               {1, num_heads, m_blocks, n_blocks}, kNowhere, query);
  const Array mask =
      nowhere("block_mask", ElementType::kInt32,
              {1, num_heads, m_blocks, ceil_div(n_blocks, kMaskWordBits)}, kNowhere * 3 / 2, query);
  RaggedParams params;
  params.estimate =
      estimate_params(query, key, std::nullopt, arrays.sink, scores, false, settings.sampling);
  params.select = select_params(scores, arrays.head_thresholds, std::nullopt, mask, false, seqlen_q,
                                seqlen_k, settings.rules);
  params.select.rules.keep_local = settings.rules.keep_local;  // a request may have more blocks
  params.attend =
      attend_params(query, key, value, mask, std::nullopt, arrays.sink, as_batch(out),
                    as_batch(lse), false, settings.sampling.softmax_scale, settings.compensate);
  params.select.block_mask = static_cast<uint32_t*>(block_mask.data);
  params.num_tokens = seqlen_q;
  params.num_requests = batch;
  params.keep_last = keep_last;
  if (paged) {
    params.block_tables = static_cast<const int32_t*>(arrays.block_tables->data);
    params.table_width = arrays.block_tables->shape[1];
    params.num_pages = arrays.key.shape[0];
    params.page_size = page_size_of(arrays, settings.heads_first);
  }
  return params;
}

void check_outputs(const RaggedArrays& arrays, int64_t mask_words, const Array& out,
                   const Array& lse, const Array& block_mask) {
  const int64_t num_tokens = arrays.query.shape[0], num_heads = arrays.query.shape[1];
  require_shape(out, {num_tokens, num_heads, arrays.value.shape.back()},
                "[tokens, num_heads, head_dim of value]");
  require_type(lse, ElementType::kFloat32, "float32");
  require_shape(lse, {num_heads, num_tokens}, "[num_heads, tokens]");
  require_type(block_mask, ElementType::kInt32, "int32");
  require_shape(block_mask, {mask_words},
                "the words of all requests' masks, [num_heads, query blocks, words of 32 key "
                "blocks] one after the other");
  require_contiguous(block_mask);
  std::vector<const Array*> outputs = {&out, &lse, &block_mask};
  std::vector<const Array*> inputs = {&arrays.query, &arrays.key, &arrays.value,
                                      &arrays.cu_seqlens_q, &arrays.seqlens_k};
  if (arrays.pooled_keys) outputs.push_back(&*arrays.pooled_keys);
  for (const OptionalArray* array :
       {&arrays.block_tables, &arrays.keep_last, &arrays.head_thresholds, &arrays.sink}) {
    if (*array) inputs.push_back(&**array);
  }
  require_own_memory(outputs, inputs, &arrays.query);
}

// Of query, key and value, as far as they tell how many requests there are; returns that.
int64_t check_ranks(const RaggedArrays& arrays, bool heads_first) {
  const Array &query = arrays.query, &cu_seqlens = arrays.cu_seqlens_q;
  require_rank(query.name, query.shape, 3, "[tokens, num_heads, head_dim]");
  const bool paged = arrays.block_tables.has_value();
  for (const Array* array : {&arrays.key, &arrays.value}) {
    require_same_device(*array, query);
    require_rank(array->name, array->shape, paged ? 4 : 3,
                 paged ? meaning_of_pages(heads_first) : "[tokens, num_heads_k, head_dim]");
  }
  require_rank(cu_seqlens.name, cu_seqlens.shape, 1, "[requests + 1]");
  if (cu_seqlens.shape[0] == 0) fail(cu_seqlens.name, " is empty, but must begin with 0");
  require_rank(arrays.seqlens_k.name, arrays.seqlens_k.shape, 1, "[requests]");
  return cu_seqlens.shape[0] - 1;
}

int64_t mask_words_of(const RequestLengths& request, int64_t num_heads) {
  return num_heads * ceil_div(request.seqlen_q, kBlockSize) *
         ceil_div(ceil_div(request.seqlen_k, kBlockSize), kMaskWordBits);
}

void check_value_rows(const Array& key, const Array& value) {
  if (!std::equal(key.shape.begin(), key.shape.end() - 1, value.shape.begin())) {
    fail("value has shape ", to_string(value.shape), ", but must have that of key, ",
         to_string(key.shape), ", but for the head size");
  }
}

// How many keys there is room for: what a setting says, or else as many as fit.
int64_t room_for(int64_t setting, const char* name, int64_t fitting) {
  if (setting < 0) fail(name, " is ", setting, ", but must be at least 0, which stands for all");
  return setting > 0 ? std::min(setting, fitting) : fitting;
}

// Sets the maxima of params from the settings and from what the arrays have room for.
void set_room(const RaggedArrays& arrays, const RaggedSettings& settings, RaggedParams& params) {
  const bool paged = arrays.block_tables.has_value();
  const int64_t of_request =
      paged ? arrays.block_tables->shape[1] * params.page_size : arrays.key.shape[0];
  params.max_seqlen_k =
      std::min(room_for(settings.max_seqlen_k, "max_seqlen_k", of_request), kMaxLength);
  const int64_t of_all = paged ? params.num_requests * params.max_seqlen_k : arrays.key.shape[0];
  params.max_num_keys = room_for(settings.max_num_keys, "max_num_keys", of_all);
}

}  // namespace

std::vector<RequestLengths> ragged_lengths(const RaggedArrays& arrays,
                                           const RaggedSettings& settings) {
  const Array& query = arrays.query;
  const int64_t batch = check_ranks(arrays, settings.heads_first);
  const bool paged = arrays.block_tables.has_value();
  const int32_t* begins = numbers_of(arrays.cu_seqlens_q, query, {batch + 1}, "[requests + 1]");
  const int32_t* seqlens_k = numbers_of(arrays.seqlens_k, query, {batch}, kLengthsMeaning);
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
    if (settings.max_seqlen_k > 0 && seqlens_k[b] > settings.max_seqlen_k) {
      fail("seqlens_k[", b, "] is ", seqlens_k[b], ", but must be at most max_seqlen_k, ",
           settings.max_seqlen_k);
    }
    num_keys += seqlens_k[b];
    lengths.push_back({begins[b], seqlen_q, seqlens_k[b]});
  }
  if (begins[batch] != query.shape[0]) {
    fail("cu_seqlens_q[", batch, "] is ", begins[batch], ", but must be ", query.shape[0],
         ", the number of tokens of query");
  }
  if (settings.max_num_keys > 0 && num_keys > settings.max_num_keys) {
    fail("seqlens_k adds up to ", num_keys, ", but must to at most max_num_keys, ",
         settings.max_num_keys);
  }
  if (paged) {
    check_pages(arrays, lengths, settings.heads_first);
  } else if (num_keys != arrays.key.shape[0]) {
    fail("seqlens_k adds up to ", num_keys, ", but must to ", arrays.key.shape[0],
         ", the number of tokens of key");
  }
  return lengths;
}

int64_t ragged_mask_words(const std::vector<RequestLengths>& lengths, int64_t num_heads) {
  int64_t words = 0;
  for (const RequestLengths& request : lengths) words += mask_words_of(request, num_heads);
  return words;
}

RaggedCalls ragged_calls(const RaggedArrays& arrays, const std::vector<RequestLengths>& lengths,
                         const Array& out, const Array& lse, const Array& block_mask,
                         const RaggedSettings& settings) {
  const int64_t num_heads = arrays.query.shape[1];
  check_value_rows(arrays.key, arrays.value);
  check_outputs(arrays, ragged_mask_words(lengths, num_heads), out, lse, block_mask);
  const auto batch = static_cast<int64_t>(lengths.size());
  const RaggedParams params = params_as_of_one_call(arrays, batch, out, lse, block_mask, settings);
  if (arrays.pooled_keys) {
    check_pooled_keys(*arrays.pooled_keys, arrays, params.attend.heads, params.page_size,
                      params.estimate.sampling.key_stride);
  }

  RaggedCalls calls;
  int64_t first_key = 0, first_word = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const RequestLengths& request = lengths[b];
    if (request.seqlen_q > 0) {
      RequestCalls own = calls_of_request(
          params, b,
          {request.first_query, request.seqlen_q, first_key, request.seqlen_k, first_word});
      if (arrays.pooled_keys) {
        own.estimate.pooled = {static_cast<float*>(arrays.pooled_keys->data),
                               request.seqlen_k - request.seqlen_q};
      }
      calls.estimate.push_back(own.estimate);
      calls.select.push_back(own.select);
      calls.attend.push_back(own.attend);
    }
    first_word += mask_words_of(request, num_heads);
    if (params.block_tables == nullptr) first_key += request.seqlen_k;
  }
  return calls;
}

int64_t max_mask_words(const RaggedArrays& arrays, const RaggedSettings& settings) {
  RaggedParams params;
  params.num_requests = check_ranks(arrays, settings.heads_first);
  params.page_size = page_size_of(arrays, settings.heads_first);
  if (arrays.block_tables) check_tables(arrays, params.num_requests, settings.heads_first);
  params.num_tokens = arrays.query.shape[0];
  set_room(arrays, settings, params);
  return arrays.query.shape[1] * max_m_blocks(params) *
         ceil_div(ceil_div(params.max_seqlen_k, kBlockSize), kMaskWordBits);
}

RaggedParams ragged_params(const RaggedArrays& arrays, const Array& out, const Array& lse,
                           const Array& block_mask, const RaggedSettings& settings) {
  const Array& query = arrays.query;
  const int64_t batch = check_ranks(arrays, settings.heads_first);
  const int64_t mask_words = max_mask_words(arrays, settings);
  check_value_rows(arrays.key, arrays.value);
  check_outputs(arrays, mask_words, out, lse, block_mask);
  if (arrays.pooled_keys) {
    fail(
        "pooled_keys is given, but must be None on a GPU: the estimate there sums the keys of each "
        "call again");
  }
  if (settings.compensate) {
    fail(
        "compensate is True, but ragged batches on a GPU are not compensated: give "
        "compensate=False");
  }
  RaggedParams params = params_as_of_one_call(arrays, batch, out, lse, block_mask, settings);
  params.cu_seqlens_q = numbers_of(arrays.cu_seqlens_q, query, {batch + 1}, "[requests + 1]");
  params.seqlens_k = numbers_of(arrays.seqlens_k, query, {batch}, kLengthsMeaning);
  set_room(arrays, settings, params);
  return params;
}

}  // namespace rrattn
