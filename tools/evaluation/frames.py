"""Frames of a video, spread evenly over it, as pictures in memory.

A video is a file that OpenCV reads, an animated picture that PIL reads (.gif, .png, .webp), or a folder of pictures in
the order of their names, one a second. OpenCV is taken where it is installed, for video files alone.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from importlib import util

import numpy as np
from PIL import Image, ImageSequence

VIDEO_FILES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
ANIMATIONS = (".gif", ".png", ".webp")
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass
class Frames:
    """uint8 [n, height, width, 3]; their times in seconds, float [n]; how long the whole video is, in seconds."""

    pictures: np.ndarray
    times: np.ndarray
    duration: float

    @property
    def rate(self):
        """Frames a second of those that were taken."""
        return len(self.times) / self.duration


def find_video(folder, name):
    """The video of a name in a folder: a file or a folder of pictures; None where there is none."""
    if (folder / name).is_dir():
        return folder / name
    files = [folder / f"{name}{suffix}" for suffix in (*VIDEO_FILES, *ANIMATIONS)]
    return next((path for path in files if path.is_file()), None)


def takes_opencv(path):
    """Whether a video is a file that PIL does not read."""
    return path.suffix.lower() in VIDEO_FILES and path.is_file()


def require_opencv(path):
    """Raises ValueError, which says what to do, where a video takes OpenCV and it is not installed."""
    if takes_opencv(path) and util.find_spec("cv2") is None:
        raise ValueError(
            f"reading {path.name} takes OpenCV, which is not installed (opencv-python-headless); without it, an "
            f"animated picture ({', '.join(ANIMATIONS)}) is read, or a folder of pictures, of the same name"
        )


def spread(total, count):
    """Numbers of at most `count` of `total` frames, from the first to the last in equal steps."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))


def read_frames(path, count):
    """`count` frames of a video, fewer where it has fewer.

    Raises
    ------
    ValueError
        For a video that cannot be read, with what is missing: OpenCV, pictures in the folder, a frame.
    """
    if path.is_dir():
        return _of_folder(path, count)
    return _by_opencv(path, count) if takes_opencv(path) else _of_animation(path, count)


def _of_folder(folder, count):
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not files:
        raise ValueError(f"{folder} holds no pictures: {', '.join(PICTURES)}")
    chosen = spread(len(files), count)
    pictures = []
    for number in chosen:
        with Image.open(files[number]) as picture:
            pictures.append(np.asarray(picture.convert("RGB")))
    if len({picture.shape for picture in pictures}) > 1:
        raise ValueError(f"{folder} holds pictures of several sizes")
    return Frames(np.stack(pictures), chosen.astype(float), float(len(files)))


def _of_animation(path, count):
    with Image.open(path) as file:
        lasting, pictures = [], []
        for frame in ImageSequence.Iterator(file):  # a frame may depend on all before it
            lasting.append(frame.info.get("duration", 0) / 1000)
        chosen = spread(len(lasting), count)
        for number, frame in enumerate(ImageSequence.Iterator(file)):
            if number in chosen:
                pictures.append(np.asarray(frame.convert("RGB")))
    duration = sum(lasting)
    if not duration:
        raise ValueError(f"{path} does not say how long its frames last")
    begins = np.cumsum(lasting) - lasting
    return Frames(np.stack(pictures), begins[chosen], duration)


def _by_opencv(path, count):
    require_opencv(path)
    cv2 = importlib.import_module("cv2")
    video = cv2.VideoCapture(str(path))
    try:
        total, rate = int(video.get(cv2.CAP_PROP_FRAME_COUNT)), video.get(cv2.CAP_PROP_FPS)
        if not video.isOpened() or total < 1 or not rate > 0:
            raise ValueError(f"OpenCV cannot read {path}: {total} frames at {rate} a second")
        chosen, pictures = spread(total, count), []
        for number in chosen:
            video.set(cv2.CAP_PROP_POS_FRAMES, int(number))
            read, picture = video.read()
            if not read:
                raise ValueError(f"OpenCV cannot read frame {number} of the {total} of {path}")
            pictures.append(picture[..., ::-1])  # BGR
    finally:
        video.release()
    return Frames(np.stack(pictures), chosen / rate, total / rate)
