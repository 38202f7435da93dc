"""Copied implementations of the ViT, MONAI's and mmpretrain's: ours gives what re-statements of their forwards give.

The modules below have the names, the order of operations and the defaults of the originals.
"""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from family import assert_rules_give_back, error_of, filled, opened
from torch import Tensor, nn

from hf_vit.checkpoints import Options, open_checkpoint
from hf_vit.model.positions_hf_vit import resample_position_embeddings

WIDTH, HIDDEN, HEADS, PATCH = 64, 96, 2, 8


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return multi-head attention of `[B, N, D]` each."""
    parts = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape))


class WithClassToken(nn.Module):
    """Put a class token before embedded patches, and add positions to all."""

    def tokens(self, patches: Tensor, cls_token: Tensor, positions: Tensor) -> Tensor:
        return torch.cat([cls_token.expand(len(patches), -1, -1), patches], dim=1) + positions


# ------------------------------------------------------------------------------------------- jeonsworld/ViT-pytorch


class JeonsworldAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(attend(self.query(tokens), self.key(tokens), self.value(tokens)))


class JeonsworldBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.ffn = nn.Module()
        self.ffn.fc1, self.ffn.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.attn = JeonsworldAttention()

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.attention_norm(tokens))
        return tokens + self.ffn.fc2(F.gelu(self.ffn.fc1(self.ffn_norm(tokens))))


class Jeonsworld(WithClassToken):
    positions_name = "transformer.embeddings.position_embeddings"
    interpolation = "bilinear_corners"

    def __init__(self, grid: int = 4) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.embeddings = nn.Module()
        self.transformer.embeddings.patch_embeddings = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.transformer.embeddings.position_embeddings = parameter(1, grid**2 + 1, WIDTH)
        self.transformer.embeddings.cls_token = parameter(1, 1, WIDTH)
        self.transformer.encoder = nn.Module()
        self.transformer.encoder.layer = nn.ModuleList([JeonsworldBlock() for _ in range(2)])
        self.transformer.encoder.encoder_norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        embeddings, encoder = self.transformer.embeddings, self.transformer.encoder
        patches = embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
        tokens = self.tokens(patches, embeddings.cls_token, embeddings.position_embeddings)
        for layer in encoder.layer:
            tokens = layer(tokens)
        return self.head(encoder.encoder_norm(tokens)[:, 0])


# ----------------------------------------------------------------------------------------------------------- MONAI


class MonaiAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out_proj, self.qkv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3 * WIDTH, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out_proj(attend(*self.qkv(tokens).chunk(3, dim=-1)))


class MonaiBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.linear1, self.mlp.linear2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = MonaiAttention()
        self.norm_cross_attn = nn.LayerNorm(WIDTH)  # built, but not used
        self.cross_attn = nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp.linear2(F.gelu(self.mlp.linear1(self.norm2(tokens))))


class FlatPatches(nn.Module):
    """The einops layer "b c (h p1) (w p2) -> b (h w) (p1 p2 c)"."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        cut = pixel_values.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, h, p1, w, p2]
        return cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class Monai(nn.Module):
    positions_name = "patch_embedding.position_embeddings"

    def __init__(self, is_perceptron: bool = False, has_head: bool = True, channels: int = 3, grid: int = 4) -> None:
        super().__init__()
        convolution = nn.Conv2d(channels, WIDTH, PATCH, PATCH)
        perceptron = nn.Sequential(FlatPatches(), nn.Linear(channels * PATCH**2, WIDTH))
        self.patch_embedding = nn.Module()
        self.patch_embedding.patch_embeddings = perceptron if is_perceptron else convolution
        self.patch_embedding.position_embeddings = parameter(1, grid**2, WIDTH)
        self.blocks = nn.ModuleList([MonaiBlock() for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH)
        self.cls_token = parameter(1, 1, WIDTH) if has_head else None
        self.classification_head = nn.Linear(WIDTH, 5) if has_head else None

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding.patch_embeddings(pixel_values)
        if patches.ndim == 4:
            patches = patches.flatten(2).transpose(1, 2)
        tokens = patches + self.patch_embedding.position_embeddings
        if self.cls_token is not None:
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        tokens = self.norm(tokens)
        return tokens if self.classification_head is None else self.classification_head(tokens[:, 0])


# ---------------------------------------------------------------------------------------- Lightning, learnpytorch.io


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.1), nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.1)
    )


class LightningBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer_norm_1 = nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS)
        self.layer_norm_2 = nn.LayerNorm(WIDTH)
        self.linear = mlp()

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.layer_norm_1(tokens)
        tokens = tokens + self.attn(normed, normed, normed)[0]
        return tokens + self.linear(self.layer_norm_2(tokens))


class Lightning(nn.Module):
    positions_name = "pos_embedding"

    def __init__(self, grid: int = 4) -> None:
        super().__init__()
        self.input_layer = nn.Linear(3 * PATCH**2, WIDTH)
        self.transformer = nn.Sequential(*[LightningBlock() for _ in range(2)])
        self.mlp_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5))
        self.cls_token, self.pos_embedding = parameter(1, 1, WIDTH), parameter(1, 1 + grid**2, WIDTH)

    def forward(self, pixel_values: Tensor) -> Tensor:
        cut = pixel_values.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, h, p1, w, p2]
        patches = self.input_layer(cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2))
        tokens = torch.cat([self.cls_token.repeat(len(patches), 1, 1), patches], dim=1) + self.pos_embedding
        return self.mlp_head(self.transformer(tokens.transpose(0, 1))[0])


class LearnPyTorchBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.msa_block, self.mlp_block = nn.Module(), nn.Module()
        self.msa_block.layer_norm = nn.LayerNorm(WIDTH)
        self.msa_block.multihead_attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp_block.layer_norm, self.mlp_block.mlp = nn.LayerNorm(WIDTH), mlp()

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.msa_block.layer_norm(tokens)
        tokens = self.msa_block.multihead_attn(normed, normed, normed, need_weights=False)[0] + tokens
        return self.mlp_block.mlp(self.mlp_block.layer_norm(tokens)) + tokens


class LearnPyTorch(WithClassToken):
    positions_name = "position_embedding"

    def __init__(self, grid: int = 4) -> None:
        super().__init__()
        self.class_embedding, self.position_embedding = parameter(1, 1, WIDTH), parameter(1, grid**2 + 1, WIDTH)
        self.patch_embedding = nn.Module()
        self.patch_embedding.patcher = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.transformer_encoder = nn.Sequential(*[LearnPyTorchBlock() for _ in range(2)])
        self.classifier = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5))

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding.patcher(pixel_values).flatten(2).transpose(1, 2)
        tokens = self.tokens(patches, self.class_embedding, self.position_embedding)
        return self.classifier(self.transformer_encoder(tokens)[:, 0])


# ------------------------------------------------------------------------------------------------------ mmpretrain


class Scale(nn.Module):
    """LayerScale of mmpretrain (`weight`) and of mmcv (`scale`)."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_parameter(name, parameter(WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * getattr(self, self.name)


class MMBlock(nn.Module):
    def __init__(self, has_scale: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn, self.ffn = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        first = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.GELU(), nn.Dropout(0.0))
        self.ffn.layers = nn.Sequential(first, nn.Linear(HIDDEN, WIDTH), nn.Dropout(0.0))
        self.attn.gamma1 = Scale("weight") if has_scale else nn.Identity()
        self.ffn.gamma2 = Scale("scale") if has_scale else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        attended = self.attn.proj(attend(*self.attn.qkv(self.ln1(tokens)).chunk(3, dim=-1)))
        tokens = tokens + self.attn.gamma1(attended)
        return tokens + self.ffn.gamma2(self.ffn.layers(self.ln2(tokens)))


class MMPretrain(WithClassToken):
    """Backbone and head, with the backbone's names at the top."""

    positions_name = "pos_embed"
    interpolation = "bicubic"

    def __init__(
        self,
        grid: int = 4,
        has_scale: bool = False,
        hidden: int = 0,
        is_mean: bool = False,
        is_distilled: bool = False,
    ) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = parameter(1, 1, WIDTH), parameter(1, grid**2 + 1 + is_distilled, WIDTH)
        self.dist_token = parameter(1, 1, WIDTH) if is_distilled else None
        self.patch_embed = nn.Module()
        self.patch_embed.projection = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.layers = nn.ModuleList([MMBlock(has_scale) for _ in range(2)])
        self.ln1 = nn.Identity() if is_mean else nn.LayerNorm(WIDTH, eps=1e-6)
        self.ln2 = nn.LayerNorm(WIDTH, eps=1e-6) if is_mean else nn.Identity()
        self.head = nn.Module()
        if is_mean:
            self.head.fc = nn.Linear(WIDTH, 5)
        else:
            layers = [("pre_logits", nn.Linear(WIDTH, hidden)), ("act", nn.Tanh())] if hidden else []
            layers += [("head", nn.Linear(hidden or WIDTH, 5))]
            layers += [("head_dist", nn.Linear(WIDTH, 5))] if is_distilled else []
            self.head.layers = nn.Sequential(OrderedDict(layers))
        self.is_mean = is_mean

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embed.projection(pixel_values).flatten(2).transpose(1, 2)
        prefix = self.cls_token if self.dist_token is None else torch.cat([self.cls_token, self.dist_token], dim=1)
        tokens = self.tokens(patches, prefix, self.pos_embed)
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.ln1(tokens)
        if self.is_mean:
            return self.head.fc(self.ln2(tokens[:, 1:].mean(dim=1)))
        if self.dist_token is not None:
            return (self.head.layers.head(tokens[:, 0]) + self.head.layers.head_dist(tokens[:, 1])) / 2
        return self.head.layers(tokens[:, 0])


# ------------------------------------------------------------------------------------------------------- the tests

CASES = {
    "jeonsworld": (Jeonsworld, {}, "jeonsworld/ViT-pytorch"),
    "MONAI": (Monai, {}, "MONAI"),
    "MONAI, perceptron": (Monai, {"is_perceptron": True}, "MONAI"),
    "MONAI, grey perceptron": (Monai, {"is_perceptron": True, "channels": 1}, "MONAI"),
    "Lightning": (Lightning, {}, "Lightning's tutorial"),
    "learnpytorch.io": (LearnPyTorch, {}, "learnpytorch.io"),
    "mmpretrain": (MMPretrain, {}, "mmpretrain"),
    "mmpretrain, LayerScale": (MMPretrain, {"has_scale": True}, "mmpretrain"),
    "mmpretrain, pre-logits": (MMPretrain, {"hidden": 48}, "mmpretrain"),
    "mmpretrain, mean": (MMPretrain, {"is_mean": True}, "mmpretrain"),
    "mmpretrain, distilled": (MMPretrain, {"is_distilled": True}, "mmpretrain"),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_the_original_s(case, tmp_path):
    model, fields, family = CASES[case]
    theirs = filled(model(**fields))
    checkpoint, ours = opened(tmp_path / "model.pt", theirs.state_dict(), num_heads=HEADS)
    assert checkpoint.family == family
    assert error_of(ours, theirs, 2, fields.get("channels", 3), 32, 32) < 1e-5
    assert_rules_give_back(checkpoint, theirs.state_dict())


@pytest.mark.parametrize("model", [Jeonsworld, Monai, Lightning, LearnPyTorch, MMPretrain])
def test_positions_are_resampled(model, tmp_path):
    state = filled(model()).state_dict()
    _, ours = opened(tmp_path / "model.pt", state, num_heads=HEADS, image_size=(48, 48))
    table = state[model.positions_name]
    prefix, grid = table.split([table.shape[1] - 16, 16], dim=1)
    rule = getattr(model, "interpolation", "bicubic_antialias")
    grid = resample_position_embeddings(grid, (4, 4), (6, 6), rule)
    larger = model(grid=6).eval()
    larger.load_state_dict({**state, model.positions_name: torch.cat([prefix, grid], dim=1)})
    assert error_of(ours, larger, 2, 3, 48, 48) < 1e-5


def test_a_backbone_of_mmsegmentation(tmp_path):
    theirs = filled(MMPretrain())
    state = {f"backbone.{name}": tensor for name, tensor in theirs.state_dict().items() if "head" not in name}
    for of_mmpretrain, name in (("qkv.weight", "in_proj_weight"), ("qkv.bias", "in_proj_bias"), ("proj", "out_proj")):
        state = {key.replace(f"attn.{of_mmpretrain}", f"attn.attn.{name}"): tensor for key, tensor in state.items()}
    state["decode_head.conv_seg.weight"] = torch.ones(5, WIDTH, 1, 1)
    _, ours = opened(tmp_path / "model.pt", {"state_dict": state}, num_heads=HEADS)
    theirs.head.layers = nn.Identity()
    assert error_of(ours, theirs, 2, 3, 32, 32, output="pooler_output") < 1e-5


def test_an_encoder_of_monai(tmp_path):
    theirs = filled(Monai(has_head=False))
    checkpoint, ours = opened(tmp_path / "model.pt", theirs.state_dict(), num_heads=HEADS)
    assert checkpoint.config.pooling == "mean"
    assert error_of(ours, theirs, 2, 3, 32, 32, output="last_hidden_state") < 1e-5


def test_the_tanh_of_monai_s_head_is_stated(tmp_path):
    theirs = filled(Monai())
    state = {name.replace("_head.", "_head.0."): tensor for name, tensor in theirs.state_dict().items()}
    checkpoint, ours = opened(tmp_path / "model.pt", state, num_heads=HEADS)
    assert error_of(ours, theirs, 2, 3, 32, 32) < 1e-5
    assert any("tanh" in sentence for sentence in checkpoint.assumed)


def test_three_dimensions_are_refused(tmp_path):
    state = Monai(has_head=False).state_dict()
    state["patch_embedding.patch_embeddings.weight"] = torch.zeros(WIDTH, 1, 8, 8, 8)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="two dimensions"):
        open_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [("transformer.embeddings.hybrid_model.root.conv.weight", "ResNet"), ("part_head.weight", "TransFG")],
)
def test_descendants_of_jeonsworld_s_are_refused(tmp_path, name, message):
    torch.save({**Jeonsworld().state_dict(), name: torch.zeros(2, 2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path / "model.pt")


def test_layers_of_torch_are_refused(tmp_path):
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
    model = nn.Module()
    model.transformer_encoder = nn.TransformerEncoder(layer, 2)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="norm_first"):
        open_checkpoint(tmp_path / "model.pt")


def test_the_heads_of_a_tutorial_are_narrow(tmp_path):
    checkpoint, _ = opened(tmp_path / "model.pt", Lightning().state_dict())
    assert checkpoint.config.num_attention_heads == WIDTH // 32
    assert any("2 heads" in sentence and "--num-heads" in sentence for sentence in checkpoint.assumed)


def test_heads_that_do_not_divide_the_width_are_an_error(tmp_path):
    torch.save(Lightning().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="--num-heads"):
        open_checkpoint(tmp_path / "model.pt", Options(num_heads=5))


def test_a_pooling_with_weights_of_its_own_is_an_error(tmp_path):
    torch.save(Lightning().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="--pooling"):
        open_checkpoint(tmp_path / "model.pt", Options(num_heads=HEADS, pooling="attention"))
