// Structs of settings as lists of arguments: settings_of(settings) gives their names and types.
#pragma once

#include <tuple>
#include <utility>

#include "../core/params.h"

namespace rrattn {

template <typename Settings>
using SettingsOf = decltype(settings_of(std::declval<Settings&>()));

// A struct from the values of its settings, in their order.
template <typename Settings, typename... Values>
Settings settings_from(Values... values) {
  Settings settings;
  std::apply([&](auto... setting) { ((setting.value = values), ...); }, settings_of(settings));
  return settings;
}

}  // namespace rrattn
