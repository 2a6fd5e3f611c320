"""What the scripts share. Import it first: it sets the environment in which numpy and paddle are loaded."""

import contextlib
import importlib.util
import os
import sys
import tempfile
import warnings
import zlib  # noqa: F401  paddlepaddle 2.6 dies in inflateReset2 if its own zlib is loaded before Python's

from simcse.machine import PROCESSOR
from simcse.signals import report_interrupted_imports

report_interrupted_imports()
if not os.access(os.path.expanduser("~"), os.W_OK):
    # Libraries keep settings and caches in the home folder, and some end with an error without one.
    with contextlib.suppress(OSError):  # there is no folder of temporary files either
        home = tempfile.TemporaryDirectory(prefix="simcse-home-")
        os.environ["HOME"] = home.name
if importlib.util.find_spec("numpy") is None:
    from simcse.console import HOW_TO_INSTALL

    sys.exit(f"numpy {HOW_TO_INSTALL}")
# One thread for each matrix product, so that numpy's results do not depend on the number of threads. The exact search
# runs several products at a time.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if "AuthenticAMD" in PROCESSOR and " avx2" in PROCESSOR:
    # Paddle's MKL is of 2019, and takes SSE on processors that are not Intel's, unless this variable names a kind
    # before it is loaded: 5 for AVX2, 7 for AVX-512. Matrix products are up to five times faster with it.
    has_avx512 = all(f" {part}" in PROCESSOR for part in ("avx512f", "avx512bw", "avx512dq", "avx512vl"))
    os.environ.setdefault("MKL_DEBUG_CPU_TYPE", "7" if has_avx512 else "5")
os.environ.setdefault("GLOG_minloglevel", "2")  # a user can do nothing about paddle's C++ notes and warnings
# Without this, tokenizers warns about every process that a package starts; none of them tokenizes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
# What paddle and paddlenlp warn of, and no user can do anything about. You are using GPU version: a GPU build without a
# GPU; --device cpu does not mind, and --device gpu ends with an error. Tensor do not have 'place': BERT's code, when
# paddle 3.3 exports its graph.
warnings.filterwarnings("ignore", message="No ccache found|Setuptools is replacing distutils|You are using GPU version|"
                                          "Tensor do not have 'place' interface")
