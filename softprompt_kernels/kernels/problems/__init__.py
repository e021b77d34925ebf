"""What a kernel is given: frozen records of checked arguments, one module for attention and one for the losses."""
