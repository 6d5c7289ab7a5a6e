"""Writes the tables of model families in docs/support.md and the README, from what the tests in tests/models run over.

python -m tools.support            rewrites both
python -m tools.support --check    exits with 1 when one does not match the tests
"""

import re
import sys

from tools.pages import ROOT, with_sections, write_or_check

sys.path.append(str(ROOT / "tests" / "models"))

from families import FAMILIES, GPT_MODEL, GPT_MODEL_ALONE, PADDLENLP, UNDER_PADDLEFLEET, VERSIONS  # noqa: E402

UNTESTED = "same interface, untested"
TITLES = {family.name: family.title for family in FAMILIES}


def table():
    """Library and version by family."""
    columns = [f"PaddleFormers {version}" for version in VERSIONS]
    columns += [f"PaddleNLP {version}" for version in PADDLENLP] + ["PaddleFleet"]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for family in FAMILIES:
        cells = [paddleformers_cell(family, version) for version in VERSIONS]
        cells += ["tested" if family.name in tested else "refused" for tested in PADDLENLP.values()]
        lines.append(f"| {family.title} | {' | '.join([*cells, paddlefleet_cell(family.name)])} |")
    for interface, cell in ((True, UNTESTED), (False, "refused: their own core attention")):
        titles = ", ".join(title for title, has_interface in GPT_MODEL_ALONE.values() if has_interface == interface)
        others = ["not there", "GPTModel alone", *["refused"] * len(PADDLENLP)]
        lines.append(f"| {titles} | {' | '.join([*others, cell])} |")
    lines.append(f"| others | {' | '.join([UNTESTED] * len(VERSIONS) + ['refused'] * len(PADDLENLP) + [UNTESTED])} |")
    return "\n".join(lines)


def paddleformers_cell(family, version):
    if version not in family.versions():
        return "not there"
    missing = family.missing.get(version)
    marks = ["older class"] * (version in family.old_class) + [f"stand-in for {missing}"] * bool(missing)
    return ", ".join(["tested", *marks])


def paddlefleet_cell(name):
    if name in GPT_MODEL:
        return "tested, GPTModel over a stand-in"
    return "tested, PaddleFormers' source" if name in UNDER_PADDLEFLEET else UNTESTED


def short_rows():
    """The README's rows: the tested families of each library."""
    everywhere = [family.title for family in FAMILIES if family.versions() == list(VERSIONS)]
    newest = VERSIONS[-1], ", ".join(family.title for family in FAMILIES if family.versions() == list(VERSIONS[-1:]))
    fleet = ", ".join(TITLES[name] for name in (*GPT_MODEL, *UNDER_PADDLEFLEET))
    nlp = (f"{version}: {', '.join(TITLES[name] for name in tested)}" for version, tested in PADDLENLP.items())
    rows = {
        f"PaddleFormers {' and '.join(VERSIONS)}": f"{', '.join(everywhere)}; {newest[0]} alone: {newest[1]}",
        "PaddleNLP": "; ".join(nlp),
        "PaddleFleet": f"{fleet}, against stand-ins: it has no release",
    }
    return "".join(f"| Models of {library} | {tested} |\n" for library, tested in rows.items())


def main():
    pages = {
        "docs/support.md": lambda text: with_sections(text, {"families": table()}),
        "README.md": lambda text: re.sub(r"(^\| Models of .*\n)+", lambda _: short_rows(), text, flags=re.MULTILINE),
    }
    return write_or_check("python -m tools.support", __doc__.splitlines()[0], "tests/models", pages)


if __name__ == "__main__":
    sys.exit(main())
