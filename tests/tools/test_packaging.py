"""The wheel holds what it should and works by itself, and an operator library for another Paddle is never loaded."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata as installed
from pathlib import Path

import paddle
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import rrattn
from tools.bench import tables

ROOT = Path(__file__).resolve().parents[2]
ATTEND = """
import paddle, rrattn
x = paddle.ones([1, 200, 2, 8])
assert (rrattn.rr_attention(x, x, x, causal=True) - x).abs().max() < 1e-6
print(rrattn.__file__)
"""


def run_python(code, *, path, timeout=120):
    """Runs code in a fresh Python that finds packages in `path` first."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(path)!r})\n{code}"],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def pip(*arguments, **environment):
    command = [sys.executable, "-m", "pip", *arguments]
    process = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.fixture(scope="module")
def wheel(unpack, tmp_path_factory):
    """A wheel of the source distribution, unpacked in a folder whose path has spaces.

    By a compiler that links the C++ runtime statically, as some do whose shared one is missing: see
    `test_libraries_keep_to_the_runtime_of_the_process`.
    """
    folder = tmp_path_factory.mktemp("wheel")
    options = "--no-build-isolation", "--no-deps", "--no-index"
    compiler = f"{os.environ.get('CXX', 'g++')} -static-libstdc++ -static-libgcc"
    source = unpack(folder / "source distribution")
    pip("wheel", *options, "--wheel-dir", str(folder), str(source), CXX=compiler)
    (path,) = folder.glob("*.whl")
    return path


def git_files(*options):
    listing = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no git checkout")
def test_the_sdist_holds_every_file_of_the_checkout(unpacked_sdist):
    held = {path.relative_to(unpacked_sdist).as_posix() for path in unpacked_sdist.rglob("*") if path.is_file()}
    written = {name for name in held if name.startswith("rrattn.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert git_files() - held == set()
    assert held - git_files() - written <= git_files("--others", "--exclude-standard")


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
    libraries = sorted(name.split(".")[0] for name in names if name.endswith(".so"))
    assert libraries == ["rrattn/_direct", "rrattn/_ops"]
    kinds = ("*.py", "*.pyi", "py.typed")
    sources = {path.relative_to(ROOT).as_posix() for kind in kinds for path in ROOT.glob(f"rrattn/**/{kind}")}
    assert "rrattn/py.typed" in sources
    assert sources | {"rrattn/_build_info.py"} == {name for name in names if not name.endswith(".so")}


def test_wheel_works_by_itself(wheel, tmp_path):
    pip("install", "--no-deps", "--no-index", "--target", str(tmp_path), str(wheel))
    process = run_python(ATTEND, path=tmp_path)
    assert process.returncode == 0, process.stderr
    assert Path(process.stdout.splitlines()[-1]) == tmp_path / "rrattn" / "__init__.py"
    command, environment = tmp_path / "bin" / "rrattn", {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run([command, "info"], env=environment, capture_output=True, text=True, timeout=120, cwd="/")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[0].endswith(f", in {tmp_path / 'rrattn'}")
    assert f"operators: built for Paddle {paddle.__version__}, " in process.stdout
    for name, option in (("calibrate", "--held-out"), ("visualize", "--output")):
        process = subprocess.run(
            [command, name, "--help"], env=environment, capture_output=True, text=True, timeout=120, cwd="/"
        )
        assert process.returncode == 0 and option in process.stdout, process.stderr


def test_mypy_checks_the_calls_of_who_installs_the_wheel(wheel, tmp_path, pytestconfig):
    pip("install", "--no-deps", "--no-index", "--target", str(tmp_path / "installed"), str(wheel))
    calls = ROOT / "tests" / "tools" / "typed_calls.py"
    shutil.copy(calls, tmp_path)
    search_path = [str(tmp_path / "installed"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    process = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", pytestconfig.cache.mkdir("mypy"), calls.name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_path))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode in (0, 1), process.stdout + process.stderr
    found = set(re.findall(rf"^{calls.name}:(\d+): error: .*\[(.*)\]$", process.stdout, flags=re.MULTILINE))
    lines = enumerate(calls.read_text().splitlines(), start=1)
    wrong = {(str(number), line.partition("# wrong: ")[2]) for number, line in lines if "# wrong: " in line}
    assert len(wrong) > 20 and found == wrong, process.stdout


RAISE = """
import numpy as np, paddle, rrattn
from rrattn import direct
for head_dim in (7, 1234):
    try:
        x = paddle.zeros([1, 8, 1, head_dim])
        rrattn.estimate_block_scores(x, x, causal=True)
    except ValueError as error:
        print(error)
    try:
        x = np.zeros((1, 8, 1, head_dim), np.float32)
        direct.estimate_block_scores(x, x, block_scores=x, causal=True)
    except ValueError as error:
        print(error)
"""


def test_libraries_keep_to_the_runtime_of_the_process(wheel, tmp_path):
    """Two C++ runtimes in a process mix, and the first error ends it or loses its numbers."""
    pip("install", "--no-deps", "--no-index", "--target", str(tmp_path), str(wheel))
    for library in [*tmp_path.glob("rrattn/*.so"), *ROOT.glob("rrattn/*.so")]:
        symbols = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True)
        exported = [line.split()[-1] for line in symbols.stdout.splitlines() if line.split()[-2] not in "tdrb"]
        assert exported == (["PyInit__direct"] if library.name.startswith("_direct") else [])
        dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
        assert "[libstdc++.so.6]" in dynamic.stdout
    process = run_python(RAISE, path=tmp_path)
    assert process.returncode == 0, process.stderr
    sizes = [line.partition("head_dim is ")[2].partition(",")[0] for line in process.stdout.splitlines() if line]
    assert sizes == ["7", "7", "1234", "1234"]


@pytest.mark.parametrize(
    "other, value",
    (("paddle.__version__", "9.8.7"), ("paddle.version.commit", "0123456789abcdef")),
    ids=("version", "commit"),
)
def test_library_for_another_paddle_is_refused_before_it_is_loaded(other, value):
    process = run_python(
        f"""
import paddle
{other} = {value!r}
try:
    import rrattn
except ImportError as error:
    print(error)
assert "rrattn" not in sys.modules
with open("/proc/self/maps") as maps:
    assert "rrattn/_ops" not in maps.read()
print("survived")
""",
        path=ROOT,
    )
    assert process.returncode == 0, process.stderr
    message, last = process.stdout.splitlines()
    assert last == "survived"
    built_for = paddle.__version__ if other == "paddle.__version__" else paddle.version.commit
    assert value in message and built_for in message and "Install rrattn again" in message


def test_the_right_library_is_loaded():
    """Otherwise the test above could pass for another reason."""
    code = ATTEND + 'assert "rrattn/_ops" in open("/proc/self/maps").read()'
    process = run_python(code, path=ROOT)
    assert process.returncode == 0, process.stderr


def test_a_missing_library_is_named(tmp_path):
    shutil.copytree(ROOT / "rrattn", tmp_path / "rrattn", ignore=shutil.ignore_patterns("_ops*.so"))
    process = run_python("import rrattn", path=tmp_path)
    assert process.returncode == 1
    assert "ImportError: rrattn's operator library is not built" in process.stderr


def test_direct_binding_needs_no_paddle():
    process = run_python(
        """
sys.modules["paddle"] = None  # as if it were not installed
import numpy as np
from rrattn import direct
x, scores = np.ones((1, 200, 2, 8), np.float32), np.zeros((1, 2, 2, 2), np.float32)
direct.estimate_block_scores(x, x, block_scores=scores, causal=True)
print(scores.sum())
""",
        path=ROOT,
    )
    assert process.returncode == 0, process.stderr
    assert float(process.stdout) == pytest.approx(2 * 200 / 8)


def test_what_needs_paddle_says_so_where_it_is_not_installed():
    process = run_python(
        """
sys.modules["paddle"] = None  # as if it were not installed
import rrattn
assert rrattn.RRAttentionConfig(threshold=0.5).threshold == 0.5 and rrattn.direct.simd()
for name in (*rrattn.__all__, "masks", "visualize"):
    if name not in ("RRAttentionConfig", "BLOCK_SIZE"):
        try:
            getattr(rrattn, name)
        except ImportError as error:
            assert str(error).startswith(f"rrattn.{name} needs Paddle, which is not installed. Install Paddle"), error
        else:
            raise AssertionError(name)
try:
    from rrattn import enable
except ImportError as error:
    print(error)
assert not hasattr(rrattn, "rr_atention")
""",
        path=ROOT,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith("rrattn.enable needs Paddle")


def test_modules_are_there_after_the_import_of_the_package():
    """Without loading what they need before they are asked for."""
    process = run_python(
        """
import rrattn
assert "rrattn.direct" not in sys.modules and {"direct", "visualize"} <= set(dir(rrattn))
assert rrattn.direct.simd() in rrattn.direct.available_simd()
assert rrattn.visualize.plot_block_mask and rrattn.masks.visible_blocks
assert "matplotlib" not in sys.modules
print(hasattr(rrattn, "visualise"))
""",
        path=ROOT,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "False\n"


def test_the_version_stands_everywhere_the_same(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = f"rrattn-{rrattn.__version__}.dist-info/METADATA"
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Version"] == rrattn.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == rrattn.__version__
    (newest, *_) = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest == rrattn.__version__


def test_the_wheel_says_its_licence_and_pythons(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (email.message_from_bytes(archive.read(name)) for name in names if name.endswith("/METADATA"))
        (licence,) = (archive.read(name) for name in names if name.endswith("/LICENSE"))
    assert metadata["License"] == "Apache-2.0" and licence == (ROOT / "LICENSE").read_bytes()
    pythons = SpecifierSet(metadata["Requires-Python"])
    said = {text.rpartition(" ")[2] for text in metadata.get_all("Classifier") if "Python :: 3." in text}
    assert said == {f"3.{minor}" for minor in range(20) if pythons.contains(f"3.{minor}")}
    assert said == {"3.9", "3.10", "3.11", "3.12"}


def test_pre_commit_runs_what_ci_checks_of_the_style():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    entries = [hook["entry"] for repository in config["repos"] for hook in repository["hooks"]]
    on_files = r"(\.venv/bin/(?:ruff|clang-format) .*) (?:\.|\"\$\{sources\[@\]\}\")$"
    on_the_package = r"(\.venv/bin/mypy)$"
    checks = (ROOT / ".ci" / "run").read_text()
    style = [command for kind in (on_files, on_the_package) for command in re.findall(kind, checks, flags=re.MULTILINE)]
    assert len(style) == 4 and sorted(entries) == sorted(style)


def test_constraints_pin_all_that_paddle_and_the_model_library_bring():
    """So that `pip install -c tools/constraints.txt paddlepaddle paddleformers` gives the versions that are tested."""
    lines = (ROOT / "tools" / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all([spec.operator for spec in pin.specifier] == ["=="] for pin in pins)
    here = {canonicalize_name(pin.name): pin for pin in pins if pin.marker is None or pin.marker.evaluate()}
    todo, seen = ["paddlepaddle", "paddleformers"], set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        if sys.version_info >= (3, 11) or name in here:  # older Pythons take what still supports them
            assert here[name].specifier.contains(installed.version(name)), f"{name} {installed.version(name)}"
        needed = map(Requirement, installed.requires(name) or ())
        todo += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert len(seen) > 50
    for line in (ROOT / "tools" / "requirements.txt").read_text().splitlines():
        if line and line[0] not in "#-":
            assert canonicalize_name(line) in here, line


def test_tables_match_the_figures():
    command = [sys.executable, "-m", "tools.bench.tables", "--check"]
    assert subprocess.run(command, cwd=ROOT).returncode == 0


def test_tables_show_eight_bits_beside_all_bits():
    eight = ',quantization="qk_int8_pv_fp8"'
    text = {"length": 2048, "task": "text"}
    losses = {
        "dense": (2.0, 0.0, 1.0),
        f"rrattn:threshold=1{eight}": (2.002, 0.002, 1.0),
        "rrattn:threshold=0.9": (2.01, 0.01, 0.31),
        f"rrattn:threshold=0.9{eight}": (2.0301, 0.0125, 0.31),
    }
    names = ("nats", "divergence", "density")
    rows = [{**text, "method": method, **dict(zip(names, figures))} for method, figures in losses.items()]
    assert tables.smollm2_table(rows).splitlines()[-2:] == [
        "| 2,048 | 1 | 100% | +0.00% | +0.10% | +0.10% | 0.0000 | 0.0020 |",
        "| 2,048 | 0.9 | 31% | +0.50% | +1.51% | +1.00% | 0.0100 | 0.0125 |",
    ]
    probe = [
        {**text, "task": task, "method": method, "score": score, "nats": 0.4 / score}
        for method, score in (("dense", 1.0), (f"rrattn:threshold=0.9{eight}", 0.5))
        for task in tables.TASK_COLUMNS
    ]
    assert tables.probe_table(probe).splitlines()[-1] == (
        f"| threshold=0.9, eight bits |{' 50.0% |' * 6} 0.8000 | 50.00% |"
    )


def test_tables_show_the_gpu_stages_that_were_measured():
    common = {"gpu": "H200", "cuda": "13.0", "dtype": "bfloat16", "num_heads": 32, "num_heads_k": 8, "head_dim": 128}
    common.update(commit="abc", command="python gpu.py", seqlen_q=8192, seqlen_k=8192, density=0.254, tflops=500.0)
    attend = {"stage": "attend", "ms": 2.0, "baselines": {"cudnn dense": 5.0, "fa4": 3.0}, **common}
    alone = {"stage": "attend", "ms": 4.0, "baselines": {"cudnn dense": 5.0}, **common}
    whole = {"stage": "rr_attention", "ms": 2.5, "baselines": {"cudnn dense": 5.0}, "data": "random", **common}
    whole["settings"] = {"threshold": 0.9, "compensate": True}
    sampled = {"stage": "estimate+select", "ms": 0.05, "floor_ms": 0.01, "stride": 8, "key_stride": 4, **common}
    sampled |= {"baselines": {"cudnn dense": 1.0}, "settings": {"spread": 0}}
    quick = {"stage": "backward", "ms": 4.0, "baselines": {"cudnn dense": 6.0}, "deterministic": False, **common}
    same_bits = {**quick, "ms": 4.5, "deterministic": True}
    assert tables.gpu_tables([]) == ""
    (table,) = tables.gpu_tables([attend, alone]).split("\n\n|")[1:]
    assert table.splitlines() == [
        " queries | keys | blocks | attend | TFLOP/s | cuDNN, dense | FlashAttention-4 |",
        "|---|---|---|---|---|---|---|",
        "| 8,192 | 8,192 | 25% | 2.000 ms | 500 | 5.000 ms, 2.50 x | 3.000 ms, 1.50 x |",
        "| 8,192 | 8,192 | 25% | 4.000 ms | 500 | 5.000 ms, 1.25 x | not measured |",
    ]
    both = tables.gpu_tables([whole, attend])
    assert both.startswith(tables.gpu_tables([attend]))
    cells = "| 8,192 | random | `threshold=0.9`, `compensate=True` | 25.4% | 2.500 ms | 5.000 ms, 2.00 x |"
    assert both.splitlines()[-1] == cells
    assert tables.gpu_tables([sampled]).splitlines()[-1] == "| 8,192 | 8,192 | 8 | 4 | 0.050 ms | 5.00% | 0.010 ms |"
    assert "With `spread=0` for what" in tables.gpu_tables([sampled])
    assert tables.gpu_tables([quick, same_bits]).splitlines()[-3:] == [
        "| tokens | blocks | backward | TFLOP/s | deterministic | cuDNN, dense |",
        "|---|---|---|---|---|---|",
        "| 8,192 | 25% | 4.000 ms | 500 | 4.500 ms | 6.000 ms, 1.50 x |",
    ]


def test_the_table_of_portable_kernels_says_what_its_shares_are_of():
    common = {"gpu": "H100", "cuda": "13.0", "dtype": "bfloat16", "num_heads": 32, "num_heads_k": 8, "head_dim": 128}
    common |= {"commit": "abc", "command": "python portable.py", "seqlen_q": 8192, "baselines": {"flash dense": 6.0}}
    common |= {"density": 0.254, "kernels": "portable-99KB"}
    whole = {"stage": "rr_attention", "ms": 3.0, "share": 2.0, **common}
    sampled = {"stage": "estimate+select", "ms": 0.06, "share": 0.01, **common}
    backward = {"stage": "backward", "ms": 2.0, "share": 0.762, **common}
    assert tables.portable_table([whole, sampled, backward]).splitlines()[-3:] == [
        "| backward | 128 | 32/8 | 8,192 | 99 KB | 25% | 2.000 ms | 6.000 ms | 0.76 x a block |",
        "| estimate + select | 128 | 32/8 | 8,192 | 99 KB |  | 0.060 ms | 6.000 ms | 1.00% of its time |",
        "| rr_attention | 128 | 32/8 | 8,192 | 99 KB | 25% | 3.000 ms | 6.000 ms | 2.00 x |",
    ]
