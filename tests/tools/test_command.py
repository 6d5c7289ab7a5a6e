"""The command `rrattn`: what `info` says, and that `check` passes here and fails where a kernel is wrong."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import paddle
import pytest

import rrattn
from rrattn import _build_info, check, direct, functional, info, serving
from rrattn.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture
def paddle_with_gpus(monkeypatch):
    """As if Paddle were a CUDA build that sees a GPU of each generation, and the operators were built for Hopper."""
    monkeypatch.setattr(paddle, "is_compiled_with_cuda", lambda: True)
    monkeypatch.setattr(paddle.version, "cuda", lambda: "12.9")
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(paddle.device.cuda, "get_device_capability", lambda index: [(8, 0), (9, 0), (10, 0)][index])
    monkeypatch.setattr(paddle.device.cuda, "get_device_name", lambda index: ["A100", "H100", "B200"][index])
    monkeypatch.setattr(_build_info, "CUDA_ARCHS", "90a")
    kernels = {"auto": ("portable-163KB", "hopper", "portable-227KB")}
    monkeypatch.setattr(direct, "gpu_kernels", lambda device, path: kernels[path][device])


@pytest.fixture
def one_case(monkeypatch):
    """Each group of the check has a case; it passes with all of them in `test_check_passes_here`."""
    monkeypatch.setattr(check, "CASES", check.CASES[:1])
    monkeypatch.setattr(check, "COMPENSATED_CASES", check.COMPENSATED_CASES[:1])
    monkeypatch.setattr(check, "FEATURES", {label: cases[:1] for label, cases in check.FEATURES.items()})


def test_info(capsys):
    assert main(["info"]) == 0
    said = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert said["rrattn"].endswith(f"in {Path(info.__file__).parent}")
    assert said["Python"].startswith(f"{platform.python_version()}, ")
    assert said["NumPy"] == np.__version__
    device = f"CUDA {paddle.version.cuda()}" if paddle.is_compiled_with_cuda() else "CPU"
    assert said["Paddle"] == f"{paddle.__version__}, commit {paddle.version.commit}, {device} build"
    built_for = f"built for Paddle {_build_info.PADDLE_VERSION}, commit {_build_info.PADDLE_COMMIT}, with"
    assert said["operators"].startswith(built_for)
    built = ", ".join("PTX" if arch == "PTX" else f"sm_{arch}" for arch in direct.cuda_archs().split())
    assert said["rrattn.direct"] == (f"with GPU kernels for {built}" if built else "without GPU kernels")
    assert said["SIMD"] == f"{direct.simd()} in use, available: {', '.join(direct.available_simd())}"
    assert said["threads"] == f"{direct.default_num_threads()} by default"
    if not paddle.is_compiled_with_cuda():
        assert said["GPU"] == "none, since this Paddle is a CPU build"


def test_info_names_the_model_libraries_that_are_installed(monkeypatch):
    monkeypatch.setattr(info, "_version", {"paddlenlp": "3.4"}.get)
    lines = info.lines()
    assert lines[0].startswith(f"rrattn: {rrattn.__version__}, in ") and "PaddleNLP: 3.4" in lines
    assert not any(line.startswith(("PaddleFormers", "PaddleFleet")) for line in lines)


def test_info_of_gpus(paddle_with_gpus, monkeypatch):
    lines = info.lines()
    assert f"Paddle: {paddle.__version__}, commit {paddle.version.commit}, CUDA 12.9 build" in lines
    assert any(line.startswith("operators: ") and line.endswith(", with GPU kernels for sm_90a") for line in lines)
    assert [line for line in lines if line.startswith("GPU")] == [
        "GPU: gpu:0, A100, compute capability 8.0, NO kernels in this build",
        "GPU: gpu:1, H100, compute capability 9.0, with Hopper's own kernels",
        "GPU: gpu:2, B200, compute capability 10.0, NO kernels in this build",
    ]
    for archs, with_kernels in (("80", [True, False, False]), ("86 90 100", [False, True, True]),
                                ("80 90a 120", [True, True, False]), ("80 PTX", [True] * 3)):  # fmt: skip
        monkeypatch.setattr(_build_info, "CUDA_ARCHS", archs)
        assert [gpu.kernels is not None for gpu in info.gpus()] == with_kernels
    assert any(line.endswith(", with GPU kernels for sm_80, PTX") for line in info.lines())
    portable = "with portable kernels, tiles for 163 KB of shared memory"
    assert f"GPU: gpu:0, A100, compute capability 8.0, {portable}" in info.lines()

    def no_driver(device, path):
        raise RuntimeError("CUDA driver version is insufficient")

    monkeypatch.setattr(direct, "gpu_kernels", no_driver)
    assert any("gpu:0, A100" in line and "CUDA driver version is insufficient" in line for line in info.lines())
    with monkeypatch.context() as patch:
        patch.setattr(paddle.device.cuda, "get_device_capability", lambda index: (7, 5))
        assert all(gpu.kernels is None for gpu in info.gpus())
    monkeypatch.setattr(_build_info, "CUDA_ARCHS", "")
    assert all(gpu.kernels is None for gpu in info.gpus())
    monkeypatch.setattr(paddle.device.cuda, "device_count", lambda: 0)
    assert info.lines()[-1] == "GPU: Paddle sees none"


def test_without_paddle():
    code = """
import sys
sys.modules["paddle"] = None  # as if it were not installed
from rrattn import check
from rrattn.__main__ import main
check.CASES = check.CASES[:1]
assert main(["info"]) == 0
print("--")
assert main(["check"]) == 0
for command in ("calibrate model config --text file --held-out file", "visualize model --text file --output file.png"):
    try:
        main(command.split())
    except SystemExit as stop:
        assert stop.code == 2
"""
    process = run_python("-c", code)
    assert process.returncode == 0, process.stderr
    told, checked = process.stdout.split("--\n")
    assert "Paddle: not installed, so that only rrattn.direct is there" in told.splitlines()
    assert "GPU: none without Paddle" in told.splitlines()
    assert "not checked: Paddle's operators: Paddle is not installed" in checked.splitlines()
    assert checked.splitlines()[-1].startswith(f"all {10 * len(direct.available_simd())} groups passed")
    for name in ("calibrate", "visualize"):
        assert f"rrattn {name}: error: needs Paddle, which is not installed" in process.stderr


def test_check_passes_here():
    before = cpu_seconds()
    process = run_python("-W", "ignore", "-m", "rrattn", "check")
    seconds = cpu_seconds() - before  # of work, however busy the machine is
    assert process.returncode == 0, process.stdout + process.stderr
    groups = [line for line in process.stdout.splitlines() if " ok " in line]
    names = [f"rrattn.direct, {simd}" for simd in direct.available_simd()] + ["Paddle's operators, cpu"]
    for name in names:
        for label in (
            "float32",
            "float16",
            "bfloat16",
            *check.FEATURES,
            "compensation",
            "eight bits",
            "ragged batches",
            "bad arguments",
        ):
            assert sum(line.startswith(f"{name}, {label} ") for line in groups) == 1, process.stdout
    assert process.stdout.splitlines()[-1].startswith(f"all {len(groups)} groups passed")
    assert seconds < 30


def test_selections_of_the_check_can_tell():
    """In most cases some visible blocks are selected and some are not."""
    discriminating = 0
    for case in check.CASES:
        known = check.expected(case, "float32")
        geometry = {"causal": case.causal, "batch": case.batch, "num_heads": case.num_heads, **case.lengths}
        hidden, touched = check.reference.block_geometry(known.startend, **geometry)
        selected = check.reference.unpack(known.block_mask, hidden.shape[-1])
        discriminating += 0 < selected.sum() < (~hidden).sum()
    assert discriminating > len(check.CASES) / 2


@pytest.mark.parametrize("case", check.COMPENSATED_CASES, ids=str)
def test_means_count_in_the_check_of_compensation(case):
    known = check.expected(case, "float32")
    block_mask = check.reference.unpack(known.block_mask, check.reference.num_blocks(case.seqlen_k))
    stands_in = check.reference.stood_in_for(block_mask, known.startend, causal=case.causal, **case.lengths)
    assert stands_in.sum() > stands_in.size / 4


# Faults: each takes the function that is made wrong, and returns the wrong one.


def spoils(output, change):
    """Changes the output of this name after the call, where it is given."""

    def fault(function):
        def wrong(*arguments, **options):
            result = function(*arguments, **options)
            if options[output] is not None:
                change(options[output])
            return result

        return wrong

    return fault


def zeroes_last_value(array):
    array.reshape(-1)[-1] = 0


def zeroes_first_token(grad):
    grad[:, 0] = 0


def flips_a_bit(words):
    words.reshape(-1)[-1] ^= 1


def scales_first_value(scores):
    scores.reshape(-1)[0] *= 1.001


def gives_other_bits_each_time(function):
    calls = []

    def wrong(*arguments, **options):
        function(*arguments, **options)
        calls.append(None)
        options["grad_query"].reshape(-1).view(np.uint8)[0] ^= len(calls) % 2  # the lowest bit of one of its numbers

    return wrong


def takes_any_head_size(function):
    def wrong(query, *arguments, **options):
        return function(query, *arguments, **options) if query.shape[-1] % 8 == 0 else None

    return wrong


def ends_early(function):
    def wrong(*arguments, **options):
        raise RuntimeError("no such kernel")

    return wrong


def selects_otherwise(function):
    def wrong(*arguments, **options):
        out, lse, block_mask = function(*arguments, **options)
        return out, lse, block_mask + 1

    return wrong


def doubles(function):
    def wrong(*arguments, **options):
        result = function(*arguments, **options)
        return (2 * result[0], *result[1:]) if isinstance(result, tuple) else 2 * result

    return wrong


def ignores(argument):
    """Takes no notice of this array."""
    return lambda function: lambda *arguments, **options: function(*arguments, **{**options, argument: None})


def does_not(option):
    """Takes no notice of this option."""
    return lambda function: lambda *arguments, **options: function(*arguments, **{**options, option: False})


DTYPES = ("float32", "float16", "bfloat16")
PLAIN = (*DTYPES, *check.FEATURES)
ATTENTION = (*PLAIN, "compensation", "eight bits")
CASES_OF_FAULTS = check.CASES[2:4]


@pytest.mark.parametrize(
    ("module", "name", "fault", "failing", "message"),
    [
        (
            direct,
            "estimate_block_scores",
            spoils("block_scores", scales_first_value),
            PLAIN,
            "block scores, largest error: ",
        ),
        (
            direct,
            "select_blocks",
            spoils("block_mask", flips_a_bit),
            PLAIN,
            "selection, in words that differ: 1, allowed 0",
        ),
        (direct, "block_sparse_attention", spoils("out", zeroes_last_value), ATTENTION, "output, largest error: "),
        (direct, "block_sparse_attention", spoils("lse", zeroes_last_value), ATTENTION, "log-sum-exp, largest error: "),
        (direct, "block_sparse_attention", does_not("compensate"), ("compensation",), "output, largest error: "),
        (direct, "rr_attention", does_not("compensate"), ("compensation",), "output of rr_attention, in words that"),
        (
            direct,
            "rr_attention",
            spoils("block_mask", flips_a_bit),
            ATTENTION,
            "selection of rr_attention, in words that differ",
        ),
        (
            direct,
            "rr_attention",
            spoils("out", zeroes_last_value),
            (*ATTENTION, "ragged batches"),
            "output of rr_attention, in words that differ",
        ),
        (
            direct,
            "ragged_attention",
            spoils("out", zeroes_last_value),
            ("ragged batches",),
            "output of 200 queries in a batch, in words that differ: 1, allowed 0",
        ),
        (serving, "ragged_attention", doubles, ("ragged batches",), "output of 1 queries in a batch, in words that"),
        (
            direct,
            "block_sparse_attention_backward",
            spoils("grad_key", zeroes_first_token),
            PLAIN,
            "gradient of key, largest error: ",
        ),
        (direct, "block_sparse_attention_backward", gives_other_bits_each_time, PLAIN, "differ from run to run: 1, "),
        (direct, "block_sparse_attention_backward", ends_early, PLAIN, "RuntimeError: no such kernel"),
        (direct, "estimate_block_scores", ignores("sink"), ("sinks",), "block scores, largest error: "),
        (direct, "block_sparse_attention", ignores("sink"), ("sinks",), "log-sum-exp, largest error: "),
        (
            direct,
            "block_sparse_attention_backward",
            spoils("grad_sink", scales_first_value),
            ("sinks",),
            "gradient of sink, largest error: ",
        ),
        (
            direct,
            "block_sparse_attention_backward",
            ignores("grad_lse"),
            ("gradient of log-sum-exp",),
            "gradient of query, largest error: ",
        ),
        (functional, "rr_attention", ignores("sink"), ("sinks",), "output of rr_attention, in words that differ"),
        (direct, "estimate_block_scores", takes_any_head_size, ("bad arguments",), "a head size of 7 raised nothing"),
        (functional, "block_sparse_attention", doubles, ATTENTION, "output, largest error: "),
        (functional, "select_blocks", doubles, PLAIN, "selection, in words that differ: "),
        (functional, "rr_attention", selects_otherwise, ATTENTION, "selection of rr_attention, in words that differ"),
        (
            functional,
            "rr_attention",
            doubles,
            (*ATTENTION, "ragged batches"),
            "output of rr_attention, in words that differ",
        ),
        (functional, "estimate_block_scores", ends_early, (*PLAIN, "bad arguments"), "RuntimeError: no such kernel"),
    ],
)
def test_check_fails_where_a_kernel_is_wrong(monkeypatch, one_case, capsys, module, name, fault, failing, message):
    here = [check.DirectKernels(direct.simd()), check.OperatorKernels("cpu")]  # the fault is before instruction sets
    monkeypatch.setattr(check, "kernels_here", lambda: (here, []))
    monkeypatch.setattr(check, "CASES", CASES_OF_FAULTS)
    monkeypatch.setattr(check, "QUANTIZED_CASES", CASES_OF_FAULTS)
    monkeypatch.setattr(module, name, fault(getattr(module, name)))
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = "rrattn.direct, " if module is direct else "Paddle's operators, cpu, "
    groups = [line for line in lines if line.startswith(("rrattn.direct", "Paddle's"))]
    for line in groups:
        expected_to_fail = line.startswith(wrong) and any(f", {label} " in line for label in failing)
        assert ("FAILED" in line) == expected_to_fail, line
    assert any(message in line for line in lines if line.startswith("    ")), lines
    assert "groups FAILED" in lines[-1]
    for word in ("issue tracker", "`rrattn info`", "`rrattn check`"):
        assert word in lines[-1]


def test_check_leaves_the_instruction_set_as_it_was(one_case, simd):
    assert main(["check"]) == 0
    assert direct.simd() == simd


def test_gpus_with_kernels_are_checked_and_others_named(paddle_with_gpus):
    kernels, left_out = check.kernels_here()
    assert [(one.device, one.dtypes) for one in kernels if one.on_gpu] == [("gpu:1", ("float16", "bfloat16"))]
    assert left_out == [
        "gpu:0, A100, compute capability 8.0, NO kernels in this build",
        "gpu:2, B200, compute capability 10.0, NO kernels in this build",
    ]


def test_check_tells_which_kernels_each_gpu_gets_and_what_is_built(paddle_with_gpus, monkeypatch, capsys):
    monkeypatch.setattr(_build_info, "CUDA_ARCHS", "80 90a")
    left_out = check.kernels_here()[1]
    monkeypatch.setattr(check, "kernels_here", lambda: ([], left_out))
    assert main(["check"]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == [
        "GPU: gpu:0, A100, compute capability 8.0, with portable kernels, tiles for 163 KB of shared memory",
        "GPU: gpu:1, H100, compute capability 9.0, with Hopper's own kernels",
        "GPU: gpu:2, B200, compute capability 10.0, NO kernels in this build",
        f"operators: built for Paddle {_build_info.PADDLE_VERSION}, commit {_build_info.PADDLE_COMMIT}, "
        "with GPU kernels for sm_80, sm_90a",
        "not checked: gpu:2, B200, compute capability 10.0, NO kernels in this build",
    ]


def test_a_device_that_cannot_be_used_fails_its_groups_alone(monkeypatch, one_case, capsys):
    monkeypatch.setattr(
        check, "kernels_here", lambda: ([check.OperatorKernels("gpu:99"), check.OperatorKernels("cpu")], [])
    )
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ")[1] for line in lines if " FAILED" in line and "operators" in line] == ["gpu:99"] * 9
    assert sum(" ok " in line for line in lines) == 10
    assert sum(line.startswith("    ") and "Error: " in line for line in lines) == 9
    assert lines[-1].startswith("9 of 19 groups FAILED")


@pytest.mark.parametrize("dtype", ("float16", "bfloat16"))
def test_what_is_allowed_on_a_gpu(monkeypatch, dtype):
    """The CPU's operators stand in for a GPU's, and block scores have the rounding of tensor cores to compare with."""
    kernels = check.OperatorKernels("cpu")
    kernels.on_gpu = True
    assert check.check_dtype(kernels, dtype)[0] == []
    monkeypatch.setattr(functional, "estimate_block_scores", doubles(functional.estimate_block_scores))
    failures, _ = check.check_dtype(kernels, dtype)
    assert any(failure.startswith("block scores, largest error: ") for failure in failures)


@pytest.mark.parametrize(
    "arguments", ([], ["chekc"], ["check", "--fast"], ["calibrate", "model"], ["visualize", "model"])
)
def test_other_commands_are_refused(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "rrattn" in capsys.readouterr().err
