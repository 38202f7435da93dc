"""Does a ViT need position embeddings, and of which kind? The paper's appendix D.4."""

from collections.abc import Iterator

from ..inspection.drawing import BLUE, GRAY, MARKERS, ORANGE, Figure, bare, new_figure
from ..training.recipe import TrainConfig
from .figures import ACCURACY, DASH, draw_dots, percent
from .study import Cell, Finding, Results, Study, are_alike, is_more, with_architecture

KINDS = {"none": "none", "learned": "1-D", "learned_2d": "2-D", "relative": "relative"}
PLACEMENTS = {"input": "at the input", "every_layer": "every layer", "every_layer_shared": "every layer, shared"}
# Table 8: 5-shot accuracy of ViT-B/16 on ImageNet.
PAPER = {
    ("none", "input"): 0.61382,
    ("learned", "input"): 0.64206,
    ("learned", "every_layer"): 0.63964,
    ("learned", "every_layer_shared"): 0.64292,
    ("learned_2d", "input"): 0.64001,
    ("learned_2d", "every_layer"): 0.64046,
    ("learned_2d", "every_layer_shared"): 0.64022,
    ("relative", "input"): 0.64032,
}


class Positions(Study):
    name = "positions"
    question = (
        "Without position embeddings, a ViT sees its patches as a set and does not know where each one is. The paper "
        "compares no positions, one vector per patch (1-D), one per row and one per column (2-D), and relative "
        "positions in the attention; vectors are added at the input or before every layer. Without positions accuracy "
        "is 2.6 to 2.9 points lower; the other variants differ by at most 0.3 points. The paper's relative positions "
        "multiply the query with a vector for the offset between two patches. Here they are a learned bias for the "
        "offset, which does not depend on the query."
    )

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        for kind, placement in PAPER:
            fields = {"position_embedding_type": kind, "position_placement": placement}
            yield Cell(cell(kind, placement), with_architecture(config, **fields))

    def table(self, results: Results) -> list[list[str]]:
        rows = [["positions", "added", "accuracy, %", "accuracy in the paper, %"]]
        for (kind, placement), theirs in PAPER.items():
            added = PLACEMENTS[placement] if kind.startswith("learned") else DASH
            ours = results.spread(**cell(kind, placement))
            rows.append([KINDS[kind], added, percent(ours), f"{100 * theirs:.1f}"])
        return rows

    def plot(self, results: Results) -> Figure:
        names = [
            KINDS[kind] + (f", {PLACEMENTS[placement]}" if kind.startswith("learned") else "")
            for kind, placement in PAPER
        ]
        figure = new_figure(9.5, 3.6)
        axes = figure.subplots(1, 2, sharey=True)
        rows = range(len(PAPER))
        axes[0].scatter([100 * value for value in PAPER.values()], rows, color=GRAY, marker=MARKERS[1], zorder=3)
        axes[0].set(xlabel="5-shot accuracy on ImageNet, %", title="the paper, ViT-B/16")
        axes[0].set_yticks(rows, names)
        axes[0].invert_yaxis()
        for row, (kind, placement) in enumerate(PAPER):
            accuracies = results.by_seed("accuracy", **cell(kind, placement))
            draw_dots(axes[1], row, accuracies.values(), ORANGE if kind == "none" else BLUE)
        axes[1].set(xlabel=ACCURACY, title="here (dots: seeds)")
        for axis in axes:
            bare(axis, grid="both")
        return figure

    def findings(self, results: Results) -> list[Finding]:
        kinds = {
            f"{KINDS[kind]} minus 1-D": results.difference(cell(kind), cell("learned"))
            for kind in ("learned_2d", "relative")
        }
        placed = {
            f"{KINDS[kind]} {PLACEMENTS[placement]} minus at the input": results.difference(
                cell(kind, placement), cell(kind)
            )
            for kind in ("learned", "learned_2d")
            for placement in ("every_layer", "every_layer_shared")
        }
        return [
            is_more(
                "Accuracy is higher with position embeddings than without",
                results.difference(cell("learned"), cell("none")),
                "1-D minus none",
            ),
            are_alike("The kind of positions matters little", kinds, within=0.01),
            are_alike("Where positions are added matters little", placed, within=0.01),
        ]


def cell(kind: str, placement: str = "input") -> dict[str, str]:
    return {"positions": kind, "placement": placement}
