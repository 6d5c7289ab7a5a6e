"""The simulated tables of context parallelism: its formulas against direct counts, and the page against the script."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import run_ranks

from rrattn import sequence_chunks
from rrattn.sequence_chunks import chunks_of_rank
from tools.bench import scaling

ROOT = Path(__file__).resolve().parents[2]
RECORDS = json.loads((ROOT / "tools/bench/results/gpu.json").read_text())
HEADS, HEADS_K, HEAD_DIM = 8, 2, 64
SHAPE = {"num_heads": HEADS, "num_heads_k": HEADS_K, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
RUN = {"gpu": "a GPU", "commit": "abc"}
PAIR, KEY, CALL = 3e-9, 2e-6, 0.5  # ms
ESTIMATE_BYTES = 1000  # a key
LINK = scaling.Link(nvlink=400.0, infiniband=40.0, ranks_per_host=2)


def record(stage, queries, keys, **others):
    return {"stage": stage, "seqlen_q": queries, "seqlen_k": keys, **others, **SHAPE, **RUN}


def sampled(queries, keys, **others):
    ms = PAIR * (keys - queries / 2) * queries + KEY * keys + CALL
    given = {"ms": ms, "workspace_bytes": ESTIMATE_BYTES * keys, "settings": {}, "stride": 8, "key_stride": 8}
    return record("estimate+select", queries, keys, **{**given, **others})


@pytest.fixture
def measured():
    """A GPU of round figures: products at 100 TFLOP/s, in the backward pass at 50."""
    attend = [record("attend", 8192, 8192, density=density, tflops=rate) for density, rate in ((1, 1e9), (0.51, 100))]
    attend.append(record("attend", 1024, 1 << 20, density=0.2, tflops=100))
    backward = [record("backward", 8192, 8192, density=0.5, tflops=rate, deterministic=rate == 1) for rate in (1, 50)]
    sampling = [sampled(queries, keys) for queries, keys in ((1024, 1024), (8192, 8192), (1024, 1 << 20))]
    others = [sampled(8192, 8192, key_stride=1, ms=99), sampled(8192, 8192, settings={"spread": 0}, ms=99)]
    return scaling.Measured([*sampling, *others, *attend, *backward])


def calls_of(layout, ranks, rank, tokens):
    """(queries, keys) of the calls of a rank that gathers keys."""
    chunks = chunks_of_rank(layout, ranks, rank)
    length = tokens // (ranks * len(chunks))
    return [(length, (chunk + 1) * length) for chunk in chunks]


def held_tokens(layout, ranks, tokens):
    """For each token the rank that holds it."""
    holder = np.empty(tokens, int)
    for rank in range(ranks):
        for queries, keys in calls_of(layout, ranks, rank, tokens):
            holder[keys - queries : keys] = rank
    return holder


def test_records_of_other_settings_do_not_count(measured):
    assert measured.ms_of_pair == pytest.approx(PAIR)
    assert measured.ms_of_key == pytest.approx(KEY)
    assert measured.ms_of_call == pytest.approx(CALL)
    assert [row["tflops"] for row in measured.attend] == [100, 100]  # of each shape the density nearest to a half
    assert [row["tflops"] for row in measured.backward] == [50]


def test_times_of_a_call(measured):
    # Before their own block, which counts half, rows of blocks see none to 3, of which half are attended: 5 blocks.
    operations = HEADS * 4 * 128 * 128 * HEAD_DIM
    assert measured.attend_ms(512, 512) == pytest.approx(5 * operations / 100e9)
    assert measured.backward_ms(512, 512) == pytest.approx(5 * 2.5 * operations / 50e9)
    # The last two of these rows, for the heads of one of 4 ranks.
    assert measured.attend_ms(256, 512, 4) == pytest.approx(3.5 * operations / 4 / 100e9)
    # Each rank has one of the two key heads.
    assert measured.sampling_ms(256, 512, 4) == pytest.approx(PAIR * 256 * 384 / 4 + KEY * 512 / 2 + CALL)


def test_rates_are_those_of_as_many_keys_as_a_query_sees():
    measured = scaling.Measured(RECORDS)
    for stage in ("attend", "backward"):
        for row in getattr(measured, stage):
            ms = getattr(measured, f"{stage}_ms")(row["seqlen_q"], row["seqlen_k"])
            assert ms / scaling.DENSITY * row["density"] == pytest.approx(row["ms"], rel=0.03)
    for row in measured.sampling:
        assert measured.sampling_ms(row["seqlen_q"], row["seqlen_k"]) == pytest.approx(row["ms"], rel=0.2)
    assert min(measured.ms_of_pair, measured.ms_of_key, measured.ms_of_call) > 0


@pytest.mark.parametrize("layout", ["dual_chunk", "contiguous"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_work_of_the_ranks_against_a_count_of_blocks(measured, layout, ranks):
    tokens = 8192
    blocks = tokens // 128
    chosen = np.random.default_rng(0).random((64, blocks, blocks)) < 0.5
    work = np.tril(chosen, -1).mean(0) + 0.5 * np.eye(blocks)
    counted = np.bincount(held_tokens(layout, ranks, tokens)[::128], weights=work.sum(1))
    told = work_of_ranks(measured, layout, ranks, tokens) * 100e9 / (HEADS * 4 * 128 * 128 * HEAD_DIM)
    np.testing.assert_allclose(told, counted, rtol=0.05)
    told = work_of_ranks(measured, layout, ranks, 1 << 20)  # so many that the diagonal's own share is little
    assert told.max() / told.mean() == pytest.approx(1 if layout == "dual_chunk" else (2 * ranks - 1) / ranks, rel=1e-3)
    assert told.sum() == pytest.approx(measured.attend_ms(1 << 20, 1 << 20))


def work_of_ranks(measured, layout, ranks, tokens):
    """Milliseconds of attend on each rank."""
    calls = [calls_of(layout, ranks, rank, tokens) for rank in range(ranks)]
    return np.array([sum(measured.attend_ms(*call) for call in of_rank) for of_rank in calls])


@pytest.mark.parametrize("layout", scaling.LAYOUTS)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bytes_on_the_wire_against_a_count_of_tokens_and_heads(measured, layout, ranks):
    tokens, vector = 4096, 2 * HEAD_DIM
    holder = held_tokens(layout, ranks, tokens)
    received = np.zeros(ranks)
    for rank in range(ranks):
        if layout != "all_to_all":
            # Keys and values twice, and one rank's share of their gradients from each of the others, which are as many.
            received[rank] += 3 * 2 * HEADS_K * vector * (holder != rank).sum()
            continue
        mine = np.arange(HEADS) * ranks // HEADS == rank
        key_heads = len(set(np.arange(HEADS)[mine] * HEADS_K // HEADS))
        # The query, and the output's gradient; the keys and values.
        received[rank] += (2 * mine.sum() + 2 * key_heads) * vector * (holder != rank).sum()
        # The output, and the query's gradient; those of keys and values, from each rank that had a copy of them.
        own = (holder == rank).sum()
        of_keys = sum(len(set(np.arange(HEADS)[np.arange(HEADS) * ranks // HEADS == other] * HEADS_K // HEADS))
                      for other in range(ranks) if other != rank)  # fmt: skip
        received[rank] += (2 * (HEADS - mine.sum()) + 2 * of_keys) * vector * own
    assert scaling.cost(measured, LINK, layout, tokens, ranks).sent == received.max() == received.min()


def test_times_of_a_rank(measured):
    # Four ranks, two hosts of two: of keys 2 MB, 0.5 MB on each rank.
    tokens = 8192
    keys = tokens * HEADS_K * HEAD_DIM * 2
    gather = max(keys * 3 / 4 / 400e6, keys / 2 / (2 * 40e6))
    assert LINK.gather_ms(keys, 4) == pytest.approx(gather)
    assert LINK.gather_ms(keys, 2) == pytest.approx(keys / 2 / 400e6)
    assert LINK.gather_ms(keys, 1) == LINK.exchange_ms(keys, 1) == 0
    (first, last) = calls_of("dual_chunk", 4, 0, tokens)
    assert (first, last) == ((1024, 1024), (1024, 8192))
    cost = scaling.cost(measured, LINK, "dual_chunk", tokens, 4)
    sampling = measured.sampling_ms(*first) + measured.sampling_ms(*last)
    assert sampling > gather  # which hides the values on their way
    attend, backward = (stage(*first) + stage(*last) for stage in (measured.attend_ms, measured.backward_ms))
    assert cost.forward_ms == pytest.approx(gather + sampling + attend)
    assert cost.backward_ms == pytest.approx(4 * gather + backward)
    slow = scaling.Link(nvlink=1.0)
    cost = scaling.cost(measured, slow, "dual_chunk", tokens, 4)
    assert cost.forward_ms == pytest.approx(2 * slow.gather_ms(keys, 4) + attend)

    # A quarter of the query's heads and the output's come from or go to the other rank here, two quarters far away.
    query, few_keys = tokens * HEADS * HEAD_DIM * 2 / 4, tokens * HEAD_DIM * 2  # one key head on each rank
    exchanged = sum(size / 4 * max(1 / 400e6, 2 / 40e6) for size in (query + 2 * few_keys, query))
    cost = scaling.cost(measured, LINK, "all_to_all", tokens, 4)
    whole = (tokens, tokens, 4)
    assert cost.forward_ms == pytest.approx(exchanged + measured.sampling_ms(*whole) + measured.attend_ms(*whole))
    assert cost.backward_ms == pytest.approx(exchanged + measured.backward_ms(*whole))


def test_the_slowest_rank_counts(measured):
    costs = scaling.cost(measured, LINK, "contiguous", 8192, 4)
    gather = LINK.gather_ms(8192 * HEADS_K * HEAD_DIM * 2, 4)
    assert costs.backward_ms == pytest.approx(4 * gather + measured.backward_ms(2048, 8192))
    assert scaling.cost(measured, LINK, "all_to_all", 8192, 16) is None  # 8 heads
    assert scaling.cost(measured, LINK, "dual_chunk", 8192, 16) is not None


def sizes(*arrays):
    """Bytes of arrays, each given as its elements' bytes and its shape."""
    return sum(itemsize * np.prod(shape) for itemsize, *shape in arrays)


def test_memory_against_a_list_of_the_tensors(measured, monkeypatch):
    tokens, here, chunk = 8192, 2048, 1024  # 4 ranks
    query, key = (2, here, HEADS, HEAD_DIM), (2, here, HEADS_K, HEAD_DIM)
    masks = [(4, HEADS, 8, words) for words in (1, 2)]  # of rank 0, whose chunks see 8 and 64 blocks
    kept = sizes(query, key, key, query, (4, HEADS, here), *masks)
    whole, first = (2, tokens, HEADS_K, HEAD_DIM), (2, chunk, HEADS_K, HEAD_DIM)
    of_chunks = first, first, whole, whole
    cost = scaling.gathered_cost(measured, LINK, chunk, (0, 7), 4)
    assert cost.kept == kept
    call = *4 * [(2, chunk, HEADS, HEAD_DIM)], (4, HEADS, chunk, HEAD_DIM + 2), masks[1]
    assert cost.peak == kept + sizes(whole, whole, *of_chunks, *call, query, query, key, key)

    # A chunk that sees three quarters of the keys; many query heads, so that the query's part is the larger one.
    measured.heads = 64
    query, seen, mask = (2, here, 64, HEAD_DIM), (2, 6144, HEADS_K, HEAD_DIM), (4, 64, 16, 2)
    kept = sizes(query, key, key, query, (4, 64, here), mask)
    cost = scaling.gathered_cost(measured, LINK, here, (2,), 4)
    assert cost.kept == kept
    workspace = (4, 64, here, HEAD_DIM + 2), mask
    grads = sizes(query, query, key, key)  # of the output, the query, the key and the value
    assert cost.peak == kept + grads + sizes(whole, whole, seen, seen, query, seen, seen, *workspace)

    # The same by groups of a key head, with the gathered keys of the next one and the sums of the one before.
    monkeypatch.setattr(sequence_chunks, "MESSAGE_BYTES", 1)
    cost = scaling.gathered_cost(measured, LINK, here, (2,), 4)
    of_three_groups = *6 * [whole], *4 * [key]
    held = sizes(*of_three_groups, seen, seen, *4 * [query], seen, seen, *workspace)
    assert cost.peak == kept + grads + held / 2
    measured.heads = HEADS

    heads = HEADS // 4
    query, key, mask = (2, tokens, heads, HEAD_DIM), (2, tokens, 1, HEAD_DIM), (4, heads, 64, 2)
    kept = sizes(*3 * [query], key, key, (4, heads, tokens), mask)
    cost = scaling.cost(measured, LINK, "all_to_all", tokens, 4)
    assert cost.kept == kept
    assert cost.peak == kept + sizes(*3 * [query], key, key, (4, heads, tokens, HEAD_DIM + 2), mask)
    one = scaling.cost(measured, LINK, "all_to_all", tokens, 1)
    assert one.kept == sizes(*2 * [(2, tokens, HEADS, HEAD_DIM)], *2 * [whole], (4, HEADS, tokens), (4, HEADS, 64, 2))

    # Where block scores and the estimate's workspace are more than all gradients.
    tokens = 1 << 22
    cost = scaling.cost(measured, LINK, "all_to_all", tokens, 4)
    selecting = sizes((4, heads, tokens // 128, tokens // 128), (ESTIMATE_BYTES // 2, tokens))
    assert cost.peak == cost.kept + selecting


@pytest.mark.parametrize("ranks", [2, 4])
def test_memory_is_what_the_ranks_hold(measured, monkeypatch, tmp_path, ranks):
    run_ranks(ROOT / "tests/tools/memory_rank.py", ranks, tmp_path)
    measured.heads, measured.heads_k, measured.head_dim, measured.itemsize = 8, 4, 64, 4
    tokens, whole = 8192, 8192 * 4 * 64 * 4
    query, keys_values = (tokens // ranks * heads * 64 * 4 for heads in (8, 2 * 4))
    for layout, (groups, message_bytes) in itertools.product(scaling.LAYOUTS, ((1, 1 << 30), (4, 1))):
        monkeypatch.setattr(sequence_chunks, "MESSAGE_BYTES", message_bytes)
        told = scaling.cost(measured, LINK, layout, tokens, ranks)
        peaks = []
        for rank in range(ranks):
            found = dict(np.load(tmp_path / f"{layout}-{groups}-{rank}.npz"))
            assert found["left"] == 0
            own = 0 if layout == "all_to_all" else query + keys_values  # which the caller made
            assert found["kept"] + own == pytest.approx(told.kept, rel=2e-3)
            forward, backward = found["peaks"]
            if layout != "all_to_all":  # whose exchange over gloo takes more
                assert forward < (5 if groups == 1 else 2) * whole + 1.2 * query
            peaks.append(backward + own)  # with Paddle's copy of the output's gradient
        if layout != "all_to_all":
            assert max(peaks) == pytest.approx(told.peak, rel=0.1)


def test_the_workspace_of_backward_is_that_of_the_records():
    measured = scaling.Measured(RECORDS)
    for row in measured.backward:
        told = measured.differentiating_bytes(row["seqlen_q"], row["seqlen_k"])
        # The tables leave out the sums of dK and dV, as docs/distributed.md says: those of as many key heads as have
        # 64 MiB of queries, dO and dQ, and 64 MiB at most. And so a number for each tile of 64 rows of dQ.
        of_key_head = 8 * measured.head_dim * row["seqlen_k"]
        sums = min(64 << 20, max(1, (64 << 20) // (measured.heads // measured.heads_k * of_key_head)) * of_key_head)
        states = 4 * measured.heads * row["seqlen_q"] // 64
        assert row["workspace_bytes"] in (pytest.approx(told, rel=1e-4), pytest.approx(told + sums + states, rel=1e-4))


def test_more_ranks_are_faster_and_none_is_better_than_ideal():
    measured = scaling.Measured(RECORDS)
    for tokens in scaling.TOKENS:
        for layout in scaling.LAYOUTS:
            costs = [scaling.cost(measured, scaling.Link(), layout, tokens, ranks) for ranks in scaling.RANKS]
            times = [cost.ms for cost in costs if cost]
            assert times == sorted(times, reverse=True)
            ideal = [times[0] / ranks for ranks in scaling.RANKS]
            assert all(time >= least * (1 - 1e-9) for time, least in zip(times, ideal))
            head = tokens * measured.head_dim * measured.itemsize
            most = head // sequence_chunks.MESSAGE_BYTES  # ranks that work in all groups
            peaks = [cost.peak for cost, ranks in zip(costs, scaling.RANKS) if cost and ranks <= most]
            assert peaks == sorted(peaks, reverse=True)


def test_numbers_have_three_digits():
    assert [scaling.seconds(ms) for ms in (0.5, 12.34, 999, 1234, 123456)] == [
        "0.50 ms",
        "12.3 ms",
        "999 ms",
        "1.23 s",
        "123 s",
    ]
    assert [scaling.gigabytes(num_bytes) for num_bytes in (0, 4e7, 1234e9)] == ["0", "0.04", "1,234"]


def test_the_page_is_what_the_script_gives(monkeypatch, capsys):
    command = [sys.executable, "-m", "tools.bench.scaling", "--check"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    monkeypatch.setattr(scaling, "RANKS", (1, 2))
    assert scaling.main(["--check"]) == 1
    assert "docs/distributed.md; python -m tools.bench.scaling writes it" in capsys.readouterr().out


def test_tables_for_another_link(monkeypatch, capsys):
    monkeypatch.setattr(scaling, "RANKS", (1, 64))
    monkeypatch.setattr(scaling, "TOKENS", (1 << 20, 1 << 21))
    page = (ROOT / scaling.PAGE).read_text()
    printed = []
    for options in (["--infiniband", "5"], ["--nvlink", "450"]):
        assert scaling.main(options) == 0
        printed.append(capsys.readouterr().out)
    assert "between hosts 5 GB/s by InfiniBand" in printed[0]
    # The page's first rows of its last column.
    rows = [line for line in page.splitlines() if line.startswith("| 1,048,576 | dual_chunk")]
    assert rows[0].split(" | ")[-1] in printed[1] and rows[0].split(" | ")[-1] not in printed[0]
    assert "| 2,097,152 * | all_to_all |" in printed[1]  # longer than a GPU selects from
    assert (ROOT / scaling.PAGE).read_text() == page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--infiniband", "0"], "above 0, got {'infiniband': 0.0}"),
        (["--check", "--nvlink", "300"], "--check compares the page"),
        (["--ranks-per-host", "6"], "--ranks-per-host must be a power of 2"),
    ],
)
def test_bad_options_are_named(capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        scaling.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
