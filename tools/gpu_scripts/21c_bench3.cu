// bench3 CUBIN...: variants of the kernel beside bf16, interleaved.
#include "cuda/sm90/quantized_attend/stage.cuh"
#include "cuda/sm90/attend/stage.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#include <algorithm>
#include <cmath>
using namespace rrattn;
using namespace rrattn::cuda;
namespace qa = rrattn::cuda::sm90::quantized_attend;
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
__global__ void __launch_bounds__(32) meter(long long ns, double* mhz) {
  long long t0, t1; asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t0)); const long long c0 = clock64();
  do { __nanosleep(1000); asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t1)); } while (t1 - t0 < ns);
  if (threadIdx.x == 0) *mhz = (clock64() - c0) * 1e3 / (t1 - t0);
}
#define OK(x) do { cudaError_t e_ = (x); if (e_) { printf("%s: %s\n", #x, cudaGetErrorString(e_)); exit(1); } } while (0)
template <int D> struct Bench {
  using T = qa::KernelTraits<cutlass::bfloat16_t, D>;
  struct Variant { std::string name; cudaKernel_t kernel; int shared, threads; unsigned long long *cycles, *prof; };
  static void run(std::vector<Variant>& variants, int tokens, std::vector<float> densities) {
    cudaStream_t side; OK(cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking)); double *mhz, *sums; OK(cudaMallocManaged(&mhz, 16)); OK(cudaMallocManaged(&sums, 16));
    const int64_t hq = 32, hk = 8, blocks = tokens / 128, words = (blocks + 31) / 32;
    cutlass::bfloat16_t *q, *k, *v, *out[2]; float* lse; uint32_t* mask;
    OK(cudaMalloc(&q, tokens * hq * D * 2)); OK(cudaMalloc(&k, tokens * hk * D * 2)); OK(cudaMalloc(&v, tokens * hk * D * 2));
    OK(cudaMalloc(&out[0], tokens * hq * D * 2)); OK(cudaMalloc(&out[1], tokens * hq * D * 2));
    OK(cudaMalloc(&lse, tokens * hq * 4)); OK(cudaMalloc(&mask, hq * blocks * words * 4));
    fill<<<1024, 256>>>(q, tokens * hq * D, 1); fill<<<1024, 256>>>(k, tokens * hk * D, 1ull << 40); fill<<<1024, 256>>>(v, tokens * hk * D, 1ull << 41);
    AttendParams p; p.visibility.batch = 1; p.visibility.seqlen_q = p.visibility.seqlen_k = tokens; p.visibility.num_heads = hq; p.visibility.causal = true;
    p.heads = {hk, D, D, DataType::kBFloat16};
    p.query = {q, tokens * hq * D, hq * D, D}; p.key = {k, tokens * hk * D, hk * D, D}; p.value = {v, tokens * hk * D, hk * D, D};
    p.block_mask = mask; p.softmax_scale = 1 / sqrtf(D); p.lse = lse;
    int64_t bytes = 0; { Arena a; qa::Workspace<D>(a, p); bytes = a.used(); }
    bytes = std::max(bytes, sm90::attend::Stage<DataType::kBFloat16, D, D>::workspace_bytes(p));
    void* ws; OK(cudaMalloc(&ws, bytes)); p.execution.workspace = ws;
    for (float density : densities) {
      masks<<<(hq * blocks * words + 255) / 256, 256>>>(mask, hq * blocks, blocks, words, density);
      std::vector<uint32_t> host(hq * blocks * words);
      OK(cudaMemcpy(host.data(), mask, host.size() * 4, cudaMemcpyDeviceToHost));
      double n = 0; for (uint32_t w : host) n += __builtin_popcount(w);
      const double tiles = n - hq * blocks / 2.0, flops = 4.0 * 128 * 128 * D * tiles;
      const int items = hq * blocks;
      const auto prologue = [&] {
        Arena arena(ws); const qa::Workspace<D> w(arena, p);
        compute_span_bounds(p.visibility, kBlockSize, w.block_bounds, nullptr);
        qa::quantize<T>(p, w, nullptr);
      };
      const auto call = [&](int i) {  // -1: bf16, -2: prologue
        if (i == -2) return prologue();
        p.out = {out[i >= 0], tokens * hq * D, hq * D, D};
        if (i == -1) return sm90::attend::Stage<DataType::kBFloat16, D, D>::launch(p);
        Arena arena(ws); const qa::Workspace<D> w(arena, p);
        OK(cudaMemsetAsync(w.next_item, 0, 4));
        qa::KernelParams<D> params{p, w, items, qa_section(p), aligned_rows(p.out)};
        void* arguments[] = {&params};
        OK(cudaLaunchKernel((const void*)variants[i].kernel, dim3(std::min(items, 132)), dim3(variants[i].threads), arguments, variants[i].shared, nullptr));
      };
      cudaEvent_t e[2]; for (auto& x : e) cudaEventCreate(&x);
      const int count = variants.size(), rounds = tokens > 40000 ? 2 : 4;
      std::vector<std::vector<float>> ms(count + 2);
      for (int round = 0; round <= rounds; ++round) for (int i = -2; i < count; ++i) {
        if (i == 0) { prologue(); cudaDeviceSynchronize(); }  // bf16's call has overwritten the workspace
        cudaEventRecord(e[0]); call(i); cudaEventRecord(e[1]); OK(cudaEventSynchronize(e[1]));
        float t; cudaEventElapsedTime(&t, e[0], e[1]); if (round) ms[i + 2].push_back(t);
      }
      for (auto& m : ms) std::sort(m.begin(), m.end());
      const auto median = [&](int i) { return ms[i + 2][ms[i + 2].size() / 2]; };
      float pieces[3] = {};
      { Arena arena(ws); const qa::Workspace<D> w(arena, p); const qa::QuantizeParams<D> params{p, w, true, true, true}; const unsigned nb = blocks;
        for (int r = 0; r < 3; ++r) for (int i = 0; i < 3; ++i) { cudaEventRecord(e[0]);
          if (i == 0) qa::survey_kernel<cutlass::bfloat16_t, D><<<dim3(nb + 1, hk, 1), qa::kQuantizeThreads>>>(params);
          if (i == 1) qa::quantize_keys_kernel<T><<<dim3(nb, hk, 1), qa::kQuantizeThreads>>>(params);
          if (i == 2) qa::quantize_queries_kernel<T><<<dim3(nb, hq, 1), qa::kQuantizeThreads>>>(params);
          cudaEventRecord(e[1]); OK(cudaEventSynchronize(e[1])); cudaEventElapsedTime(&pieces[i], e[0], e[1]); } }
      const auto clock_of = [&](int i) { call(i); meter<<<1, 32, 0, side>>>((long long)(median(i) * 0.6e6), mhz); OK(cudaDeviceSynchronize()); return *mhz; };
      call(-1); call(-1);
      const double base_clock = clock_of(-1);
      printf("D%d %dK %.0f%%: bf16 %.3f ms %4.0f, %4.0f MHz %4.0f cycles | prologue %.3f: %.3f %.3f %.3f\n", D, tokens / 1024, density * 100, median(-1), flops / median(-1) / 1e9, base_clock, median(-1) * base_clock * 132e3 / tiles / 1e0 / 1e0, median(-2), pieces[0], pieces[1], pieces[2]);
      prologue();
      for (int i = 0; i < count; ++i) {
        OK(cudaMemset(out[1], 0xff, tokens * hq * D * 2));
        const double clock = clock_of(i); OK(cudaMemset(variants[i].cycles, 0, 16)); OK(cudaMemset(variants[i].prof, 0, 64)); call(i); unsigned long long cycles[2]; OK(cudaMemcpy(cycles, variants[i].cycles, 16, cudaMemcpyDeviceToHost));
        sums[0] = sums[1] = 0; compare<<<1024, 256>>>(out[1], out[0], tokens * hq * D, sums); cudaError_t err = cudaDeviceSynchronize();
        const float b = median(i), total = b + median(-2);
        printf("  %-9s kernel %7.3f %4.0f, all %4.0f, ratio %.3f | %4.0f MHz %4.0f cycles (%4.0f, mean %4.0f) | rms %.4f %s\n", variants[i].name.c_str(), b, flops / b / 1e9, flops / total / 1e9, median(-1) / total, clock, b * clock * 132e3 / tiles, cycles[0] * 132. / tiles, cycles[1] / 2. / tiles, sqrt(sums[0] / sums[1]), err ? cudaGetErrorString(err) : "");
        if (err) exit(1);
        unsigned long long prof[8]; OK(cudaMemcpy(prof, variants[i].prof, 64, cudaMemcpyDeviceToHost)); if (prof[0]) { printf("    cycles a tile:"); for (int j = 0; j < 8; ++j) printf(" %.0f", prof[j] / 2. / tiles); printf("\n"); }
      }
      fflush(stdout);
    }
    for (void* x : {(void*)q, (void*)k, (void*)v, (void*)out[0], (void*)out[1], (void*)lse, (void*)mask, ws}) cudaFree(x);
  }
  static int qa_section(const AttendParams& p) { return attend_section_heads(p, qa::kSectionBytes); }
};
int main(int argc, char** argv) {
  std::vector<Bench<DIM>::Variant> variants;
  for (int i = 2; i < argc; ++i) {
    cudaLibrary_t lib; cudaKernel_t kernel; OK(cudaLibraryLoadFromFile(&lib, argv[i], nullptr, nullptr, 0, nullptr, nullptr, 0)); OK(cudaLibraryGetKernel(&kernel, lib, "k"));
    int shared, threads; void* at; size_t size; OK(cudaLibraryGetGlobal(&at, &size, lib, "k_shared")); OK(cudaMemcpy(&shared, at, 4, cudaMemcpyDeviceToHost)); OK(cudaLibraryGetGlobal(&at, &size, lib, "k_threads")); OK(cudaMemcpy(&threads, at, 4, cudaMemcpyDeviceToHost));
    OK(cudaKernelSetAttributeForDevice(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared, 0));
    std::string name = argv[i]; name = name.substr(name.rfind('/') + 1); OK(cudaLibraryGetGlobal(&at, &size, lib, "k_cycles")); variants.push_back({name.substr(0, name.find('.')), kernel, shared, threads, (unsigned long long*)at, nullptr}); OK(cudaLibraryGetGlobal(&at, &size, lib, "k_prof")); variants.back().prof = (unsigned long long*)at;
  }
  const char* what = argv[1];
  if (strchr(what, 's')) Bench<DIM>::run(variants, 32768, {1.f, 0.5f, 0.25f});
  if (strchr(what, 'm')) Bench<DIM>::run(variants, 32768, {0.5f});
  if (strchr(what, 'l')) Bench<DIM>::run(variants, 131072, {0.5f});
}
