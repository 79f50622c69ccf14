"""Rollouts of checkpoints in ManiSkill, and what is told about them."""
