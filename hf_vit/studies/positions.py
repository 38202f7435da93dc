"""Does a ViT need to be told where a patch lies, and how? The paper's appendix D.4."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..inspection.drawing import BLUE, GRAY, MARKERS, ORANGE, bare, new_figure
from ..training.recipe import TrainConfig
from .figures import draw_dots
from .study import Cell, Finding, Results, Study, are_alike, cell_of, is_more, with_architecture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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
    title = "Position embeddings"
    question = (
        "Patches come as a set: without position embeddings a ViT does not know where each lies. The paper compares "
        "none, one vector a patch (1-D), one a row and one a column (2-D), and relative ones, which act in the "
        "attention, added at the input or before every layer. None is worse by 2.6 to 2.9 points; the others differ "
        "by 0.3 at most. Its relative positions are a product of the query with a vector for the offset between two "
        "patches; here they are a learned bias for the offset alone, whatever the patches hold."
    )
    source = "Dosovitskiy et al. 2021, appendix D.4, table 8 (ViT-B/16, 5-shot accuracy on ImageNet)"

    def cells(self, config: TrainConfig) -> Iterator[Cell]:
        for positions, placement in PAPER:
            fields = {"position_embedding_type": positions, "position_placement": placement}
            yield Cell({"positions": positions, "placement": placement}, with_architecture(config, **fields))

    def table(self, results: Results) -> list[list[str]]:
        rows = [["positions", "added", "accuracy, %", "the paper's, %"]]
        for (positions, placement), theirs in PAPER.items():
            ours = results.spread(positions=positions, placement=placement)
            added = PLACEMENTS[placement] if positions.startswith("learned") else "–"
            rows.append([KINDS[positions], added, cell_of(ours), f"{100 * theirs:.1f}"])
        return rows

    def plot(self, results: Results) -> "Figure":
        names = [
            KINDS[positions] + (f", {PLACEMENTS[placement]}" if positions.startswith("learned") else "")
            for positions, placement in PAPER
        ]
        drawn = new_figure(9.5, 3.6)
        axes = drawn.subplots(1, 2, sharey=True)
        places = range(len(PAPER))
        axes[0].scatter([100 * value for value in PAPER.values()], places, color=GRAY, marker=MARKERS[1], zorder=3)
        axes[0].set(xlabel="5-shot accuracy on ImageNet, %", title="the paper, ViT-B/16")
        axes[0].set_yticks(places, names)
        axes[0].invert_yaxis()
        for place, (positions, placement) in enumerate(PAPER):
            cell = {"positions": positions, "placement": placement}
            color = ORANGE if positions == "none" else BLUE
            draw_dots(axes[1], place, list(results.by_seed("accuracy", **cell).values()), color)
        axes[1].set(xlabel="accuracy, % (mean, deviation and seeds)", title="here")
        for axis in axes:
            bare(axis, grid="both")
        return drawn

    def findings(self, results: Results) -> list[Finding]:
        def input_of(positions: str) -> dict[str, str]:
            return {"positions": positions, "placement": "input"}

        learned = input_of("learned")
        kinds = {
            f"{KINDS[kind]} less 1-D": results.difference(input_of(kind), learned)
            for kind in ("learned_2d", "relative")
        }
        placed = {
            f"{KINDS[kind]} {PLACEMENTS[placement]} less at the input": results.difference(
                {"positions": kind, "placement": placement}, input_of(kind)
            )
            for kind in ("learned", "learned_2d")
            for placement in ("every_layer", "every_layer_shared")
        }
        return [
            is_more(
                "With positions accuracy is higher than without",
                results.difference(learned, input_of("none")),
                "1-D less none",
            ),
            are_alike("Which kind of positions matters little", kinds, within=0.01),
            are_alike("Where they are added matters little", placed, within=0.01),
        ]
