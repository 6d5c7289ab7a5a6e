"""`pip install .` in an environment whose Paddle is another build than the one that pip gets for the build."""

import base64
import hashlib
import importlib.metadata
import os
import subprocess
import sys
import zipfile

import paddle
import pytest

OTHER_PADDLE = """
__version__ = {version!r}
class version:
    commit = {commit!r}
def is_compiled_with_cuda():
    return False
"""


def write_wheel(folder, name, version, files):
    """A wheel for any Python with these files, {path in it: bytes}, which pip installs."""
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        record = f"{info}/RECORD,,\n"
        for path, content in files.items():
            archive.writestr(path, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record += f'"{path}",sha256={digest},{len(content)}\n'
        archive.writestr(f"{info}/RECORD", record)


def write_wheel_of_installed(folder, name):
    distribution = importlib.metadata.distribution(name)
    paths = [path for path in distribution.files if path.parts[0] != ".." and path.suffix != ".pyc"]
    kept = [path for path in paths if path.name == "entry_points.txt" or ".dist-info" not in path.parts[0]]
    files = {path.as_posix(): path.locate().read_bytes() for path in kept}
    write_wheel(folder, name, distribution.version, files)


@pytest.fixture(scope="module")
def build_requirements(tmp_path_factory):
    """A folder of wheels: all that the build requires but Paddle."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in ("setuptools", "wheel", "pybind11"):
        write_wheel_of_installed(folder, name)
    if importlib.metadata.requires("wheel"):
        write_wheel_of_installed(folder, "packaging")
    return folder


def install(unpacked_sdist, build_requirements, target, *, version, commit):
    """Runs pip install with a Paddle for the build alone that says to be of this version and commit."""
    module = OTHER_PADDLE.format(version=version, commit=commit).encode()
    write_wheel(build_requirements, "paddlepaddle", "3.3.1", {"paddle/__init__.py": module})
    options = ["--no-index", "--find-links", str(build_requirements), "--no-deps", "--no-cache-dir"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(unpacked_sdist)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("other", ("version", "commit"))
def test_operators_for_another_paddle_than_the_environments_are_refused(
    other, unpacked_sdist, build_requirements, tmp_path
):
    build = {"version": paddle.__version__, "commit": paddle.version.commit, other: "9.8.7"}
    process = install(unpacked_sdist, build_requirements, tmp_path, **build)
    assert process.returncode != 0
    said = " ".join((process.stdout + process.stderr).split())
    assert f"is Paddle {paddle.__version__} (commit {paddle.version.commit})" in said
    assert f"for Paddle {build['version']} (commit {build['commit']})" in said
    assert "pip install 'setuptools>=65' wheel 'pybind11>=2.12', then pip install --no-build-isolation ." in said


def test_operators_for_the_environments_paddle_are_built(unpacked_sdist, build_requirements, tmp_path):
    """As far as the stand-in goes, which has no headers."""
    build = {"version": paddle.__version__, "commit": paddle.version.commit}
    process = install(unpacked_sdist, build_requirements, tmp_path, **build)
    assert "No module named 'paddle.utils'" in process.stdout + process.stderr
    assert "isolated build" not in process.stdout + process.stderr
