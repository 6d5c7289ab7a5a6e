"""A file of results, one JSON line each."""

from __future__ import annotations

import json

MASS = "mass"  # the task of a line about kept mass is this and the kind of context
BEST = "best:"  # a "method" of kept mass alone: what no selection of this density can beat


class Results:
    """A file of JSON lines, one a result, that an interrupted run goes on with.

    A result is known by its model, method, task, length, context number and number of questions.
    """

    KEY = ("model", "method", "task", "length", "index", "questions")

    def __init__(self, path):
        self.path = path
        self.rows = read_results(path) if path.exists() else []
        self._known = {self.key(row) for row in self.rows}

    def key(self, row):
        return tuple(row.get(name) for name in self.KEY)

    def __contains__(self, row):
        return self.key(row) in self._known

    def add(self, row):
        self.rows.append(row)
        self._known.add(self.key(row))
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_results(path):
    """The rows of a results file; a last line that an interruption cut off is left out, and cut off the file.

    Raises
    ------
    ValueError
        Where another line is no JSON object. The file is then as it was.
    """
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    if text and not complete:
        raise ValueError(f"{path} is no file of results: it has no whole line")
    rows = []
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path} is no file of results: line {number} is not JSON") from error
        if not isinstance(rows[-1], dict):
            raise ValueError(f"{path} is no file of results: line {number} is no JSON object")
    if complete != text:
        path.write_text(complete)
    return rows
