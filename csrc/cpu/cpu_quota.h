// The CPU quota that control groups, and so containers, set for this process.
#pragma once

#include <string>

namespace rrattn::cpu {

// Processors that the quota pays for, rounded up; INT_MAX where there is none. `groups` lists the
// process's groups, and `mount` is where their files are.
int cpu_quota(const std::string& groups = "/proc/self/cgroup",
              const std::string& mount = "/sys/fs/cgroup");

}  // namespace rrattn::cpu
