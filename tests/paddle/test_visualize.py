"""The pictures: what is drawn where, at 8 and at 1,024 blocks, and errors that say what is wrong."""

import builtins

import numpy as np
import paddle
import pytest

import rrattn
from rrattn import visualize
from rrattn.layer import BlockSelection
from rrattn.masks import document_startend_rows

pytest.importorskip("matplotlib")


def random_mask(num_blocks, heads=3, share=0.3, batch=1):
    bits = np.random.default_rng(0).random([batch, heads, num_blocks, num_blocks]) < share
    return bits, rrattn.pack_block_mask(paddle.to_tensor(bits))


def geometry(num_blocks):
    return {"causal": True, "seqlen_q": num_blocks * 128, "seqlen_k": num_blocks * 128}


def panels(figure):
    """The axes that hold a picture, without the colour bar."""
    return [axes for axes in figure.axes if axes.get_visible() and axes.images]


def cells(axes):
    return np.ma.filled(axes.images[0].get_array(), np.nan)


def test_every_block_is_a_cell_when_they_fit():
    bits, block_mask = random_mask(8, batch=2)
    figure = visualize.plot_block_mask(block_mask, **geometry(8), batch=1, heads=[2, 0])
    visible = np.tril(np.ones([8, 8], dtype=bool))
    assert len(panels(figure)) == 2
    for axes, head in zip(panels(figure), (2, 0)):
        np.testing.assert_array_equal(cells(axes), np.where(visible, bits[1, head], np.nan))
        density = (bits[1, head] & visible).sum() / visible.sum()
        assert axes.get_title() == f"head {head}  ·  {density:.1%}"
        assert axes.get_xlim() == (0, 1024) and axes.get_ylim() == (1024, 0)


def packed_rows(num_blocks):
    """(bounds of two documents of half the blocks, and of the same and of one for another head; visible to each)."""
    half, whole = num_blocks * 64, num_blocks * 128
    rows = paddle.concat([document_startend_rows([half, half]), document_startend_rows([whole])], axis=1)
    visible = np.tril(np.ones([2, num_blocks, num_blocks], dtype=bool))
    visible[0, num_blocks // 2 :, : num_blocks // 2] = False
    return rows, visible


def test_what_flashmask_hides_is_not_drawn():
    bits, block_mask = random_mask(8, heads=2)
    rows, visible = packed_rows(8)
    selection = BlockSelection(block_mask, rows, **geometry(8))
    for figure in (
        visualize.plot_block_mask(block_mask, rows, **geometry(8)),
        visualize.plot_layers([selection]),
    ):
        for axes, kept, seen in zip(panels(figure), bits[0], visible):
            np.testing.assert_array_equal(cells(axes), np.where(seen, kept, np.nan))
            assert axes.get_title().endswith(f"  ·  {(kept & seen).sum() / seen.sum():.1%}")


def test_scores_of_what_flashmask_hides_are_not_drawn():
    scores = np.full([1, 2, 8, 8], 0.01, dtype=np.float32)
    scores[..., 0] = 10.0  # one block a row holds 95% and more, where it can be seen
    rows, visible = packed_rows(8)
    figure = visualize.plot_block_scores(paddle.to_tensor(scores), rows, **geometry(8))
    titles = [axes.get_title() for axes in panels(figure)]
    # 4 rows of one block, then 1 + 2 + 3 + 4 of the 20 that are seen; 8 of 36
    assert titles == ["head 0  ·  95% in 70% of blocks", "head 1  ·  95% in 22% of blocks"]
    for axes, seen in zip(panels(figure), visible):
        np.testing.assert_array_equal(np.isnan(cells(axes)), ~seen)
        np.testing.assert_allclose(np.nansum(cells(axes), axis=1), 1)


def test_many_blocks_are_averaged():
    bits, block_mask = random_mask(1024, heads=1)
    (axes,) = panels(visualize.plot_block_mask(block_mask, **geometry(1024)))
    drawn = cells(axes)
    assert drawn.shape == (128, 128)
    assert drawn[100, 3] == pytest.approx(bits[0, 0, 800:808, 24:32].mean())
    on_diagonal = np.tril(np.ones([8, 8], dtype=bool))  # blocks above the diagonal do not count
    assert drawn[5, 5] == pytest.approx(bits[0, 0, 40:48, 40:48][on_diagonal].mean())
    assert np.isnan(drawn[5, 6])


def test_ragged_cells_cover_what_is_there():
    bits, block_mask = random_mask(131, heads=1)  # 65.5 cells of 2 blocks a side
    (axes,) = panels(visualize.plot_block_mask(block_mask, causal=False, seqlen_q=131 * 128, seqlen_k=131 * 128))
    assert cells(axes).shape == (66, 66)
    assert cells(axes)[65, 65] == bits[0, 0, 130, 130]
    assert cells(axes)[65, 0] == pytest.approx(bits[0, 0, 130, :2].mean())
    assert axes.images[0].get_extent() == [0, 132 * 128, 132 * 128, 0]


def test_later_queries_stand_at_their_positions():
    bits = paddle.ones([1, 1, 2, 8], dtype="bool")
    figure = visualize.plot_block_mask(rrattn.pack_block_mask(bits), causal=True, seqlen_q=200, seqlen_k=1000)
    (axes,) = panels(figure)
    assert axes.get_ylim() == (1000, 800)
    np.testing.assert_array_equal(cells(axes)[0], [1] * 8)


def test_scores_are_shares_of_their_rows():
    scores = paddle.to_tensor(np.random.default_rng(0).random([1, 2, 8, 8]), dtype="float32")
    figure = visualize.plot_block_scores(scores, **geometry(8), layer=5)
    for head, axes in enumerate(panels(figure)):
        visible = np.tril(scores.numpy()[0, head])
        expected = visible / visible.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(np.nan_to_num(cells(axes)), expected, rtol=1e-6)
        assert axes.get_title().startswith(f"layer 5, head {head}  ·  95% in ")


def test_score_title_counts_the_blocks_that_hold_the_mass():
    scores = np.full([1, 1, 4, 4], 0.01, dtype=np.float32)
    scores[..., 0] = 10.0  # one block a row holds 95% and more
    figure = visualize.plot_block_scores(paddle.to_tensor(scores), **geometry(4))
    assert panels(figure)[0].get_title() == "head 0  ·  95% in 40% of blocks"  # 4 of 10


def selections(num_layers, num_blocks=8, heads=3):
    masks = [random_mask(num_blocks, heads, share=0.2 * (layer + 1))[1] for layer in range(num_layers)]
    return [BlockSelection(mask, **geometry(num_blocks)) for mask in masks]


def test_layers_are_rows(tmp_path):
    path = tmp_path / "layers.png"
    figure = visualize.plot_layers(selections(4), layers=[1, 3], heads=[0, 2], title="two layers", path=path)
    titles = [axes.get_title().split("  ·  ")[0] for axes in panels(figure)]
    assert titles == ["layer 1, head 0", "layer 1, head 2", "layer 3, head 0", "layer 3, head 2"]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_densities_are_a_table():
    densities = [selection.density for selection in selections(4)]
    figure = visualize.plot_densities(densities, title="density")
    np.testing.assert_array_equal(cells(panels(figure)[0]), np.concatenate([d.numpy() for d in densities]))
    assert "density" in panels(figure)[0].get_title()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": [3]}, r"no head \[3\]"),
        ({"heads": []}, "no head"),
        ({"batch": 1}, "no sequence 1"),
        ({"seqlen_q": 2000, "seqlen_k": 2000}, "2000|16"),
        ({"heads": 0}, "heads is 0, but must be a sequence of integers"),
        ({"heads": [-1]}, r"heads is \[-1\], but must be a sequence of integers of at least 0"),
        ({"heads": np.array([True, False, True])}, r"heads is \[True, False, True\], but must be a sequence of int"),
        ({"heads": ["1"]}, r"heads is \['1'\], but must be a sequence of integers"),
        ({"batch": -1}, "batch is -1, but must be an integer of at least 0"),
        ({"batch": 0.0}, "batch is 0.0, but must be an integer of at least 0"),
        ({"layer": "1"}, "layer is '1', but must be an integer of at least 0"),
        ({"causal": "False"}, "causal is 'False', but must be True or False"),
        ({"seqlen_q": 1024.0}, "seqlen_q is 1024.0, but must be an integer from 0"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        visualize.plot_block_mask(random_mask(8)[1], **{**geometry(8), **arguments})
    with pytest.raises(ValueError, match=message):
        visualize.plot_block_scores(paddle.ones([1, 3, 8, 8]), **{**geometry(8), **arguments})


def test_iterators_and_numbers_of_numpy():
    """An iterator of heads is for the heads of every layer."""
    figure = visualize.plot_layers(iter(selections(3)), layers=iter([0, 2]), heads=iter([1, 0]), batch=np.int64(0))
    titles = [axes.get_title().split("  ·  ")[0] for axes in panels(figure)]
    assert titles == ["layer 0, head 1", "layer 0, head 0", "layer 2, head 1", "layer 2, head 0"]
    sizes = {"causal": np.bool_(True), "seqlen_q": np.int64(1024), "seqlen_k": np.uint16(1024)}
    figure = visualize.plot_block_mask(random_mask(8)[1].numpy(), **sizes, heads=np.array([2]), layer=np.int8(4))
    assert [axes.get_title().split("  ·  ")[0] for axes in panels(figure)] == ["layer 4, head 2"]
    figure = visualize.plot_densities(selection.density for selection in selections(2))
    assert cells(panels(figure)[0]).shape == (2, 3)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: visualize.plot_block_mask(None, **geometry(8)), "block_mask is None, but must be a Tensor"),
        (
            lambda: visualize.plot_block_scores("scores", **geometry(8)),
            "block_scores is 'scores', but must be a Tensor",
        ),
        (lambda: visualize.plot_layers(None), "selections is None, but must be a sequence of BlockSelection"),
        (
            lambda: visualize.plot_layers([random_mask(8)[1]]),
            "selections is .*, but must be a sequence of BlockSelection",
        ),
        (lambda: visualize.plot_layers(selections(2), layers=1), "layers is 1, but must be a sequence of integers"),
        (lambda: visualize.plot_layers(selections(2), layers=[-1]), r"layers is \[-1\], but must be a sequence of int"),
        (
            lambda: visualize.plot_densities(paddle.ones([1, 3])),
            "densities is a Tensor, but must be a sequence of Tensor",
        ),
        (
            lambda: visualize.plot_densities([paddle.ones([3])]),
            r"densities .* shapes \[\(3,\)\], .* one shape \[B, Hq\]",
        ),
        (lambda: visualize.plot_densities([paddle.ones([1, 3])], batch=1), "no sequence 1 in a batch of 1"),
        (lambda: visualize.plot_stats(None), "stats is None, but must be a ModelStats"),
    ],
)
def test_what_is_nothing_to_draw(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="no blocks"):
        visualize.plot_block_mask(paddle.zeros([1, 1, 0, 0], dtype="int32"), causal=True, seqlen_q=0, seqlen_k=0)


def test_too_many_panels_are_refused():
    with pytest.raises(ValueError, match="300 panels"):
        visualize.plot_block_mask(random_mask(2, heads=300)[1], **geometry(2))


def test_layers_that_did_not_run_are_refused():
    with pytest.raises(ValueError, match="layer 1 has no block mask"):
        visualize.plot_layers([*selections(1), None])
    with pytest.raises(ValueError, match="no layer 7"):
        visualize.plot_layers(selections(1), layers=[7])
    with pytest.raises(ValueError, match="not run yet"):
        visualize.plot_densities([None])


def test_missing_matplotlib_is_named(monkeypatch):
    original = builtins.__import__

    def without_matplotlib(name, *arguments, **keywords):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        visualize.plot_block_mask(random_mask(8)[1], **geometry(8))


def test_layers_that_a_picture_has_room_for():
    assert visualize.layers_to_draw(6, 6) == list(range(6))
    drawn = visualize.layers_to_draw(30, 9)
    assert len(drawn) == 7 == len(set(drawn)) and drawn[0] == 0 and set(np.diff(drawn)) == {4, 5} and max(drawn) < 30
    assert visualize.layers_to_draw(3, 100) == [0]


def test_ticks_are_on_the_outer_panels_alone():
    block_mask = random_mask(8, heads=7)[1]
    figure = visualize.plot_block_mask(block_mask, **geometry(8))
    drawn = panels(figure)
    assert len(drawn) == 7  # four in a row
    assert [len(axes.get_yticks()) > 0 for axes in drawn] == [True, False, False, False, True, False, False]
    assert [len(axes.get_xticks()) > 0 for axes in drawn] == [False, False, False, True, True, True, True]
    assert all(axes.get_xlim() == drawn[0].get_xlim() and axes.get_ylim() == drawn[0].get_ylim() for axes in drawn)
