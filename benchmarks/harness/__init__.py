"""What the suites of `make bench` share: cases, requirements, the report. The measuring is softprompt_kernels.bench."""
