"""A checkpoint of PaddleFormers that reads pictures and text, whose text model chooses its blocks by a given method."""

from __future__ import annotations

import json
from pathlib import Path

import paddle

from rrattn.tokens import Tokenizer

from .model import Model

_PROCESSOR = "preprocessor_config.json"


def check_vision_checkpoint(folder):
    """The name of a checkpoint's class.

    Raises
    ------
    ValueError
        For a checkpoint of another kind, with what is missing.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    if "vision_config" not in config:
        raise ValueError(f"{folder} is no model that reads frames: its config.json has no vision_config")
    if not (Path(folder) / _PROCESSOR).is_file():
        raise ValueError(f"{folder} has no processor: {_PROCESSOR} is missing")
    names = config.get("architectures") or config.get("text_config", {}).get("architectures")
    if not names:
        raise ValueError(f"{folder}/config.json names no architectures")
    return names[0]


class VisionModel(Model):
    """A model, its processor, and the method by which its text model's attention chooses blocks.

    Parameters
    ----------
    folder : path
        A checkpoint directory of PaddleFormers, with the processor's files and a chat template.

    Raises
    ------
    ValueError
        For a checkpoint of another kind, or that this PaddleFormers does not know.
    """

    def _load(self, folder):
        from paddleformers import transformers

        name = check_vision_checkpoint(folder)
        if not hasattr(transformers, name):
            raise ValueError(f"this PaddleFormers has no {name}, of which {folder} is")
        self.processor = transformers.AutoProcessor.from_pretrained(str(folder))
        if not self.processor.chat_template:
            raise ValueError(f"the processor of {folder} has no chat template")
        model = getattr(transformers, name).from_pretrained(str(folder), dtype="float32")
        if not paddle.device.get_device().startswith("gpu"):
            for config in (model.config, model.config.vision_config):
                config.fuse_rms_norm = False  # an operator for GPUs
        model.eval()
        return Tokenizer(self.processor.tokenizer), model

    def prompt_of(self, sample, longest):
        """(the model's inputs, number of tokens) of a sample of video_mme.py: its frames and prompt as a user's turn.

        Raises
        ------
        ValueError
            For a video that cannot be read, and a prompt of more than `longest` tokens.
        """
        video, text = sample.read()
        content = [{"type": "video"}, {"type": "text", "text": text}]
        turn = [{"role": "user", "content": content}]
        prompt = self.processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[prompt], videos=[video.pictures], fps=video.rate, return_tensors="pd")
        inputs.pop("attention_mask")  # of ones
        num_tokens = inputs["input_ids"].shape[1]
        if num_tokens > longest:
            raise ValueError(
                f"{sample.name}: {len(video.times)} frames and the question are {num_tokens:,} tokens, more than "
                f"--longest {longest:,}: take fewer --frames"
            )
        return inputs, num_tokens

    def _run(self, inputs, cache):
        output = self.model.model(**inputs, use_cache=False, return_dict=True)
        return output.last_hidden_state[0], None
