// What the three builds of the CPU stages share with each other and the rest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "../core/geometry.h"
#include "../core/params.h"
#include "../core/quantization.h"
#include "../core/ragged.h"
#include "kernels.h"
#include "parallel.h"
#include "span_bounds.h"
#include "work_queue.h"
