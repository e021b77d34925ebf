"""The caller's default device changes nothing: every tensor is made where it is needed."""
