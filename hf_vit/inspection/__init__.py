"""Arrays and figures that show what a model learned and how a training run went.

Functions whose names begin with `plot` return a matplotlib figure; the others return arrays.
"""

from ..system.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "attention": [
            "attention_distance",
            "attention_maps",
            "attention_rollout",
            "attention_weights",
            "plot_attention_distance",
            "rollout",
            "uniform_distance",
        ],
        "boxes": ["plot_boxes"],
        "features": ["feature_components", "outlier_norm", "plot_token_norms", "token_norms"],
        "filters": ["patch_filters", "plot_filters", "stem_filters"],
        "maps": ["lit", "plot_attention_maps", "plot_feature_components", "plot_heads", "plot_norm_maps"],
        "masks": ["chosen_images", "legend_colors", "overlay", "plot_masks", "plot_overlays"],
        "positions": ["plot_position_bias", "plot_position_similarity", "position_bias", "position_similarity"],
        "runs": [
            "plot_average_precision",
            "plot_confusion",
            "plot_predictions",
            "plot_targets",
            "plot_training",
            "shown_predictions",
        ],
    },
)
