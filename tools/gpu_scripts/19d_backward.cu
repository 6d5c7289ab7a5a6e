#include "cuda/sm80/backward/kernel.cuh"
using namespace rrattn::cuda;
namespace rrattn::cuda::sm80::backward {
using E = ELEMENT;
#define K(D, DV, T, DET) \
  template __global__ void backward_kernel<KernelTraits<E, D, DV, DET, TileTable::T>, false>(const __grid_constant__ KernelParams); \
  template __global__ void backward_kernel<KernelTraits<E, D, DV, DET, TileTable::T>, true>(const __grid_constant__ KernelParams);
K(SIZE, SIZEV, TABLE, false)
K(SIZE, SIZEV, TABLE, true)
}
