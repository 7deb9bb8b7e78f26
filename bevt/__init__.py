"""BEVT pretraining of video transformers: the trainer."""

__version__ = "0.1.0"
