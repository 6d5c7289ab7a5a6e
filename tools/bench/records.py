"""What the records of the GPU benchmarks have in common, and the files that keep them."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import torch


def fields_of_run(module, commit=None, launcher=("python",)):
    """What all records of a run of `launcher -m module` have; `commit` where this is no git checkout."""
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "dtype": "bfloat16",
        "causal": True,
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "commit": commit or revision.stdout.strip(),
        "command": shlex.join([*launcher, "-m", module, *sys.argv[1:]]),
    }


def stored(path):
    """The records of a file; none where it does not exist yet."""
    return json.loads(path.read_text()) if path.is_file() else []


def store(path, records, place):
    """Writes the records, beside those of the file whose place(record) none of them has."""
    replaced = set(map(place, records))
    kept = [record for record in stored(path) if place(record) not in replaced]
    path.write_text(json.dumps(kept + records, indent=1) + "\n")
