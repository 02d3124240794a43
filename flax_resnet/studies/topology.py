"""TPUs that are not there, as their compiler knows them: libtpu, which needs none."""

import importlib.metadata
import importlib.util
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from flax_resnet.errors import ConfigError
from flax_resnet.parallel.sharding import AXIS

GIB = 2**30
EXAMPLES = "v5e:1x1, v5e:2x4, v5e:16x16, v6e:2x2, v4:2x2x1, v5p:2x2x1 or v5p:4x4x4"
NAME = re.compile(r"(?P<generation>\w+):(?P<sides>[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2})")
# libtpu looks for a machine of Google's unless it is told of one. It lets one process at a time
# have the TPUs, which none has here.
SURROUNDINGS = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Chip(NamedTuple):
    """What Google says of a chip (docs.cloud.google.com/tpu/docs/v5e, and so on)."""

    name: str
    memory: int  # bytes
    flops: float  # a second, in bfloat16
    bandwidth: float  # of its memory, in bytes a second


CHIPS = {  # by what JAX calls them
    "TPU v4": Chip("v4", 32 * GIB, 275e12, 1.228e12),
    "TPU v5 lite": Chip("v5e", 16 * GIB, 197e12, 0.819e12),
    "TPU v5": Chip("v5p", 95 * GIB, 459e12, 2.765e12),
    "TPU v6 lite": Chip("v6e", 32 * GIB, 918e12, 1.64e12),
}


def prepare() -> None:
    """Tells JAX and libtpu that no TPU is to be looked for. To be called before JAX is used."""
    os.environ.update(SURROUNDINGS)
    jax.config.update("jax_platforms", "cpu")
    # A program that is read instead of compiled would not say how long compiling takes.
    jax.config.update("jax_enable_compilation_cache", False)


def mesh(name: str) -> Mesh:
    """All chips of a topology in a row, such as "v5e:16x16": a generation, and how they lie.

    Raises:
        ConfigError: libtpu is not installed, or knows no such topology.
    """
    if not is_installed():
        raise ConfigError("TPU's compiler is not here: pip install 'flax-resnet[tpu]'")
    known = NAME.fullmatch(name)
    if not known:  # some others, such as v5e:0x0, would end the process
        raise ConfigError(f"--topology must be such as {EXAMPLES}, got {name!r}")
    # A host has 2x2 chips, or all of them if they are fewer.
    sides = [min(int(side), 2) for side in known["sides"].split("x")]
    options: dict[str, Any] = {"chips_per_host_bounds": [*sides[:2], 1]}
    if known["generation"].lower() == "v4":  # whose two cores else are devices of their own
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as e:
        reason = " ".join(str(e).split()).removeprefix("INVALID_ARGUMENT: ")
        raise ConfigError(f"--topology must be such as {EXAMPLES}, got {name!r}: {reason}") from e
    return Mesh(np.array(found.devices), (AXIS,))


def is_installed() -> bool:
    return "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None


def version_of_compiler() -> str | None:
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:  # TPU_LIBRARY_PATH names a file
        return None


def chip_of(mesh: Mesh) -> Chip | None:
    """None where there are no figures."""
    return CHIPS.get(mesh.devices.flat[0].device_kind)
