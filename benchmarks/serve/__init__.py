"""Many clients of `softprompt serve` at once: are their answers right, how much faster is it, does memory stay flat."""
