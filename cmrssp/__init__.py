"""Self-supervised pretraining for the segmentation of cardiac MR cine."""

__version__ = "0.1.0"
