// Which kernels a GPU gets: Hopper's own (sm90), or the portable ones for every GPU from Ampere on
// (sm80). Pure decisions, which know neither CUDA nor a GPU.
//
// Architectures are given as the build takes them, separated by spaces: 90a is Hopper's kernels, any
// other the portable ones, as machine code for that compute capability, or, PTX, in a form that the
// driver compiles for any from 8.0 on.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/device.h"
#include "sm80/common/tile_table.h"

namespace rrattn::cuda {

// What may be asked for, by name.
struct WantedPath {
  const char* name;
  bool portable;
  std::optional<sm80::TileTable> table;  // none: the largest that the GPU has room for
};

struct GpuPath {
  bool hopper;            // Hopper's own kernels
  sm80::TileTable table;  // that of the portable ones
};

// Calls `use` with each architecture of a list.
template <typename Use>
constexpr void for_each_arch(std::string_view archs, const Use& use) {
  while (!archs.empty()) {
    const size_t length = archs.find(' ');
    use(archs.substr(0, length));
    archs = length == std::string_view::npos ? std::string_view() : archs.substr(length + 1);
  }
}

constexpr bool has_hopper_kernels(std::string_view archs) {
  bool found = false;
  for_each_arch(archs, [&](std::string_view arch) { found |= arch == "90a"; });
  return found;
}

constexpr bool has_portable_kernels(std::string_view archs) {
  bool found = false;
  for_each_arch(archs, [&](std::string_view arch) { found |= arch != "90a"; });
  return found;
}

// The kernels for a GPU of a build for these architectures. Throws where there are none.
GpuPath choose_gpu_path(const Gpu& gpu, std::string_view archs, const WantedPath& wanted);

// What it is called: hopper, or the name of the wanted path that would give the same.
std::string name_of(const GpuPath& path);

// The wanted path of this name. Throws where this build has none such.
const WantedPath& gpu_path_of_name(const std::string& name);

// The setting that all calls obey, of the paths that this build has: "auto" first, which is the
// default.
const WantedPath& wanted_gpu_path();
std::vector<std::string> available_gpu_paths();
void set_gpu_path(const std::string& name);

// The architectures of this build; empty: no GPU kernels.
std::string_view built_cuda_archs();

}  // namespace rrattn::cuda
