"""ManiSkill: envs, observations as a policy gets them, and the milestones of an episode."""
