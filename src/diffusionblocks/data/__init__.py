"""Data sets by name or folder, split deterministically, and a stream of batches that can start anywhere."""

from diffusionblocks.data.images import ImageData, ImageSplits, load_images
from diffusionblocks.data.stream import BatchStream

__all__ = ["BatchStream", "ImageData", "ImageSplits", "load_images"]
