"""The commands of `softprompt`, one a file."""
