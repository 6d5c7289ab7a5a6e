"""What commands, examples and tools check of their arguments before they load or compute anything.

Where a check fails, the program ends by `parser.error`, with status 2 and a message that names the argument.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import tempfile
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from importlib import util
from pathlib import Path

PICTURES = (".png", ".pdf", ".svg")


def check_at_least(parser: ArgumentParser, arguments: argparse.Namespace, **least: float) -> None:
    """That the arguments of these names are none, or this much and more."""
    for name, smallest in least.items():
        given = getattr(arguments, name)
        if given is not None and not given >= smallest:
            parser.error(f"--{name.replace('_', '-')} must be at least {smallest}, got {given}")


def check_input_file(parser: ArgumentParser, name: str, path: Path) -> None:
    """That a file can be read."""
    if not path.is_file():
        parser.error(f"there is no file {path} for {name}")
    try:
        path.open("rb").close()
    except OSError as error:
        parser.error(f"{path} for {name} cannot be read: {error.strerror}")


def read_text(parser: ArgumentParser, name: str, path: Path) -> bytes:
    """The bytes of a file, which can be read."""
    check_input_file(parser, name, path)
    return path.read_bytes()


def check_checkpoint(parser: ArgumentParser, name: str, folder: Path) -> None:
    """That a folder is a model's checkpoint."""
    if not (folder / "config.json").is_file():
        parser.error(f"there is no checkpoint in {folder} for {name}: it has no config.json")


def check_output_file(parser: ArgumentParser, name: str, path: Path, suffixes: Sequence[str] = ()) -> None:
    """That a file can be written, and ends in one of the suffixes if there are any."""
    if suffixes and path.suffix not in suffixes:
        parser.error(f"{name} must end in {' or '.join(suffixes)}, got {path}")
    if not path.parent.is_dir():
        parser.error(f"there is no folder {path.parent} for {name}")
    if path.is_dir():
        parser.error(f"{name} must be a file, but {path} is a folder")
    is_new = not path.exists()
    try:
        path.open("a").close()  # permissions do not tell all: the file system may be for reading alone
    except OSError as error:
        parser.error(f"{path} for {name} cannot be written: {error.strerror}")
    if is_new:
        path.unlink()


def check_picture(parser: ArgumentParser, name: str, path: Path) -> None:
    """That a picture can be drawn and written."""
    check_output_file(parser, name, path, PICTURES)
    if util.find_spec("matplotlib") is None:
        parser.error(f"{name} takes matplotlib: pip install matplotlib")


def check_output_folder(parser: ArgumentParser, name: str, path: Path) -> None:
    """That files can be written to a folder, which may be one to be made."""
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        parser.error(f"{name} must be a folder, but {there} is none")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        parser.error(f"{path} for {name} cannot be written to: {error.strerror}")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps what model libraries tell of their loading off the terminal: log lines below errors, and warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
