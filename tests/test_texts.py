"""What comes from outside is shown and not obeyed: names of labels and files, and tokens not at all."""

import ast
import io
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Image
from hub_server import SHAPED, Hub
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import colored_images, save_photos, tiny_recipe
from transformers import pipeline
from typer.testing import CliRunner

from hf_vit.cli.main import app
from hf_vit.hub.upload import push
from hf_vit.inspection.drawing import new_figure, plain, short
from hf_vit.inspection.gallery import folder_for
from hf_vit.studies.page import markdown_table
from hf_vit.system.places import is_junk, is_path
from hf_vit.system.texts import code, fenced, has_token, markdown, one_line, shell_word, visible, without_tokens
from hf_vit.training.recipe import TrainConfig
from hf_vit.training.report import public_command, train_and_report

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

HOSTILE = [
    "../../x",
    "/etc/passwd",
    "..",
    "CON",
    "a|b",
    "line\nbreak",
    "---\nlicense: none\n---",
    "```\n# heading",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![](http://127.0.0.1/seen)",
    "{{ 7 * 7 }}{% raw %}",
    "{name}%s",
    "$x^{$",
    "$$\\frac{1}{0}$$",
    "\x1b[2J\x1b]0;title\x07",
    "\x00\x9b31m",
    "\u202egnp.exe",
    "&lt;b&gt;",
    "__init__ *bold* ~~gone~~",
    "quote\"s'",
    "null",
    "",
    " ",
    "é画\N{GRINNING FACE}" * 40,
    "x" * 5000,
]


# ---------------------------------------------------------------------------------------------------------- texts


@given(st.text(st.characters(), max_size=40))
def test_what_is_shown_can_be_written_and_steers_nothing(text: str) -> None:
    for shown in (visible(text), one_line(text), markdown(text)):
        shown.encode("utf-8")
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", shown)
    assert "\n" not in one_line(text) + markdown(text) + code(text)
    assert shlex.split(shell_word(text)) == ([visible(text)] if text else [""])


def test_plain_texts_stay_as_they_are() -> None:
    for text in ("LABEL_0", "black-and-white (old)", "R&D, 5 % #1", "tench, Tinca tinca", "画\N{GRINNING FACE}\u200d"):
        assert visible(text) == one_line(text) == markdown(text) == text


@pytest.mark.parametrize("text", [*HOSTILE, "`", "``` `` `", "````\n```"])
def test_code_is_not_left(text: str) -> None:
    *block, end = fenced(text, "bash").splitlines()
    assert not [line for line in block[1:] if len(line.strip()) >= len(end) and set(line.strip()) == {"`"}]
    marks, within, end = re.fullmatch("(`+)(.*?)(`+)", code(text)).groups()  # type: ignore[union-attr]
    assert marks == end and marks not in within


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"--token {SHAPED}", "--token TOKEN"),
        ("https://me:pass%20word@host/x", "https://TOKEN@host/x"),
        ("https://longtoken@host/x.git", "https://TOKEN@host/x.git"),
        ("ssh://git@github.com/x", "ssh://git@github.com/x"),
        ("https://host/f?x=1&X-Amz-Signature=abc&y=2", "https://host/f?x=1&TOKEN&y=2"),
        ("https://host/f?token=abc'", "https://host/f?TOKEN'"),
        ("me@host.org https://host/@me", "me@host.org https://host/@me"),
    ],
)
def test_tokens_are_found_in_addresses(text: str, shown: str) -> None:
    assert without_tokens(text) == shown and has_token(text) == (text != shown)


def test_the_token_of_a_file_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    (tmp_path / "token").write_text("of-another-shape\n")
    assert without_tokens("by of-another-shape.") == "by TOKEN."


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("form", ["png", "svg"])
def test_pictures_take_any_name(form: str) -> None:
    from xml.etree import ElementTree

    figure = new_figure(6, 6)
    for place, name in enumerate(HOSTILE):
        figure.text(0, place / len(HOSTILE), short(name))
        figure.text(0.5, place / len(HOSTILE), plain(name[:30]))
    figure.savefig(drawn := io.BytesIO(), format=form)
    assert form == "png" or ElementTree.fromstring(drawn.getvalue().decode()).tag.endswith("svg")


@pytest.mark.parametrize("name", HOSTILE)
def test_folders_for_pictures_stay_where_they_are(name: str) -> None:
    folder = folder_for(name[:60].replace("\0", "") or "x")
    assert re.fullmatch(r"[a-z0-9-]{1,41}-pictures", folder) and not folder.startswith("-")


def test_a_table_holds_any_cell() -> None:
    rows = markdown_table([["a", "b"], ["x|y\nz", "`"]]).splitlines()
    assert len(rows) == 3 and rows[2] == "| x\\|y z | ` |"


# --------------------------------------------------------------------------------------------------------- labels


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parquet file whose labels are hostile, two images each."""
    path = tmp_path_factory.mktemp("data") / "a|b <i>`$.parquet"
    images, _ = colored_images(2 * len(HOSTILE), 0)
    features = Features({"image": Image(), "label": ClassLabel(names=sorted(HOSTILE))})  # blank text is no label
    Dataset.from_dict({"image": images, "label": [*range(len(HOSTILE))] * 2}, features=features).to_parquet(path)
    return path


def test_paths_and_names_on_the_hub_are_told_apart() -> None:
    for path in ("./a", "../a", "/a", "~/a", "a/", "a/b/c", "a.csv", "a/b.PNG", "C:\\a", "x.safetensors"):
        assert is_path(path), path
    for name in ("google/vit-base-patch16-224", "timm/vit_base.augreg_in21k", "beans", "user/v1.5"):
        assert not is_path(name), name
    assert all(map(is_junk, (".DS_Store", "._a.jpg", "Thumbs.db", "THUMBS.DB", ".ipynb_checkpoints", "__MACOSX")))
    assert not any(map(is_junk, (".env", "a.jpg", "_a.jpg", ".gitattributes")))


def test_commands_on_cards_state_no_folder_of_this_machine() -> None:
    typed = "hf-vit train --data /home/me/my/photos/ --model=../runs/vit --output-dir '~/my vit' --x a/b ./c"
    assert public_command(typed) == "hf-vit train --data photos --model=vit --output-dir 'my vit' --x a/b c"
    assert public_command("hf_vit.fit(data='/tmp/a/b', model='u/m')") == "hf_vit.fit(data='b', model='u/m')"
    assert public_command("hf-vit train --data https://a.b/c.zip") == "hf-vit train --data https://a.b/c.zip"


@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_labels_go_through_training_to_the_pipeline(
    hostile: Path, tmp_path: Path, client: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / 'x "y" | $(z) [1]'
    said: list[str] = []
    config = tiny_recipe(hostile, folder, max_steps=1, push_to_hub="tester/hostile", eval_fraction=0.5)
    (tmp_path / "runs").mkdir()
    run = train_and_report(config, "hf-vit train `x` ```", said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
    assert sorted(run.data.label_names) == sorted(HOSTILE)
    assert said[-1].startswith("Published at ")

    config_file = json.loads((folder / "config.json").read_text())
    assert list(config_file["id2label"].values()) == run.data.label_names
    classify = pipeline("image-classification", str(folder), device="cpu", top_k=len(HOSTILE))
    answers = classify(colored_images(1, 0)[0][0])
    assert {answer["label"] for answer in answers} == set(HOSTILE)

    for card in ((folder / "README.md").read_text(), client.files("tester/hostile")["README.md"].decode()):
        front = yaml.safe_load(card.split("---\n")[1])
        assert "license" not in front and front["model-index"][0]["name"] == folder.name
        text = re.sub(r"^(`{3,}).*?^\1$", "", ModelCard(card).text, flags=re.DOTALL | re.MULTILINE)
        assert not re.search(r"(?<!\\)<(?!/?(details|summary)>)", text)  # no tag but ours
        assert "](javascript" not in text.replace("\\]", "") and "](http://127" not in text.replace("\\]", "")
        assert "{{ 7" in text and "\x1b" not in card and "\u202e" not in card and "\0" not in card
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert all(len(re.findall(r"(?<!\\)\|", row)) in (4, 6) for row in rows)
    python = re.findall(r"```python\n(.*?)```", client.files("tester/hostile")["README.md"].decode(), re.DOTALL)
    assert len(python) == 2 and all('"tester/hostile"' in block for block in python)
    for block in re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL):
        assert folder.name in [node.value for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Constant)]

    shown = CliRunner().invoke(app, ["evaluate", str(folder), str(hostile)])
    assert shown.exit_code == 0 and "\x1b" not in shown.output and "\\x1b[2J" in shown.output, shown.output
    capsys.readouterr()


@pytest.mark.parametrize("repo_id", ["../../x", "/x", "a/b/c", "..", "a b", "x" * 200, "a\nb", ""])
def test_names_of_repositories_are_refused_before_anything_is_sent(repo_id: str, client: Hub, tmp_path: Path) -> None:
    from isolated import save_tiny_classifier

    result = CliRunner().invoke(app, ["push", str(save_tiny_classifier(tmp_path / "tiny")), repo_id])
    assert result.exit_code == 2 and result.stderr.count("Error: ") == 1
    assert client.requests == []


# --------------------------------------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


MARKED, STRANGE = "marked-token-of-another-shape", "what nobody wants to publish"
STRANGERS = (".env", "id_rsa", "nohup.out", "mine.py", "training_args.bin", "notes/README.md")


def bytes_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("where", "is_refused"), [("file", False), ("variable", True)])
def test_a_token_is_nowhere_but_in_its_header(
    where: str,
    is_refused: bool,
    client: Hub,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    no_pause_between_tries: None,
) -> None:
    """Neither in what a run writes, prints, logs and sends, though it was typed behind an option by mistake."""
    client.tokens[MARKED] = True
    if where == "variable":
        monkeypatch.setenv("HF_TOKEN", MARKED)
    else:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        (tmp_path / "token").write_text(MARKED)
    if is_refused:
        client.fail("/commit/", status=403, times=10**9)
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)  # the folder of an earlier run
    for name in STRANGERS:  # which do not hold up the push at the end of a run, either
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(STRANGE)
    (tmp_path / "tiny.yaml").write_text(
        tiny_recipe(photos, folder, max_steps=2, push_to_hub="tester/run", push_every=1).to_yaml()
    )
    arguments = ["train", "--recipe", str(tmp_path / "tiny.yaml")]
    monkeypatch.setattr(sys, "argv", ["hf-vit", *arguments, "--note", MARKED, f"--other={SHAPED}"])
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert ("Not published" in result.output) == is_refused
    printed = capfd.readouterr()
    written = bytes_below(folder)
    assert b"--note TOKEN --other=TOKEN" in written[folder / "README.md"]
    assert [request for request in client.requests if request.has_token]
    everything = {
        **written,
        "printed": (result.output + result.stderr + printed.out + printed.err + caplog.text).encode(),
        **{f"sent {number}": request.sent for number, request in enumerate(client.requests)},
    }
    for place, data in everything.items():
        assert MARKED.encode() not in data and SHAPED.encode() not in data, place
        assert STRANGE.encode() not in data or place in [folder / name for name in STRANGERS], place
    assert "Not pushed, since a run does not write such files: " + ", ".join(sorted(STRANGERS)) in result.output
    with pytest.raises(ValueError, match="look like secrets"):  # what is pushed by hand is to be clean
        push(folder, "tester/run")


@pytest.mark.parametrize(
    "fields",
    [
        {"data": f"https://me:{MARKED}@host/data.parquet"},
        {"data": f"https://host/data.parquet?token={MARKED}"},
        {"model": f"https://{MARKED}@host/me/model"},
        {"output_dir": SHAPED},
        {"push_to_hub": f"https://me:{MARKED}@host/me/model"},
        {"model_config": {"hidden_act": SHAPED}},
    ],
)
def test_a_recipe_with_a_token_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(fields))} contains a token or a password, ") as refusal:
        TrainConfig(**fields)
    assert MARKED not in str(refusal.value) and SHAPED not in str(refusal.value)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(fields))
    result = CliRunner().invoke(app, ["train", "--recipe", str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 2 and MARKED not in result.output + result.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "recipe.yaml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "ADDRESS", "x.png"],
        ["predict", "MODEL", "ADDRESS"],
        ["predict", "MODEL", "ADDRESS", "-o", "out.parquet"],
        ["evaluate", "ADDRESS", "digits"],
        ["evaluate", "MODEL", "ADDRESS"],
        ["convert", "ADDRESS", "out"],
        ["inspect", "ADDRESS"],
        ["export", "ADDRESS", "out", "--to", "timm"],
        ["train", "--data", "ADDRESS"],
        ["train", "--recipe", "ADDRESS"],
        ["train", "--hub-token", SHAPED],
        ["train", "--epochs", SHAPED],
        ["train", "--recipe", "BROKEN"],
        ["study", "positions", "--data", "ADDRESS"],
        ["push", "MODEL", "ADDRESS"],
        ["push", "ADDRESS", "me/model"],
    ],
    ids=" ".join,
)
def test_a_token_in_a_command_is_not_repeated(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isolated import save_tiny_classifier

    monkeypatch.chdir(tmp_path)
    Path("x.png").touch()
    Path("broken.yaml").write_text(f"token: [{SHAPED}")
    names = {"ADDRESS": f"https://me:{MARKED}@host/a/{SHAPED}", "BROKEN": "broken.yaml"}
    if "MODEL" in arguments:
        names["MODEL"] = str(save_tiny_classifier(tmp_path / "model"))
    before = bytes_below(tmp_path)
    result = CliRunner().invoke(app, [names.get(word, word) for word in arguments])
    assert (result.exit_code == 2 and result.stderr.startswith("Error: ")) or "\nError: " in result.stderr, (
        result.stderr
    )
    assert MARKED not in result.output + result.stderr and SHAPED not in result.output + result.stderr
    assert bytes_below(tmp_path) == before
