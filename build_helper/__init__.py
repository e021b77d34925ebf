"""What setup.py needs to build the compiled kernels: it is part of the sdist, and not of the wheel.

commands.py     the setuptools commands: compile with ninja, and pack only what this build made
modules.py      the modules, the environment variables that ask for them, and what they need
plans.py        which source is compiled with which options
compilers.py    which compilers are there, and what they can do
ninja.py        the text of a build.ninja
"""
