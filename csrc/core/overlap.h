// Whether arrays share memory.
#pragma once

#include "arguments.h"

namespace rrattn {

// Whether any byte belongs to both. The answer is exact, except where the strides make it too
// costly to find: then it is yes.
bool share_memory(const Array& a, const Array& b);

// Throws if elements of an output share memory with each other, or an output with another output or
// an input. The input `in_place` may have exactly the memory of the first output.
void require_own_memory(const std::vector<const Array*>& outputs,
                        const std::vector<const Array*>& inputs, const Array* in_place = nullptr);

}  // namespace rrattn
