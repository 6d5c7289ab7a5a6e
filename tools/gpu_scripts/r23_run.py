"""Ragged batches and pages on a GPU: tests, then times. From the root of the built branch:

    python3 r23_run.py [--no-tests]
"""

import subprocess
import sys

import torch

sys.path.insert(0, ".")
from rrattn import direct  # noqa: E402

HEADS, HEADS_K, SIZE = 32, 8, 128
HALF = {"threshold": 0.5, "min_share": 0}
LINES = []


def say(line):
    LINES.append(line)
    print(line, flush=True)


def run_tests():
    tests = ["tests/kernels/test_ragged.py", "tests/gpu/test_ragged_gpu.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gpu", "--no-header", "--maxfail=12", *tests]
    process = subprocess.run(command, capture_output=True, text=True)
    print(process.stdout[-6000:], process.stderr[-1500:])
    say("tests: " + (process.stdout.strip().splitlines() or ["none"])[-1])


def normal(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def graph_of(call):
    """The call as a graph, so that what the host does between launches counts for nothing."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def times(calls, rounds=5):
    """Median milliseconds of each, in turns."""
    found = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(rounds):
        for call, own in zip(calls, found):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            torch.cuda.synchronize()
            own.append(begin.elapsed_time(end))
    return [sorted(own)[len(own) // 2] for own in found]


def stream():
    return {"stream": torch.cuda.current_stream().cuda_stream}


def with_workspace(call):
    workspace = torch.empty(call(size_only=True), device="cuda", dtype=torch.uint8)
    return lambda: call(workspace=workspace, **stream())


def usual(query, key, value, keep_last=True):
    """A call for [tokens, heads, size] of one request."""
    out = torch.empty_like(query)[None]
    arrays = query[None], key[None], value[None]
    return with_workspace(
        lambda **options: direct.rr_attention(*arrays, out=out, causal=True, keep_last=keep_last, **HALF, **options)
    ), out[0]


def numbers(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def ragged(query, key, value, lengths, tables=None, keep_last=True, **options):
    """A call for (queries, keys) of each request."""
    out = torch.empty_like(query)
    begins = [0]
    for seqlen_q, _ in lengths:
        begins.append(begins[-1] + seqlen_q)
    arrays = query, key, value, numbers(begins), numbers([k for _, k in lengths]), tables
    maxima = {"max_seqlen_k": max(k for _, k in lengths), "max_num_keys": sum(k for _, k in lengths)}
    return with_workspace(
        lambda **more: direct.ragged_attention(*arrays, out=out, keep_last=keep_last, **maxima, **HALF, **options, **more)
    ), out


def paged(rows, page_size):
    """(pages [P, Hkv, page, D], table [1, P]) of [tokens, Hkv, D], in a shuffled order."""
    count = len(rows) // page_size
    order = torch.randperm(count, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    pages = torch.empty(count, HEADS_K, page_size, SIZE, device="cuda", dtype=rows.dtype)
    pages[order] = rows.reshape(count, page_size, HEADS_K, SIZE).transpose(1, 2).contiguous()
    return pages, order.int()[None].contiguous()


def mixed(path, lengths, title):
    tokens = sum(lengths)
    query, key, value = normal(tokens, HEADS, SIZE), normal(tokens, HEADS_K, SIZE), normal(tokens, HEADS_K, SIZE)
    together, out = ragged(query, key, value, [(n, n) for n in lengths])
    singles, first = [], 0
    for n in lengths:
        rows = slice(first, first + n)
        singles.append(usual(query[rows], key[rows], value[rows]))
        first += n
    apart = graph_of(lambda: [call() for call, _ in singles])
    together = graph_of(together)
    one, all_ = times([together, apart])
    same = torch.equal(out, torch.cat([own for _, own in singles]))
    say(f"{path:9} {title:34} ragged {one:8.3f} ms  separate {all_:8.3f} ms  separate/ragged {all_ / one:6.3f}  same bits {same}")


def pages(path, tokens):
    query, key, value = normal(tokens, HEADS, SIZE), normal(tokens, HEADS_K, SIZE), normal(tokens, HEADS_K, SIZE)
    own, expected = usual(query, key, value)
    calls, outs = [own], [expected]
    for page_size in (None, 64, 128, 256):
        tables, arrays = None, (key, value)
        if page_size is not None:
            (pages_k, tables), (pages_v, _) = paged(key, page_size), paged(value, page_size)
            arrays = pages_k, pages_v
        call, out = ragged(query, *arrays, [(tokens, tokens)], tables)
        calls.append(call)
        outs.append(out)
    found = times([graph_of(call) for call in calls], 9)
    names = "usual", "one piece", "pages 64", "pages 128", "pages 256"
    for name, ms, out in zip(names, found, outs):
        say(
            f"{path:9} {tokens // 1024:3}K {name:29} {ms:8.3f} ms  usual/this {found[0] / ms:6.3f}  "
            f"same bits {torch.equal(out, expected)}"
        )


def chunks(path, tokens, chunk):
    query, key, value = normal(tokens, HEADS, SIZE), normal(tokens, HEADS_K, SIZE), normal(tokens, HEADS_K, SIZE)
    own, expected = usual(query, key, value)
    (pages_k, tables), (pages_v, _) = paged(key, 128), paged(value, 128)
    calls, outs = [], []
    workspace = torch.empty(0, device="cuda", dtype=torch.uint8)
    for end in range(chunk, tokens + 1, chunk):
        out = torch.empty_like(query[:chunk])
        arrays = query[end - chunk : end], pages_k, pages_v, numbers([0, chunk]), numbers([end]), tables
        options = {"out": out, "keep_last": end == tokens, **HALF}
        size = direct.ragged_attention(*arrays, **options, size_only=True)
        if size > len(workspace):
            workspace = torch.empty(size, device="cuda", dtype=torch.uint8)
        calls.append((arrays, options))
        outs.append(out)
    all_chunks = graph_of(
        lambda: [direct.ragged_attention(*a, **o, workspace=workspace, **stream()) for a, o in calls]
    )
    whole, parts = times([graph_of(own), all_chunks], 3)
    same = torch.equal(torch.cat(outs), expected)
    say(
        f"{path:9} {tokens // 1024}K by {chunk // 1024}K, pages 128 {'':13} chunks {parts:8.3f} ms  one call {whole:8.3f} ms  "
        f"chunks/one call {parts / whole:6.3f}  same bits {same}"
    )


def main():
    if "--no-tests" not in sys.argv:
        run_tests()
    say(f"{torch.cuda.get_device_name()}; heads {HEADS}/{HEADS_K}, D {SIZE}, bfloat16, random data, threshold 0.5")
    portable = ["portable"] if "portable" in direct.available_gpu_paths() else []
    for path in ("auto", *portable):
        direct.set_gpu_path(path)
        mixed(path, [32768] + [4096] * 8 + [1024] * 32, "one 32K, eight 4K, thirty-two 1K")
        mixed(path, [32768] * 2, "two 32K")
        mixed(path, [1024] * 64, "sixty-four 1K")
        pages(path, 32768)
        if path == "auto":
            chunks(path, 131072, 8192)
    print("\n" + "\n".join(LINES))


main()
