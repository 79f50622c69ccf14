"""Checkpoints on disk: openpi's layout, Hugging Face's safetensors, and a policy's metadata."""
