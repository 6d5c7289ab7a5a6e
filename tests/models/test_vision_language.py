"""Vision-language prefill end to end: a tiny Qwen2.5-VL that reads pictures and videos, rrattn in its text model."""

import numpy as np
import paddle
import pytest
from model_oracle import oracle_forward
from vision_models import NUM_LAYERS, make_frames, make_model, make_processor

import rrattn
from rrattn.integrations import attention_cores

PROMPT = "<|vision_start|><|video_pad|><|vision_end|>Where does the ball fly to? What colours has it on its way?"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return make_processor(tmp_path_factory.mktemp("processor"), (112 * 112, 168 * 168))


@pytest.fixture(scope="module")
def video(processor):
    """A video of 56 frames and a question about it, as the library's processor hands them to a model."""
    frames = np.stack([np.asarray(frame) for frame in make_frames(56)])
    inputs = processor(text=PROMPT, videos=[frames], fps=2.0, return_tensors="pd")
    assert inputs["input_ids"].shape[1] > 5 * 128  # blocks to choose from
    return dict(inputs)


@pytest.fixture(scope="module")
def pictures(processor):
    """Twenty pictures between texts."""
    text = "Compare: " + "<|vision_start|><|image_pad|><|vision_end|> and " * 20 + "what has changed?"
    inputs = processor(text=text, images=make_frames(20, (640, 480)), return_tensors="pd")
    assert inputs["input_ids"].shape[1] > 5 * 128
    return dict(inputs)


@pytest.fixture
def model():
    return make_model()


@paddle.no_grad()
def logits(model, inputs):
    return model(**inputs, return_dict=True).logits.numpy()


def gradients(model, inputs):
    """(loss, name -> gradient) of a training step."""
    model.train()
    model.clear_gradients()
    loss = model(**inputs, labels=inputs["input_ids"], return_dict=True).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.eval()
    return float(loss), {name: grad.numpy() for name, grad in grads.items() if grad is not None}


def generate(model, inputs, count=2):
    """`count` more tokens [1, count], drawn with a seed. The library prefills all anew for each: it keeps no cache."""
    paddle.seed(7)
    settings = {"decode_strategy": "sampling", "top_k": 20, "temperature": 10.0, "eos_token_id": -1}
    return model.generate(**inputs, max_new_tokens=count, **settings)[0].numpy()


@paddle.no_grad()
def video_features(model, inputs):
    """What the vision tower makes of a video."""
    return model.visual(inputs["pixel_values_videos"], inputs["video_grid_thw"]).numpy()


def assert_same(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-4 * max(1.0, np.abs(expected).max()))


def assert_same_gradients(actual, expected):
    assert abs(actual[0] - expected[0]) <= 1e-5 * abs(expected[0]) and actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        np.testing.assert_allclose(actual[1][name], gradient, atol=2e-4 * np.abs(gradient).max() + 1e-7, err_msg=name)


@pytest.mark.parametrize("media", ["video", "pictures"])
def test_threshold_1_equals_the_dense_twin(model, media, request):
    inputs = request.getfixturevalue(media)
    dense, tokens, trained = logits(model, inputs), generate(model, inputs), gradients(model, inputs)
    rrattn.enable(model, threshold=1.0)
    assert_same(logits(model, inputs), dense)
    np.testing.assert_array_equal(generate(model, inputs), tokens)
    assert_same_gradients(gradients(model, inputs), trained)


@pytest.mark.parametrize("media", ["video", "pictures"])
def test_below_threshold_1_it_equals_the_oracle(model, media, request, monkeypatch):
    inputs = request.getfixturevalue(media)
    dense = logits(model, inputs)
    rrattn.enable(model, threshold=0.3)
    sparse, tokens, trained = logits(model, inputs), generate(model, inputs), gradients(model, inputs)
    assert all(float(density.min()) < 1 for density in rrattn.layer_densities(model))
    assert np.abs(sparse - dense).max() > 1e-2
    calls = []
    monkeypatch.setattr(rrattn.RRAttention, "forward", lambda *a, **k: calls.append(0) or oracle_forward(*a, **k))
    assert_same(sparse, logits(model, inputs))
    assert len(calls) == NUM_LAYERS  # of the text model, and none of the vision tower
    np.testing.assert_array_equal(tokens, generate(model, inputs))
    assert_same_gradients(trained, gradients(model, inputs))


def test_the_vision_tower_stays_as_it_is(model, video):
    tower = model.visual
    before = video_features(model, video)
    held = [{name: id(value) for name, value in vars(layer).items()} for layer in tower.sublayers(include_self=True)]
    rrattn.enable(model, threshold=0.5)
    assert len(attention_cores(model)) == NUM_LAYERS
    assert (video_features(model, video) == before).all()
    after = [{name: id(value) for name, value in vars(layer).items()} for layer in tower.sublayers(include_self=True)]
    assert after == held and tower.config._attn_implementation == "eager"
    assert model.language_model.config._attn_implementation == "rrattn"


def test_the_text_models_flag_alone_runs_it_too(model, video):
    rrattn.enable(model, threshold=0.5)
    sparse = logits(model, video)
    flagged = make_model()
    flagged.config.text_config.rrattn_threshold = 0.5
    flagged.config.text_config._attn_implementation = "rrattn"
    assert (logits(flagged, video) == sparse).all()
    assert all(density is not None for density in rrattn.layer_densities(flagged))


def test_disable_returns_to_the_dense_twin(model, video):
    dense = logits(model, video)
    rrattn.enable(model, threshold=0.5)
    rrattn.disable(model)
    assert (logits(model, video) == dense).all() and rrattn.layer_densities(model) == [None] * NUM_LAYERS


@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_chunks_and_decoding_steps_over_a_cache(model, video, threshold):
    """The text model by its embeddings and positions of three axes: two chunks select what one prefill does."""
    rrattn.enable(model, threshold=threshold, keep_last=False)
    tokens = video["input_ids"]
    with paddle.no_grad():
        embedded = model.get_input_embeddings()(tokens)
        embedded[tokens == model.config.video_token_id] = paddle.to_tensor(video_features(model, video))
        positions, _ = model.model.get_rope_index(
            tokens, video_grid_thw=video["video_grid_thw"], second_per_grid_ts=video["second_per_grid_ts"]
        )

        def hidden(part, **cache):
            inputs = {"inputs_embeds": embedded[:, part], "position_ids": positions[:, :, part]}
            return model.language_model(**inputs, **cache, return_dict=True)

        whole = hidden(slice(None)).last_hidden_state
        cache, parts = None, []
        for part in (slice(0, 384), slice(384, -1), slice(-1, None)):
            out = hidden(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.last_hidden_state)
        assert_same(paddle.concat(parts[:2], axis=1).numpy(), whole[:, :-1].numpy())
        if threshold == 1:  # a decoding step is dense
            assert_same(parts[2].numpy(), whole[:, -1:].numpy())


def test_an_animated_file_and_its_frames_are_one_video(processor, tmp_path):
    """What PIL reads of a lossless animation goes through the library's preprocessing bit by bit."""
    from PIL import Image, ImageSequence

    frames = make_frames(4)
    frames[0].save(tmp_path / "video.png", save_all=True, append_images=frames[1:], duration=500)
    with Image.open(tmp_path / "video.png") as file:
        read = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)]
    given = [np.asarray(frame) for frame in frames]
    pixels = [
        processor(text=PROMPT, videos=[np.stack(each)], return_tensors="pd")["pixel_values_videos"]
        for each in (read, given)
    ]
    assert (pixels[0] == pixels[1]).all()
