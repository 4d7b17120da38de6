"""`undivided demo`: a trained language model embeds real sentences with its own attention and with ours.

The same weights, batches and machine; then the embeddings, each sentence's nearest neighbour, the
speed, the memory and a few searches side by side. `command` tells the story from top to bottom.
"""

from .command import add_arguments, main

__all__ = ["add_arguments", "main"]
