"""A user's own Vision Transformer, read through a table of names."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from family_models import answers, distance, pixels_of, randomized, written_back
from torch import Tensor, nn
from typer.testing import CliRunner

from hf_vit.checkpoints import Options, names_template, open_checkpoint
from hf_vit.cli.main import app
from hf_vit.model.modeling_hf_vit import HFViTForImageClassification

D, HEADS, PATCH, SIDE = 32, 4, 8, 4
ORDERS = {
    "part, head, dim": (3, HEADS, D // HEADS),
    "head, part, dim": (HEADS, 3, D // HEADS),
    "head, dim, part": (HEADS, D // HEADS, 3),
}


class OwnBlock(nn.Module):
    """A block as people write it: separate projections, or one whose rows have any order."""

    def __init__(self, order: str | None, is_gated: bool) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.order, self.is_gated = order, is_gated
        if order is None:
            self.wq, self.wv = nn.Linear(D, D), nn.Linear(D, D)
            self.wk = nn.Linear(D, D, bias=False)
        else:
            self.to_qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 96 if is_gated else 48), nn.Linear(48, D)
        self.gamma_1 = nn.Parameter(torch.ones(D))
        self.gamma_2 = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln1(x)
        if self.order is None:
            parts = [layer(normed).unflatten(-1, (HEADS, -1)) for layer in (self.wq, self.wk, self.wv)]
        else:
            axis = self.order.split(", ").index("part") - 3
            parts = list(self.to_qkv(normed).unflatten(-1, ORDERS[self.order]).unbind(axis))
        attended = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts))
        x = x + self.gamma_1 * self.out(attended.transpose(1, 2).flatten(2))
        hidden = self.up(self.ln2(x))
        if self.is_gated:
            gate, hidden = hidden.chunk(2, -1)
            return x + self.gamma_2 * self.down(F.silu(gate) * hidden)
        return x + self.gamma_2 * self.down(F.relu(hidden))


class OwnViT(nn.Module):
    def __init__(self, order: str | None = None, is_gated: bool = False, is_matrix: bool = False) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * PATCH * PATCH, D) if is_matrix else nn.Conv2d(3, D, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(D))
        self.pos = nn.Parameter(torch.zeros(1 + SIDE * SIDE, D))
        self.blocks = nn.ModuleList([OwnBlock(order, is_gated) for _ in range(2)])
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, 5)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("counter", torch.zeros(3))

    def forward(self, pixels: Tensor) -> Tensor:
        if isinstance(self.patch, nn.Linear):
            cut = pixels.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, h, p, w, p]
            patches = self.patch(cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        else:
            patches = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(pixels), 1, -1), patches], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def saved(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path / "own.pth")
    return path / "own.pth"


def filled(file: Path, path: Path, tensors: dict[str, str | None] | None = None, **changed: Any) -> Path:
    """Write the template for a file, with what a user would change."""
    content = yaml.safe_load(names_template(file))
    content["tensors"].update(tensors or {})
    content["config"].update(changed.pop("config", {}))
    (path / "names.yaml").write_text(yaml.safe_dump({**content, **changed}))
    return path / "names.yaml"


CONFIG = {"num_attention_heads": HEADS, "hidden_act": "relu", "pooling": "cls"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "separate, no bias of keys": ({}, {}),
    **{order: ({"order": order}, {"qkv": order}) for order in ORDERS},
    "gated": ({"is_gated": True}, {"config": {**CONFIG, "hidden_act": "silu"}}),
    "matrix": ({"is_matrix": True}, {"patch": "row, column, channel"}),
}


@pytest.mark.parametrize(("arguments", "changed"), CASES.values(), ids=CASES)
def test_a_filled_template_gives_the_model_s_logits(
    tmp_path: Path, arguments: dict[str, Any], changed: dict[str, Any]
) -> None:
    model = randomized(OwnViT(**arguments))
    file = saved(model, tmp_path)
    names = filled(file, tmp_path, {"counter": None}, **{"config": CONFIG, **changed})
    checkpoint = open_checkpoint(file, Options(names=names))
    assert checkpoint.left_out == ["counter", "steps"]
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5
    assert [sentence.split(":")[0] for sentence in checkpoint.assumed] == ["Preprocessing"]
    for name, tensor in written_back(checkpoint).items():
        assert torch.equal(tensor, checkpoint.source.tensors[name].read()), name


def test_the_template_asks_for_what_nothing_determines(tmp_path: Path) -> None:
    file = saved(OwnViT(order="part, head, dim"), tmp_path)
    template = names_template(file)
    lines = dict(re.findall(r'^  "(.+)": (\S+)  # \[', template, re.M))
    assert lines == {
        "cls": "embeddings.cls_token",
        "pos": "embeddings.position_embeddings",
        "steps": "null",
        "counter": '"?"',
        "patch.*": "embeddings.patch_embeddings.projection.*",
        "blocks.{}.gamma_1": "layers.{}.attention_scale.weight",
        "blocks.{}.gamma_2": "layers.{}.mlp_scale.weight",
        "blocks.{}.ln1.*": "layers.{}.layernorm_before.*",
        "blocks.{}.ln2.*": "layers.{}.layernorm_after.*",
        "blocks.{}.to_qkv.*": "layers.{}.attention.qkv.*",
        "blocks.{}.out.*": "layers.{}.attention.o_proj.*",
        "blocks.{}.up.*": "layers.{}.mlp.fc1.*",
        "blocks.{}.down.*": "layers.{}.mlp.fc2.*",
        "norm.*": "layernorm.*",
        "head.*": "classifier.*",
    }
    (tmp_path / "names.yaml").write_text(template)
    with pytest.raises(ValueError, match="'counter' has no name yet"):
        open_checkpoint(file, Options(names=tmp_path / "names.yaml"))


def test_an_encoder_of_torch(tmp_path: Path) -> None:
    """`nn.TransformerEncoder` names its fused projection in_proj_weight and in_proj_bias."""
    layer = nn.TransformerEncoderLayer(D, HEADS, 48, 0.0, "gelu", batch_first=True, norm_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)})
    model["patch"] = nn.Conv2d(3, D, PATCH, PATCH)
    randomized(model)
    file = saved(model, tmp_path)
    template = names_template(file)
    assert '"encoder.layers.{}.self_attn.in_proj_*": layers.{}.attention.qkv.*  # [96, 32]' in template
    assert '"?"  #' not in template
    config = {"num_attention_heads": HEADS, "position_embedding_type": "none", "pooling": "mean", "image_size": 32}
    names = filled(file, tmp_path, config={**config, "final_layernorm": "none"})
    checkpoint = open_checkpoint(file, Options(names=names))
    with torch.no_grad():
        expected = model["encoder"](model["patch"](pixels_of((32, 32))).flatten(2).transpose(1, 2)).mean(1)
    assert distance(answers(checkpoint, pixels_of((32, 32))), expected) < 1e-5


def test_from_pretrained_reads_a_table_below_a_wrapper(tmp_path: Path) -> None:
    model = randomized(OwnViT())
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model_state_dict": state, "epoch": 1}, tmp_path / "own.pth")
    names = filled(tmp_path / "own.pth", tmp_path, {"counter": None}, config=CONFIG)
    with pytest.raises(ValueError, match=r"hf-vit inspect \S+ --names-template names.yaml$"):
        HFViTForImageClassification.from_pretrained(tmp_path / "own.pth")
    ours = HFViTForImageClassification.from_pretrained(tmp_path / "own.pth", names=names).eval()
    with torch.no_grad():
        assert distance(ours(pixels_of((32, 32))).logits, model(pixels_of((32, 32)))) < 1e-5


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name of ours": ({"tensors": {"cls": "class_token"}}, "nearest is 'embeddings.cls_token'"),
    "unknown name of theirs": ({"tensors": {"clz": None}}, "no tensor 'clz'; the nearest is 'cls'"),
    "unknown field": ({"config": {"heads": 4}}, "not a field of HFViTConfig"),
    "unknown order": ({"qkv": "q, k, v"}, "words part, head, dim in some order"),
    "unknown order of patches": ({"patch": "row, channel, column"}, "patch must be one of"),
    "unknown key": ({"names": {}}, "'names' is not one of"),
    "twice": ({"tensors": {"pos": "embeddings.cls_token"}}, "two tensors have the name 'embeddings.cls_token'"),
    "a tensor is missing": ({"tensors": {"blocks.{}.up.*": None}}, "no tensor is named 'layers.{}.mlp.fc1.weight'"),
    "a norm is missing": ({"tensors": {"blocks.{}.ln2.*": None}}, "layernorm_after.*Add it under 'tensors:'"),
    "keys are missing": ({"tensors": {"blocks.{}.wk.weight": None}}, "of query, key and value, only"),
    "heads": ({"config": {"num_attention_heads": 5}}, "cannot divide"),
}


@pytest.mark.parametrize(("changed", "message"), REFUSED.values(), ids=REFUSED)
def test_errors_name_what_to_change(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    file = saved(OwnViT(), tmp_path)
    changed = {**changed, "config": {**CONFIG, **changed.get("config", {})}}
    names = filled(file, tmp_path, {"counter": None, **changed.pop("tensors", {})}, **changed)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(file, Options(names=names))


def test_tensors_that_a_table_does_not_mention_are_named(tmp_path: Path) -> None:
    file = saved(OwnViT(), tmp_path)
    content = yaml.safe_load(filled(file, tmp_path, config=CONFIG).read_text())
    del content["tensors"]["counter"]
    (tmp_path / "names.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"no place for the tensors 'counter'"):
        open_checkpoint(file, Options(names=tmp_path / "names.yaml"))
    (tmp_path / "names.yaml").write_text("tensors: [")
    with pytest.raises(ValueError, match="cannot be read as YAML"):
        open_checkpoint(file, Options(names=tmp_path / "names.yaml"))


def test_the_command_line_writes_a_template_and_reads_it(tmp_path: Path) -> None:
    model = randomized(OwnViT(order="head, part, dim"))
    file, names = saved(model, tmp_path), tmp_path / "names.yaml"
    runner = CliRunner()
    unknown = runner.invoke(app, ["inspect", str(file)])
    assert "--names-template" in unknown.output
    written = runner.invoke(app, ["inspect", str(file), "--names-template", str(names)])
    assert "with 1 name to fill in" in written.output
    text = names.read_text()
    edits = {'"?"': "null", "1.0e-5": "1e-5", "act: gelu": "act: relu", "qkv: part, head, dim": "qkv: head, part, dim"}
    for old, new in {**edits, "num_attention_heads:": "num_attention_heads: 4"}.items():
        text = text.replace(old, new)
    names.write_text(text)
    converted = runner.invoke(app, ["convert", str(file), str(tmp_path / "out"), "--names", str(names)])
    assert converted.exit_code == 0, converted.output
    checkpoint = open_checkpoint(tmp_path / "out")
    assert distance(answers(checkpoint, pixels_of((32, 32))), model(pixels_of((32, 32)))) < 1e-5
