"""Checkpoints on disk: openpi's layout, Hugging Face's safetensors, and what a policy needs besides weights."""
