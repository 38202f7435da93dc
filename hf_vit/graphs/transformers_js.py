"""Export a model as the folder that transformers.js 4 loads: an ONNX graph, a config and an image processor.

transformers.js chooses its classes by `model_type` and `image_processor_type`, and reads nothing else of the
architecture, which the graph holds. Every architecture can therefore be loaded as a stock ViT, or as a SegFormer if it
segments, provided that the pipeline of transformers.js does with images and outputs what ours does. `_obstacles` lists
what it cannot do.

Its resizing differs from Pillow's. Under Node, the bilinear and bicubic interpolation of libvips do not antialias: on
30 photographs resized to 224x224, their pixels differ from Pillow's bicubic ones by 5.0 and 5.7 levels of 255 on
average. Those of the Lanczos kernel, which antialiases, differ by 1.5. In browsers, the canvas resizes.
"""

import base64
import json
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..checkpoints.checkpoint import DETECTOR, MULTI_TASK, Checkpoint
from ..checkpoints.export import no_certainty
from ..checkpoints.models import load
from ..checkpoints.opening import open_checkpoint
from ..model.image_processing_hf_vit import HFViTImageProcessor
from ..model.losses_hf_vit import activation_of
from ..model.modeling_hf_vit import HFViTForImageClassification
from ..model.segmentation_hf_vit import HFViTForSemanticSegmentation
from ..system.disk import new_folder
from ..system.extras import need
from ..system.texts import counted, one_line
from .export import BOUNDS, export_graph, sample_images
from .onnx_files import MOST_BYTES_INSIDE
from .open_sizes import Model
from .tracing import INPUT, Graph

NAME = "transformers-js"
LANCZOS = 1  # Pillow's number
# The file and the `dtype` by which transformers.js finds it, by form.
FILES = {
    "fp32": ("model.onnx", "fp32"),
    "fp16": ("model_fp16.onnx", "fp16"),
    "int8 dynamic": ("model_quantized.onnx", "q8"),
}
MODULES = "HF_VIT_NODE_MODULES"  # variable of the environment with a folder of npm packages
STOCK_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels"),
)
README = """---
library_name: transformers.js
pipeline_tag: {task}
---

# {name}

A Vision Transformer for [transformers.js](https://huggingface.co/docs/transformers.js), exported by hf-vit.

```js
import {{ pipeline }} from '@huggingface/transformers';

const model = await pipeline('{task}', '{name}');
const output = await model('photo.jpg'{options});
```

{output}
"""


class Loaded(NamedTuple):
    """How transformers.js loads a kind of model: its pipeline and the names of its classes."""

    task: str
    model_type: str
    architecture: str
    processor: str
    options: str
    output: str


CLASSIFIER = Loaded(
    "image-classification", "vit", "ViTForImageClassification", "ViTImageProcessor",
    ", { top_k: 5 }", "The output is a list of labels and their probabilities.",
)  # fmt: skip
SEGMENTER = Loaded(
    "image-segmentation", "segformer", "SegformerForSemanticSegmentation", "SegformerImageProcessor",
    "", "The output is a list of labels and their masks.",
)  # fmt: skip
ENCODER = Loaded(
    "image-feature-extraction", "vit", "ViTModel", "ViTImageProcessor",
    "", "The output is the pooled output of the encoder, one vector per image.",
)  # fmt: skip


def export_transformers_js(
    source: str | Path,
    out: str | Path,
    int8: str | None = None,
    measure: Callable[..., list[str]] | None = None,
    force: bool = False,
    precision: str = "fp32",
    say: Callable[[str], None] = lambda stage: None,
) -> list[str]:
    """Write the folder of a model for transformers.js, and keep it only if its outputs are the model's.

    Outputs are compared in onnxruntime, and under Node if it and the npm package are found: in the folder that
    `HF_VIT_NODE_MODULES` names, or in a `node_modules` of the working directory or above.

    Args:
        source: A file, a folder, or a name on the Hub, in any layout.
        out: The folder, with config.json, preprocessor_config.json, README.md and onnx/.
        int8: `"dynamic"` for weights and products in 8 bits (`dtype: 'q8'`).
        measure: As of `export_graph`.
        force: Replace what is there.
        precision: `"fp32"`, or `"fp16"` for half of the size (`dtype: 'fp16'`).
        say: As of `export_graph`.

    Returns:
        The sentences of `export_graph`, and those on transformers.js.

    Raises:
        ValueError: If transformers.js would answer wrongly; if outputs differ. Then nothing is written.
    """
    form = precision if int8 is None else f"int8 {int8}"
    if form not in FILES:
        raise ValueError(
            f"transformers.js does not run {form} everywhere: for int8 use dynamic, or leave --int8 out; for "
            "precision, fp32 or fp16."
        )
    need("onnx", "onnx", "onnxruntime", "onnxscript")
    checkpoint = open_checkpoint(source)
    if checkpoint.architecture in (DETECTOR, MULTI_TASK):
        raise ValueError(
            f"{source} is a {checkpoint.architecture}, whose outputs no pipeline of transformers.js decodes: export "
            "it to onnx."
        )
    model, processor = load(source, checkpoint=checkpoint)
    loaded = _loaded_as(model)
    if obstacles := _obstacles(checkpoint, loaded, processor):
        raise ValueError(
            f"transformers.js would run {source} incorrectly: {'; '.join(obstacles)}. Export it to onnx "
            "instead, and prepare the images yourself."
        )
    file, dtype = FILES[form]
    with new_folder(out, force) as unfinished:
        (unfinished / "onnx").mkdir()
        lines = export_graph(source, unfinished / "onnx" / file, "onnx", int8, measure, precision=precision, say=say)
        if loaded is ENCODER:
            _add_output(unfinished / "onnx" / file)
        _write_json(unfinished / "config.json", _config(model, loaded, dtype))
        _write_json(unfinished / "preprocessor_config.json", _preprocessing(processor, loaded))
        readme = README.format(name=Path(out).name, task=loaded.task, options=loaded.options, output=loaded.output)
        (unfinished / "README.md").write_text(readme, encoding="utf-8")
        lines += [f"Note: {sentence}" for sentence in no_certainty(model.config)]
        say("Comparing its outputs under Node.")
        lines.append(_compared_in_node(unfinished, model, processor, loaded, BOUNDS[form]))
    return lines


def _loaded_as(model: Model) -> Loaded:
    if isinstance(model, HFViTForSemanticSegmentation):
        return SEGMENTER
    return CLASSIFIER if isinstance(model, HFViTForImageClassification) and model.config.num_labels else ENCODER


def _obstacles(checkpoint: Checkpoint, loaded: Loaded, processor: HFViTImageProcessor) -> list[str]:
    """Return what the pipelines and the image processor of transformers.js cannot do."""
    config, found = checkpoint.config, []
    height, width = processor.size.get("height"), processor.size.get("width")
    activation = activation_of(config)
    if loaded is CLASSIFIER and activation != "softmax":
        outputs = {"sigmoid": "the sigmoids of its logits", "none": "its logits themselves"}[activation]
        found.append(f"its outputs are {outputs}, and the pipeline applies the softmax")
    if config.num_channels != 3:
        found.append(f"its images have {counted(config.num_channels, 'channel')}, and those of transformers.js have 3")
    for name in ("packing", "value_range", "do_grayscale"):
        if (value := getattr(processor, name)) is not None and value is not False:
            found.append(f"its image processor has {name}={value}")
    if not processor.do_resize:
        found.append("its image processor does not resize")
    if processor.crop_pct is not None and height != width:
        found.append(f"it crops images to {height}x{width}, and resizing to cover a size is for squares only")
    if loaded is SEGMENTER and (processor.crop_pct is not None or processor.do_center_crop):
        found.append("its masks are those of a crop, and the pipeline stretches them over the image")
    if sum(map(math.prod, checkpoint.shapes.values())) * 4 > MOST_BYTES_INSIDE:
        found.append("its weights exceed 2 GB")
    return found


def _config(model: Model, loaded: Loaded, dtype: str) -> dict[str, Any]:
    """Return the config; `dtype` names the file that is there, since the default depends on the device."""
    config = model.config
    labels = {} if loaded is ENCODER else {"id2label": config.id2label, "label2id": config.label2id}
    return {
        "model_type": loaded.model_type,
        "architectures": [loaded.architecture],
        **{name: getattr(config, name) for name in STOCK_FIELDS},
        **labels,
        "transformers.js_config": {"dtype": dtype},
    }


def _preprocessing(processor: HFViTImageProcessor, loaded: Loaded) -> dict[str, Any]:
    """Return the config of the image processor."""
    size: dict[str, int] = {name: side for name, side in dict(processor.size).items() if side is not None}
    crop = {name: side for name, side in dict(processor.crop_size or {}).items() if side is not None}
    if processor.crop_pct is not None:
        crop, size = size, {"shortest_edge": math.floor(size["height"] / processor.crop_pct)}
    has_crop = processor.crop_pct is not None or bool(processor.do_center_crop)
    return {
        "image_processor_type": loaded.processor,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": size,
        "resample": LANCZOS,
        "do_center_crop": has_crop,
        **({"crop_size": crop} if has_crop else {}),
        "do_rescale": bool(processor.do_rescale),
        "rescale_factor": processor.rescale_factor,
        "do_normalize": bool(processor.do_normalize),
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_output(path: Path) -> None:
    """Give the output of an encoder a second name: the pipeline returns `image_embeds` unless asked to pool."""
    import onnx

    model = onnx.load(path)
    (pooled,) = model.graph.output
    model.graph.node.append(onnx.helper.make_node("Identity", [pooled.name], ["image_embeds"]))
    same = model.graph.output.add()
    same.CopyFrom(pooled)
    same.name = "image_embeds"
    onnx.save(model, path)


# ---------------------------------------------------------------------------------------------------------- under Node


def node_modules() -> Path | None:
    """Return a folder of npm packages that has transformers.js; `None` without one, and without Node."""
    here = Path.cwd()
    places = [Path(os.environ[MODULES])] if MODULES in os.environ else []
    places += [folder / "node_modules" for folder in (here, *here.parents)]
    found = [place for place in places if (place / "@huggingface" / "transformers" / "package.json").is_file()]
    return found[0] if found and shutil.which("node") else None


def answers_in_node(folder: Path, task: str, images: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Return what transformers.js makes of images: pixel values `[1, 3, H, W]`, outputs `[n]`, labels and scores.

    Raises:
        ValueError: If Node or the package is missing, or with the error of transformers.js.
    """
    modules = node_modules()
    if modules is None:
        raise ValueError(f"Node or its package @huggingface/transformers is missing: set {MODULES} to its folder.")
    with as_file(files(__package__) / "transformers_js.mjs") as script:
        command = ["node", script, modules.resolve(), folder, task, *images]
        done = subprocess.run([str(each) for each in command], capture_output=True, text=True)
    if done.returncode:
        error = next((line for line in done.stderr.splitlines() if "Error" in line), done.stderr)
        raise ValueError(f"transformers.js does not run {folder.name}: {one_line(error)}")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for each in found:
        pixels = np.frombuffer(base64.b64decode(each["pixel_values"]), np.float32)
        each["pixel_values"], each["outputs"] = (
            pixels.reshape(each["shape"]).copy(),
            np.array(each["outputs"], np.float32),
        )
    return found


@torch.no_grad()
def _compared_in_node(folder: Path, model: Model, processor: HFViTImageProcessor, loaded: Loaded, bound: float) -> str:
    """Return a sentence on outputs and pixels under Node.

    Raises:
        ValueError: If outputs differ by more than the bound.
    """
    if node_modules() is None:
        return f"Not run in transformers.js, since Node or its package is missing: set {MODULES} to try it."
    graph, images = Graph(model).eval(), [Image.fromarray(photo) for photo in sample_images()]
    with tempfile.TemporaryDirectory() as temporary:
        paths = [Path(temporary) / f"{index}.png" for index in range(len(images))]
        for path, image in zip(paths, images, strict=True):
            image.save(path)
        answers = answers_in_node(folder, loaded.task, paths)
    outputs, pixels = [], []
    scale = 255 * np.array(processor.image_std if processor.do_normalize else [1, 1, 1])[:, None, None]
    for image, answer in zip(images, answers, strict=True):
        expected = graph(torch.from_numpy(answer["pixel_values"])).numpy().reshape(-1)
        outputs.append(np.abs(answer["outputs"] - expected).max() / max(1.0, np.abs(expected).max()))
        ours = processor(image, return_tensors="pt")[INPUT].numpy()
        pixels.append(np.abs(answer["pixel_values"] - ours)[0] * scale)
    sentence = f"transformers.js: outputs differ from torch's by at most {max(outputs):.1e}; the bound is {bound:g}"
    if not max(outputs) <= bound:
        raise ValueError(f"{sentence}. Nothing is written: please report the model.")
    return f"{sentence}. Its resized pixels differ from Pillow's by {np.mean(pixels):.1f} levels of 255 on average."
