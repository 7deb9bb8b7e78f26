"""The Video Swin encoder, the two-stream BEVT model on it, and their weights."""
