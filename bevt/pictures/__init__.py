"""What a person looks at: learning curves, clips under their masks and what the tokenizer rebuilds, mask sheets."""

from bevt.pictures.curves import curves
from bevt.pictures.strips import masks, strip

__all__ = ["curves", "masks", "strip"]
