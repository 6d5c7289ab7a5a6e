"""Pages of which a script makes parts: it rewrites them, or with --check says which differ from what it would write."""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def with_sections(text, sections):
    """The text with what stands between <!-- name --> and <!-- /name --> replaced."""
    for name, section in sections.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        first, last = text.index(begin) + len(begin), text.index(end)
        text = f"{text[:first]}{section}\n{text[last:]}"
    return text


def rewrite(pages, check):
    """The paths of those pages that are not as they are to be; writes them, unless it is only to check.

    `pages` is as for `write_or_check`.
    """
    differing = []
    for name, rewritten in pages.items():
        before = (ROOT / name).read_text()
        after = rewritten(before)
        if before != after:
            differing.append(name)
            if not check:
                (ROOT / name).write_text(after)
    return differing


def write_or_check(script, description, source, pages):
    """Reads the command line of a script, and returns its exit status: 1 where --check finds a difference.

    Parameters
    ----------
    script, source : str
        The script as it is called, and what it makes the pages from, for messages.
    description : str
        For --help.
    pages : dict
        By the path of each page, from the top of the checkout, a function from its text to the text that it is to have.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    differing = rewrite(pages, arguments.check)
    if arguments.check and differing:
        print(f"not as in {source}: {', '.join(differing)}; {script} writes them")
    return int(arguments.check and bool(differing))
