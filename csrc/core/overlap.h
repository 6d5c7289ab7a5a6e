// Whether arrays share memory.
#pragma once

#include "arguments.h"

namespace rrattn {

// Whether some byte belongs to both; exact for all arrays but those whose strides make the question
// hard, for which the answer is yes.
bool share_memory(const Array& a, const Array& b);

// Throws where an output has elements that share memory, or shares it with another output or an
// input. `in_place` may have exactly the memory of the first output.
void require_own_memory(const std::vector<const Array*>& outputs,
                        const std::vector<const Array*>& inputs, const Array* in_place = nullptr);

}  // namespace rrattn
