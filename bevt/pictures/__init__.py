"""What a person looks at: learning curves, clips under their masks and what the tokenizer rebuilds, mask sheets;
answers, and which classes are confused.
"""

from bevt.pictures.answers import answer
from bevt.pictures.confusion import confusion
from bevt.pictures.curves import curves
from bevt.pictures.strips import masks, strip

__all__ = ["answer", "confusion", "curves", "masks", "strip"]
