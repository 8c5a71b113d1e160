"""What `benchmarks/gpu.sh` runs: all there is to know about GPUs, part by part.

`parts` lists the parts; each runs in a process with a deadline of its own. They are
functions: `exact` compares trainings, `refusals` what is refused and whether memory is
given back, `speed` times epochs, `product` has a kernel in the order of
docs/arithmetic.md. Each returns its figures, and raises what is wrong.
"""
