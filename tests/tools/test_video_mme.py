"""tools.evaluate video-mme: frames, subtitles, prompts and scores, on a made-up data set in the published layout."""

import json
import re
import sys
from types import ModuleType

import numpy as np
import paddle
import pytest

pytest.importorskip("paddleformers.transformers")

from PIL import Image  # noqa: E402
from vision_models import make_frames, make_model, save_checkpoint  # noqa: E402

import rrattn  # noqa: E402
from tools import evaluate  # noqa: E402
from tools.evaluation import benchmarks, frames, video_mme  # noqa: E402
from tools.evaluation.methods import Method  # noqa: E402
from tools.evaluation.records import Results  # noqa: E402
from tools.evaluation.vision_model import VisionModel, check_vision_checkpoint  # noqa: E402

COUNT = 24
SRT = """1
00:00:00,000 --> 00:00:01,500
<i>Here it comes:</i>
the ball.

2
00:00:03,000 --> 00:00:05,000
42

3
00:00:30,000 --> 00:00:31,000
Never shown.
"""


def record(number, video, **others):
    """A record with the fields of the data page."""
    return {
        "video_id": f"{number:03d}",
        "duration": "short",
        "domain": "Life Record",
        "sub_category": "Ball Games",
        "url": f"https://www.youtube.com/watch?v={video}",
        "videoID": video,
        "question_id": f"{number:03d}-1",
        "task_type": "Action Recognition",
        "question": "What does the ball do?",
        "options": ["A. It flies.", "B. It rests.", "C. It sinks.", "D. It bursts."],
        "answer": "A",
        **others,
    }


def write_table(folder, *records):
    (folder / "videomme").mkdir(exist_ok=True)
    (folder / "videomme" / "test.json").write_text(json.dumps(records))


@pytest.fixture
def data(tmp_path):
    """Two videos of four seconds: an animation with subtitles and a folder of pictures without."""
    folder = tmp_path / "Video-MME"
    for part in ("data/folder", "subtitle"):
        (folder / part).mkdir(parents=True)
    first, *others = make_frames(48)
    first.save(folder / "data" / "moving.png", save_all=True, append_images=others, duration=1000 / 12)
    for number, frame in enumerate(make_frames(4, seed=1)):
        frame.save(folder / "data" / "folder" / f"frame{number:03d}.png")
    (folder / "subtitle" / "moving.srt").write_text(SRT)
    write_table(folder, record(1, "moving"), record(2, "folder", answer="C", duration="long"))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Qwen2.5-VL with its processor, as they are saved."""
    folder = tmp_path_factory.mktemp("vision-model")
    save_checkpoint(folder, (112 * 112, 168 * 168))
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return VisionModel(checkpoint)


# Frames


def test_frames_are_spread_from_the_first_to_the_last():
    assert frames.spread(9, 3).tolist() == [0, 4, 8]
    assert frames.spread(4, 8).tolist() == [0, 1, 2, 3]
    assert frames.spread(100, 1).tolist() == [0]


def test_an_animation_and_a_folder_are_read(data):
    given = [np.asarray(frame) for frame in make_frames(48)]
    moving = frames.read_frames(data / "data" / "moving.png", 3)
    np.testing.assert_array_equal(moving.pictures, np.stack([given[0], given[24], given[47]]))
    np.testing.assert_allclose(moving.times, [0, 2, 47 / 12], atol=0.1)
    np.testing.assert_allclose([moving.duration, moving.rate], [4, 0.75], atol=0.1)
    pictures = frames.read_frames(data / "data" / "folder", 2)
    ends = [np.asarray(frame) for frame in make_frames(4, seed=1)]
    np.testing.assert_array_equal(pictures.pictures, np.stack([ends[0], ends[3]]))
    assert pictures.times.tolist() == [0, 3] and pictures.rate == 0.5


class VideoCapture:
    """OpenCV's, over made-up frames in the order blue, green, red; one of them cannot be read."""

    def __init__(self, path):
        self.pictures = [] if path.endswith("empty.mp4") else [np.asarray(frame) for frame in make_frames(10)]
        self.broken = 9 if path.endswith("broken.mp4") else None

    def isOpened(self):
        return bool(self.pictures)

    def get(self, name):
        return {"count": float(len(self.pictures)), "rate": 5.0}[name]

    def set(self, name, value):
        assert name == "position"
        self.position = value

    def read(self):
        read = self.position != self.broken
        return read, self.pictures[self.position][..., ::-1] if read else None

    def release(self):
        self.pictures = None


@pytest.fixture
def opencv(monkeypatch):
    module = ModuleType("cv2")
    module.VideoCapture = VideoCapture
    module.CAP_PROP_FRAME_COUNT, module.CAP_PROP_FPS, module.CAP_PROP_POS_FRAMES = "count", "rate", "position"
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "cv2", module)


def test_opencv_reads_video_files(tmp_path, opencv):
    for name in ("video", "empty", "broken"):
        (tmp_path / f"{name}.mp4").touch()
    video = frames.read_frames(tmp_path / "video.mp4", 4)
    given = [np.asarray(frame) for frame in make_frames(10)]
    np.testing.assert_array_equal(video.pictures, np.stack([given[number] for number in (0, 3, 6, 9)]))
    assert video.times.tolist() == [0, 0.6, 1.2, 1.8] and video.duration == 2
    with pytest.raises(ValueError, match="OpenCV cannot read .*empty.mp4: 0 frames"):
        frames.read_frames(tmp_path / "empty.mp4", 4)
    with pytest.raises(ValueError, match="OpenCV cannot read frame 9 of the 10 of .*broken.mp4"):
        frames.read_frames(tmp_path / "broken.mp4", 4)


def test_what_cannot_be_read_is_told(tmp_path, monkeypatch):
    (tmp_path / "video.mp4").touch()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="video.mp4 takes OpenCV, which is not installed.*a folder of pictures"):
        frames.read_frames(tmp_path / "video.mp4", 4)
    with pytest.raises(ValueError, match="holds no pictures: .jpg"):
        frames.read_frames(tmp_path, 4)
    for number, size in enumerate([(8, 8), (8, 9)]):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    with pytest.raises(ValueError, match="pictures of several sizes"):
        frames.read_frames(tmp_path, 4)
    with pytest.raises(ValueError, match="0.png does not say how long"):
        frames.read_frames(tmp_path / "0.png", 4)


# The data set


def test_subtitles_alone(data):
    (sample,) = video_mme.read_video_mme(data, 10)  # the other video has none
    assert sample.prompt.startswith("Subtitles of a video:\nHere it comes:\nthe ball.\n42\nNever shown.\n\nWhat does")
    assert "-->" not in sample.prompt and "B. It rests.\n" in sample.prompt and sample.prompt.endswith("The answer is ")
    assert sample.answers == ["A"] and sample.letters == ["A", "B", "C", "D"] and sample.name == "001-1"
    (data / "subtitle" / "moving.srt").unlink()
    with pytest.raises(ValueError, match="holds no .srt file of the videos in test.json"):
        video_mme.read_video_mme(data, 10)


def test_frames_and_the_published_prompt(data):
    moving, folder = video_mme.read_video_mme(data, 10, 5)
    video, prompt = moving.read()
    assert len(video.times) == 5
    assert prompt == (
        "This video's subtitles are listed below:\nHere it comes:\nthe ball.\n42\n"  # of the frames at 0, 1, 3 and 4 s
        "Select the best answer to the following multiple-choice question based on the video. Respond with only the "
        "letter (A, B, C, or D) of the correct option.\nWhat does the ball do?\nA. It flies.\nB. It rests.\n"
        "C. It sinks.\nD. It bursts.\nThe best answer is:"
    )
    without = prompt[prompt.index("Select") :]
    assert folder.read()[1] == without  # a video without subtitles
    assert [sample.read()[1] for sample in video_mme.read_video_mme(data, 10, 5, False)] == [without] * 2
    assert folder.told == {
        "duration": "long",
        "domain": "Life Record",
        "sub_category": "Ball Games",
        "task_type": "Action Recognition",
    }
    assert [sample.name for sample in video_mme.read_video_mme(data, 1, 5)] == ["001-1"]


def test_the_table_may_be_parquet(data):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    (data / "videomme" / "test.json").unlink()
    pandas.DataFrame([record(1, "moving"), record(2, "folder")]).to_parquet(data / "videomme" / "test.parquet")
    assert [sample.letters for sample in video_mme.read_video_mme(data, 10, 5)] == [list("ABCD")] * 2


def test_what_the_data_lacks_is_told(data, monkeypatch):
    write_table(data, record(1, "gone"))
    with pytest.raises(ValueError, match="record 1 asks about gone, but .* holds no data/gone with one of .*mp4"):
        video_mme.read_video_mme(data, 10, 5)
    (data / "data" / "gone.mp4").touch()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="gone.mp4 takes OpenCV"):
        video_mme.read_video_mme(data, 10, 5)
    write_table(data, record(1, "moving", answer="E"))
    with pytest.raises(ValueError, match="record 1: answer 'E' is not among"):
        video_mme.read_video_mme(data, 10, 5)
    write_table(data, {"videoID": "moving", "question": "What?"})
    with pytest.raises(ValueError, match="test.json, record 1 lacks options, answer"):
        video_mme.read_video_mme(data, 10, 5)
    (data / "videomme" / "test.json").unlink()
    with pytest.raises(ValueError, match="holds no table"):
        video_mme.read_video_mme(data, 10, 5)


# The model


def test_prefills_do_what_the_enabled_model_does(model, checkpoint, data):
    sample = video_mme.read_video_mme(data, 1, COUNT)[0]
    inputs, num_tokens = model.prompt_of(sample, 10_000)
    assert num_tokens == inputs["input_ids"].shape[1] > 400
    assert int((inputs["input_ids"] == model.model.config.video_token_id).sum()) == COUNT // 2 * 4 * 6
    np.testing.assert_allclose(float(inputs["second_per_grid_ts"]), 2 * 4 / COUNT, rtol=0.02)
    plain = make_model()
    plain.set_state_dict(model.model.state_dict())
    for method, threshold in (("dense", 1.0), ("rrattn:threshold=0.3,keep_last=false", 0.3)):
        rrattn.enable(plain, threshold=threshold, keep_last=False)
        with paddle.no_grad():
            expected = plain(**inputs, return_dict=True).logits[0].numpy()
        model.method = Method(method)
        hidden, _ = model.prefill(inputs)
        np.testing.assert_allclose(model.logits(hidden), expected, atol=1e-3 * np.abs(expected).max())
        of_plain = [density.numpy()[0] for density in rrattn.layer_densities(plain)]
        np.testing.assert_allclose(model.densities, of_plain)
    assert np.mean(model.densities) < 1
    with pytest.raises(ValueError, match=f"001-1: {COUNT} frames and the question are .* take fewer --frames"):
        model.prompt_of(sample, 100)


def test_the_likeliest_letter_is_the_answer(model, data):
    model.method = Method("dense")
    (sample, _) = video_mme.read_video_mme(data, 10, 8)
    hidden, _ = model.prefill(model.prompt_of(sample, 10_000)[0])
    logits = model.logits(hidden[-1:])[0]
    best = max("ABCD", key=lambda letter: logits[int(model.codec.encode(letter.encode())[0])])
    for letter in "ABCD":
        sample.answers = [letter]
        assert benchmarks.score(model, sample, 10_000)[0] == float(letter == best)


def test_it_runs_end_to_end(checkpoint, data, tmp_path, monkeypatch, capsys):
    path = tmp_path / "results.jsonl"
    methods = ["dense", "rrattn:threshold=0.3"]
    command = ["evaluate", "video-mme", str(checkpoint), str(path), "--data", str(data), "--methods", *methods]
    for options in (["--frames", str(COUNT)], ["--frames", str(COUNT), "--no-subtitles"]):
        monkeypatch.setattr(sys, "argv", command + options)
        evaluate.main()
        evaluate.main()  # finds all done
    rows = Results(path).rows
    tasks = [f"video-mme, {COUNT} frames", f"video-mme, {COUNT} frames without subtitles"]
    keys = [(task, name, method) for task in tasks for name in ("001-1", "002-1") for method in methods]
    assert [(row["task"], row["index"], row["method"]) for row in rows] == keys
    assert all(row["score"] in (0, 1) and row["duration"] in ("short", "long") for row in rows)
    assert [row["density"] < 1 for row in rows[:2]] == [False, True]
    assert rows[0]["tokens"] > rows[4]["tokens"]  # subtitles
    monkeypatch.setattr(sys, "argv", ["evaluate", "report", str(path)])
    evaluate.main()
    assert f"### {tasks[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--frames", "-1"], "--frames is -1, but must be 0 or more"),
        (["--no-subtitles"], "--frames is 0, but must be .* 1 or more with --no-subtitles"),
        (["--frames", "4"], "has no processor: preprocessor_config.json is missing"),
    ],
)
def test_the_command_checks_first(data, tmp_path, monkeypatch, capsys, options, message):
    make_model().save_pretrained(str(tmp_path))
    command = ["evaluate", "video-mme", str(tmp_path), str(tmp_path / "out.jsonl"), "--data", str(data)]
    monkeypatch.setattr(sys, "argv", command + options)
    with pytest.raises(SystemExit):
        evaluate.main()
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_of_text_alone_takes_no_frames(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="no model that reads frames: its config.json has no vision_config"):
        check_vision_checkpoint(tmp_path)
