#include "cuda/sm90/backward/stage.cuh"
using namespace rrattn;
struct Args {
  int64_t batch, lq, lk, hq, hk, d, dv, causal, bounds, deterministic;
  void *q, *k, *v, *out, *mask, *lse, *grad_out, *dq, *dk, *dv_out, *workspace, *stream, *startend;
  double scale;
};
static Rows rows(void* p, int64_t l, int64_t h, int64_t d) { return {p, l * h * d, h * d, d}; }
static BackwardParams of(const Args& a) {
  BackwardParams p;
  p.visibility.batch = a.batch; p.visibility.seqlen_q = a.lq; p.visibility.seqlen_k = a.lk;
  p.visibility.num_heads = a.hq; p.visibility.causal = a.causal;
  if (a.startend) {
    RowBounds b; b.data = (const int32_t*)a.startend; b.num_bounds = a.bounds; b.num_heads = 1;
    b.batch_stride = 0; b.head_stride = 0; b.key_stride = a.bounds; b.bound_stride = 1;
    p.visibility.row_bounds = b;
  }
  p.heads = {a.hk, a.d, a.dv, DataType::kBFloat16};
  p.query = rows(a.q, a.lq, a.hq, a.d); p.key = rows(a.k, a.lk, a.hk, a.d); p.value = rows(a.v, a.lk, a.hk, a.dv);
  p.block_mask = (const uint32_t*)a.mask; p.softmax_scale = a.scale; p.out = rows(a.out, a.lq, a.hq, a.dv);
  p.lse = (const float*)a.lse; p.grad_out = rows(a.grad_out, a.lq, a.hq, a.dv);
  p.grad_query = rows(a.dq, a.lq, a.hq, a.d); p.grad_key = rows(a.dk, a.lk, a.hk, a.d); p.grad_value = rows(a.dv_out, a.lk, a.hk, a.dv);
  p.deterministic = a.deterministic;
  p.execution.workspace = a.workspace; p.execution.stream = a.stream;
  return p;
}
#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)
template <bool kDeterministic> using S = rrattn::cuda::sm90::backward::Stage<DataType::kBFloat16, SIZE, SIZE, kDeterministic>;
extern "C" __attribute__((visibility("default"))) int64_t NAME(bytes_, SIZE)(const Args* a) {
  return a->deterministic ? S<true>::workspace_bytes(of(*a)) : S<false>::workspace_bytes(of(*a));
}
extern "C" __attribute__((visibility("default"))) int NAME(run_, SIZE)(const Args* a) {
  try { a->deterministic ? S<true>::launch(of(*a)) : S<false>::launch(of(*a)); return 0; }
  catch (const std::exception& e) { fprintf(stderr, "%s\n", e.what()); return 1; }
}
#ifdef PROF
extern "C" __attribute__((visibility("default"))) void NAME(prof_, SIZE)(unsigned long long* to) {
  unsigned long long zero[8] = {};
  cudaMemcpyFromSymbol(to, rrattn::cuda::sm90::backward::prof, sizeof(zero));
  cudaMemcpyToSymbol(rrattn::cuda::sm90::backward::prof, zero, sizeof(zero));
}
#endif
