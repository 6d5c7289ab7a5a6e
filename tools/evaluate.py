"""Evaluates ways to choose attention blocks on a checkpoint: quality, density and kept attention mass.

    python -m tools.evaluate run MODEL RESULTS.jsonl [--text FILE] [--tasks ...] [--methods ...] [--lengths ...]
    python -m tools.evaluate mass MODEL RESULTS.jsonl [--text FILE] [...]
    python -m tools.evaluate many MODEL RESULTS.jsonl [--text FILE] [--contexts 10] [...]
    python -m tools.evaluate report RESULTS.jsonl [--plots FOLDER]
    python -m tools.evaluate helmet MODEL RESULTS.jsonl --data FILE.jsonl [--methods ...]
    python -m tools.evaluate video-mme MODEL RESULTS.jsonl --data FOLDER [--frames 64 [--no-subtitles]] [--methods ...]

MODEL is a checkpoint directory of PaddleFormers or PaddleNLP, such as examples/probe. Results are JSON lines; a run
that was interrupted goes on where it stopped. Tasks are told in evaluation/prompts.py, methods in
evaluation/methods.py.

`many` runs tasks and kept mass with PyTorch, in place of Paddle, on a GPU if there is one: ten contexts of the
probe in three minutes. It computes a plain LLaMA, and takes torch and safetensors, `tokenizers` where the model has a
tokenizer, and of this package no Paddle, and a build only where a method names rrattn's settings.
"""

from __future__ import annotations

import argparse
import json
import os
from functools import partial
from pathlib import Path

from rrattn.command_line import (
    check_at_least,
    check_checkpoint,
    check_input_file,
    check_output_file,
    check_output_folder,
)

DEFAULT_METHODS = (
    ["dense"]
    + [f"rrattn:{tau}:{stride}" for stride in (8, 16, 32) for tau in ("0.80", "0.90", "0.95", "0.99")]
    + [f"{name}:{tau}" for name in ("xattention", "pooling", "vertical-slash") for tau in ("0.80", "0.90", "0.95")]
    + [f"window:{blocks}" for blocks in (8, 16, 32)]
    + [f"random:{share}" for share in ("0.1", "0.3", "0.5")]
)

DEFAULT_LENGTHS = (4096, 8192, 16384)

BOTH = "+last+near"  # rrattn's defaults
MANY_METHODS = (
    ["dense"]
    + [f"rrattn{rules}:0.95:{stride}" for stride in (4, 8, 16, 32) for rules in ("", "+near", BOTH)]
    + ["rrattn+last:0.95:8", f"rrattn{BOTH}:0.9:8"]
    + [f"rrattn{rules}:{tau}:8" for tau in (0.97, 0.98, 0.99) for rules in ("+near", BOTH)]
    + [f"xattention{rules}:0.95:8" for rules in ("", "+near", BOTH)]
    + [f"exact{rules}:0.95" for rules in ("", BOTH)]
    + [f"{name}{BOTH}:0.95:8" for name in ("rotated-blocks", "rotated-strides", "group-mean", "row-maximum")]
    + [f"row-maximum{BOTH}:{tau}:8" for tau in (0.85, 0.9)]
)
MANY_MASS_METHODS = [
    f"{family}:{tau}{stride}"
    for family, stride in (*(("rrattn", f":{s}") for s in (4, 8, 16, 32)), ("xattention", ":8"), ("exact", ""))
    for tau in (0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.97, 0.98, 0.99, 0.995)
]


def add_common(parser, lengths):
    parser.add_argument("model", type=Path, help="a checkpoint directory")
    parser.add_argument("--methods", nargs="+", default=DEFAULT_METHODS, metavar="METHOD", help="(default: all)")
    if lengths:
        parser.add_argument(
            "--lengths",
            nargs="+",
            type=int,
            help="tokens of a context (default: 4K, 8K and 16K, up to the model's own)",
        )


def add_text(parser):
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="held-out text, a document or several with a zero byte between them; .xz is unpacked, as probe/corpus.py "
        "writes it (default: the help topics that Python brings, as 12 documents of 38 KB)",
    )


def parse_arguments():
    """The arguments, checked; in place of the files that they name stands what was read from these: `results` are
    Results (but for a report), `text` is uint8 [bytes], `data` are the samples of a benchmark."""
    from .evaluation.methods import Method
    from .evaluation.prompts import CONTEXTS, token_prompt
    from .evaluation.records import BEST, Results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "mass"):
        command = commands.add_parser(name)
        add_common(command, lengths=True)
        command.add_argument("results", type=Path, help="a file of JSON lines, made or gone on with")
        add_text(command)
        kinds = list(CONTEXTS) if name == "run" else ["text", "lookup", "needle"]
        command.add_argument("--tasks", nargs="+", choices=list(CONTEXTS), default=kinds)
        command.add_argument("--contexts", type=int, default=1, help="of each task and length (default: 1)")
        command.add_argument("--questions", type=int, default=12, help="about each context (default: 12)")
    command = commands.add_parser("many")
    command.add_argument("model", type=Path, help="a checkpoint directory of a LLaMA")
    command.add_argument("results", type=Path, help="a file of JSON lines, made or gone on with")
    add_text(command)
    command.add_argument("--tasks", nargs="+", choices=list(CONTEXTS), default=list(CONTEXTS))
    command.add_argument("--methods", nargs="+", default=MANY_METHODS, metavar="METHOD", help="to run the tasks with")
    command.add_argument(
        "--mass", nargs="*", default=MANY_MASS_METHODS, metavar="METHOD", help="to measure the mass of"
    )
    command.add_argument("--length", type=int, help="tokens of a context (default: 16384, up to the model's own)")
    command.add_argument("--contexts", type=int, default=10, help="of each task (default: 10)")
    command.add_argument("--questions", type=int, default=24, help="about each context (default: 24)")
    command.add_argument("--device", help="(default: cuda where there is one)")
    command = commands.add_parser("report")
    command.add_argument("results", type=Path)
    command.add_argument("--plots", type=Path, help="folder for the plots (default: none are drawn)")
    for name in ("helmet", "video-mme"):
        command = commands.add_parser(name)
        add_common(command, lengths=False)
        command.add_argument("results", type=Path, help="a file of JSON lines, made or gone on with")
        command.add_argument("--data", type=Path, required=True, help="a .jsonl file / the folder of the data set")
        command.add_argument("--samples", type=int, default=100, help="at most so many (default: 100)")
        command.add_argument("--longest", type=int, default=131072, help="tokens of a prompt (default: 131072)")
        if name == "video-mme":
            spread = "of a video, spread evenly over it, for a MODEL that reads pictures (default: 0, subtitles alone)"
            command.add_argument("--frames", type=int, default=0, help=spread)
            command.add_argument(
                "--no-subtitles", action="store_true", help="beside frames (default: what is shown then)"
            )
    arguments = parser.parse_args()
    if arguments.command == "report":
        check_input_file(parser, "RESULTS", arguments.results)
        if arguments.plots is not None:
            check_output_folder(parser, "--plots", arguments.plots)
        return arguments
    check_checkpoint(parser, "MODEL", arguments.model)
    set_lengths(arguments)
    counts = {"contexts": 1, "questions": 1, "samples": 1, "longest": 1, "length": 512}
    check_at_least(parser, arguments, **{name: least for name, least in counts.items() if hasattr(arguments, name)})
    if min(getattr(arguments, "lengths", [512])) < 512:
        parser.error(f"--lengths must be at least 512, got {min(arguments.lengths)}")
    check_output_file(parser, "RESULTS", arguments.results)
    try:
        for method in [*arguments.methods, *getattr(arguments, "mass", [])]:
            if arguments.command == "mass" and method.startswith(BEST):
                if not 0 < float(method[len(BEST) :]) <= 1:
                    raise ValueError(f"method {method!r}: the density must be in (0, 1]")
                continue
            Method(method)
        arguments.results = Results(arguments.results)
        if arguments.command == "many":
            check_many(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if arguments.command in ("helmet", "video-mme"):
        arguments.task, arguments.data = read_benchmark(parser, arguments)
        return arguments
    if arguments.command == "many":  # without Paddle
        from .evaluation.torch_model import codec_of

        make, lengths = partial(token_prompt, codec_of(arguments.model)), [arguments.length]
    else:
        make, lengths = prompts_of(parser, arguments.model), arguments.lengths
    sizes = (arguments.tasks, lengths, arguments.contexts, arguments.questions)
    arguments.text = read_text_for(parser, "--text", arguments.text, make, *sizes)
    return arguments


def set_lengths(arguments):
    """Where no lengths of contexts are given, those of the defaults that the model was made for."""
    most = json.loads((arguments.model / "config.json").read_text()).get(
        "max_position_embeddings", max(DEFAULT_LENGTHS)
    )
    if getattr(arguments, "lengths", ()) is None:
        arguments.lengths = [length for length in DEFAULT_LENGTHS if length <= most] or [most]
    if getattr(arguments, "length", 0) is None:
        arguments.length = min(max(DEFAULT_LENGTHS), most)


def check_many(arguments):
    """Raises ValueError for what `many` cannot do with these methods, this checkpoint or this device, which it sets."""
    import torch

    from .evaluation.many import chosen
    from .evaluation.torch_model import read_config
    from .evaluation.torch_rrattn import check_device

    methods = [chosen(method) for method in [*arguments.methods, *arguments.mass]]
    read_config(arguments.model)
    arguments.device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        raise ValueError(f"--device is {arguments.device!r}, which torch cannot use: {error}") from error
    if any(method.by_config for method in methods):
        check_device(arguments.device)


def prompts_of(parser, folder):
    """Function that makes prompts in the tokens of a checkpoint, with the arguments of `prompts.make_prompt`."""
    from rrattn.checkpoint import codec_of

    from .evaluation.prompts import token_prompt

    try:
        return partial(token_prompt, codec_of(folder))
    except (ValueError, OSError) as error:
        parser.error(f"MODEL {folder}: {error}")


def read_text_for(parser, name, path, make, kinds, lengths, contexts, num_questions):
    """The text of an option, uint8 [bytes], after a check that it has room for every prompt; see `check_prompts`.

    Where the path is None, it is `default_text`.
    """
    from .evaluation.prompts import check_prompts, default_text

    if path is not None:
        check_input_file(parser, name, path)
    try:
        text = default_text() if path is None else read_text(path)
        check_prompts(make, text, kinds, lengths, contexts, num_questions)
    except (ValueError, OSError) as error:
        parser.error(f"{name} {path or '(default)'}: {error}")
    return text


def read_benchmark(parser, arguments):
    """(name of the task in results, the samples of --data, at most --samples)."""
    from .evaluation.benchmarks import read_helmet
    from .evaluation.video_mme import read_video_mme
    from .evaluation.vision_model import check_vision_checkpoint

    path, frames = arguments.data, getattr(arguments, "frames", 0)
    task, of_videos = arguments.command, arguments.command == "video-mme"
    if not of_videos:
        check_input_file(parser, "--data", path)
    elif not path.is_dir():
        parser.error(f"there is no folder {path} for --data")
    elif frames < 0 or (arguments.no_subtitles and not frames):
        parser.error(f"--frames is {frames}, but must be 0 or more, and 1 or more with --no-subtitles")
    try:
        if frames:
            check_vision_checkpoint(arguments.model)
            task += f", {frames} frames" + (" without subtitles" if arguments.no_subtitles else "")
    except (ValueError, OSError) as error:
        parser.error(f"--frames {frames}: {error}")
    try:
        if of_videos:
            samples = read_video_mme(path, arguments.samples, frames, not arguments.no_subtitles)
        else:
            samples = read_helmet(path)[: arguments.samples]
    except (ValueError, OSError, KeyError, TypeError) as error:  # the latter two where a record is of another form
        parser.error(f"--data {path}: {error!r}")
    if not samples:
        parser.error(f"--data {path} holds no samples")
    return task, samples


def read_text(path):
    """A text as uint8 [bytes]; .xz is unpacked."""
    import numpy as np

    from .probe.tasks import load_text

    return load_text(path) if path.suffix == ".xz" else np.frombuffer(path.read_bytes(), np.uint8)


def main():
    arguments = parse_arguments()
    if arguments.command == "report":
        from .evaluation.report import write_report

        print(write_report(arguments.results, arguments.plots))
        return
    if arguments.command == "many":
        from .evaluation.many import run_many

        run_many(
            arguments.model,
            arguments.results,
            arguments.text,
            arguments.tasks,
            arguments.methods,
            arguments.mass,
            arguments.length,
            arguments.contexts,
            arguments.questions,
            arguments.device,
        )
        return
    import paddle

    from .evaluation.run import measure_mass, run_tasks

    paddle.base.core.set_num_threads(os.cpu_count())  # or Paddle's own products run on one core
    if getattr(arguments, "frames", 0):
        from .evaluation.vision_model import VisionModel as Model
    else:
        from .evaluation.model import Model
    model = Model(arguments.model)
    if arguments.command in ("run", "mass"):
        work = run_tasks if arguments.command == "run" else measure_mass
        work(
            model,
            arguments.results,
            arguments.text,
            arguments.tasks,
            arguments.methods,
            arguments.lengths,
            arguments.contexts,
            arguments.questions,
        )
        return
    from .evaluation.benchmarks import run_benchmark

    run_benchmark(model, arguments.results, arguments.task, arguments.data, arguments.methods, arguments.longest)


if __name__ == "__main__":
    main()
