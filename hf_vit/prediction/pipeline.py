"""An image classification pipeline that passes files to the image processor instead of opening them first.

transformers' pipeline converts every file to 8-bit RGB before the processor: 16-bit grayscale turns white, transparent
pixels get an arbitrary color, and an error does not name the file.
"""

from typing import Any

from transformers import BatchFeature, ImageClassificationPipeline

from ..model.image_reading_hf_vit import DOWNLOAD_TIMEOUT, download, is_url


class HFViTImageClassificationPipeline(ImageClassificationPipeline):
    """Image classification on images as `hf_vit` reads them.

    Use `pipeline("image-classification", model, pipeline_class=HFViTImageClassificationPipeline)`. It accepts what the
    image processor accepts, and raises a `ValueError` that names an image which cannot be read.
    """

    def preprocess(self, image: Any, timeout: float | None = None) -> BatchFeature:  # type: ignore[override]
        """Return `pixel_values` `[1, C, H, W]` of an image; `timeout` is the longest silence of a server, seconds."""
        if is_url(image):
            image = download(image, timeout or DOWNLOAD_TIMEOUT)
        assert self.image_processor is not None
        return self.image_processor(images=image, return_tensors="pt").to(self.dtype)
