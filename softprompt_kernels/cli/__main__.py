"""`python -m softprompt_kernels.cli` is `softprompt`: for `torchrun -m`, which starts modules."""

from softprompt_kernels.cli import main

if __name__ == "__main__":
    main()
