#include "cpu_quota.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <fstream>

namespace rrattn::cpu {

namespace {

int processors(double quota, double period) {
  return quota > 0 && period > 0 ? static_cast<int>(std::ceil(quota / period)) : INT_MAX;
}

// Control groups of version 2 have quota and period in one file ("max 100000" without a quota),
// those of version 1 in a file each (-1 without a quota).
int quota_of_group(const std::string& folder) {
  double quota = 0, period = 0;
  if (std::ifstream(folder + "/cpu.max") >> quota >> period) return processors(quota, period);
  if (std::ifstream(folder + "/cpu.cfs_quota_us") >> quota &&
      std::ifstream(folder + "/cpu.cfs_period_us") >> period) {
    return processors(quota, period);
  }
  return INT_MAX;
}

}  // namespace

int cpu_quota(const std::string& groups, const std::string& mount) {
  int quota = INT_MAX;
  std::ifstream lines(groups);  // of "number:controllers:path"
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool version_2 = controllers == ",,";
    if (!version_2 && controllers.find(",cpu,") == std::string::npos) continue;
    const std::string root = version_2 ? mount : mount + "/cpu";
    // A group's quota binds the groups below it too, so all groups on the path count. Inside a
    // container the process's own group may be mounted as the root, whatever its path is said to
    // be.
    for (std::string path = line.substr(second + 1);;) {
      quota = std::min(quota, quota_of_group(root + path));
      if (path.empty()) break;
      path.resize(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
    }
  }
  return quota;
}

}  // namespace rrattn::cpu
