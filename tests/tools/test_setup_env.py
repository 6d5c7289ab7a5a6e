"""tools/setup_env asks for the compiler before it installs anything, and tells how far it is.

Programs that only note what they are asked for stand in for Python and pip.
"""

import os
import pty
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A Python of a virtual environment, and one that makes these. pip takes its time.
PYTHON = """#!/bin/sh
echo "$@" >>{log}
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"-m pip "*" -r "*) echo Collecting the first package; sleep {seconds}; echo Installing; exit {status} ;;
  *"-m pip "*" -e ."*) : >rrattn/_build_info.py ;;
esac
"""
COMPILER = """#!/bin/sh
cat >/dev/null
echo no such option >&2
exit 1
"""


class Checkout:
    def __init__(self, folder):
        self.folder, self.log = folder / "a checkout", folder / "asked"
        for name in ("tools", "csrc", "rrattn", "programs"):
            (self.folder / name).mkdir(parents=True)
        versions = [path.relative_to(ROOT) for path in (ROOT / "tools").glob("*.txt")]
        for name in ("tools/setup_env", "setup.py", "pyproject.toml", *versions):
            shutil.copy(ROOT / name, self.folder / name)
        self.environment = {**os.environ, "PATH": f"{self.folder / 'programs'}{os.pathsep}{os.environ['PATH']}"}
        self.environment.pop("CXX", None)

    def write(self, name, content):
        path = self.folder / "programs" / name
        path.write_text(content)
        path.chmod(0o755)

    def write_python(self, *, seconds=0, status=0):
        self.write("python3", PYTHON.format(log=f"'{self.log}'", seconds=seconds, status=status))

    def run(self, *environments, **options):
        command = ["bash", self.folder / "tools" / "setup_env", *environments]
        return subprocess.run(command, env=self.environment, timeout=120, text=True, **options)

    def asked(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def checkout(tmp_path):
    made = Checkout(tmp_path)
    made.write_python()
    return made


def test_both_steps_and_none_the_second_time(checkout):
    process = checkout.run(capture_output=True)
    assert process.returncode == 0, process.stderr
    messages = [line for line in process.stderr.splitlines() if not re.match(r"set-up:   \d+ s: ", line)]
    assert [line.split()[1] for line in messages] == ["making", "installing", "building", "loading"], messages
    asked = checkout.asked()
    assert any(line.endswith("-r tools/requirements.txt") for line in asked)
    assert checkout.run(capture_output=True).stderr == ""
    assert all(line.startswith("-c") for line in checkout.asked()[len(asked) :])
    (checkout.folder / "tools" / "constraints.txt").write_text("numpy==1\n")
    assert "installing" in checkout.run(capture_output=True).stderr


def test_environments_of_model_libraries_on_request(checkout):
    process = checkout.run("paddlenlp", "paddleformers", capture_output=True)
    assert process.returncode == 0, process.stderr
    asked = checkout.asked()
    for library in ("paddlenlp", "paddleformers"):
        assert any(line.endswith(f"-r tools/requirements-{library}.txt") for line in asked)
        assert (checkout.folder / f".venv-{library}" / "environment.stamp").exists()
    assert any("paddlenlp-2.8.1 paddlenlp==2.8.1" in line for line in asked)
    assert checkout.run("paddlenlp", "paddleformers", capture_output=True).stderr == ""
    (checkout.folder / "tools" / "constraints-paddleformers.txt").write_text("numpy==1\n")
    stderr = checkout.run("paddlenlp", "paddleformers", capture_output=True).stderr
    assert "making .venv-paddleformers" in stderr and ".venv-paddlenlp" not in stderr


def test_an_environment_that_is_not_known_is_refused_before_anything_is_installed(checkout):
    process = checkout.run("paddleformer", capture_output=True)
    assert process.returncode == 1
    assert process.stderr == "set-up: knows no environment paddleformer; there are paddlenlp and paddleformers\n"
    assert checkout.asked() == []


def test_a_missing_compiler_is_named_before_anything_is_installed(checkout):
    checkout.environment["CXX"] = "no-such-compiler -O2"
    process = checkout.run(capture_output=True)
    assert process.returncode == 1
    assert process.stderr == "set-up: needs a C++17 compiler; no-such-compiler was not found (set CXX to another)\n"
    assert not any("venv" in line or "pip" in line for line in checkout.asked())


def test_a_compiler_of_an_older_language_is_named_before_anything_is_installed(checkout):
    checkout.write("old", COMPILER)
    checkout.environment["CXX"] = "old -m64"
    process = checkout.run(capture_output=True)
    assert process.returncode == 1
    said, message = process.stderr.splitlines()
    assert said == "no such option" and "old -m64 compiles no line of it" in message
    assert not any("venv" in line or "pip" in line for line in checkout.asked())


def test_a_compiler_may_have_options_and_quotes(checkout):
    checkout.write("new", "#!/bin/sh\ncat >/dev/null\n")
    checkout.environment["CXX"] = f"'{checkout.folder / 'programs' / 'new'}' -m64"
    process = checkout.run(capture_output=True)
    assert process.returncode == 0, process.stderr


def test_a_failed_install_shows_what_pip_said(checkout):
    checkout.write_python(status=1)
    process = checkout.run(capture_output=True)
    assert process.returncode == 1
    assert "Collecting the first package\nInstalling\nset-up: failed: installing" in process.stderr
    assert not (checkout.folder / ".venv" / "environment.stamp").exists()


def test_progress_on_a_terminal(checkout):
    """The seconds and what pip does, each second in one place; nothing of it stays."""
    checkout.write_python(seconds=2.5)
    terminal, theirs = pty.openpty()
    process = checkout.run(stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096) or b""
        except OSError:  # all was read
            break
    os.close(terminal)
    assert process.returncode == 0
    shown = shown.decode()
    assert re.search(r"\r\x1b\[Kset-up:   [12] s: Collecting the first package", shown), shown
    lines = [line.rpartition("\x1b[K")[2] for line in shown.replace("\r\n", "\n").split("\n")]
    assert all(re.match("set-up: (making|installing|building|loading)", line) for line in lines if line), lines
    assert "Terminated" not in shown
