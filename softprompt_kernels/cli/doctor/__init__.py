"""`softprompt doctor`: checks of the installation, of a model, and of the compiled Triton kernels."""
