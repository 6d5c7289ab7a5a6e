// Simulates workers that walk the query blocks of key blocks, and an LRU cache of query blocks. One key head, causal.
#include <cstdio>
#include <cstdlib>
#include <vector>
#include <queue>
#include <random>
#include <algorithm>
#include <list>
#include <unordered_map>
#include <cmath>
#include <cstring>
using namespace std;
int N, G = 4, W = 132;
vector<vector<vector<char>>> m;  // [h][row][col]
struct Item { int col; vector<int> steps; double density; };  // step = h*N+row in walk order
int main(int argc, char** argv) {
  N = atoi(argv[1]); const char* kind = argv[2];
  double base = argc > 3 ? atof(argv[3]) : 0.5;
  mt19937 g(1); uniform_real_distribution<double> U(0, 1);
  m.assign(G, vector<vector<char>>(N, vector<char>(N, 0)));
  vector<double> shared(N); for (auto& x : shared) x = 0.1 + 0.8 * U(g);
  for (int h = 0; h < G; ++h) {
    vector<double> p(N, base);
    if (!strcmp(kind, "columns")) for (auto& x : p) x = 0.1 + 0.8 * U(g);
    if (!strcmp(kind, "kv")) p = shared;
    for (int r = 0; r < N; ++r) for (int c = 0; c <= r; ++c) {
      bool on = U(g) < p[c];
      if (!strcmp(kind, "struct")) { // head kinds: local, vertical, needles, all
        bool local = r - c < 3, sink = c == 0, vert = U(g) < 0 || ((c * 2654435761u) % 1024 < 16), needle = ((r / 4) * 2654435761u % 1000003) % max(1, r / 4 * 4 + 1) / 1 == (unsigned)c;
        on = sink || ((h == 0 || h == 3) && local) || ((h == 1 || h == 3) && vert) || ((h == 2 || h == 3) && (needle || U(g) < 0.01)) || U(g) < 0.04;
      }
      m[h][r][c] = on || c == r;
    }
  }
  double total = 0; vector<vector<int>> count(G, vector<int>(N, 0));
  for (int h = 0; h < G; ++h) for (int r = 0; r < N; ++r) for (int c = 0; c <= r; ++c) if (m[h][r][c]) { count[h][c]++; total++; }
  for (int variant = 0; variant < 13; ++variant) {
    // order of columns
    vector<int> order(N); for (int i = 0; i < N; ++i) order[i] = i;
    auto n_of = [&](int c) { int s = 0; for (int h = 0; h < G; ++h) s += count[h][c]; return s; };
    if (variant == 1 || variant == 2) stable_sort(order.begin(), order.end(), [&](int a, int b) { return n_of(a) / double(N - a) > n_of(b) / double(N - b); });
    if (variant == 4) stable_sort(order.begin(), order.end(), [&](int a, int b) { return n_of(a) > n_of(b); });
    bool cyclic = variant == 2 || variant == 3;
    bool down = variant == 5;
    bool per_head = variant >= 6; int windows = variant == 9 ? 2 : variant == 10 ? 4 : variant == 11 ? 8 : 1; int throttle = variant == 12 ? 200 : 0; (void)throttle;  // items are (head, column)
    vector<int> wins; vector<pair<int,int>> items;  // (first head, col); heads
    if (per_head) for (int h = 0; h < G; ++h) for (int win = 0; win < windows; ++win) { auto o = order; if (variant == 7) stable_sort(o.begin(), o.end(), [&](int a, int b) { return count[h][a] / double(N - a) > count[h][b] / double(N - b); }); if (variant == 8) stable_sort(o.begin(), o.end(), [&](int a, int b) { return count[h][a] > count[h][b]; }); for (int c : o) if (c < N * (win + 1) / windows) { items.push_back({h, c}); wins.push_back(win); } }
    else for (int c : order) items.push_back({-1, c});
    // cache
    int capacity = int(40e6 / 131072);
    list<int> lru; unordered_map<int, list<int>::iterator> where; long misses = 0;
    auto touch = [&](int key) { auto f = where.find(key); if (f != where.end()) { lru.splice(lru.begin(), lru, f->second); return; } ++misses; lru.push_front(key); where[key] = lru.begin(); if ((int)lru.size() > capacity) { where.erase(lru.back()); lru.pop_back(); } };
    struct Worker { int item = -1; size_t at = 0; vector<int> steps; int last = 0; };
    vector<Worker> workers(W);
    priority_queue<pair<double,int>, vector<pair<double,int>>, greater<>> q;
    for (int w = 0; w < W; ++w) q.push({w * 0.01, w});
    size_t next = 0; double end = 0, busy = 0;
    mt19937 jitter(2);
    while (!q.empty()) {
      auto [t, w] = q.top(); q.pop(); auto& k = workers[w];
      if (k.at >= k.steps.size()) {
        if (!k.steps.empty()) k.last = k.steps.back();
        if (next >= items.size()) { end = max(end, t); continue; }
        int win = per_head ? wins[next] : 0; auto [h0, c] = items[next++]; k.steps.clear(); k.at = 0;
        for (int h = (h0 < 0 ? 0 : h0); h < (h0 < 0 ? G : h0 + 1); ++h) {
          if (down) { for (int r = N - 1; r >= c; --r) if (m[h][r][c]) k.steps.push_back(h * N + r); }
          else for (int r = max(c, per_head ? N * win / windows : 0); r < (per_head ? N * (win + 1) / windows : N); ++r) if (m[h][r][c]) k.steps.push_back(h * N + r);
        }
        if (cyclic) { auto p = upper_bound(k.steps.begin(), k.steps.end(), k.last); rotate(k.steps.begin(), p, k.steps.end()); }
        q.push({t + 1.5, w}); continue;
      }
      touch(k.steps[k.at++]); ++busy;
      q.push({t + 0.95 + 0.1 * (jitter() % 1024) / 1024.0, w});
    }
    const char* names[] = {"now", "by density", "by density, cyclic", "now, cyclic", "by length", "now, downwards", "per head", "per head, by density", "per head, by length", "per head, 2 windows", "per head, 4 windows", "per head, 8 windows", "x"};
    double compute_us = total * 5.0 / W, memory_us = misses * 196608.0 / 3.0e6;
    long n_items = items.size(); printf("%5ld items %-22s misses %.3f of steps, compute %.1f ms, memory %.1f ms, utilisation %.3f\n", n_items, names[variant], misses / total, compute_us / 1e3, memory_us / 1e3, busy / (end * W));
  }
}
