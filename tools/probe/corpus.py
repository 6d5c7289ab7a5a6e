"""Builds the probe's corpus: the text of packages that tools/requirements.txt installs, as bytes, in two files.

    .venv/bin/python -m tools.probe.corpus [FOLDER] [--seed 0] [--megabytes 6]

FOLDER (default: build/probe) gets

    train.xz, heldout.xz   documents one after the other, each led by a zero byte (which no text holds)
    manifest.json          the seed, the packages with their versions, documents and bytes, SHA-256 of both texts

A document is a source or documentation file: valid UTF-8, 2 KB to 512 KB, no line over 2,000 bytes, none twice. Of each
package at most --megabytes are taken, in an order drawn by the seed, so that no package is most of the text. One
document in twenty is held out, by a hash of the seed and its name. The same installation and seed give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import math
import sysconfig
from importlib import metadata, util
from pathlib import Path

from tqdm import tqdm

from rrattn.command_line import check_output_folder

DOCUMENT_START = b"\0"
SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt", ".h", ".hpp", ".cuh")
SMALLEST, LARGEST, LONGEST_LINE = 2 << 10, 512 << 10, 2000
HELD_OUT_SHARE = 20  # one document in this many
STANDARD_LIBRARY = "Python's standard library"

# Name of the distribution and its folder. All are in tools/requirements.txt or come with what is.
PACKAGES = {
    "paddlepaddle": "paddle",
    "paddleformers": "paddleformers",
    "transformers": "transformers",
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "scikit-learn": "sklearn",
    "matplotlib": "matplotlib",
    "networkx": "networkx",
    "nvidia-cutlass": "cutlass_library",
    "modelscope": "modelscope",
    "Pygments": "pygments",
    "fonttools": "fontTools",
    "hypothesis": "hypothesis",
    "setuptools": "setuptools",
    "pip": "pip",
    "pytest": "_pytest",
    "aiohttp": "aiohttp",
    "Werkzeug": "werkzeug",
    "huggingface_hub": "huggingface_hub",
    "omegaconf": "omegaconf",
    "psutil": "psutil",
}


def digest(*parts):
    """A hash of text, the same on every machine and in every run."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def package_folders():
    """{name and version: folder} of the packages that are installed, the standard library among them."""
    folders = {f"{STANDARD_LIBRARY} {sysconfig.get_python_version()}": Path(sysconfig.get_path("stdlib"))}
    for distribution, module in PACKAGES.items():
        spec = util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{distribution} is not installed here: run tools/setup_env, and this with its Python")
        folders[f"{distribution} {metadata.version(distribution)}"] = Path(list(spec.submodule_search_locations)[0])
    return folders


def read_document(path):
    """A file's bytes, or None where it is no document."""
    if not SMALLEST <= path.stat().st_size <= LARGEST:
        return None
    data = path.read_bytes().replace(b"\r\n", b"\n")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if DOCUMENT_START in data or max(map(len, data.split(b"\n"))) > LONGEST_LINE:
        return None
    return data


def documents(folder, seed, limit, seen):
    """[(name, bytes)] of one package, at most `limit` bytes, without what is in `seen` (hashes; added to)."""
    found = [path for path in folder.rglob("*") if path.suffix in SUFFIXES and "site-packages" not in
             path.relative_to(folder).parts and path.is_file()]  # fmt: skip
    named = {path.relative_to(folder).as_posix(): path for path in found}
    taken, size = [], 0
    for name in sorted(named, key=lambda name: digest(seed, folder.name, name)):
        data = read_document(named[name])
        content = hashlib.sha256(data).digest() if data else None
        if data is None or content in seen or size + len(data) > limit:
            continue
        seen.add(content)
        taken.append((name, data))
        size += len(data)
    return taken


def is_held_out(seed, package, name):
    """Whether a document is kept from training."""
    return int(digest("held out", seed, package, name), 16) % HELD_OUT_SHARE == 0


def write(folder, seed, limit):
    """Writes the two texts and the manifest into `folder`; returns the manifest."""
    texts = {"train": [], "heldout": []}
    counts, seen = {}, set()
    for package, root in tqdm(package_folders().items(), desc="reading", unit="package"):
        name_of_package = package.rsplit(" ", 1)[0]
        taken = documents(root, seed, limit, seen)
        for name, data in taken:
            texts["heldout" if is_held_out(seed, name_of_package, name) else "train"].append(DOCUMENT_START + data)
        counts[package] = {"documents": len(taken), "bytes": sum(len(data) for _, data in taken)}
    manifest = {"seed": seed, "bytes_per_package": limit, "packages": counts}
    folder.mkdir(parents=True, exist_ok=True)
    for part, pieces in tqdm(texts.items(), desc="compressing", unit="text"):
        text = b"".join(pieces)
        packed = lzma.compress(text, preset=6)
        (folder / f"{part}.xz").write_bytes(packed)
        manifest[part] = {
            "documents": len(pieces),
            "bytes": len(text),
            "compressed_bytes": len(packed),
            "sha256": hashlib.sha256(text).hexdigest(),
        }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def main():
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=root / "build" / "probe", help="(default: build/probe)")
    parser.add_argument("--seed", type=int, default=0, help="draws what is taken and held out (default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=6, help="most of each package (default: %(default)s)")
    arguments = parser.parse_args()
    if not (arguments.megabytes > 0 and math.isfinite(arguments.megabytes)):
        parser.error(f"--megabytes must be above 0 and finite, got {arguments.megabytes}")
    check_output_folder(parser, "FOLDER", arguments.folder)
    manifest = write(arguments.folder, arguments.seed, int(arguments.megabytes * 1e6))
    for part in ("train", "heldout"):
        counts = manifest[part]
        print(
            f"{part + '.xz':10}  {counts['documents']:6,} documents  {counts['bytes']:12,} bytes, "
            f"{counts['compressed_bytes']:11,} compressed"
        )


if __name__ == "__main__":
    main()
