"""Trains the probe: a byte-level LLaMA on real text and retrieval tasks, for a given time. PyTorch, one GPU.

    python -m tools.probe.train OUT [--corpus build/probe] [--minutes 8] [--resume FOLDER]

OUT gets the model as a Hugging Face LLaMA directory (config.json, model.safetensors), training.json (settings, progress
and quality), and checkpoint/. What share of the time is spent decides the length of the sequences and the learning
rate, so the same recipe fits any budget: first short contexts, where heads that look things up form, then longer ones
up to 16K. Every step is of the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch

from rrattn.command_line import check_at_least, check_input_file, check_output_folder

from .model import Probe, Shape, load_checkpoint, save_checkpoint
from .quality import measure, table
from .tasks import KINDS, MIXTURE, load_text, training_batch

# From which share of the training on, the length of the sequences.
STAGES = ((0.0, 512), (0.10, 1024), (0.24, 2048), (0.42, 4096), (0.57, 8192), (0.73, 16384))
TOKENS = 65536  # of a step
PEAK_LEARNING_RATE, LAST_LEARNING_RATE, WARMUP_STEPS = 2e-3, 5e-5, 200
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
LOG_EVERY, CHECKPOINT_SECONDS, MEASURE_SECONDS = 100, 150, 45


def stage_length(progress, longest):
    """Bytes of a sequence when this share of the training is done."""
    return min([length for begin, length in STAGES if progress >= begin][-1], longest)


def learning_rate(progress, step):
    """Warm-up by steps, then a cosine over the whole training."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0))
    decayed = LAST_LEARNING_RATE + (PEAK_LEARNING_RATE - LAST_LEARNING_RATE) * cosine
    return decayed * min(1.0, (step + 1) / WARMUP_STEPS)


def make_batches(worker, seed, text, tokens, length, queue):
    """Puts (length, tokens, kinds) into the queue for ever, in the length that is asked for at the time."""
    for index in range(1 << 62):
        now = length.value
        generator = np.random.default_rng([*seed, worker, index])
        queue.put((now, *training_batch(generator, text, tokens // now, now)))


class Batches:
    """Training batches from processes of their own."""

    def __init__(self, text, seed, num_workers, tokens, length):
        context = multiprocessing.get_context("fork")
        self._length = context.Value("q", length)
        self._queues = [context.Queue(maxsize=4) for _ in range(num_workers)]
        self._turn = 0
        self._workers = [
            context.Process(target=make_batches, args=(worker, seed, text, tokens, self._length, queue), daemon=True)
            for worker, queue in enumerate(self._queues)
        ]
        for worker in self._workers:
            worker.start()

    def next(self, length):
        """(tokens, kinds) uint8 [batch, length + 1]."""
        self._length.value = length
        while True:
            made, tokens, kinds = self._queues[self._turn].get(timeout=120)
            self._turn = (self._turn + 1) % len(self._queues)
            if made == length:
                return torch.from_numpy(tokens), torch.from_numpy(kinds)

    def close(self):
        for worker in self._workers:
            worker.terminate()


def parse_arguments():
    """The arguments, with `texts`: what to train on and what is held out, uint8 [bytes] each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the model, the log and the checkpoint")
    parser.add_argument("--corpus", type=Path, default=Path("build/probe"), help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=8, help="of this run, start to end (default: %(default)s)")
    parser.add_argument("--of", type=float, help="minutes of training in all runs (default: what this run has left)")
    parser.add_argument("--resume", type=Path, help="a checkpoint folder to go on from")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a step (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=16384, help="bytes of a sequence (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=Shape.num_layers, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, help="stop after so many, to try things out (default: by time)")
    parser.add_argument("--measure-seconds", type=float, default=MEASURE_SECONDS, help="kept for the end (default: 45)")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    arguments = parser.parse_args()
    lengths = [length for _, length in STAGES]
    if arguments.longest not in lengths:
        parser.error(f"--longest must be one of {', '.join(map(str, lengths))}, got {arguments.longest}")
    if arguments.tokens < arguments.longest or arguments.tokens % arguments.longest:
        parser.error(f"--tokens must be a multiple of --longest {arguments.longest}, got {arguments.tokens}")
    for name in ("minutes", "of"):
        if getattr(arguments, name) is not None and not getattr(arguments, name) > 0:
            parser.error(f"--{name} must be above 0, got {getattr(arguments, name)}")
    check_at_least(parser, arguments, layers=1, steps=1, seed=0, measure_seconds=0)
    check_output_folder(parser, "OUT", arguments.out)
    if arguments.resume:
        check_input_file(parser, "--resume", arguments.resume / "state.json")
    for name in ("train.xz", "heldout.xz", "manifest.json"):
        if not (arguments.corpus / name).is_file():
            parser.error(f"--corpus {arguments.corpus} holds no {name}: make it by python -m tools.probe.corpus")
    try:
        arguments.texts = [load_text(arguments.corpus / f"{part}.xz") for part in ("train", "heldout")]
    except ValueError as error:
        parser.error(f"--corpus {arguments.corpus}: {error}")
    for part, text in zip(("train", "heldout"), arguments.texts):
        if len(text) < arguments.longest:
            parser.error(
                f"{part}.xz of --corpus {arguments.corpus} holds {len(text):,} bytes, fewer than the "
                f"{arguments.longest:,} of a sequence (--longest)"
            )
    return arguments


def log_row(sums, seconds, tokens):
    """Speed, and loss and share of right bytes of each kind since the last row."""
    sums = sums.cpu().numpy()
    row = {"million_tokens_per_second": tokens / seconds / 1e6}
    for i, kind in enumerate(KINDS):
        if kind != "none" and sums[i, 2]:
            row[kind] = {"loss": float(sums[i, 0] / sums[i, 2]), "right": float(sums[i, 1] / sums[i, 2])}
    return row


def print_row(row):
    shares = "  ".join(f"{row[kind]['right']:7.1%}" if kind in row else "      -" for kind in KINDS[2:])
    text = f"{row['text']['loss']:.3f}" if "text" in row else "    -"
    print(
        f"{row['progress']:6.1%} {row['step']:6} {row['length']:6} {row['learning_rate']:9.1e} "
        f"{row['million_tokens_per_second']:7.2f}  {text:>6}  {shares}",
        flush=True,
    )


def main():
    began = time.perf_counter()
    arguments = parse_arguments()
    text, heldout = arguments.texts
    state = {"step": 0, "seconds": 0.0, "tokens": 0, "rows": []}
    if arguments.resume:
        state = json.loads((arguments.resume / "state.json").read_text())
    num_workers = max(1, min(12, (os.cpu_count() or 2) - 2))
    # Before the GPU is touched, since the workers are forks. A resumed run sees other data.
    batches = Batches(text, [arguments.seed, state["step"]], num_workers, arguments.tokens, STAGES[0][1])

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = Shape(num_layers=arguments.layers, max_tokens=arguments.longest)
    probe = Probe(shape, device, arguments.seed, compiled=device == "cuda" and not arguments.no_compile)
    matrices = [weight for name, weight in probe.weights.items() if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in probe.weights.items() if weight.ndim == 1 or "embed" in name]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=BETAS, fused=device == "cuda")
    if arguments.resume:
        state = load_checkpoint(arguments.resume, probe, optimizer)
    kernels = probe.choose_attention(arguments.tokens // arguments.longest, arguments.longest)
    print(f"{probe.num_weights() / 1e6:.2f} M weights, {len(text) / 1e6:.1f} MB of text, {num_workers} data processes")
    if kernels:
        print(f"attention, ms forward and backward: {kernels}; used: {probe.backend.name}")

    def losses(length):
        tokens, kinds = batches.next(length)
        return probe(tokens.to(device, non_blocking=True), kinds.to(device, non_blocking=True))

    losses(stage_length(0, arguments.longest))[0].backward()  # compiles
    optimizer.zero_grad(set_to_none=True)
    start = time.perf_counter()
    left = max(1.0, arguments.minutes * 60 - (start - began) - arguments.measure_seconds)
    total = arguments.of * 60 if arguments.of else state["seconds"] + left
    print(f"ready after {start - began:.0f} s; training for {min(left, total - state['seconds']):.0f} s")
    print("  done   step length      rate  Mtok/s    text  " + "  ".join(f"{kind:>7}" for kind in KINDS[2:]))
    before, first_step = state["seconds"], state["step"]
    saved = logged = start
    sums, logged_tokens = torch.zeros(len(KINDS), 3, device=device), 0
    while True:
        now = time.perf_counter()
        state["seconds"] = before + now - start
        progress = state["seconds"] / total
        enough = arguments.steps is not None and state["step"] - first_step >= arguments.steps
        if now - start >= left or progress >= 1 or enough:
            break
        length, rate = stage_length(progress, arguments.longest), learning_rate(progress, state["step"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, of_step, _, _ = losses(length)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(probe.weights.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sums += of_step
        state["step"] += 1
        state["tokens"] += arguments.tokens
        logged_tokens += arguments.tokens
        if state["step"] % LOG_EVERY == 0:
            row = {"progress": progress, "step": state["step"], "length": length, "learning_rate": rate}
            row |= log_row(sums, time.perf_counter() - logged, logged_tokens)
            state["rows"].append(row)
            print_row(row)
            sums.zero_()
            logged, logged_tokens = time.perf_counter(), 0
        if time.perf_counter() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(arguments.out / "checkpoint", probe, optimizer, state)
            saved = time.perf_counter()
    batches.close()
    save_checkpoint(arguments.out / "checkpoint", probe, optimizer, state)
    probe.export(arguments.out)
    exact = probe.round_weights()  # quality is that of the weights as exported
    quality = measure(probe, text, heldout, arguments.tokens, arguments.longest)
    del exact
    record = {
        "settings": {
            "seed": arguments.seed,
            "tokens_per_step": arguments.tokens,
            "stages": STAGES,
            "mixture": {KINDS[kind]: share for kind, share in MIXTURE.items()},
            "learning_rate": [PEAK_LEARNING_RATE, LAST_LEARNING_RATE],
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "torch": torch.__version__,
            "attention": kernels,
            "corpus": json.loads((arguments.corpus / "manifest.json").read_text()),
        },
        **{key: state[key] for key in ("step", "seconds", "tokens", "rows")},
        "quality": quality,
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{state['step']} steps, {state['tokens'] / 1e6:.0f} M tokens, {time.perf_counter() - began:.0f} s in all")
    print(table(quality))


if __name__ == "__main__":
    main()
