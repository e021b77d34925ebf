"""What a run does with its process: one process a folder, signals, settings of torch."""
