// Cycles of what a tile is made of, two consumer warp groups on each SM.
#include "cuda/sm90/quantized_attend/config.cuh"
#include "cuda/common/softmax.cuh"
#include "cuda/sm90/common/wgmma.cuh"
#include <cstdio>
using namespace rrattn::cuda::sm90; using namespace rrattn::cuda::sm90::quantized_attend; using namespace cute; using namespace rrattn::cuda;
using T = KernelTraits<cutlass::bfloat16_t, 128>;
constexpr int kIterations = 400;
struct alignas(1024) Shared { int8_t q[2][64 * 128]; int8_t k[3][128 * 128]; uint8_t v[2][256 * 128]; float4 sums[2][16][128]; };
__device__ __forceinline__ uint32_t pack8(float a, float b, float c, float d) {
  uint32_t four;
  asm volatile("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\nmov.b32 %0, {low, high};\n}\n" : "=r"(four) : "f"(a), "f"(b), "f"(c), "f"(d));
  return four;
}
__device__ __forceinline__ float ex2(float x) { float y; asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
template <int N> using OutMmaOf = std::conditional_t<N == 128, SM90::GMMA::MMA_64x128x32_F32E4M3E4M3_RS_TN<>, std::conditional_t<N == 136, SM90::GMMA::MMA_64x136x32_F32E4M3E4M3_RS_TN<>, SM90::GMMA::MMA_64x144x32_F32E4M3E4M3_RS_TN<>>>;
// kN: columns of the second product, 0 for none. kSoft: 0 none, 1 convert and exponentials, 2 without exponentials, 3 without conversions. kTurns.
template <bool kScores, int kN, int kSoft, bool kTurns, int kFlush = 0, bool kQueries = false, int kPoly = 0, bool kCheck = false>
__global__ void __launch_bounds__(384, 1) tile(float* sink, long long* cycles, float scale, float shift) {
  extern __shared__ char raw[]; Shared& s = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {}
  for (int i = threadIdx.x; i < (int)sizeof(Shared) / 4; i += 384) reinterpret_cast<uint32_t*>(&s)[i] = (i * 2654435761u) & 0x33333333;
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncthreads();
  if (threadIdx.x < 128) { cutlass::arch::warpgroup_reg_dealloc<40>(); return; }
  cutlass::arch::warpgroup_reg_alloc<232>();
  const int g = threadIdx.x / 128 - 1;
  constexpr int N = kN ? kN : 128;
  auto sm = make_tiled_mma(std::conditional_t<kQueries, SM90::GMMA::MMA_64x128x32_S32S8S8_RS_TN, SM90::GMMA::MMA_64x128x32_S32S8S8_SS_TN>{});
  auto q = make_tensor<uint32_t>(Shape<_4, _1, _4>{}); for (int i = 0; i < 16; ++i) q(i) = 0x01020304 * (threadIdx.x & 3) + i;
  int in_out = 0; auto om = make_tiled_mma(OutMmaOf<N>{});
  auto ts = sm.get_thread_slice(threadIdx.x % 128); auto to = om.get_thread_slice(threadIdx.x % 128);
  auto scores = partition_fragment_C(sm, Shape<_64, _128>{});
  auto out = partition_fragment_C(om, Shape<_64, Int<N>>{});
  auto p = make_tensor<uint32_t>(Shape<_4, _1, _4>{});
  clear(out); clear(scores);
  for (int i = 0; i < 16; ++i) p(i) = 0x38383838 & (threadIdx.x * 77777);
  using VL = decltype(tile_to_shape(GMMA::Layout_K_SW128_Atom<float_e4m3_t>{}, Shape<Int<N>, _128>{}));
  if (kTurns && g == 1) cutlass::arch::NamedBarrier::arrive(256, 0);
  const long long t0 = clock64();
#pragma unroll 1
  for (int it = 0; it < kIterations; ++it) {
    if (kTurns) cutlass::arch::NamedBarrier::sync(256, g);
    if constexpr (kScores && kQueries) { warpgroup_fence_operand(q); start_product<GMMA::ScaleOut::Zero>(sm, q, ts.partition_fragment_B(make_tensor(make_smem_ptr(s.k[it % 3]), typename T::KeyLayout{})), scores); }
    else if constexpr (kScores) start_product<GMMA::ScaleOut::Zero>(sm, ts.partition_fragment_A(make_tensor(make_smem_ptr(s.q[g]), typename T::QueryLayout{})), ts.partition_fragment_B(make_tensor(make_smem_ptr(s.k[it % 3]), typename T::KeyLayout{})), scores);
    if (kN) { warpgroup_fence_operand(p); start_product<GMMA::ScaleOut::One>(om, p, to.partition_fragment_B(make_tensor(make_smem_ptr(reinterpret_cast<const float_e4m3_t*>(s.v[it % 2])), VL{})), out); }
    if (kTurns) cutlass::arch::NamedBarrier::arrive(256, 1 - g);
    if (kSoft) {
      warpgroup_wait<kN ? 1 : 0>(); warpgroup_fence_operand(scores);
      for (int i = 0; i < 64; ++i) { float x = fmaf((float)scores(i), scale, shift);
        if (kPoly && i % (kPoly ? kPoly : 1) == 0) { const float y = fmaxf(x, -100.f), t = y + 12582912.f, f = y - (t - 12582912.f);
          const float e = fmaf(fmaf(0.24f, f, 0.695f), f, 1.0f); scores(i) = __float_as_int(t) * 8388608 + __float_as_int(e); continue; }
        scores(i) = __float_as_int(kSoft == 2 ? x : ex2(x)); }
      if (kN) { compute_here(__int_as_float(scores(63))); warpgroup_wait<0>(); warpgroup_fence_operand(out); }
      if (kSoft != 3) for (int i = 0; i < 16; ++i) p(i) = pack8(__int_as_float(scores(i * 4)), __int_as_float(scores(i * 4 + 1)), __int_as_float(scores(i * 4 + 2)), __int_as_float(scores(i * 4 + 3)));
      else for (int i = 0; i < 16; ++i) p(i) = scores(i * 4) ^ scores(i * 4 + 1) ^ scores(i * 4 + 2) ^ scores(i * 4 + 3);
      if (kCheck) { uint32_t sat = 0; for (int i = 0; i < 16; ++i) sat |= p(i) + 0x02020202; if (__any_sync(~0u, (sat & 0x80808080) != 0)) for (int i = 0; i < size(out); ++i) out(i) *= 0.5f; }
      if (kFlush && ++in_out == kFlush) { in_out = 0; for (int i = 0; i < 16; ++i) { float4& m = s.sums[g][i][threadIdx.x % 128]; float4 o = m; m = make_float4(o.x + out(i * 4), o.y + out(i * 4 + 1), o.z + out(i * 4 + 2), o.w + out(i * 4 + 3)); } clear(out); }
    } else { warpgroup_wait<0>(); warpgroup_fence_operand(scores); warpgroup_fence_operand(out); }
  }
  const long long t1 = clock64();
  float r = 0; for (int i = 0; i < size(out); ++i) r += out(i); for (int i = 0; i < 64; ++i) r += scores(i); for (int i = 0; i < 16; ++i) r += p(i);
  sink[blockIdx.x * 384 + threadIdx.x] = r;
  if (threadIdx.x == 128) cycles[blockIdx.x] = t1 - t0;
}
// Instructions alone, of eight warps.
template <int kOp>
__global__ void __launch_bounds__(256, 1) pipe(float* sink, long long* cycles, float a, int b) {
  float x[64]; 
  for (int i = 0; i < 64; ++i) x[i] = a * i + threadIdx.x;
  __syncthreads();
  const long long t0 = clock64();
#pragma unroll 1
  for (int it = 0; it < kIterations; ++it) {
#pragma unroll
    for (int i = 0; i < 64; ++i) {
      if (kOp == 0) x[i] = ex2(x[i]);
      if (kOp == 1) { float y; asm volatile("cvt.rn.f32.s32 %0, %1;" : "=f"(y) : "r"(__float_as_int(x[i]))); x[i] = y; }
      if (kOp == 2) { float y; asm volatile("fma.rn.f32 %0, %1, %2, %1;" : "=f"(y) : "f"(x[i]), "f"(a)); x[i] = y; }
      if (kOp == 3) { float y; asm volatile("max.f32 %0, %1, %2;" : "=f"(y) : "f"(x[i]), "f"(x[(i + 1) % 64])); x[i] = y; }
      if (kOp == 4 && i % 4 == 0) x[i] = __uint_as_float(pack8(x[i], x[i + 1], x[i + 2], x[i + 3]));
      if (kOp == 5) { int y; asm volatile("max.s32 %0, %1, %2;" : "=r"(y) : "r"(__float_as_int(x[i])), "r"(__float_as_int(x[(i + 1) % 64]))); x[i] = __int_as_float(y); }
      if (kOp == 6) { float y; asm volatile("add.rn.f32 %0, %1, %2;" : "=f"(y) : "f"(x[i]), "f"(a)); x[i] = y; }
      if (kOp == 7) { uint32_t y; asm volatile("ex2.approx.f16x2 %0, %1;" : "=r"(y) : "r"(__float_as_uint(x[i]))); x[i] = __uint_as_float(y); }
      if (kOp == 8 && i % 2 == 0) { uint32_t y; asm volatile("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(x[i]), "f"(x[i + 1])); x[i] = __uint_as_float(y); }
      if (kOp == 9 && i % 4 == 0) { uint32_t y; asm volatile("{\n.reg .b16 l, h;\ncvt.rn.satfinite.e4m3x2.f16x2 l, %1;\ncvt.rn.satfinite.e4m3x2.f16x2 h, %2;\nmov.b32 %0, {l, h};\n}\n" : "=r"(y) : "r"(__float_as_uint(x[i])), "r"(__float_as_uint(x[i + 1]))); x[i] = __uint_as_float(y); }
      if (kOp == 10) { float y = fmaf((float)__float_as_int(x[i]), a, 1.f); x[i] = ex2(y); if (i % 4 == 3) x[i] = __uint_as_float(pack8(x[i], x[i - 1], x[i - 2], x[i - 3])); }
    }
  }
  const long long t1 = clock64();
  float r = 0; for (int i = 0; i < 64; ++i) r += x[i];
  sink[blockIdx.x * 256 + threadIdx.x] = r;
  if (threadIdx.x == 0) cycles[blockIdx.x] = t1 - t0;
}
int main() {
  float* sink; long long* c; cudaMalloc(&sink, 132 * 384 * 4); cudaMallocManaged(&c, 132 * 8);
  auto show = [&](const char* n, auto k, int threads, auto... a) {
    cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, 225 * 1024);
    cudaEvent_t e[2]; for (auto& x : e) cudaEventCreate(&x);
    float ms = 0;
    for (int i = 0; i < 3; ++i) { cudaEventRecord(e[0]); k<<<132, threads, threads == 384 ? sizeof(Shared) : 0>>>(sink, c, a...); cudaEventRecord(e[1]); cudaError_t r = cudaDeviceSynchronize(); if (r) { printf("%s %s\n", n, cudaGetErrorString(r)); exit(1); } cudaEventElapsedTime(&ms, e[0], e[1]); }
    printf("%-34s %7.1f cycles an iteration, %6.1f us\n", n, (double)c[7] / kIterations, ms * 1000);
  };
#define TILE(n, ...) show(n, tile<__VA_ARGS__>, 384, 1e-6f, 1.f)
  TILE("Q K^T alone", true, 0, 0, false);
  TILE("P V 128 alone", false, 128, 0, false);
  TILE("P V 136 alone", false, 136, 0, false);
  TILE("P V 144 alone", false, 144, 0, false);
  TILE("Q K^T, P V 128", true, 128, 0, false);
  TILE("Q K^T, P V 136", true, 136, 0, false);
  TILE("both 136, softmax", true, 136, 1, false);
  TILE("both 136, softmax, turns", true, 136, 1, true);
  TILE("both 128, softmax", true, 128, 1, false);
  TILE("both 128, softmax, turns", true, 128, 1, true);
  TILE("both 136, no exp, turns", true, 136, 2, true);
  TILE("both 136, no cvt, turns", true, 136, 3, true);
  TILE("Q K^T, softmax", true, 0, 1, false);
  TILE("turns, check", true, 136, 1, true, 0, false, 0, true);
  TILE("turns, check, flush 4", true, 136, 1, true, 4, false, 0, true);
  TILE("turns, check, flush 8", true, 136, 1, true, 8, false, 0, true);
  TILE("turns, check, flush 8, Q registers", true, 136, 1, true, 8, true, 0, true);
  TILE("turns, check, flush 8, poly 8", true, 136, 1, true, 8, false, 8, true);
  TILE("turns, check, flush 8, poly 4", true, 136, 1, true, 8, false, 4, true);
  TILE("check, flush 8, no turns", true, 136, 1, false, 8, false, 0, true);
#define PIPE(n, op) show(n, pipe<op>, 256, 1.5f, 3)
  PIPE("64 ex2", 0); PIPE("64 I2F", 1); PIPE("64 FFMA", 2); PIPE("64 FMNMX", 3); PIPE("32 cvt e4m3x2.f32", 4); PIPE("64 IMNMX", 5); PIPE("64 FADD", 6);
  PIPE("64 ex2.f16x2", 7); PIPE("32 cvt f16x2.f32", 8); PIPE("32 cvt e4m3x2.f16x2", 9); PIPE("64 I2F FFMA ex2, 32 cvt", 10);
}
