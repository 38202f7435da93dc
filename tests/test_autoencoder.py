"""The masked autoencoder: the same loss as transformers' ViTMAE, and the properties of a mask."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hf_vit import HFViTConfig, HFViTForMaskedImageModeling, HFViTModel
from hf_vit.model.layers_hf_vit import patchify, unpatchify
from hf_vit.model.positions_hf_vit import POSITIONS

PATCH, GRID = 8, (4, 3)
TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
}


def autoencoder(**fields: Any) -> HFViTForMaskedImageModeling:
    size = (GRID[0] * PATCH, GRID[1] * PATCH)
    config = HFViTConfig(**{**TINY, "image_size": size, "patch_size": PATCH, "mim_objective": "autoencoder", **fields})
    torch.manual_seed(0)
    return HFViTForMaskedImageModeling(config).eval()


def masks(number: int, masked: int = 9, patches: int = 12, seed: int = 0) -> Tensor:
    order = torch.rand(number, patches, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order < masked


# Names of transformers, of both eras, and ours.
NAMES = {
    "decoder_embed.": "projection.",
    "decoder_norm.": "layernorm.",
    "decoder_layers.": "layers.",
    "decoder_pred.": "decoder.",
    "mask_token": "mask_token.weight",
    "attention.attention.": "attention.",
    "attention.output.dense.": "attention.o_proj.",
    "intermediate.dense.": "mlp.fc1.",
    "output.dense.": "mlp.fc2.",
    ".query.": ".q_proj.",
    ".key.": ".k_proj.",
    ".value.": ".v_proj.",
}


def decoder_of(theirs: dict[str, Tensor], channels: int, heads: int) -> dict[str, Tensor]:
    """Return the weights of a decoder of transformers' ViTMAE with our names and orders."""
    ours = {}
    for name, tensor in theirs.items():
        for their_name, our_name in NAMES.items():
            name = name.replace(their_name, our_name)
        ours[name] = tensor
    del ours["decoder_pos_embed"]
    for name in [name for name in ours if ".q_proj." in name]:
        parts = [
            ours.pop(name.replace("q_proj", part)).unflatten(0, (heads, -1)) for part in ("q_proj", "k_proj", "v_proj")
        ]
        ours[name.replace("q_proj", "qkv")] = torch.stack(parts, dim=1).flatten(0, 2)
    for name in ("decoder.weight", "decoder.bias"):  # their channels are last
        ours[name] = ours[name].unflatten(0, (-1, channels)).transpose(0, 1).flatten(0, 1)
    return ours


@pytest.mark.parametrize("channels", [1, 3])
def test_the_loss_is_that_of_transformers(channels: int, tmp_path: Path) -> None:
    config = transformers.ViTMAEConfig(
        **TINY, decoder_intermediate_size=96, image_size=32, patch_size=PATCH, num_channels=channels,
        norm_pix_loss=True, mask_ratio=0.75, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    for parameter in theirs.decoder.parameters():
        parameter._is_hf_initialized = False
    theirs.decoder.initialize_weights(16)  # the constructor alone leaves the positions of the decoder zero
    theirs.save_pretrained(tmp_path)
    ours = autoencoder(image_size=32, num_channels=channels, layer_norm_eps=1e-12)
    encoder = HFViTModel.from_pretrained(tmp_path, add_pooling_layer=False)
    assert not ours.vit.load_state_dict(encoder.state_dict(), strict=False).unexpected_keys
    ours.objective.load_state_dict(decoder_of(theirs.decoder.state_dict(), channels, heads=3))
    pixel_values, noise = torch.randn(3, channels, 32, 32), torch.rand(3, 16)
    with torch.no_grad():
        expected = theirs(pixel_values, noise=noise)
        outputs = ours(pixel_values, bool_masked_pos=expected.mask)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=1e-5, atol=1e-6)
    # Their patches have the channels last.
    logits = expected.logits.unflatten(2, (PATCH * PATCH, channels)).transpose(2, 3).flatten(2)
    torch.testing.assert_close(outputs.predictions, logits, rtol=1e-4, atol=1e-4)


def test_what_is_masked_is_not_seen_and_the_rest_decides() -> None:
    model, pixel_values, mask = autoencoder(num_register_tokens=2), torch.randn(2, 3, 32, 24), masks(2)
    outputs = model(pixel_values, bool_masked_pos=mask)
    patches = patchify(pixel_values, (PATCH, PATCH))
    for which, changes in ((mask, False), (~mask, True)):
        changed = patches.clone()
        changed[which] += torch.randn(1)
        again = model(unpatchify(changed, (PATCH, PATCH), GRID), bool_masked_pos=mask).predictions
        assert torch.allclose(again, outputs.predictions, atol=1e-6) != changes


def test_the_encoder_reads_visible_patches_alone() -> None:
    model = autoencoder()
    hidden = model(torch.randn(2, 3, 32, 24), bool_masked_pos=masks(2), output_hidden_states=True).hidden_states
    assert {states.shape for states in hidden} == {(2, 1 + 3, 32)}
    assert model.vit(torch.randn(2, 3, 32, 24)).last_hidden_state.shape == (2, 1 + 12, 32)


def test_the_loss_is_of_normalized_pixels_of_masked_patches() -> None:
    model, pixel_values, mask = autoencoder(), torch.randn(2, 3, 32, 24) * 3 + 1, masks(2)
    outputs = model(pixel_values, bool_masked_pos=mask)
    patches = patchify(pixel_values, (PATCH, PATCH))
    targets = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(outputs.loss, (outputs.predictions - targets)[mask].square().mean())
    painted = model.objective.paint(targets, GRID, pixel_values)
    torch.testing.assert_close(painted, pixel_values, rtol=1e-4, atol=1e-4)
    assert model(pixel_values).loss is None and model(pixel_values).predictions.shape == patches.shape


@pytest.mark.parametrize("positions", POSITIONS)
def test_every_kind_of_positions_and_grid(positions: str, tmp_path: Path) -> None:
    fields = {"position_embedding_type": positions, "num_channels": 5, "pooling": "mean"}
    model = autoencoder(**fields).train()
    pixel_values, mask = torch.randn(2, 5, 24, 40), masks(2, 11, 15)
    model(pixel_values, bool_masked_pos=mask).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not without
    model.eval().save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedImageModeling.from_pretrained(tmp_path)
    assert torch.equal(loaded(pixel_values, bool_masked_pos=mask).loss, model(pixel_values, bool_masked_pos=mask).loss)
    encoder = transformers.AutoModel.from_pretrained(tmp_path)
    assert isinstance(encoder, HFViTModel)
    assert torch.equal(encoder(pixel_values).last_hidden_state, model.vit(pixel_values).last_hidden_state)


def test_eager_equals_sdpa() -> None:
    model, pixel_values, mask = autoencoder(), torch.randn(2, 3, 32, 24), masks(2)
    expected = model(pixel_values, bool_masked_pos=mask).loss
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(pixel_values, bool_masked_pos=mask).loss, expected)
    assert model.objective.layers[0].attention.config._attn_implementation == "eager"


def test_masks_that_leave_different_numbers_or_nothing_are_refused() -> None:
    model, pixel_values = autoencoder(), torch.randn(2, 3, 32, 24)
    uneven = masks(2)
    uneven[0] = True
    for mask in (uneven, torch.ones(2, 12)):
        with pytest.raises(ValueError, match=r"the same number of patches .* at least one: got 0 to .* mask_ratio"):
            model(pixel_values, bool_masked_pos=mask)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_hidden_size": 25}, "decoder_hidden_size=25 is not divisible by decoder_num_attention_heads=3"),
        ({"decoder_hidden_size": 27}, "decoder_hidden_size=27 is not divisible by 4, for its positions: use 24 or 28"),
        ({"num_channels": 1, "patch_size": 1}, "use a larger patch_size"),
    ],
)
def test_decoders_that_cannot_work(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        autoencoder(**fields)
