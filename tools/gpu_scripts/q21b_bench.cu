// Times attention in eight bits beside bf16, without Python. Prints lines.
#include "cuda/sm90/quantized_attend/stage.cuh"
#include "cuda/sm90/attend/stage.h"
#include <cstdio>
#include <cstring>
#include <vector>
#include <algorithm>
#include <cmath>
#ifndef NAME
#define NAME "base"
#endif
using namespace rrattn;
using namespace rrattn::cuda;
template struct sm90::quantized_attend::Stage<DataType::kBFloat16, DIM>;
__device__ uint32_t mix(uint64_t x) { x ^= x >> 33; x *= 0xff51afd7ed558ccdull; x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53ull; x ^= x >> 33; return (uint32_t)x; }
__global__ void fill(cutlass::bfloat16_t* p, int64_t n, uint64_t seed) {
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
    float u = (mix(i * 2 + seed) + 1.f) / 4294967808.f, v = mix(i * 2 + 1 + seed) / 4294967296.f;
    p[i] = cutlass::bfloat16_t(sqrtf(-2 * logf(u)) * cosf(6.2831853f * v));
  }
}
__global__ void masks(uint32_t* p, int64_t rows, int m_blocks, int words, float density) {
  int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x;
  if (i >= rows * words) return;
  int m = (i / words) % m_blocks, w = i % words;
  uint32_t bits = 0;
  for (int b = 0; b < 32; ++b) { int j = w * 32 + b; if (j == m || (j < m && mix(i * 32 + b + 77) < density * 4294967040.f)) bits |= 1u << b; }
  p[i] = bits;
}
__global__ void compare(const cutlass::bfloat16_t* a, const cutlass::bfloat16_t* b, int64_t n, double* s) {
  double d = 0, r = 0;
  for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
    float x = a[i], y = b[i]; d += (x - y) * (x - y); r += y * y;
  }
  atomicAdd(s, d); atomicAdd(s + 1, r);
}
int main() {
  for (int tokens : {32768, 131072}) for (float density : {1.f, 0.5f, 0.25f}) {
    if (tokens == 131072 && (density == 1.f || (density == 0.25f && !FULL))) continue;
    const int64_t hq = 32, hk = 8, D = DIM, blocks = tokens / 128, words = (blocks + 31) / 32;
    cutlass::bfloat16_t *q, *k, *v, *out[2]; float* lse; uint32_t* mask; double* sums; 
    cudaMalloc(&q, tokens * hq * D * 2); cudaMalloc(&k, tokens * hk * D * 2); cudaMalloc(&v, tokens * hk * D * 2);
    cudaMalloc(&out[0], tokens * hq * D * 2); cudaMalloc(&out[1], tokens * hq * D * 2);
    cudaMalloc(&lse, tokens * hq * 4); cudaMalloc(&mask, hq * blocks * words * 4); cudaMallocManaged(&sums, 16);
    fill<<<1024, 256>>>(q, tokens * hq * D, 1); fill<<<1024, 256>>>(k, tokens * hk * D, 1ull << 40); fill<<<1024, 256>>>(v, tokens * hk * D, 1ull << 41);
    masks<<<(hq * blocks * words + 255) / 256, 256>>>(mask, hq * blocks, blocks, words, density);
    AttendParams p; p.visibility.batch = 1; p.visibility.seqlen_q = p.visibility.seqlen_k = tokens; p.visibility.num_heads = hq; p.visibility.causal = true;
    p.heads = {hk, D, D, DataType::kBFloat16};
    p.query = {q, tokens * hq * D, hq * D, D}; p.key = {k, tokens * hk * D, hk * D, D}; p.value = {v, tokens * hk * D, hk * D, D};
    p.block_mask = mask; p.softmax_scale = 1 / sqrtf(DIM); p.lse = lse;
    int64_t bytes = std::max(sm90::quantized_attend::Stage<DataType::kBFloat16, DIM>::workspace_bytes(p), sm90::attend::Stage<DataType::kBFloat16, DIM, DIM>::workspace_bytes(p));
    void* ws; cudaMalloc(&ws, bytes); p.execution.workspace = ws;
    std::vector<uint32_t> host(hq * blocks * words);
    cudaMemcpy(host.data(), mask, host.size() * 4, cudaMemcpyDeviceToHost);
    double n = 0; for (uint32_t w : host) n += __builtin_popcount(w);
    double flops = 4.0 * 128 * 128 * D * (n - hq * blocks / 2.0);
    auto call = [&](int which) {
      p.out = {out[which], tokens * hq * D, hq * D, D};
      if (which) sm90::quantized_attend::Stage<DataType::kBFloat16, DIM>::launch(p); else sm90::attend::Stage<DataType::kBFloat16, DIM, DIM>::launch(p);
    };
    std::vector<float> ms[3];
    cudaEvent_t e[3]; for (auto& x : e) cudaEventCreate(&x);
    for (int round = 0; round < (tokens > 40000 ? 3 : 5); ++round) for (int which : {0, 1, 2}) {
      if (which == 0 && round > 2) continue;
      cudaEventRecord(e[0]);
      if (which < 2) call(which);
      else { Arena arena(ws); const sm90::quantized_attend::Workspace<DIM> w(arena, p); sm90::quantized_attend::quantize<sm90::quantized_attend::KernelTraits<cutlass::bfloat16_t, DIM>>(p, w, nullptr); }
      cudaEventRecord(e[1]); cudaEventSynchronize(e[1]);
      float t; cudaEventElapsedTime(&t, e[0], e[1]); if (round) ms[which].push_back(t);
    }
    sums[0] = sums[1] = 0; compare<<<1024, 256>>>(out[1], out[0], tokens * hq * D, sums); cudaError_t err = cudaDeviceSynchronize();
    for (auto& m : ms) std::sort(m.begin(), m.end());
    float a = ms[0][ms[0].size() / 2], b = ms[1][ms[1].size() / 2], c = ms[2][ms[2].size() / 2];
    printf("%-9s D%d %6d %3.0f%%: bf16 %8.3f ms %4.0f | eight %8.3f ms %4.0f  | ratio %.3f | prologue %.3f ms (%.1f%%), kernel %4.0f | rms %.4f %s\n", NAME, DIM, tokens, density * 100, a, flops / a / 1e9, b, flops / b / 1e9, a / b, c, c / (b - c) * 100, flops / (b - c) / 1e9, sqrt(sums[0] / sums[1]), err ? cudaGetErrorString(err) : "");
#ifdef COUNT
    static_assert(true); uint64_t counts[4]; cudaMemcpyFromSymbol(counts, sm90::quantized_attend::g_count, 32); double calls = tokens > 40000 ? 3 : 5, rows = hq * blocks * calls;
    printf("  a row block: %.2f tiles of a warp with a probability above 448, %.3f of them with products again; %.2f rows raised\n", counts[0] / rows, counts[1] / rows, counts[2] / rows);
    memset(counts, 0, 32); cudaMemcpyToSymbol(sm90::quantized_attend::g_count, counts, 32);
#endif
    fflush(stdout);
    for (void* x : {(void*)q, (void*)k, (void*)v, (void*)out[0], (void*)out[1], (void*)lse, (void*)mask, ws, (void*)sums}) cudaFree(x);
  }
}
