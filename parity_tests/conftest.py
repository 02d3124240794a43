"""Parity is proven in float64: JAX's 64-bit types are on for every test in this process."""

import os
import tempfile

os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp(prefix="flax-resnet-test-cache-"))

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 8)  # virtual ones, for the tests of data parallelism
