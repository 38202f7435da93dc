"""Descriptions of the inputs and outputs of a graph."""

from ..model.configuration_hf_vit import HFViTConfig
from ..model.detection_hf_vit import HFViTForObjectDetection
from ..model.losses_hf_vit import activation_of
from ..model.modeling_hf_vit import HFViTForImageClassification
from ..model.segmentation_hf_vit import HFViTForSemanticSegmentation
from .preprocessing import PreprocessedGraph
from .tracing import IMAGES, INPUT, Graph, most_patches

# What the logits become, by `activation_of`. The temperature is in the graph.
SCORES = {
    "softmax": "The probabilities of the classes are the softmax of the logits.",
    "sigmoid": "The probability of each label is the sigmoid of its logit.",
    "none": "The logits are the values of the targets.",
}


def description(graph: Graph) -> str:
    """Return sentences about the inputs and outputs of a graph."""
    outputs, scores = _outputs(graph)
    if isinstance(graph, PreprocessedGraph):
        height, width = graph.preprocessing.plan.size
        given = f"{IMAGES} [batch, height, width, {graph.preprocessing.num_channels}], uint8"
        sizes = f"Images may have any size of at least 2x2, and are preprocessed to {height}x{width} inside the graph."
        types = "float32"
    else:
        given, sizes = f"{INPUT} [batch, {graph.config.num_channels}, height, width]", _sizes(graph)
        types = "both float32" if len(graph.outputs) == 1 else "all float32"
    return " ".join(part for part in (f"Input: {given}; output: {outputs}; {types}.", sizes, scores) if part)


def _sizes(graph: Graph) -> str:
    height, width = graph.config.patch_shape
    batch = f" A batch has at most {graph.most_images} images." if graph.most_images is not None else ""
    if graph.fixed is not None:
        return graph.fixed + batch
    most = most_patches(graph.config)
    to = f"to {most * height}x{most * width}" if graph.is_bounded else "upwards"
    sides = (
        f"Height and width are multiples of {height}"
        if height == width
        else f"The height is a multiple of {height}, the width of {width}"
    )
    return f"{sides}, from {2 * height}x{2 * width} {to}.{batch}"


def _certainty(config: HFViTConfig) -> list[str]:
    """Return what the thresholds of a classifier say, which a runtime applies to the probabilities."""
    said = []
    if config.abstention_threshold is not None:
        said.append(f"The answer is unknown if the largest probability is below {config.abstention_threshold!r}.")
    if config.label_set_threshold is not None:
        said.append(
            f"The label set ({config.label_set_coverage!r} coverage) has the classes with a probability of at least "
            f"{config.label_set_threshold!r}, and the most likely one."
        )
    return said


def _outputs(graph: Graph) -> tuple[str, str]:
    """Return the outputs with their shapes, and what they mean."""
    model, labels = graph.original, graph.config.num_labels
    if isinstance(model, HFViTForSemanticSegmentation):
        parts = graph.config.patch_subdivision
        return f"logits [batch, {labels}, rows, columns]", (
            f"Each patch has {parts}x{parts} logits per class. Resize them bilinearly to the image (without aligned "
            "corners); the class of a pixel is the one with the largest logit."
        )
    if isinstance(model, HFViTForObjectDetection):
        return f"logits [batch, points, {labels}] and pred_boxes [batch, points, 4]", (
            "The score of each class is the sigmoid of its logit, which is very low at points without an object. "
            "Boxes are centre x, centre y, width and height, as shares of the image. Among boxes of one class with "
            "an intersection over union above 0.5, keep only the one with the highest score."
        )
    if isinstance(model, HFViTForImageClassification):
        scores = SCORES[activation_of(graph.config)] if graph.output == "logits" else ""
        return f"{graph.output} [batch, {labels}]", " ".join(filter(None, [scores, *_certainty(graph.config)]))
    if graph.output == "pooler_output":
        return "pooler_output [batch, features]", ""
    return " and ".join(f"{name} [batch, features, rows, columns]" for name in graph.outputs), ""
