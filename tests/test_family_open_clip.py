"""The image towers of CLIP with the names of OpenAI and open_clip give what the original code computes."""

import json
from collections import OrderedDict

import pytest
import torch
from family import assert_rules_give_back, error_of, filled, opened
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from hf_vit.checkpoints import Options, open_checkpoint
from hf_vit.model import model_class
from hf_vit.model.positions_hf_vit import resample_position_embeddings


class QuickGELU(nn.Module):
    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * torch.sigmoid(1.702 * tokens)


class Scale(nn.Module):
    """The LayerScale of open_clip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, heads: int, activation: type[nn.Module], has_scale: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [("c_fc", nn.Linear(width, 96)), ("gelu", activation()), ("c_proj", nn.Linear(96, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls_1, self.ls_2 = (Scale(width) if has_scale else nn.Identity() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.ln_1(tokens)
        tokens = tokens + self.ls_1(self.attn(normed, normed, normed, need_weights=False)[0])
        return tokens + self.ls_2(self.mlp(self.ln_2(tokens)))


class Tower(nn.Module):
    """The image tower of openai/CLIP and open_clip, up to the projection."""

    def __init__(
        self,
        heads: int = 1,
        activation: type[nn.Module] = nn.GELU,
        has_scale: bool = False,
        is_clipa: bool = False,
        grid: int = 4,
    ) -> None:
        super().__init__()
        width = 64
        self.conv1 = nn.Conv2d(3, width, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(grid**2 + 1, width))
        self.ln_pre = nn.Identity() if is_clipa else nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*[Block(width, heads, activation, has_scale) for _ in range(2)])
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.zeros(width, 24))
        self.is_clipa = is_clipa

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        tokens = self.transformer.resblocks(self.ln_pre(tokens + self.positional_embedding))
        return self.ln_post(tokens[:, 1:].mean(dim=1) if self.is_clipa else tokens[:, 0])


def pooled_error(path, theirs, **options):
    checkpoint, ours = opened(path, theirs.state_dict(), **options)
    return checkpoint, error_of(ours, theirs, 2, 3, 32, 32, output="pooler_output")


@pytest.mark.parametrize("fields", [{}, {"has_scale": True}, {"is_clipa": True}, {"heads": 2}], ids=str)
def test_outputs_are_the_original_s(tmp_path, fields):
    theirs = filled(Tower(**fields))
    options = {"num_heads": 2} if "heads" in fields else {}
    checkpoint, error = pooled_error(tmp_path / "clip.pt", theirs, **options)
    assert checkpoint.family == "open_clip"
    assert checkpoint.left_out == ["proj"]
    assert error < 1e-5
    assert_rules_give_back(checkpoint, theirs.state_dict())
    assert list(checkpoint.processor().image_mean) == pytest.approx([0.481, 0.458, 0.408], abs=1e-3)


def test_the_activation_is_stated_and_an_option_sets_it(tmp_path):
    theirs = filled(Tower(activation=QuickGELU))
    checkpoint, error = pooled_error(tmp_path / "clip.pt", theirs)
    assert error > 1e-4
    assert any("--hidden-act quick_gelu" in sentence for sentence in checkpoint.assumed)
    checkpoint, error = pooled_error(tmp_path / "clip.pt", theirs, hidden_act="quick_gelu")
    assert error < 1e-5
    assert not any("hidden_act" in sentence for sentence in checkpoint.assumed)


@pytest.mark.parametrize("hint", ["sizes", "dtypes"])
def test_openai_s_files_have_quick_gelu(tmp_path, hint):
    state = filled(Tower(activation=QuickGELU)).state_dict()
    if hint == "sizes":
        state["input_resolution"] = torch.tensor(32)
    else:
        state = {name: tensor if "ln_" in name else tensor.half() for name, tensor in state.items()}
    checkpoint, _ = opened(tmp_path / "clip.pt", state)
    assert checkpoint.config.hidden_act == "quick_gelu"


@pytest.mark.parametrize(
    ("fields", "vision", "model"),
    [
        ({"heads": 2}, {"head_width": 32}, {}),
        ({"activation": QuickGELU}, {}, {"quick_gelu": True}),
        ({"is_clipa": True}, {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}, {}),
    ],
    ids=["heads", "quick_gelu", "CLIPA"],
)
def test_a_config_beside_the_file_states_the_rest(tmp_path, fields, vision, model):
    theirs = filled(Tower(**fields))
    vision = {"image_size": 32, "width": 64, **vision}
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [0.4] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, **model}, "preprocess_cfg": pixels}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    for source in (tmp_path, tmp_path / "open_clip_pytorch_model.bin"):
        checkpoint = open_checkpoint(source)
        ours = model_class(checkpoint.architecture)(checkpoint.config).eval()
        ours.load_state_dict(checkpoint.state_dict(), strict=True)
        assert error_of(ours, theirs, 2, 3, 32, 32, output="pooler_output") < 1e-5
        assert checkpoint.assumed == []
        processor = checkpoint.processor()
        assert (list(processor.image_mean), processor.crop_pct) == ([0.1, 0.2, 0.3], None)


def test_timm_computes_the_same_from_the_file(tmp_path):
    state = filled(Tower()).state_dict()
    theirs = VisionTransformer(
        **{"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "mlp_ratio": 1.5},
        **{"num_classes": 24, "pre_norm": True, "norm_layer": nn.LayerNorm},
    ).eval()
    theirs.load_state_dict(checkpoint_filter_fn({f"visual.{name}": tensor for name, tensor in state.items()}, theirs))
    theirs.head = nn.Identity()
    _, ours = opened(tmp_path / "clip.pt", state)
    assert error_of(ours, theirs, 2, 3, 32, 32, output="pooler_output") < 1e-5


def test_positions_are_resampled_by_open_clip_s_rule(tmp_path):
    state = filled(Tower()).state_dict()
    _, ours = opened(tmp_path / "clip.pt", state, image_size=(48, 48))
    prefix, grid = state["positional_embedding"][None].split([1, 16], dim=1)
    grid = resample_position_embeddings(grid, (4, 4), (6, 6), "bicubic_antialias")
    larger = Tower(grid=6).eval()
    larger.load_state_dict({**state, "positional_embedding": torch.cat([prefix, grid], dim=1)[0]})
    assert error_of(ours, larger, 2, 3, 48, 48, output="pooler_output") < 1e-5


def test_the_attentional_pooling_of_coca_is_refused(tmp_path):
    torch.save({**Tower().state_dict(), "attn_pool.query": torch.zeros(4, 4)}, tmp_path / "coca.pt")
    with pytest.raises(ValueError, match="attentional pooling"):
        open_checkpoint(tmp_path / "coca.pt", Options())


def test_names_of_open_clip_beside_a_config_of_transformers(tmp_path):
    """Repositories of CLIP on the Hub hold both layouts."""
    theirs = filled(Tower())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    checkpoint, error = pooled_error(tmp_path / "open_clip_pytorch_model.bin", theirs)
    assert checkpoint.family == "open_clip" and error < 1e-5


def test_a_head_is_read_where_it_reads_the_encoder(tmp_path):
    theirs, head = filled(Tower()), {"head.weight": torch.randn(5, 64), "head.bias": torch.randn(5)}
    checkpoint, _ = opened(tmp_path / "clip.pt", {**theirs.state_dict(), **head})
    assert checkpoint.architecture == "HFViTModel"
    assert any("head reads the projection" in sentence for sentence in checkpoint.assumed)
    state = {name: tensor for name, tensor in theirs.state_dict().items() if name != "proj"}
    checkpoint, ours = opened(tmp_path / "clip.pt", {**state, **head})
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = nn.functional.linear(theirs(pixel_values), head["head.weight"], head["head.bias"])
        torch.testing.assert_close(ours(pixel_values).logits, expected, rtol=1e-4, atol=1e-4)
