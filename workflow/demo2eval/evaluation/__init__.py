"""Rollouts of checkpoints in ManiSkill, and the tables, curves and videos made of them."""
