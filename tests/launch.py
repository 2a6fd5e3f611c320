"""paddle.distributed.launch as a script, which the tests' server can fork (see forkserver.py), and then its ranks."""

import runpy

runpy.run_module("paddle.distributed.launch", run_name="__main__")
