"""ManiSkill: the six tasks, their environments, and observations as a policy sees them."""
