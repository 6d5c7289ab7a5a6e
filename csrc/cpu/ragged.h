// All stages of a ragged batch, one after the other.
#pragma once

#include "../core/ragged.h"

namespace rrattn::cpu {

int64_t ragged_workspace_bytes(const RaggedCalls& calls, int num_threads);
void run_ragged(RaggedCalls calls, const Execution& execution);

}  // namespace rrattn::cpu
