#include "cuda/sm90/quantized_attend/config.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/sm90/common/wgmma.cuh"
#include <cstdio>
using namespace rrattn::cuda::sm90; using namespace rrattn::cuda::sm90::quantized_attend; using namespace cute; using namespace rrattn::cuda;
constexpr int kIterations = 1000;
struct alignas(1024) Shared { int8_t q[2][64 * 128]; int8_t k[3][128 * 128]; uint8_t v[2][256 * 128]; int stop; };
__device__ __forceinline__ uint32_t pack8(float a, float b, float c, float d) {
  uint32_t four;
  asm volatile("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\nmov.b32 %0, {low, high};\n}\n" : "=r"(four) : "f"(a), "f"(b), "f"(c), "f"(d));
  return four;
}
__device__ __forceinline__ float ex2(float x) { float y; asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
template <int kOp> __device__ __forceinline__ void ops(float (&x)[64], float a, float b) {
  if (kOp == 0) {
    float e[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) e[i] = ex2(fmaf((float)__float_as_int(x[i]), a, b));
#pragma unroll
    for (int i = 0; i < 16; ++i) { x[i * 4] = __uint_as_float(pack8(e[i * 4], e[i * 4 + 1], e[i * 4 + 2], e[i * 4 + 3])); x[i * 4 + 1] = x[i * 4]; }
  }
  if (kOp == 6) {  // in eights, conversions of the last behind exponentials of the next
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      float e[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) e[i] = ex2(fmaf((float)__float_as_int(x[c * 8 + i]), a, b));
      x[c * 8] = __uint_as_float(pack8(e[0], e[1], e[2], e[3])); x[c * 8 + 1] = __uint_as_float(pack8(e[4], e[5], e[6], e[7]));
    }
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    if (kOp == 1) x[i] = ex2(x[i]);
    if (kOp == 2) { asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(x[i]) : "f"(a)); }
    if (kOp == 3) { float y; asm volatile("cvt.rn.f32.s32 %0, %1;" : "=f"(y) : "r"(__float_as_int(x[i]))); x[i] = y; }
    if (kOp == 4 && i % 4 == 0) x[i] = __uint_as_float(pack8(x[i], x[i + 1], x[i + 2], x[i + 3]));
    if (kOp == 5) { int y; asm volatile("add.s32 %0, %1, %2;" : "=r"(y) : "r"(__float_as_int(x[i])), "r"(__float_as_int(a))); x[i] = __int_as_float(y); }
  }
}
// Group 0: kOp. Group 1: kBusy: 0 nothing, 1 S n128 SS, 2 O n136 RS, 3 both, 4 the same as group 0, 5 S n64 RS, 6 S n64 SS, 7 S n128 RS, 8 S n64 RS and O in 2s, 9 as 8 with wait each.
template <int kOp, int kBusy>
__global__ void __launch_bounds__(256, 1) mixed(float* sink, long long* cycles, float a, float b) {
  extern __shared__ char raw[]; Shared& s = *reinterpret_cast<Shared*>(raw);
  for (int i = threadIdx.x; i < (int)sizeof(Shared) / 4; i += 256) { uint32_t h = i * 2654435761u; h ^= h >> 15; h *= 0x85ebca6bu; h ^= h >> 13; reinterpret_cast<uint32_t*>(&s)[i] = h & 0xbfbfbfbfu; }
  if (threadIdx.x == 0) s.stop = 0;
  asm volatile("fence.proxy.async;" ::: "memory"); __syncthreads();
  const int g = threadIdx.x / 128;
  if (g == 0 || kBusy == 4) {
    float x[64];
#pragma unroll
    for (int i = 0; i < 64; ++i) x[i] = a * i + threadIdx.x;
    const long long t0 = clock64();
#pragma unroll 1
    for (int it = 0; it < kIterations; ++it) ops<kOp>(x, a, b);
    const long long t1 = clock64();
    if (threadIdx.x == 0) { cycles[0] = t1 - t0; *(volatile int*)&s.stop = 1; }
    float r = 0; for (int i = 0; i < 64; ++i) r += x[i];
    sink[threadIdx.x] = r;
  } else if (kBusy) {
    auto s128 = make_tiled_mma(std::conditional_t<kBusy == 7, SM90::GMMA::MMA_64x128x32_S32S8S8_RS_TN, SM90::GMMA::MMA_64x128x32_S32S8S8_SS_TN>{});
    auto s64 = make_tiled_mma(std::conditional_t<kBusy == 6, SM90::GMMA::MMA_64x64x32_S32S8S8_SS_TN, SM90::GMMA::MMA_64x64x32_S32S8S8_RS_TN>{});
    auto om = make_tiled_mma(SM90::GMMA::MMA_64x136x32_F32E4M3E4M3_RS_TN<>{});
    auto scores = partition_fragment_C(s128, Shape<_64, _128>{}); auto half = partition_fragment_C(s64, Shape<_64, _64>{}); auto out = partition_fragment_C(om, Shape<_64, Int<136>>{});
    auto p = make_tensor<uint32_t>(Shape<_4, _1, _4>{}); for (int i = 0; i < 16; ++i) p(i) = 0x38383838 & (threadIdx.x * 77777);
    clear(scores); clear(half); clear(out);
    using VL = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<float_e4m3_t>{}, Shape<Int<136>, _128>{}));
    using L64 = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<int8_t>{}, Shape<_64, _128>{}));
    using L128 = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<int8_t>{}, Shape<_128, _128>{}));
    auto q = s128.get_slice(0).partition_fragment_A(make_tensor(make_smem_ptr(s.q[0]), L64{}));
    auto k128 = s128.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(s.k[0]), L128{}));
    auto k64 = s64.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(s.k[0]), L64{}));
    auto v = om.get_slice(0).partition_fragment_B(make_tensor(make_smem_ptr(reinterpret_cast<const float_e4m3_t*>(s.v[0])), VL{}));
    warpgroup_fence_operand(scores); warpgroup_fence_operand(half); warpgroup_fence_operand(out); warpgroup_fence_operand(p);
    long long n = 0; const long long t0 = clock64();
#pragma unroll 1
    while (*(volatile int*)&s.stop == 0) {
#pragma unroll 1
      for (int r = 0; r < 4; ++r) {
        warpgroup_arrive();
        for (int k = 0; k < 4; ++k) {
          if constexpr (kBusy == 1 || kBusy == 3) cute::gemm(s128, q(_, _, k), k128(_, _, k), scores);
          if constexpr (kBusy == 7) cute::gemm(s128, p(_, _, k), k128(_, _, k), scores);
          if constexpr (kBusy == 5) { cute::gemm(s64, p(_, _, k), k64(_, _, k), half); }
          if constexpr (kBusy == 8 || kBusy == 9) { cute::gemm(s64, p(_, _, k), k64(_, _, k), half); }
          if constexpr (kBusy == 6) { cute::gemm(s64, q(_, _, k), k64(_, _, k), half); }
        }
        for (int k = 0; k < 4; ++k) {
          if constexpr (kBusy == 2 || kBusy == 3) cute::gemm(om, p(_, _, k), v(_, _, k), out);
          if constexpr (kBusy == 8 || kBusy == 9) if (k < 2) cute::gemm(om, p(_, _, k), v(_, _, k), out);
        }
        warpgroup_commit_batch(); warpgroup_wait<0>();
        warpgroup_fence_operand(scores); warpgroup_fence_operand(half); warpgroup_fence_operand(out); warpgroup_fence_operand(p);
      }
      n += 4;
    }
    const long long t1 = clock64();
    if (threadIdx.x == 128) { cycles[1] = t1 - t0; cycles[2] = n; }
    float r = 0; for (int i = 0; i < size(out); ++i) r += out(i); for (int i = 0; i < 64; ++i) r += scores(i); for (int i = 0; i < 32; ++i) r += half(i);
    sink[threadIdx.x] = r;
  }
}
int main() {
  float* sink; long long* c; cudaMalloc(&sink, 1 << 20); cudaMallocManaged(&c, 64);
  auto show = [&](auto k) {
    cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, 225 * 1024);
    c[1] = 0; c[2] = 1;
    for (int i = 0; i < 2; ++i) { k<<<1, 256, sizeof(Shared)>>>(sink, c, 1e-6f, 1.f); cudaError_t r = cudaDeviceSynchronize(); if (r) { printf("%s\n", cudaGetErrorString(r)); exit(1); } }
    printf(" %5.0f/%4.0f", (double)c[0] / kIterations, (double)c[1] / c[2]);
  };
  printf("cycles of ops / of products. beside: nothing, S 128 SS (256 cycles), O 136 (272), both, the same ops, S 64 RS (128), S 64 SS, S 128 RS, S 64 RS + O in 2 (264)\n");
#define ROW(name, op) printf("%-22s", name); show(mixed<op, 0>); show(mixed<op, 1>); show(mixed<op, 2>); show(mixed<op, 3>); show(mixed<op, 4>); show(mixed<op, 5>); show(mixed<op, 6>); show(mixed<op, 7>); show(mixed<op, 8>); printf("\n");
  ROW("softmax 64", 0) ROW("softmax in eights", 6) ROW("64 ex2", 1) ROW("64 FFMA", 2) ROW("64 I2F", 3) ROW("16 pack8", 4) ROW("64 IADD", 5) ROW("nothing", 99)
}
