import numpy as np, math
rng = np.random.default_rng(0)
def e4(p):
    p = np.minimum(p, 448).astype(np.float32)
    m, e = np.frexp(p); e = np.maximum(e, -5)
    q = np.ldexp(np.float32(1), e - 4)
    return np.rint(p / q) * q
def run(n_keys, diag, sigma, rows=200, c=5, room=2, most=6, old=False):
    s = rng.standard_normal((rows, n_keys), dtype=np.float32) * sigma; v = rng.standard_normal((rows, n_keys), dtype=np.float32)
    s[:, diag:128] = -1e30
    expected = -1e9 if old else math.ceil(c * sigma)
    base = np.full(rows, -1e30, np.float32); events = np.zeros(rows); total = np.zeros(rows); acc = np.zeros(rows); warps = 0
    for j in range(0, n_keys, 128):
        t = s[:, j:j+128]; m = t.max(1); rise = m > base + 0.8; up = np.ceil(m)
        new = np.where(rise, np.minimum(np.maximum(expected, up + room), up + most), base).astype(np.float32)
        if j: events += rise; warps += np.add.reduceat(m > base + 0.75, np.arange(0, rows, 16)).astype(bool).mean()
        f = np.exp2(base - new); base = new
        p = e4(np.exp2(t - base[:, None] + 8)); total = total * f + p.sum(1); acc = acc * f + (p * v[:, j:j+128]).sum(1)
    b = np.ceil(s.max(1)); p = e4(np.exp2(s - b[:, None] + 8))
    d = ((base - 8 + np.log2(total)) - (b - 8 + np.log2(p.sum(1)))) * math.log(2); o, oo = acc / total, (p * v).sum(1) / p.sum(1)
    r = lambda x: np.sqrt(np.mean(np.square(x)))
    print(f"{n_keys:6} keys, first {diag:3}, sigma {sigma}: raises a row {events.mean():.3f}, of a warp {warps:.2f} tiles | lse {r(d):.1e} max {abs(d).max():.1e} | out {r(o-oo)/r(oo):.1e} | base over exact {(base-b).mean():.2f}", flush=True)
for kw in (dict(old=True), dict(), dict(most=5), dict(c=4.5)):
    print(kw)
    for n, d, g in ((32768, 64, 1.44), (32768, 4, 1.44), (8192, 64, 1.44), (768, 40, 1.44), (768, 40, 0.7), (768, 1, 5.0), (8192, 64, 4.0)): run(n, d, g, rows=192, **kw)
