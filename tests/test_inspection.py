"""What a model has learned, where the answer is known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_vit import HFViTForImageClassification, HFViTModel
from hf_vit.evaluation.metrics import ImageResults
from hf_vit.inspection import (
    attention_weights,
    feature_components,
    lit,
    outlier_norm,
    patch_filters,
    plot_attention_distance,
    plot_attention_maps,
    plot_confusion,
    plot_feature_components,
    plot_filters,
    plot_heads,
    plot_norm_maps,
    plot_position_bias,
    plot_position_similarity,
    plot_predictions,
    plot_token_norms,
    plot_training,
    position_bias,
    position_similarity,
    shown_predictions,
    stem_filters,
    token_norms,
)
from hf_vit.inspection.maps import DIM


@pytest.mark.parametrize("kind", ["learned", "learned_2d", "sincos_2d"])
def test_similarity_is_symmetric_and_one_with_itself(kind: str, tiny_config: Any) -> None:
    model = HFViTForImageClassification(tiny_config(position_embedding_type=kind))
    similarity = position_similarity(model)
    assert similarity.shape == (4, 6, 4, 6)
    flat = similarity.reshape(24, 24)
    np.testing.assert_allclose(flat, flat.T, atol=1e-6)
    np.testing.assert_allclose(flat.diagonal(), 1, atol=1e-6)
    assert np.abs(flat).max() <= 1 + 1e-6


def test_similarity_of_known_positions(tiny_config: Any) -> None:
    """Positions that say their column alone are alike in a column, and at right angles elsewhere."""
    model = HFViTModel(tiny_config())
    table = model.embeddings.position_embeddings.table.weight.data.zero_()  # [1, 4, 6, D]
    for column in range(6):
        table[0, :, column, column] = 3.0
    similarity = position_similarity(model)
    for column in range(6):
        expected = np.zeros((4, 6))
        expected[:, column] = 1
        np.testing.assert_allclose(similarity[2, column], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["learned", "learned_2d"])
def test_similarity_of_positions_that_are_resampled(kind: str, tiny_config: Any) -> None:
    """Positions that say their column alone say it on any grid; equal ones stay equal."""
    model = HFViTModel(tiny_config(position_embedding_type=kind))
    positions = model.embeddings.position_embeddings
    for table in [positions.table] if kind == "learned" else [positions.rows, positions.columns]:
        table.weight.data[:] = table.weight.data[:, :1]
    similarity = position_similarity(model, (7, 9))
    assert similarity.shape == (7, 9, 7, 9)
    for column in range(9):
        np.testing.assert_allclose(similarity[2, column, :, column], 1, atol=1e-5)
    assert np.abs(similarity[0, :, 0, :] - np.eye(9)).max() > 0.1
    for parameter in positions.parameters():
        parameter.data.fill_(0.5)
    np.testing.assert_allclose(position_similarity(model, (3, 11)), 1, atol=1e-5)
    assert np.array_equal(position_similarity(model), position_similarity(model, (4, 6)))


def test_layers_with_positions_of_their_own(tiny_config: Any) -> None:
    model = HFViTModel(tiny_config(position_placement="every_layer", initializer_range=1.0))
    first, last = position_similarity(model), position_similarity(model, layer=-1)
    assert first.shape == last.shape == (4, 6, 4, 6) and not np.allclose(first, last)
    with pytest.raises(ValueError, match="Expected a layer from 1 to 3, or -1 to -3 from the end, got 4"):
        position_similarity(model, layer=4)


@pytest.mark.parametrize("kind", ["relative", "rotary", "none"])
def test_no_vectors_to_compare(kind: str, tiny_config: Any) -> None:
    model = HFViTModel(tiny_config(position_embedding_type=kind))
    with pytest.raises(ValueError, match=f"one position vector per patch, got position_embedding_type='{kind}'"):
        position_similarity(model)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
def test_bias_of_positions_says_where_attention_goes(grid: tuple[int, int], tiny_config: Any) -> None:
    """Where queries and keys say nothing, attention is the softmax of the bias, by the place relative to who looks."""
    model = HFViTModel(tiny_config(position_embedding_type="relative", pooling="mean", initializer_range=1.0))
    model.layers[1].attention.qkv.weight.data.zero_()
    rows, columns = grid
    bias = position_bias(model, 2, grid)
    assert bias.shape == (4, 2 * rows - 1, 2 * columns - 1)
    ((_, weights),) = attention_weights(model, torch.randn(1, 3, 8 * rows, 8 * columns), [2])
    row, column = 3, 2  # the patch that looks: what it sees is a window of the bias
    window = bias[:, rows - 1 - row : 2 * rows - 1 - row, columns - 1 - column : 2 * columns - 1 - column]
    expected = np.exp(window) / np.exp(window).sum(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(weights[0, :, row * columns + column].reshape(4, rows, columns), expected, atol=1e-5)


def test_bias_is_of_relative_positions_alone(tiny_config: Any) -> None:
    with pytest.raises(ValueError, match="position_embedding_type='learned' adds nothing to attention scores"):
        position_bias(HFViTModel(tiny_config()))
    with pytest.raises(ValueError, match="at least one row and one column, got 0x3"):
        position_similarity(HFViTModel(tiny_config()), (0, 3))


# -------------------------------------------------------------------------------------------------------- filters


def test_filters_that_are_one_pattern(tiny_config: Any) -> None:
    """All filters are multiples of one picture: it is the first component, and all of the variance."""
    model = HFViTModel(tiny_config(patch_size=(8, 4)))
    projection = model.embeddings.patch_embeddings.projection
    pattern = torch.randn(8, 4, 3)
    image = torch.randn(8, 4, 3)
    with torch.no_grad():
        projection.weight.copy_(torch.outer(torch.randn(32), pattern.permute(2, 0, 1).flatten()))
        projection.bias.zero_()
        answer = model.embeddings.patch_embeddings(image.permute(2, 0, 1)[None])[0, 0]
    filters, shares = patch_filters(model, 5)
    assert filters.shape == (5, 8, 4, 3) and shares.shape == (5,)
    np.testing.assert_allclose(shares, [1, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(filters.reshape(5, -1), axis=1), 1, atol=1e-5)
    cosine = (filters[0] * pattern.numpy()).sum() / pattern.norm().item()
    assert abs(cosine) == pytest.approx(1, abs=1e-5) and filters[0].flat[np.abs(filters[0]).argmax()] > 0
    # What the projection answers goes with how much of the pattern is in the image.
    assert answer.norm().item() == pytest.approx(
        abs((filters[0] * image.numpy()).sum()) * projection.weight.norm().item(), rel=1e-4
    )
    assert len(patch_filters(model)[0]) == 28 and len(patch_filters(model, 1000)[0]) == 31


def test_filters_of_a_hybrid_are_those_of_its_stem(tiny_config: Any) -> None:
    model = HFViTForImageClassification(tiny_config(stem_layers=[1], stem_width=32))
    filters = stem_filters(model)
    assert filters.shape == (32, 7, 7, 3)
    np.testing.assert_allclose(filters.mean(axis=(1, 2, 3)), 0, atol=1e-6)
    with pytest.raises(ValueError, match="got a hybrid, which projects features of its stem: use stem_filters"):
        patch_filters(model)
    with pytest.raises(ValueError, match="got a model without a stem: use patch_filters"):
        stem_filters(HFViTModel(tiny_config()))


# ------------------------------------------------------------------------------------------------------- features


def test_components_of_two_kinds_of_patches(tiny_config: Any) -> None:
    """Without positions equal patches stay equal: those of two colours are the two ends of one component."""
    model = HFViTModel(tiny_config(position_embedding_type="none", initializer_range=0.3))
    pixel_values = torch.ones(2, 3, 32, 48)
    pixel_values[:, :, :, 24:] = -2
    for layer in (None, 1, -1):
        components = feature_components(model, pixel_values, layer)
        assert components.shape == (2, 4, 6, 3) and components.dtype == np.float32
        left = components[0, 0, 0, 0]
        assert left in (0, 1)
        np.testing.assert_allclose(components[..., :3, 0], left, atol=1e-5)
        np.testing.assert_allclose(components[..., 3:, 0], 1 - left, atol=1e-5)
        np.testing.assert_allclose(components[..., 1:], 0.5, atol=0.01)  # nothing is left to vary


def test_components_are_those_of_all_images_together(tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model = HFViTModel(tiny_config(num_register_tokens=2, initializer_range=0.3)).eval()
    with torch.no_grad():
        rows = model(pixel_values).last_hidden_state[:, 3:].flatten(0, 1).double().numpy()
    left, _, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    components = feature_components(model, pixel_values, components=5).reshape(48, 5)
    for number in range(5):
        inner = (components[:, number] > 0) & (components[:, number] < 1)  # what the ends did not cut off
        assert inner.sum() > 40
        assert abs(np.corrcoef(components[inner, number], left[inner, number])[0, 1]) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="Expected 1 to 32 components, the width of the model, got 33"):
        feature_components(model, pixel_values, components=33)


@pytest.mark.parametrize("placement", ["input", "every_layer_shared"])
def test_a_planted_outlier_is_found(placement: str, tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model = HFViTModel(tiny_config(num_register_tokens=2, position_placement=placement))
    model.embeddings.position_embeddings.table.weight.data[0, 1, 2] = 100.0
    patches, prefix = token_norms(model, pixel_values)
    assert patches.shape == (3, 2, 4, 6) and prefix.shape == (3, 2, 3)
    for of_layer in patches:
        assert np.argwhere(of_layer > outlier_norm(of_layer)).tolist() == [[0, 1, 2], [1, 1, 2]]
    last, of_prefix = token_norms(model, pixel_values, [-1])
    assert np.array_equal(last, patches[2:]) and np.array_equal(of_prefix, prefix[2:])


def test_outliers_are_beyond_tukey_s_outer_fence() -> None:
    assert outlier_norm(np.arange(1, 102)) == 76 + 3 * 50
    assert not (np.full(20, 3.0) > outlier_norm(np.full(20, 3.0))).any()


def test_norms_are_those_of_hidden_states(tiny_config: Any, pixel_values: torch.Tensor) -> None:
    model = HFViTModel(tiny_config(use_cls_token=True, num_register_tokens=1)).eval()
    with torch.no_grad():
        states = model(pixel_values, output_hidden_states=True).hidden_states[1:]
    patches, prefix = token_norms(model, pixel_values)
    for number, state in enumerate(states):
        norms = state.norm(dim=-1)
        np.testing.assert_allclose(prefix[number], norms[:, :2], rtol=1e-5)
        np.testing.assert_allclose(patches[number].reshape(2, -1), norms[:, 2:], rtol=1e-5)


# -------------------------------------------------------------------------------------------------- of every shape


@pytest.mark.parametrize(("channels", "number"), [(1, 28), (3, 1), (4, 28), (13, 3), (3, 64)])
def test_filters_of_every_number_of_channels_are_drawn(channels: int, number: int, tmp_path: Path) -> None:
    filters = np.random.default_rng(0).normal(size=(number, 8, 6, channels)).astype(np.float32)
    filters[0] = 0
    figure = plot_filters(filters, np.full(number, 1 / number))
    assert len(figure.axes[0].images) == (number if channels in (1, 3) else channels * min(number, 7))
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), 0.5)
    draw(figure, tmp_path / "filters.png")


@pytest.mark.parametrize(("rows", "columns", "shown"), [(1, 1, 1), (1, 7, 7), (3, 2, 6), (32, 48, 11 * 16)])
def test_positions_of_every_grid_are_drawn(rows: int, columns: int, shown: int, tmp_path: Path) -> None:
    similarity = np.ones((rows, columns, rows, columns), np.float32)
    figure = plot_position_similarity(similarity)
    assert len(figure.axes[0].images) == shown
    assert figure.axes[0].get_yticklabels()[0].get_text() == "1"
    draw(figure, tmp_path / "positions.svg")


@pytest.mark.parametrize(("heads", "rows", "columns"), [(1, 1, 1), (3, 13, 7), (48, 3, 5)])
def test_biases_of_every_number_of_heads_are_drawn(heads: int, rows: int, columns: int, tmp_path: Path) -> None:
    figure = plot_position_bias(np.random.default_rng(0).normal(size=(heads, rows, columns)))
    assert len(figure.axes[0].images) == heads
    draw(figure, tmp_path / "bias.png")


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (3, 4), (48, 24)])
def test_distances_of_every_depth_are_drawn(layers: int, heads: int, tmp_path: Path) -> None:
    figure = plot_attention_distance(np.random.default_rng(0).uniform(0, 90, (layers, heads)), 60.0)
    assert len(figure.axes[0].collections[0].get_offsets()) == layers * heads
    assert figure.axes[0].get_ylabel() == "mean attention distance, pixels"
    draw(figure, tmp_path / "distance.png")
    draw(plot_attention_distance(np.zeros((layers, heads))), tmp_path / "zero.png")


@pytest.mark.parametrize(
    ("channels", "size", "grid", "heads", "number"),
    [(3, (32, 48), (4, 6), 4, 2), (1, (8, 8), (1, 1), 1, 1), (4, (60, 12), (5, 1), 48, 3)],
)
def test_maps_of_every_shape_are_drawn(
    channels: int, size: tuple[int, int], grid: tuple[int, int], heads: int, number: int, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (number, channels, *size), dtype=np.uint8)
    maps = random.uniform(0, 1, (number, heads, *grid)).astype(np.float32)
    figures = {
        "attention": plot_attention_maps(images, maps[:, 0]),
        "heads": plot_heads(images[0], maps[0], "a name that is longer than a tile is wide"),
        "features": plot_feature_components(images, random.uniform(0, 1, (number, *grid, 3)), ["$a$"] * number),
        "norms": plot_norm_maps(images, 50 * maps[:, 0]),
        "by layer": plot_token_norms(np.repeat(maps[None], 3, axis=0).swapaxes(0, 2)[:, :, 0], np.ones((heads, 1, 2))),
    }
    tiles = {"attention": 3 * number, "heads": 1 + heads, "features": 2 * number, "norms": 2 * number, "by layer": 0}
    for name, figure in figures.items():
        assert len(figure.axes[0].images) == tiles[name]
        draw(figure, tmp_path / f"{name}.png")
    draw(plot_attention_maps(images, 0 * maps[:, 0]), tmp_path / "dark.png")
    draw(plot_token_norms(np.ones((1, 1, 1, 1)), np.ones((1, 1, 0))), tmp_path / "one.png")


def test_light_falls_where_the_map_is_large() -> None:
    image, values = np.full((1, 40, 60), 200, np.uint8), np.zeros((2, 3), np.float32)
    values[1, 2] = 0.04
    picture, (low, high) = lit(image, values)
    assert picture.shape == (40, 60, 3) and picture.dtype == np.uint8
    assert low == 0 and high == pytest.approx(np.quantile(values, 0.995))
    assert picture[:20, :20].max() == round(DIM * 200) and (picture[-5:, -5:] == 200).all()
    even, (low, high) = lit(image, np.full((2, 3), 0.25, np.float32))
    assert (even == 200).all() and low == high == 0.25


# ---------------------------------------------------------------------------------------------------------- runs


LOG = [
    {"step": 1, "epoch": 0.5, "loss": 2.0, "learning_rate": 0.1},
    {"step": 2, "epoch": 1.0, "eval_accuracy": 0.5, "eval_loss": 1.0, "eval_count": 20},
]


def predictions_of(labels: list[int], answers: list[int], confidence: torch.Tensor, num_labels: int) -> ImageResults:
    zeros = torch.zeros(len(labels))
    return ImageResults(torch.tensor(labels), torch.tensor(answers), confidence, zeros, zeros.long(), num_labels)


def draw(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=50)
    assert path.stat().st_size > 1000


def test_pictures_are_drawn(tiny_config: Any, tmp_path: Path) -> None:
    draw(plot_training(LOG), tmp_path / "training.png")
    draw(plot_position_similarity(position_similarity(HFViTModel(tiny_config()))), tmp_path / "positions.png")


def test_one_evaluation_is_drawn_on_a_whole_axis(tmp_path: Path) -> None:
    log = [{"step": 2, "epoch": 1.0, "loss": 0.4}, {"step": 2, "epoch": 1.0, "eval_loss": 0.5, "eval_accuracy": 0.9}]
    losses, accuracy = plot_training(log).axes
    assert accuracy.get_ylim() == (0, 101) and losses.get_ylim()[1] > 0.5
    assert all(line.get_marker() not in ("", "None", None) for line in losses.lines)


def test_a_run_without_labels_has_one_panel(tmp_path: Path) -> None:
    log = [{name: value for name, value in row.items() if name != "eval_accuracy"} for row in LOG]
    figure = plot_training(log)
    assert [axis.get_ylabel() for axis in figure.axes] == ["loss of masked patches"]
    draw(figure, tmp_path / "training.png")


@pytest.mark.parametrize("number", [2, 10, 40])
def test_confusion_says_shares_of_the_true_class(number: int, tmp_path: Path) -> None:
    confusion = torch.eye(number, dtype=torch.long) * 3
    confusion[0, 1] = 1  # a quarter of the first class
    confusion[-1] = 0  # a class without images
    figure = plot_confusion(confusion, [f"a class with quite a long name, number {i}" for i in range(number)])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == (["75", "25", *["100"] * (number - 2)] if number <= 20 else [])
    draw(figure, tmp_path / "confusion.png")


@pytest.mark.parametrize("name", ["$50% off, $5", "A$^$", r"$\x$", "a_b^c", "bird|plane", "two\nlines"])
def test_names_are_no_formulas(name: str, tmp_path: Path) -> None:
    draw(plot_confusion(torch.eye(2, dtype=torch.long), [name, "b"], title=name), tmp_path / "confusion.png")
    classes = torch.tensor([0, 1])
    answers = ImageResults(classes, classes.flip(0), torch.ones(2), torch.ones(2), classes, 2)
    pictures = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    draw(plot_predictions(pictures.__getitem__, answers, [name, "b"], title=name), tmp_path / "predictions.png")


def test_only_images_that_are_shown_are_read(tmp_path: Path) -> None:
    """Those drawn by chance, and the mistakes that the model was surest of, the surest first."""
    labels = [index % 3 for index in range(200)]
    answers = [label if index % 4 else (label + 1) % 3 for index, label in enumerate(labels)]
    confidence = torch.arange(200) / 200
    predictions = predictions_of(labels, answers, confidence, 3)
    read: list[int] = []

    def image_of(place: int) -> torch.Tensor:
        read.append(place)
        return torch.randint(0, 256, (1 + 2 * (place % 2), 8, 9), dtype=torch.uint8)

    figure = plot_predictions(image_of, predictions, ["a", "b", "c"])
    assert read == shown_predictions(predictions) and len(read) == 32
    assert read[16:] == list(range(196, 132, -4))
    titles = [axis.get_title() for part in figure.subfigs for axis in part.axes]
    assert titles[16] == "c  98%\ntrue: b" and titles[31] == "c  68%\ntrue: b"
    draw(figure, tmp_path / "predictions.png")


def test_a_model_without_mistakes_and_with_few_images(tmp_path: Path) -> None:
    predictions = predictions_of([0, 1], [0, 1], torch.ones(2), 2)
    figure = plot_predictions(lambda place: torch.zeros(3, 40, 40, dtype=torch.uint8), predictions, ["a", "b"])
    assert len(figure.subfigs) == 1
    draw(figure, tmp_path / "predictions.png")
