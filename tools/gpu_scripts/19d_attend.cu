#include "cuda/sm80/attend/kernel.cuh"
using namespace rrattn::cuda;
using namespace rrattn::cuda::sm80::attend;
namespace rrattn::cuda::sm80::attend {
#define K(D, DV, T) \
  template __global__ void attend_kernel<KernelTraits<E, D, DV, TileTable::T>, false, false>(const __grid_constant__ KernelParams); \
  template __global__ void attend_kernel<KernelTraits<E, D, DV, TileTable::T>, true, false>(const __grid_constant__ KernelParams); \
  template __global__ void attend_kernel<KernelTraits<E, D, DV, TileTable::T>, true, true>(const __grid_constant__ KernelParams); \
  template __global__ void ragged_attend_kernel<KernelTraits<E, D, DV, TileTable::T>>(const __grid_constant__ KernelParams, const __grid_constant__ RaggedPlan);
using E = ELEMENT;
K(SIZE, SIZEV, TABLE)
}
