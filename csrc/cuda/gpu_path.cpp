#include "gpu_path.h"

#include <atomic>
#include <stdexcept>

namespace rrattn::cuda {

namespace {

using sm80::TileTable;

constexpr WantedPath kPaths[] = {
    {"auto", false, std::nullopt},
    {"portable", true, std::nullopt},
    {"portable-99KB", true, TileTable::k99KB},
    {"portable-163KB", true, TileTable::k163KB},
    {"portable-227KB", true, TileTable::k227KB},
};

std::atomic<const WantedPath*>& wanted_path() {
  static std::atomic<const WantedPath*> wanted{&kPaths[0]};
  return wanted;
}

bool is_available(const WantedPath& path) {
  return !path.portable || has_portable_kernels(built_cuda_archs());
}

// Whether the portable kernels for an architecture run on a GPU from 8.0 on. Machine code does within
// its major version, from its own minor version on; PTX, which is 8.0's, on all.
bool runs_on(std::string_view arch, const ComputeCapability& capability) {
  if (arch == "PTX") return true;
  const int number = std::stoi(std::string(arch));
  return number / 10 == capability.major && number % 10 <= capability.minor;
}

bool has_portable_kernels_for(const ComputeCapability& capability, std::string_view archs) {
  bool found = false;
  for_each_arch(
      archs, [&](std::string_view arch) { found |= arch != "90a" && runs_on(arch, capability); });
  return found;
}

std::string described(const Gpu& gpu) {
  return "the GPU is " + gpu.name + " of compute capability " +
         std::to_string(gpu.capability.major) + "." + std::to_string(gpu.capability.minor);
}

std::string names_of(std::string_view archs) {
  std::string names;
  for_each_arch(archs, [&](std::string_view arch) {
    names += std::string(names.empty() ? "" : ", ") + (arch == "PTX" ? "" : "sm_");
    names += arch;
  });
  return names;
}

// The largest table that the GPU has room for, or the wanted one.
TileTable table_for(const Gpu& gpu, const WantedPath& wanted) {
  const auto has_room = [&](TileTable table) {
    return gpu.shared_bytes >= static_cast<int>(table) * 1024;
  };
  const auto refuse = [&](TileTable table, const std::string& what) {
    throw std::invalid_argument(described(gpu) + ", where a thread block has " +
                                std::to_string(gpu.shared_bytes / 1024) +
                                " KB of shared memory, but " + what + " takes " +
                                std::to_string(static_cast<int>(table)) + " KB");
  };
  if (wanted.table) {
    if (!has_room(*wanted.table)) {
      refuse(*wanted.table, std::string("GPU path \"") + wanted.name + "\"");
    }
    return *wanted.table;
  }
  for (const TileTable table : {TileTable::k227KB, TileTable::k163KB, TileTable::k99KB}) {
    if (has_room(table)) return table;
  }
  refuse(TileTable::k99KB, "rrattn");
  return {};  // not reached
}

}  // namespace

GpuPath choose_gpu_path(const Gpu& gpu, std::string_view archs, const WantedPath& wanted) {
  if (gpu.capability.major < 8) {
    throw std::invalid_argument(described(gpu) + ", but rrattn supports 8.0 (Ampere) and newer");
  }
  const bool is_hopper = gpu.capability.major == 9 && gpu.capability.minor == 0;
  if (is_hopper && !wanted.portable && has_hopper_kernels(archs)) return {true, {}};
  if (!has_portable_kernels_for(gpu.capability, archs)) {
    throw std::invalid_argument(described(gpu) + ", but this build of rrattn has " +
                                (wanted.portable ? "portable " : "") +
                                "kernels for none such: it is for " + names_of(archs));
  }
  return {false, table_for(gpu, wanted)};
}

std::string name_of(const GpuPath& path) {
  for (const WantedPath& wanted : kPaths) {
    if (!path.hopper && wanted.table == path.table) return wanted.name;
  }
  return "hopper";
}

const WantedPath& wanted_gpu_path() { return *wanted_path().load(); }

std::vector<std::string> available_gpu_paths() {
  std::vector<std::string> names;
  for (const WantedPath& path : kPaths) {
    if (is_available(path)) names.push_back(path.name);
  }
  return names;
}

const WantedPath& gpu_path_of_name(const std::string& name) {
  std::string allowed;
  for (const WantedPath& path : kPaths) {
    if (!is_available(path)) continue;
    if (name == path.name) return path;
    allowed += std::string(allowed.empty() ? "" : ", ") + path.name;
  }
  throw std::invalid_argument("GPU path is \"" + name + "\", but this build has: " + allowed);
}

void set_gpu_path(const std::string& name) { wanted_path() = &gpu_path_of_name(name); }

std::string_view built_cuda_archs() { return RRATTN_CUDA_ARCHS; }

}  // namespace rrattn::cuda
