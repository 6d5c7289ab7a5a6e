"""What the README and the pages in docs/ tell users to run does run, and what they name is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import rrattn
from tools import support

pytest.importorskip("paddleformers")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_ELSEWHERE = {
    "distributed.md": "test_the_program_for_several_processes",
    "migration.md": "tests/paddle/test_published.py",
}
# Constants, and the names of the first release, which docs/migration.md has.
UNDOCUMENTED = (
    "BLOCK_SIZE",
    "patch_ernie_attention",
    "patch_llama_attention",
    "patch_qwen_attention",
    "rrattn_estimate",
    "rrattn_prefill",
)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def checkout(tmp_path):
    """A folder where what the pages read lies, and what they write may lie."""
    for name in ("examples", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    rrattn.RRAttentionConfig(threshold=[0.9] * 6).to_json(tmp_path / "config.json")  # what rrattn calibrate writes
    return tmp_path


def run_python(page, folder):
    """What the Python of a page prints, from its first line to its last."""
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks(page, "python"))],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_python_of_the_readme(checkout):
    densities = [float(line) for line in run_python(PAGES[0], checkout).splitlines() if re.fullmatch(r"0\.\d+", line)]
    assert len(densities) == 6  # those of the probe's layers


@pytest.mark.parametrize("name", sorted(page.name for page in PAGES[1:] if blocks(page, "python")))
def test_the_python_of_a_page(name, checkout):
    if name in RUN_ELSEWHERE:
        pytest.skip(f"{RUN_ELSEWHERE[name]} runs it")
    run_python(ROOT / "docs" / name, checkout)


def test_the_program_for_several_processes(tmp_path):
    page = ROOT / "docs" / "distributed.md"
    (program,), (command,) = blocks(page, "python"), blocks(page, "bash")
    python, *arguments, name = shlex.split(command)
    assert python == "python" and f"Save this as `{name}`" in page.read_text()
    (tmp_path / name).write_text(program)
    process = subprocess.run(
        [sys.executable, *arguments, name], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    logs = [log.read_text() for log in sorted(tmp_path.glob("log/workerlog.*"))]
    assert process.returncode == 0, process.stdout + process.stderr + "".join(logs)
    assert len(logs) == 2
    for rank, log in enumerate(logs):
        assert re.search(rf"^rank {rank} of 2: 1024 of 2048 tokens, largest difference ", log, re.MULTILINE), log


def test_the_readmes_commands():
    lines = [line.split("#")[0].strip() for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    assert lines == ["rrattn check", "rrattn info", "bash tools/demo", "bash tools/test"]
    _, info, *scripts = lines  # tests/tools/test_command.py runs the first
    process = subprocess.run(
        [sys.executable, "-m", *info.split()], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stdout + process.stderr
    for command in scripts:  # the latter runs this test, and tests/tools/test_examples.py what the former starts
        assert (ROOT / command.split()[1]).is_file()
    assert 'examples/prefill_document.py" "$@"' in (ROOT / "tools" / "demo").read_text()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 130


def test_the_readme_installs_what_the_build_asks_for():
    readme = (ROOT / "README.md").read_text()
    assert re.search(r'^BUILD_TOOLS = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE).group(1) in readme
    required = re.search(r"paddlepaddle==[\d.]+", (ROOT / "pyproject.toml").read_text()).group()
    assert f"`pip install {required}`" in readme


def test_the_readmes_quality_is_that_of_the_page():
    readme = " ".join((ROOT / "README.md").read_text().split())
    page = (ROOT / "docs" / "quality.md").read_text()
    answers = r"with `([^`]+)` (\S+) of 1,068 numbers are looked up right, dense attention has (\S+),"
    settings, right, of_dense = re.search(answers, readme).groups()
    loss = re.search(r"a text's loss is (\S+) above", readme).group(1)
    assert re.search(rf"^\| `{settings}` \| \S+ \| \+{loss} \|.* 44.4% \| {right} \|$", page, re.MULTILINE)
    assert re.search(rf"^\| dense \|.*\| {of_dense} \|$", page, re.MULTILINE)
    defaults = re.search(r"look (\S+) up at (\S+)% of the blocks", readme).groups()
    assert re.search(rf"^\| rrattn, the defaults \|.*\| {defaults[1]}\.\d% \| {defaults[0]} \|$", page, re.MULTILINE)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    assert not [target for target in targets if not (page.parent / target).exists()]
    named = re.findall(r"`((?:csrc|tests|tools|docs|examples|rrattn)/[\w./-]+)`", text)
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_pages_and_the_api_reference_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    reference = (tmp_path / "api.html").read_text()
    documented = set(re.findall(r'id="rrattn\.(?:\w+\.)*(\w+)"', reference))
    assert set(rrattn.__all__) - documented == set(UNDOCUMENTED)


def test_the_tables_of_model_families_are_what_the_tests_run(monkeypatch):
    assert subprocess.run([sys.executable, "-m", "tools.support", "--check"], cwd=ROOT).returncode == 0
    monkeypatch.setattr(support, "FAMILIES", support.FAMILIES[:2])
    monkeypatch.setattr(support, "GPT_MODEL", ("llama",))
    rows = support.table().splitlines()
    assert rows[2] == "| LLaMA | tested | tested | tested | tested | tested, GPTModel over a stand-in |"
    assert rows[3].startswith("| Qwen2 | tested | tested, older class, stand-in for PaddleFleet | tested | refused |")
    assert "| Models of PaddleFleet | LLaMA, LLaMA, against" in support.short_rows()
