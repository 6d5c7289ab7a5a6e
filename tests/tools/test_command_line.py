"""The checks that the examples and tools share, and those of the tools whose work takes more than is here."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rrattn import command_line

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fails(capsys):
    """fails(check, *arguments): what a check says when it ends the program."""

    def said(check, *arguments, **named):
        with pytest.raises(SystemExit) as stop:
            check(argparse.ArgumentParser(prog="tool"), *arguments, **named)
        assert stop.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return said


def test_numbers(fails):
    arguments = argparse.Namespace(steps=3, keep_local=0, share=float("nan"), other=None)
    command_line.check_at_least(None, arguments, steps=3, keep_local=0, other=1)
    for name, least in (("steps", 4), ("keep_local", 1), ("share", 0)):
        option = name.replace("_", "-")
        message = f"tool: error: --{option} must be at least {least}, got {getattr(arguments, name)}"
        assert fails(command_line.check_at_least, arguments, **{name: least}) == message


def test_files(fails, tmp_path):
    there = tmp_path / "there.json"
    there.write_text("kept")
    command_line.check_input_file(None, "FILE", there)
    for path in (there, tmp_path / "new.json"):
        command_line.check_output_file(None, "--json", path, (".json",))
    assert there.read_text() == "kept" and list(tmp_path.iterdir()) == [there]
    assert "there is no file" in fails(command_line.check_input_file, "FILE", tmp_path)
    for path, message in (
        (tmp_path / "no" / "x.json", f"there is no folder {tmp_path}/no for --json"),
        (tmp_path / "x.txt", f"--json must end in .json, got {tmp_path}/x.txt"),
        (Path("/proc/x.json"), "/proc/x.json for --json cannot be written: No such file"),
    ):
        assert message in fails(command_line.check_output_file, "--json", path, (".json",))
    assert "must be a file" in fails(command_line.check_output_file, "--json", tmp_path)


def test_folders(fails, tmp_path):
    for folder in (tmp_path, tmp_path / "new" / "one"):
        command_line.check_output_folder(None, "--output", folder)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "in it"):
        assert "must be a folder, but" in fails(command_line.check_output_folder, "--output", folder)
    assert "cannot be written to" in fails(command_line.check_output_folder, "--output", Path("/proc/x/y"))
    assert "there is no checkpoint" in fails(command_line.check_checkpoint, "--model", tmp_path)


def test_pictures(fails, monkeypatch, tmp_path):
    assert ".png or .pdf or .svg" in fails(command_line.check_picture, "--picture", tmp_path / "x.jpg")
    monkeypatch.setattr(command_line.util, "find_spec", lambda _: None)
    assert "--picture takes matplotlib" in fails(command_line.check_picture, "--picture", tmp_path / "x.png")


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("bench.cpu", ["--rounds", "0"], "--rounds must be at least 1, got 0"),
        ("bench.cpu", ["--json", "no/x.json"], "there is no folder no for --json"),
        ("probe.corpus", ["file"], "FOLDER must be a folder, but"),
        ("probe.corpus", ["--megabytes", "nan"], "--megabytes must be above 0 and finite, got nan"),
    ],
)
def test_tools(tmp_path, tool, arguments, message):
    (tmp_path / "file").touch()
    command = [sys.executable, "-W", "ignore", "-m", f"tools.{tool}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=environment)
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1], result.stderr
