"""The compiler: from Dynamo's graph of a decoder to pieces that can be skipped.

The order of the passes is the order of these lists; ``run`` is the loop. Analyses read the Dynamo graph and return
fields of the ``Plan``; placement does so too, knowing the settings; rewrites turn the graph, then the ``Program``, into
the next one. Each says in its docstring what a graph looks like before and after, and why that is safe.
"""

from tide_compile.passes.compact_rows import compact_rows
from tide_compile.passes.fill_kv import fill_kv
from tide_compile.passes.find_boundaries import find_boundaries
from tide_compile.passes.find_layers import find_layers
from tide_compile.passes.find_padding import find_padding
from tide_compile.passes.mask_rows import mask_rows
from tide_compile.passes.place_checkpoints import place_checkpoints
from tide_compile.passes.splice_routers import splice_routers
from tide_compile.passes.split_segments import split_segments

ANALYSES = (find_layers, find_boundaries, find_padding)
PLACEMENT = (place_checkpoints,)
REWRITES = (split_segments, fill_kv, splice_routers, mask_rows, compact_rows)
