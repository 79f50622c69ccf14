"""From ManiSkill demonstrations to a success-rate table for Pi0.5."""
