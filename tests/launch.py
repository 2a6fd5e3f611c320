"""paddle.distributed.launch, on CPU ranks that are forked by the tests' server (see forkserver.py)."""

import os
import runpy
import sys

sys.executable = os.environ["SIMCSE_FORKED_PYTHON"]  # what it starts the ranks with
runpy.run_module("paddle.distributed.launch", run_name="__main__")
