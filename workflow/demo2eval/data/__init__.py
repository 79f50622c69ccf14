"""From demonstrations to the samples that training reads."""
