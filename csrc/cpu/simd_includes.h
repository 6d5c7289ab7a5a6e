// What the three builds of the CPU stages share with each other and the rest.
#pragma once

#include <omp.h>

#include <cstdint>
#include <cstring>

#include "../core/geometry.h"
#include "../core/params.h"
#include "kernels.h"
#include "run_bounds.h"
