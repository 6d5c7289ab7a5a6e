"""Video-MME (arXiv 2405.21075), read from the user's copy of the data.

It comes as a folder: a table videomme/*.parquet (or *.json, *.jsonl, a list of the same records) with video_id,
duration, domain, sub_category, videoID, question_id, task_type, question, options and answer (a letter);
subtitle/<videoID>.srt; and the videos as data/<videoID>.mp4, or in another form that frames.py reads.

A model that reads pictures is given frames of a video, spread evenly over it, and the question in the prompt that the
benchmark publishes: with subtitles, those that are shown at the times of these frames, where the video has any. A model
that reads text is given all subtitles and no frames: questions about videos without subtitles are left out, and a score
compares with published ones of subtitles alone.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from . import frames
from .benchmarks import Sample

_FIELDS = ("videoID", "question", "options", "answer")
_TOLD = ("duration", "domain", "sub_category", "task_type")  # what results say of a question
_VIDEO_FOLDERS = ("data", "video")
_SHOWN = re.compile(r"(\d+):(\d+):(\d+)[,.](\d+)\s*-->\s*(\d+):(\d+):(\d+)[,.](\d+)")
PROMPT = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
    "letter (A, B, C, or D) of the correct option.\n{question}\n{options}\nThe best answer is:"
)
SUBTITLES = "This video's subtitles are listed below:\n{subtitles}\n"

_read_frames = lru_cache(maxsize=1)(frames.read_frames)  # the questions about a video stand together


@dataclass
class VideoSample(Sample):
    """A question about a video, of which frames are read when it is asked.

    path is the video, see frames.py, and `count` how many frames are taken; subtitles is an .srt file or None.
    """

    path: Path | None = None
    count: int = 0
    subtitles: Path | None = None

    def read(self):
        """(Frames, prompt).

        Raises
        ------
        ValueError
            Where the video cannot be read.
        """
        video = _read_frames(self.path, self.count)
        said = "" if self.subtitles is None else "\n".join(said_at(_text_of(self.subtitles), video.times))
        return video, SUBTITLES.format(subtitles=said) + self.prompt if said else self.prompt


def read_video_mme(folder, most, count=0, subtitles=True):
    """The first samples of a Video-MME folder.

    Parameters
    ----------
    folder : Path
    most : int
        Samples.
    count : int
        Frames of a video; 0 for its subtitles alone.
    subtitles : bool
        Whether subtitles stand in a prompt beside frames.

    Raises
    ------
    ValueError
        When there is no table, a record lacks a field, or there are no subtitles, no video or no OpenCV for it.
    """
    tables = [
        path for path in sorted((folder / "videomme").glob("*")) if path.suffix in (".parquet", ".json", ".jsonl")
    ]
    if not tables:
        raise ValueError(f"{folder}/videomme holds no table: .parquet, .json or .jsonl")
    samples = []
    for path in tables:
        for number, record in enumerate(_records(path), 1):
            if len(samples) < most:
                sample = _sample(folder, record, f"{path.name}, record {number}", count, subtitles)
                samples += [] if sample is None else [sample]
    if not samples:
        names = ", ".join(path.name for path in tables)
        raise ValueError(f"{folder}/subtitle holds no .srt file of the videos in {names}")
    return samples


def _records(path):
    if path.suffix == ".parquet":
        import pandas

        return pandas.read_parquet(path).to_dict("records")
    text = path.read_text()
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]


def _sample(folder, record, place, count, with_subtitles):
    """The sample of a record; None where it is about subtitles that there are not."""
    missing = [name for name in _FIELDS if name not in record]
    if missing:
        raise ValueError(f"{place} lacks {', '.join(missing)}")
    name, answer, options = record["videoID"], record["answer"], [str(option) for option in record["options"]]
    letters = [option[0] for option in options]
    if answer not in letters:
        raise ValueError(f"{place}: answer {answer!r} is not among {letters}")
    subtitles = folder / "subtitle" / f"{name}.srt"
    told = {field: str(record[field]) for field in _TOLD if field in record}
    common = {"answers": [answer], "letters": letters, "told": told}
    common["name"] = str(record.get("question_id", place))
    asked = {"question": record["question"], "options": "\n".join(options)}
    if not count:
        if not subtitles.is_file():
            return None
        said = subtitle_text(_text_of(subtitles))
        prompt = f"Subtitles of a video:\n{said}\n\n{asked['question']}\n{asked['options']}\nThe answer is "
        return Sample(prompt=prompt, **common)
    found = [frames.find_video(folder / part, name) for part in _VIDEO_FOLDERS]
    path = next((path for path in found if path is not None), None)
    if path is None:
        raise ValueError(
            f"{place} asks about {name}, but {folder} holds no data/{name} with one of the endings "
            f"{', '.join(frames.VIDEO_FILES + frames.ANIMATIONS)}, and no folder data/{name} of pictures"
        )
    frames.require_opencv(path)
    shown = subtitles if with_subtitles and subtitles.is_file() else None
    return VideoSample(prompt=PROMPT.format(**asked), path=path, count=count, subtitles=shown, **common)


def _text_of(path):
    return path.read_text(encoding="utf-8", errors="replace")


def cues(srt):
    """[(begin, end, text)] of an .srt file: times in seconds, the text without tags."""
    found = []
    for block in re.split(r"\n\s*\n", srt.replace("\ufeff", "").replace("\r\n", "\n")):
        lines = [re.sub(r"<[^>]*>", "", line).strip() for line in block.splitlines()]
        times = [(number, match) for number, match in enumerate(map(_SHOWN.match, lines)) if match]
        if times:
            number, match = times[0]
            parts = [int(part) for part in match.groups()]
            begin, end = (3600 * h + 60 * m + s + ms / 1000 for h, m, s, ms in (parts[:4], parts[4:]))
            found.append((begin, end, "\n".join(filter(None, lines[number + 1 :]))))
    return found


def subtitle_text(srt):
    """All that is said in an .srt file."""
    return "\n".join(text for _, _, text in cues(srt) if text)


def said_at(srt, times):
    """What is shown of an .srt file at these times, in seconds: a text for each that is shown, once for neighbours."""
    shown = [next(((begin, text) for begin, end, text in cues(srt) if begin <= time <= end), None) for time in times]
    return [one[1] for one, before in zip(shown, [None, *shown]) if one is not None and one != before and one[1]]
