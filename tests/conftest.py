"""What every test shares: a private kernel cache for the run, no network, and as many threads as CI has cores."""

import os
import shutil
import sys
import tempfile

# Before torch is imported: libgomp reads its variables once. Two test processes with two threads each on two cores would
# spend their time spinning at barriers; passive waiting makes a barrier give the core away.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TILEWELD_EXECUTABLES"] = "0"  # a test is about compiling, whatever an earlier one compiled; tests/compiler/test_executable_cache.py turns it on

_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if not _WORKER:
    # Workers inherit both folders from the process that starts them, so a kernel is built once a run, not once a worker.
    _PRIVATE = tempfile.mkdtemp(prefix="tileweld-tests-")
    os.environ["TILEWELD_CACHE_DIR"] = os.path.join(_PRIVATE, "kernels")
    os.environ["TRITON_CACHE_DIR"] = os.path.join(_PRIVATE, "triton")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# 200 ms an example, hypothesis' limit, says how busy the machine is: four lines of arithmetic have passed it.
hypothesis.settings.register_profile("busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy machine")

# Two, also where there are more cores: a kernel that races must have somebody to race with, and timings stay comparable.
torch.set_num_threads(2)


def pytest_unconfigure(config):
    if not _WORKER:
        shutil.rmtree(_PRIVATE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Compiled code and its guards never travel from one test to the next; nor does the random state, nor what was warned of once."""
    torch.manual_seed(0)
    if "tileweld.compiler.degrade" in sys.modules:
        sys.modules["tileweld.compiler.degrade"]._said.clear()
    yield
    if "torch._dynamo" in sys.modules:  # importing it costs two seconds; a test that never compiles need not pay them
        torch._dynamo.reset()
