// What the three builds of the CPU stages share with each other and the rest.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core/geometry.h"
#include "../core/params.h"
#include "kernels.h"
#include "parallel.h"
#include "run_bounds.h"
