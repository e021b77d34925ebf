"""Soft prompts in the files of other packages: export, import, inspection, model card, hub."""
