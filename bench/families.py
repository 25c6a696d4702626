"""python -m bench.families: tide against the eager reference on every causal language model of transformers.

The matrix is a test of correctness and lies in ``tests.families.matrix``: see there. Here it has the name of before.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("tests.families.matrix", run_name="__main__")
