"""Parity is proven in float64: JAX's 64-bit types are on for every test in this process."""

import os
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
os.environ.setdefault("XDG_CACHE_HOME", tempfile.mkdtemp(prefix="flax-resnet-test-cache-"))

import jax

jax.config.update("jax_enable_x64", True)
