"""Parity is proven in float64: JAX's 64-bit types are on for every test in this process."""

import logging
import os
import tempfile

import jax

os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads spin while they wait for JAX's
CACHE = tempfile.TemporaryDirectory(prefix="flax-resnet-test-")  # removed when the tests end
os.environ["XDG_CACHE_HOME"] = CACHE.name

logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # as in `cli.run`

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)  # virtual ones, for the tests of data parallelism
