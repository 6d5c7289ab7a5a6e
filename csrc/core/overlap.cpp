#include "overlap.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

namespace rrattn {

namespace {

// A distance of `bytes`, times any whole number from `low` to `high`.
struct Term {
  int64_t bytes, low, high;
};

// Adds the terms of an array: its elements lie at sums of one multiple of each term, in bytes from
// `data`. Its strides may be negative. With `sign` -1 the distances are negated.
void add_terms(const Array& array, int64_t sign, std::vector<Term>& terms) {
  for (size_t i = 0; i < array.shape.size(); ++i) {
    int64_t bytes = array.strides[i] * array.element_bytes, steps = sign * (array.shape[i] - 1);
    if (bytes < 0) bytes = -bytes, steps = -steps;
    if (bytes == 0 || steps == 0) continue;
    const auto same = std::find_if(terms.begin(), terms.end(),
                                   [&](const Term& term) { return term.bytes == bytes; });
    Term& term = same == terms.end() ? terms.emplace_back(Term{bytes, 0, 0}) : *same;
    (steps < 0 ? term.low : term.high) += steps;
  }
}

// The first and the last byte of an array.
std::pair<intptr_t, intptr_t> extent(const Array& array) {
  intptr_t first = reinterpret_cast<intptr_t>(array.data), last = first + array.element_bytes - 1;
  for (size_t i = 0; i < array.shape.size(); ++i) {
    const int64_t reach = array.strides[i] * array.element_bytes * (array.shape[i] - 1);
    (reach < 0 ? first : last) += reach;
  }
  return {first, last};
}

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

// Looks for multiples of the terms that bring `distance` into [low, high], beginning with the terms
// of most bytes. Where strides nest, few multiples of a term can still do so.
class Search {
 public:
  Search(std::vector<Term> terms, int64_t low, int64_t high)
      : terms_(std::move(terms)), low_(low), high_(high) {
    std::sort(terms_.begin(), terms_.end(),
              [](const Term& a, const Term& b) { return a.bytes > b.bytes; });
    rest_.resize(terms_.size() + 1, {0, 0});
    for (size_t i = terms_.size(); i-- > 0;) {
      rest_[i].first = rest_[i + 1].first + terms_[i].bytes * terms_[i].low;
      rest_[i].second = rest_[i + 1].second + terms_[i].bytes * terms_[i].high;
    }
  }

  bool finds(int64_t distance, size_t from = 0) {
    if (distance + rest_[from].second < low_ || distance + rest_[from].first > high_) return false;
    if (from == terms_.size() || --steps_left_ < 0) return true;
    const Term& term = terms_[from];
    const auto& [rest_low, rest_high] = rest_[from + 1];
    const int64_t first = std::max(term.low, -floor_div(distance + rest_high - low_, term.bytes));
    const int64_t last = std::min(term.high, floor_div(high_ - rest_low - distance, term.bytes));
    for (int64_t multiple = first; multiple <= last; ++multiple) {
      if (finds(distance + multiple * term.bytes, from + 1)) return true;
    }
    return false;
  }

 private:
  std::vector<Term> terms_;
  std::vector<std::pair<int64_t, int64_t>> rest_;  // range of the sums of the terms from each on
  int64_t low_, high_;
  int steps_left_ = 10000;
};

// Whether each stride steps over everything that the shorter ones reach.
bool elements_are_apart(const Array& array) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (size_t i = 0; i < array.shape.size(); ++i) {
    if (array.shape[i] > 1) dimensions.emplace_back(std::abs(array.strides[i]), array.shape[i]);
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t reach = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride < reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

bool same_memory(const Array& a, const Array& b) {
  return a.data == b.data && a.shape == b.shape && a.strides == b.strides;
}

}  // namespace

bool share_memory(const Array& a, const Array& b) {
  if (is_empty(a) || is_empty(b) || a.device != b.device) return false;
  const auto [a_first, a_last] = extent(a);
  const auto [b_first, b_last] = extent(b);
  if (a_last < b_first || b_last < a_first) return false;  // the usual case
  std::vector<Term> terms;
  add_terms(a, 1, terms);
  add_terms(b, -1, terms);
  const int64_t distance = reinterpret_cast<intptr_t>(a.data) - reinterpret_cast<intptr_t>(b.data);
  return Search(std::move(terms), 1 - a.element_bytes, b.element_bytes - 1).finds(distance);
}

void require_own_memory(const std::vector<const Array*>& outputs,
                        const std::vector<const Array*>& inputs, const Array* in_place) {
  const auto refuse = [](const Array& output, const Array& other) {
    throw std::invalid_argument(output.name + " shares memory with " + other.name +
                                ", but must have its own: it is written while others are read");
  };
  for (size_t i = 0; i < outputs.size(); ++i) {
    const Array& output = *outputs[i];
    if (is_empty(output)) continue;
    if (!elements_are_apart(output)) {
      throw std::invalid_argument(output.name + " has strides " + to_string(output.strides) +
                                  " for shape " + to_string(output.shape) +
                                  ", in which elements share memory, but each must have its own");
    }
    for (const Array* input : inputs) {
      const bool allowed = i == 0 && input == in_place && same_memory(output, *input);
      if (!allowed && share_memory(output, *input)) refuse(output, *input);
    }
    for (size_t other = 0; other < i; ++other) {
      if (share_memory(output, *outputs[other])) refuse(output, *outputs[other]);
    }
  }
}

}  // namespace rrattn
