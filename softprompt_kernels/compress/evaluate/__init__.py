"""The distance of a student from the teacher, and the baselines that a prompt is compared with."""
