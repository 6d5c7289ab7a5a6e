"""A tiny Qwen2.5-VL of PaddleFormers, its processor, and pictures for it."""

import json

import numpy as np
import paddle
import pytest
from PIL import Image, ImageDraw

transformers = pytest.importorskip("paddleformers.transformers")

NUM_LAYERS = 2
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
FIRST_SPECIAL = 256  # after the bytes
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% for part in message['content'] %}\
{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>\
{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # in Qwen's form


def token_id(name):
    return FIRST_SPECIAL + SPECIAL.index(name)


def make_processor(folder, pixels=(56 * 56, 112 * 112)):
    """The library's processor of Qwen2.5-VL over a tokenizer of bytes, whose files are written to a folder.

    pixels are the fewest and the most of a picture, to which pictures are scaled.
    """
    from paddleformers.transformers.qwen2_vl.image_processor import Qwen2VLImageProcessor
    from paddleformers.transformers.qwen2_vl.video_processor import Qwen2VLVideoProcessor
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.Qwen2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    tokenizer.chat_template = TEMPLATE
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [token_id(name) for name in SPECIAL]
    fewest, most = pixels
    pictures = {"min_pixels": fewest, "max_pixels": most}
    return transformers.Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**pictures), tokenizer, Qwen2VLVideoProcessor(**pictures)
    )


def make_config():
    text = {
        "vocab_size": FIRST_SPECIAL + len(SPECIAL),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,  # large enough for attention to have preferences
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
        "pad_token_id": token_id("<|endoftext|>"),
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "window_size": 56,
        "initializer_range": 0.3,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        pad_token_id=token_id("<|endoftext|>"),
    )
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "eager"
        part.fuse_rms_norm = False
    return config


def make_model():
    """A model in evaluation mode with random weights."""
    paddle.seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(make_config())
    model.eval()
    return model


def save_checkpoint(folder, pixels):
    """A model and its processor, written to a folder under the names that published checkpoints have."""
    from safetensors.numpy import load_file, save_file

    processor = make_processor(folder, pixels)
    make_model().save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    # PaddleFormers 1.2 writes the biases of attention under other names than it reads.
    ours, published = "model.language_model.layers.", "model.layers."
    for path in folder.glob("*.safetensors"):
        weights = {name.replace(ours, published): weight for name, weight in load_file(str(path)).items()}
        save_file(weights, str(path), metadata={"format": "np"})
    for path in folder.glob("*.safetensors.index.json"):
        path.write_text(path.read_text().replace(ours, published))


def make_frames(count, size=(160, 120), seed=0):
    """Frames of a video, PIL pictures: a ball that flies over a striped, noisy ground and changes its colour."""
    noise = np.random.default_rng(seed).integers(0, 60, (size[1], size[0], 3), dtype=np.uint8)
    frames = []
    for number in range(count):
        share = number / max(1, count - 1)
        picture = Image.fromarray(noise + np.uint8([0, 40, 90]))
        draw = ImageDraw.Draw(picture)
        for stripe in range(0, size[0], 20):
            draw.rectangle((stripe, size[1] // 2, stripe + 9, size[1]), fill=(30, 90 + stripe, 40))
        x, y = share * (size[0] - 40), 20 + 40 * share
        draw.ellipse((x, y, x + 40, y + 40), fill=(255, int(255 * share), 0))
        frames.append(picture)
    return frames
