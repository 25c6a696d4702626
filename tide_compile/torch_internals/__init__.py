"""What is used of torch beyond its public names: one file per concern, checked for the versions in ``versions``.

The only other place is ``kernels/cpu``: oneDNN's operators and Inductor's GEMM template, a file each.
"""
