"""What the scripts share. Import it first: it sets the environment in which numpy and paddle are loaded."""

import importlib.util
import os
import sys
import warnings
import zlib  # noqa: F401  paddlepaddle 2.6 dies in inflateReset2 if its own zlib is loaded before Python's

from simcse.machine import PROCESSOR

if importlib.util.find_spec("numpy") is None:
    from simcse.console import HOW_TO_INSTALL

    sys.exit(f"numpy {HOW_TO_INSTALL}")
# One thread a matrix product, so that what numpy computes does not depend on their number; ann_util runs several
# products side by side.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "AuthenticAMD" in PROCESSOR and " avx2" in PROCESSOR:
    # Paddle's MKL, of 2019, runs processors that are not Intel's on SSE unless this names a kind before it is loaded:
    # 5 for AVX2, 7 for AVX-512. Matrix products are up to five times faster for it.
    wide = all(f" {part}" in PROCESSOR for part in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "7" if wide else "5")
os.environ.setdefault("GLOG_minloglevel", "2")  # paddle's C++ notes and warnings say nothing that a user can act on
# Else tokenizers warns of every process that a package starts; none of them tokenizes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# The last is the GPU build without a GPU: with --device cpu nothing is wrong, and with --device gpu it is an error.
warnings.filterwarnings("ignore", message="No ccache found|Setuptools is replacing distutils|You are using GPU version")
