"""The probe's corpus: what counts as a document, the split, and that it repeats."""

import hashlib
import json
import lzma

import numpy as np
import pytest

from tools.probe import corpus


def line(i):
    return f"line {i} of some text that is not the same everywhere\n"


@pytest.fixture
def package(tmp_path):
    """60 documents, and files that are none."""
    folder = tmp_path / "package"
    (folder / "sub").mkdir(parents=True)
    for i in range(60):
        content = "".join(line(1000 * i + j) for j in range(60))
        (folder / ("sub" if i % 2 else ".") / f"file{i}.py").write_text(content)
    good = "".join(line(j) for j in range(-90, -30))
    (folder / "copy.py").write_bytes((folder / "file0.py").read_bytes())
    (folder / "short.py").write_text("x = 1\n")
    (folder / "long_line.py").write_text(good + "y" * 2001)
    (folder / "binary.py").write_bytes(good.encode() + b"\0")
    (folder / "latin.py").write_bytes(good.encode() + b"\xe9\n")
    (folder / "picture.png").write_text(good)
    (folder / "site-packages").mkdir()
    (folder / "site-packages" / "other.py").write_text(good)
    return folder


def test_documents(package):
    taken = corpus.documents(package, 0, 10**9, set())
    names = {name for name, _ in taken}
    assert len(taken) == 60 and names - {"copy.py"} >= {f"file{i}.py" for i in range(2, 60, 2)}
    assert names.isdisjoint({"short.py", "long_line.py", "binary.py", "latin.py", "picture.png"})
    assert len({data for _, data in taken}) == 60


def test_a_limit_takes_the_first_of_a_drawn_order(package):
    everything = corpus.documents(package, 0, 10**9, set())
    some = corpus.documents(package, 0, 20_000, set())
    assert sum(len(data) for _, data in some) <= 20_000 and 3 <= len(some) < 10
    assert some[:4] == everything[:4] and all(document in everything for document in some)
    assert [name for name, _ in some] != [name for name, _ in corpus.documents(package, 1, 20_000, set())]


def test_texts_and_manifest(package, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "package_folders", lambda: {"thing 1.0": package})
    manifest = corpus.write(tmp_path / "out", 3, 10**9)
    assert manifest == json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["packages"]["thing 1.0"]["documents"] == 60
    found = set()
    for part in ("train", "heldout"):
        text = lzma.decompress((tmp_path / "out" / f"{part}.xz").read_bytes())
        assert hashlib.sha256(text).hexdigest() == manifest[part]["sha256"]
        split = text.split(b"\0")[1:]
        assert text[:1] == b"\0" and len(split) == manifest[part]["documents"]
        assert found.isdisjoint(split)
        found |= set(split)
    assert len(found) == 60 and 0 < manifest["heldout"]["documents"] < 12
    assert corpus.write(tmp_path / "again", 3, 10**9) == manifest


def test_one_document_in_twenty_is_held_out():
    held = [corpus.is_held_out(0, "package", f"file{i}") for i in range(4000)]
    assert np.mean(held) == pytest.approx(0.05, abs=0.015)
    assert held != [corpus.is_held_out(1, "package", f"file{i}") for i in range(4000)]


def test_the_packages_are_those_of_this_environment():
    folders = corpus.package_folders()
    assert len(folders) == 1 + len(corpus.PACKAGES) and all(folder.is_dir() for folder in folders.values())
    assert any(name.startswith("numpy 1.") for name in folders)
