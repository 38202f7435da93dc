"""A pipeline that hands files to the image processor, instead of opening them on the way to it.

transformers' own opens every file as 8-bit RGB before any processor sees it: 16-bit grayscale turns white there, what
is transparent takes any color, and an error does not say which file it is about.
"""

from typing import Any

from transformers import BatchFeature, ImageClassificationPipeline

from ..model.image_reading_hf_vit import DOWNLOAD_TIMEOUT, download, is_url


class HFViTImageClassificationPipeline(ImageClassificationPipeline):
    """transformers' image classification, on images as `hf_vit` reads them.

    To be asked for: `pipeline("image-classification", model, pipeline_class=HFViTImageClassificationPipeline)`. Takes
    what the image processor takes. An image that cannot be read is a `ValueError` that names it.
    """

    def preprocess(self, image: Any, timeout: float | None = None) -> BatchFeature:  # type: ignore[override]
        """Return `pixel_values` `[1, C, H, W]` of an image; a server may be silent for `timeout` seconds."""
        if is_url(image):
            image = download(image, timeout or DOWNLOAD_TIMEOUT)
        assert self.image_processor is not None
        return self.image_processor(images=image, return_tensors="pt").to(self.dtype)
