"""The quickstart: train on handwritten digits, save the model, and load it in a fresh process."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training.loop import train
from ..training.recipe import TrainConfig
from ..training.report import write_report

# What a user without this package would run: the model's code comes from the folder.
FRESH_PROCESS = """
import json, sys
from transformers import pipeline
classify = pipeline("image-classification", sys.argv[1], trust_remote_code=True, device="cpu")
predictions = classify(json.load(sys.stdin), top_k=1, batch_size=32)
json.dump([labels[0] for labels in predictions], sys.stdout)
"""
EXAMPLES = 10


def quickstart(output_dir: str, seed: int, resume: str, say: Callable[[str], None], **overrides: Any) -> None:
    """Train by the recipe `digits`, write the model with its card and figures, and load it in a fresh process.

    Args:
        output_dir: Folder for the model.
        seed: Random seed of the run. The evaluation split does not depend on it.
        resume: See `TrainConfig`.
        say: Prints a line.
        overrides: Other fields of the recipe.
    """
    say("Training a Vision Transformer on scikit-learn's handwritten digits.")
    config = TrainConfig.from_recipe("digits", output_dir=output_dir, seed=seed, resume=resume, **overrides)
    run = train(config)
    if not run.is_main_process or run.predictions is None:
        return
    metrics = run.metrics
    right = round(metrics["eval_accuracy"] * metrics["eval_count"])
    say(
        f"Accuracy {metrics['eval_accuracy']:.2%} ({right} of {metrics['eval_count']} evaluation digits), "
        f"seed {seed}, {metrics['parameters']:,} parameters, {run.timing['seconds']:.0f} s of training."
    )
    write_report(run, f"hf-vit quickstart --seed {seed}")

    say(f'\nLoading the model in a fresh process with pipeline("image-classification", "{output_dir}"):')
    column, label_column = run.data.columns
    predictions = classify_elsewhere(run.output_dir, run.data.evaluation[column])
    names = [run.data.label_names[label] for label in run.data.evaluation[label_column]]
    say("  true  predicted")
    for name, prediction in list(zip(names, predictions, strict=True))[:EXAMPLES]:
        mark = "" if name == prediction["label"] else "   wrong"
        say(f"  {name:>4}  {prediction['label']:>9}  {prediction['score']:6.1%}{mark}")
    here = [run.data.label_names[index] for index in run.predictions.predicted.tolist()]
    same = sum(prediction["label"] == label for prediction, label in zip(predictions, here, strict=True))
    say(f"  {same} of {len(here)} predictions equal those of the model in memory.")
    say(f"\n{output_dir}/ contains the model (safetensors), config, image processors, code, model card, and")
    say("  training.png     loss and accuracy")
    say("  confusion.png    which digits it confuses")
    say("  predictions.png  predictions on the evaluation split, with all errors")
    say("  positions.png    similarity of its position embeddings (figure 7 of the paper)")
    say(f"\nTo publish it:  hf-vit push {output_dir} YOUR_NAME/{run.output_dir.resolve().name}")


def classify_elsewhere(folder: Path, images: Any) -> list[dict[str, Any]]:
    """Return the predictions of `pipeline` in a new process that reads the images from files, in order."""
    with tempfile.TemporaryDirectory() as temporary:
        paths = []
        for index, image in enumerate(images):
            paths.append(str(Path(temporary) / f"{index:05d}.png"))
            image.save(paths[-1])
        finished = subprocess.run(
            [sys.executable, "-c", FRESH_PROCESS, str(folder.resolve())],
            input=json.dumps(paths),
            capture_output=True,
            text=True,
            cwd=temporary,  # so that a source tree in the current folder is not found
        )
    if finished.returncode:
        raise RuntimeError(f"The fresh process could not classify with {folder}:\n{finished.stderr}")
    return json.loads(finished.stdout)
