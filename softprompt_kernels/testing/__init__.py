"""What suites of tests and benchmarks import: cases of each op, their inputs, references, tolerances and costs.

Start at `softprompt_kernels.testing.cases`.
"""
