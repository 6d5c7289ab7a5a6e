"""What tools/gpu_resources.py has recorded of the portable kernels, and that it would tell where they take too much."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools import gpu_resources, pages

ROOT = Path(__file__).resolve().parents[2]
# Instances of the main kernels for each dtype, head size and architecture: attention with and without keys that none
# sees, with compensation and of ragged batches; gradients with and without such keys and deterministic or not; the
# estimate by key stride, of usual calls and of ragged batches.
INSTANCES = {"attend": 4, "backward": 4, "estimate": 14}
ATTEND = (
    "_ZN6rrattn4cuda4sm806attend13attend_kernelINS2_12KernelTraitsIN7cutlass10bfloat16_tELi64ELi64ELNS1_9TileTableE{}EEE"
    "Lb1ELb0EEEvNS2_12KernelParamsE"
)
MEANS = "_ZN6rrattn4cuda18block_means_kernelIN7cutlass10bfloat16_tELi64EEEvNS_12AttendParamsENS_4RowsES5_bb"


@pytest.fixture
def record():
    return gpu_resources.read_record()


def report_of(name, arch, registers=255, spilled=0, shared=""):
    """As ptxas has it."""
    return (
        f"ptxas info    : Compiling entry function '{name}' for 'sm_{arch}'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    16 bytes stack frame, {spilled} bytes spill stores, {2 * spilled} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers, {shared}768 bytes cmem[0]\n"
        "ptxas info    : Compile time = 462.013 ms\n"
    )


def test_the_record_belongs_to_the_sources_and_the_docs_say_what_it_does():
    """And every kernel has what its chips have, without a spill that is not known."""
    command = [sys.executable, "-m", "tools.gpu_resources", "--check"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout == ""


def test_every_instance_is_recorded_for_every_architecture(record):
    assert list(record) == gpu_resources.sources()
    kernels = [kernel for kernel in gpu_resources.kernels_of(record) if kernel.is_main]
    stages = {Path(source).parts[3] for source in record}
    assert {kernel.stage for kernel in kernels} == stages
    for stage in stages:
        found = {}
        for kernel in kernels:
            if kernel.stage == stage:
                found.setdefault((kernel.dtype, kernel.head_sizes, kernel.arch), []).append(kernel.arguments[1:])
        sizes = {head_sizes for _, head_sizes, _ in found}
        assert len(found) == 2 * len(sizes) * len(gpu_resources.CHIPS), stage
        assert len(sizes) * 2 == sum(f"/{stage}/" in source for source in record)
        variants = {tuple(sorted(arguments)) for arguments in found.values()}
        assert len(variants) == 1, stage  # every dtype, head size and architecture has the same ones
        assert len(variants.pop()) == INSTANCES[stage]


def test_kernels_are_recorded_for_the_chips_of_their_tiles(record):
    for kernel in gpu_resources.kernels_of(record):
        if kernel.is_main and kernel.table:
            assert kernel.table == gpu_resources.CHIPS[kernel.arch].table
            assert 0 < kernel.dynamic_shared <= kernel.table * 1024


@pytest.fixture
def sound(monkeypatch):
    """A record of two kernels, one of them small, in which nothing is amiss but that it is not of these sources."""
    monkeypatch.setattr(gpu_resources, "KNOWN_SPILLS", {})
    taken = {"registers": 255, "spill_stores": 0, "spill_loads": 0, "static_shared": 0}
    on = {arch: dict(taken) for arch in gpu_resources.CHIPS}
    main = {"kernel": "attend_kernel", "arguments": ["KernelTraits<half_t, 128, 128>", "true", "true"], "on": on}
    small = {"kernel": "block_means_kernel", "arguments": ["half_t", "128"], "on": copy.deepcopy(on)}
    kernels = [{**main, "threads": 128, "dynamic_shared": 49152}, {**small, "threads": None, "dynamic_shared": 0}]
    return {"csrc/cuda/sm80/attend/instantiations/attend_fp16_128.cu": {"nvcc": "13.0", "kernels": kernels}}


def problems(record):
    return [one for one in gpu_resources.problems(record) if "has changed since" not in one]


@pytest.mark.parametrize(
    ("which", "change", "problem"),
    [
        (
            0,
            {"registers": 256},
            "attend_kernel<KernelTraits<half_t, 128, 128>, true, true> on 8.6 takes 256 registers, of 255",
        ),
        (1, {"registers": 256}, "block_means_kernel<half_t, 128> on 8.6 takes 256 registers, of 255"),
        (0, {"static_shared": 52352}, "true> on 8.6 takes 101504 bytes of shared memory, of 101376"),
        (1, {"static_shared": 101377}, "block_means_kernel<half_t, 128> on 8.6 takes 101377 bytes of shared memory"),
        (0, {"static_shared": 448}, "true> on 8.6 takes 448 bytes of static shared memory, which its tiles follow"),
        (0, {"spill_stores": 8}, "attend, compensated, head size 128, on 8.6 spills 8 bytes, where 0 are known"),
    ],
)
def test_what_a_chip_has_not_is_a_problem(sound, which, change, problem):
    assert problems(sound) == []
    (kernels,) = (one["kernels"] for one in sound.values())
    kernels[which]["on"]["86"].update(change)
    assert [problem in one for one in problems(sound)][:1] == [True]
    kernels[which]["on"]["86"].update(registers=255, spill_stores=0, static_shared=0)
    kernels[which]["on"]["80"].update(static_shared=52352)  # which has more
    assert problems(sound) == []


def test_a_kernel_without_room_on_a_multiprocessor_is_a_problem(sound):
    (kernels,) = (one["kernels"] for one in sound.values())
    kernels[0]["threads"] = 1024
    assert len(problems(sound)) == len(gpu_resources.CHIPS)
    assert all("has no room on a multiprocessor" in one for one in problems(sound))


def test_known_spills_are_those_that_there_are_and_stand_in_the_docs(sound, monkeypatch):
    place = "attend, compensated", (128,)
    monkeypatch.setattr(gpu_resources, "KNOWN_SPILLS", {place: ({"12.0": 12}, "nobody knows")})
    assert problems(sound) == ["attend, compensated, head size 128, on 12.0 spills 0 bytes, where 12 are known"]
    (kernels,) = (one["kernels"] for one in sound.values())
    kernels[0]["on"]["120"]["spill_stores"] = 12
    kernels[1]["on"]["120"]["spill_stores"] = 8  # of a small one
    assert problems(sound) == []
    lines = gpu_resources.table(sound).splitlines()
    assert "- attend, compensated, head size 128: 12 bytes on 12.0: nobody knows." in lines
    cells = "255, 48.0 KB x 2; spills 12 on 12.0 | 255, 48.0 KB x 2 | 255, 48.0 KB x 2 |"
    assert f"| attend, compensated | 128 | {cells}" in lines
    for kernel in kernels:
        kernel["arguments"] = [one.replace("128", "256") for one in kernel["arguments"]]
    monkeypatch.setattr(gpu_resources, "KNOWN_SPILLS", {})
    assert problems(sound) == []  # larger head sizes may spill


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "arch", "blocks"),
    [
        (255, 128, 48 * 1024, "86", 2),
        (168, 128, 32 * 1024, "86", 3),  # 3 warps in each of the four parts
        (128, 128, 48 * 1024, "86", 2),  # of 100 KB, each with 1 KB of the driver's
        (128, 128, 49 * 1024, "86", 2),
        (128, 128, 49 * 1024 + 1, "86", 1),
        (128, 128, 49 * 1024 + 1, "80", 3),
        (32, 256, 0, "86", 6),  # 48 warps
        (32, 256, 0, "90", 8),
        (255, 256, 128 * 1024, "80", 1),
    ],
)
def test_thread_blocks_of_a_multiprocessor(registers, threads, shared, arch, blocks):
    kernel = gpu_resources.Kernel("attend", "kernel", ("KernelTraits<half_t, 64>",), arch, threads, shared, registers)
    assert kernel.thread_blocks == blocks


def test_names_are_read():
    traits = "rrattn::cuda::sm80::attend::KernelTraits<cutlass::half_t, 64, 64, (rrattn::cuda::sm80::TileTable)99>"
    name = f"void rrattn::cuda::attend_kernel<{traits}, true, false>(rrattn::Parameters<{traits} >)"
    read = traits.replace("(rrattn::cuda::sm80::TileTable)", "rrattn::cuda::sm80::TileTable ")
    assert gpu_resources.template_arguments(name) == ("rrattn::cuda::attend_kernel", [read, "true", "false"])
    name = "rrattn::(anonymous namespace)::transpose_kernel(rrattn::Parameters<int, 3>, int)"
    assert gpu_resources.template_arguments(name) == ("rrattn::transpose_kernel", [])


def test_a_report_is_read():
    report = report_of(ATTEND.format(99), 86, 254, 4) + report_of(MEANS, 86, 40, shared="16384 bytes smem, ")
    called = (
        "ptxas info    : Function properties for helper\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    )
    report += report_of(MEANS, 120, 41).replace("ptxas info    : Used", f"{called}ptxas info    : Used")
    read = gpu_resources.read_report(report)
    assert list(read) == [ATTEND.format(99), MEANS]
    assert read[ATTEND.format(99)] == {
        "86": {"registers": 254, "spill_stores": 4, "spill_loads": 8, "static_shared": 0}
    }
    assert {arch: (taken["registers"], taken["static_shared"]) for arch, taken in read[MEANS].items()} == {
        "86": (40, 16384), "120": (41, 0),
    }  # fmt: skip
    with pytest.raises(SystemExit, match="reads otherwise than expected"):
        gpu_resources.read_report(report.replace("bytes spill stores", "bytes of spills"))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of two sources and what they include."""
    folder = tmp_path / "csrc/cuda/sm80/attend"
    (folder / "instantiations").mkdir(parents=True)
    (folder / "stage.cuh").write_text('#include "../../common/parts.cuh"\n\nint a = 1;\n')
    (tmp_path / "csrc/cuda/common").mkdir()
    (tmp_path / "csrc/cuda/common/parts.cuh").write_text("#pragma once\n\nkernel(Parts parts) {\n  int b;\n}\n")
    (folder / "kernel.cuh").write_text("attend_kernel(const Params params) {\n  extern __shared__ char memory[];\n")
    for name in ("attend_bf16_64.cu", "attend_fp16_64.cu"):
        (folder / "instantiations" / name).write_text('#include "../stage.cuh"\n')
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/tuning.md").write_text("Before\n<!-- resources -->\n<!-- /resources -->\nafter\n")
    (tmp_path / "tools/bench/results").mkdir(parents=True)
    for module in (gpu_resources, pages):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_resources, "RECORD", tmp_path / "tools/bench/results/gpu_resources.json")
    monkeypatch.setattr(gpu_resources, "toolkit", lambda: "13.0")
    monkeypatch.setattr(gpu_resources.cuda_archs, "known", lambda: list(gpu_resources.CHIPS))
    return tmp_path


@pytest.fixture
def run(checkout, monkeypatch, capsys):
    """run(...): what the tool returns and prints, and which sources it had compiled; its compiler is none."""
    compiled = []

    def nvcc(*arguments):
        *_, source, _, output = arguments
        if "-fatbin" in arguments:
            compiled.append(Path(source).name)
            assert {"-gencode=arch=compute_80,code=sm_90", "-gencode=arch=compute_80,code=sm_86"} <= {*arguments}
            names = [ATTEND.format(table) for table in (99, 163, 227)] + [MEANS]
            archs = re.findall(r"code=sm_(\d+)", str(arguments))
            return "".join(report_of(name, arch, 200) for arch in archs for name in names)
        program = Path(arguments[-1]).read_text()
        assert f'#include "{checkout}/csrc/cuda/sm80/attend/stage.cuh"' in program
        assert "attend::KernelTraits<cutlass::bfloat16_t, 64, 64, static_cast<rrattn::" in program
        Path(arguments[-2]).write_text("#!/bin/sh\n" + "echo 128 32768\n" * program.count("print<"))
        Path(arguments[-2]).chmod(0o755)

    monkeypatch.setattr(gpu_resources, "nvcc", nvcc)

    def called(*arguments):
        compiled.clear()
        monkeypatch.setattr(sys, "argv", ["gpu_resources", *arguments])
        status = gpu_resources.main()
        return status, capsys.readouterr().out, list(compiled)

    return called


BOTH = ["attend_bf16_64.cu", "attend_fp16_64.cu"]
ROW = "| attend | 64 | 200, 32.0 KB x 2 | 200, 32.0 KB x 2 | 200, 32.0 KB x 2 |"


def test_what_has_changed_is_compiled_and_written_down(run, checkout, monkeypatch):
    status, said, compiled = run("--check")
    assert (status, compiled) == (1, []) and said.count("has changed since it was compiled") == 2
    status, said, compiled = run()
    assert (status, compiled) == (0, BOTH), said
    page = checkout / "docs/tuning.md"
    assert ROW in page.read_text().splitlines() and page.read_text().endswith("<!-- /resources -->\nafter\n")
    assert run("--check") == (0, "", []) and run() == (0, "", [])
    kernels = gpu_resources.kernels_of(gpu_resources.read_record())
    on = {kernel.arch: (kernel.table, kernel.threads, kernel.dynamic_shared) for kernel in kernels if kernel.is_main}
    assert on == {arch: (chip.table, 128, 32768) for arch, chip in gpu_resources.CHIPS.items()}
    assert sorted(kernel.arch for kernel in kernels if not kernel.is_main) == sorted(2 * [*gpu_resources.CHIPS])

    header = checkout / "csrc/cuda/common/parts.cuh"
    header.write_text(f"// A comment.\n{header.read_text()}")
    assert run("--check") == (0, "", [])
    page.write_text(page.read_text().replace("32.0", "31.9"))
    assert run("--check") == (1, "docs/tuning.md has another table\n", [])
    assert run() == (0, "", []) and ROW in page.read_text()
    header.write_text(header.read_text().replace("int b", "long b"))
    status, said, compiled = run("--check")
    assert (status, compiled) == (1, []) and said.count("has changed since it was compiled") == 2
    source = checkout / "csrc/cuda/sm80/attend/instantiations/attend_fp16_64.cu"
    assert run("--source", "csrc/cuda/**/attend_fp16*.cu")[::2] == (1, ["attend_fp16_64.cu"])  # the other is left
    assert run()[::2] == (0, ["attend_bf16_64.cu"])
    assert run("--source", str(source.relative_to(checkout)))[::2] == (0, ["attend_fp16_64.cu"])  # asked for
    with monkeypatch.context() as patch:
        patch.setattr(gpu_resources.cuda_archs, "flags", lambda archs: ["-gencode=arch=compute_80,code=sm_80"])
        assert run("--check")[1].count("has changed since it was compiled") == 2
    source.unlink()
    gone = source.relative_to(checkout)
    assert run("--check") == (1, f"{gone} is no more\n", [])
    assert run() == (0, "", []) and list(gpu_resources.read_record()) == gpu_resources.sources()


def test_a_source_of_no_kernels_is_refused(run, capsys):
    with pytest.raises(SystemExit):
        run("--source", "csrc/cuda/sm80/attend/stage.cuh")
    assert "no portable kernels are in csrc/cuda/sm80/attend/stage.cuh" in capsys.readouterr().err


def test_an_nvcc_that_knows_not_all_is_told(run, monkeypatch):
    monkeypatch.setattr(gpu_resources.cuda_archs, "known", lambda: ["80", "86", "87", "89", "90"])
    status, said, compiled = run()
    assert (status, compiled) == (1, BOTH)
    assert said.count(" was not compiled for 10.0, 12.0\n") == 2


def test_a_run_that_fails_keeps_what_it_had(run, monkeypatch):
    whole = gpu_resources.nvcc

    def fails(*arguments):
        if BOTH[1] in str(arguments):
            raise SystemExit("nvcc failed")
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_resources, "nvcc", fails)
        with pytest.raises(SystemExit, match="nvcc failed"):
            run()
    assert run()[::2] == (0, BOTH[1:])
