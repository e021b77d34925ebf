"""What a kernel is given: frozen dataclasses of checked arguments, for attention and for the losses."""
