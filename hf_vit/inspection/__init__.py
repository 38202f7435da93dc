"""What a model has learned, and what a run was like, as arrays and as pictures.

Functions that begin with `plot` return a matplotlib figure, to be saved by its `savefig`; the others return arrays.
"""

from .attention import (
    attention_distance,
    attention_maps,
    attention_rollout,
    attention_weights,
    plot_attention_distance,
    rollout,
    uniform_distance,
)
from .features import feature_components, outlier_norm, plot_token_norms, token_norms
from .filters import patch_filters, plot_filters, stem_filters
from .maps import lit, plot_attention_maps, plot_feature_components, plot_heads, plot_norm_maps
from .positions import plot_position_bias, plot_position_similarity, position_bias, position_similarity
from .runs import plot_confusion, plot_predictions, plot_training, shown_predictions

__all__ = [
    "attention_distance",
    "attention_maps",
    "attention_rollout",
    "attention_weights",
    "feature_components",
    "lit",
    "outlier_norm",
    "patch_filters",
    "plot_attention_distance",
    "plot_attention_maps",
    "plot_confusion",
    "plot_feature_components",
    "plot_filters",
    "plot_heads",
    "plot_norm_maps",
    "plot_position_bias",
    "plot_position_similarity",
    "plot_predictions",
    "plot_token_norms",
    "plot_training",
    "position_bias",
    "position_similarity",
    "rollout",
    "shown_predictions",
    "stem_filters",
    "token_norms",
    "uniform_distance",
]
