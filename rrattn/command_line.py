"""What the examples and tools check of their arguments before they load or compute anything.

Where a check fails, the program ends by `parser.error`, with status 2 and a message that names the argument.
"""

import tempfile
from importlib import util
from pathlib import Path

PICTURES = (".png", ".pdf", ".svg")


def check_at_least(parser, arguments, **least):
    """That the arguments of these names are none, or this much and more."""
    for name, smallest in least.items():
        given = getattr(arguments, name)
        if given is not None and not given >= smallest:
            parser.error(f"--{name.replace('_', '-')} must be at least {smallest}, got {given}")


def check_input_file(parser, name, path):
    """That a file can be read."""
    if not path.is_file():
        parser.error(f"there is no file {path} for {name}")
    try:
        path.open("rb").close()
    except OSError as error:
        parser.error(f"{path} for {name} cannot be read: {error.strerror}")


def check_checkpoint(parser, name, folder):
    """That a folder is a model's checkpoint."""
    if not (folder / "config.json").is_file():
        parser.error(f"there is no checkpoint in {folder} for {name}: it has no config.json")


def check_output_file(parser, name, path, suffixes=()):
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


def check_picture(parser, name, path):
    """That a picture can be drawn and written."""
    check_output_file(parser, name, path, PICTURES)
    if util.find_spec("matplotlib") is None:
        parser.error(f"{name} takes matplotlib: pip install matplotlib")


def check_output_folder(parser, name, path):
    """That files can be written to a folder, which may be one to be made."""
    path = Path(path).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        parser.error(f"{name} must be a folder, but {there} is none")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        parser.error(f"{path} for {name} cannot be written to: {error.strerror}")
