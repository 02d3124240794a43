"""Weight files that are made to do harm.

Each function here writes one into `directory` and returns its path. Code in it, if it is ever
executed, makes the file `canary`.
"""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any


class Payload:
    """Makes a file when it is unpickled without care."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def pickle_that_runs_code(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.pt"
    path.write_bytes(pickle.dumps({"state_dict": Payload(canary)}, protocol=2))
    return path


def archive_that_runs_code(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"w": Payload(canary)}, protocol=2))
        archive.writestr("x/version", "3\n")
    return path


def archive_that_unpacks_elsewhere(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"w": 1}, protocol=2))
        archive.writestr(f"x/../../../../../..{canary}", "")
        archive.writestr(str(canary), "")
    return path


def archive_bomb(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.th"
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("x/data.pkl", "w") as file:
        for _ in range(1000):
            file.write(bytes(1 << 20))
    return path


def tensors_that_claim_terabytes(directory: Path, step: int, canary: Path) -> Path:
    import torch

    path = directory / "x.pt"
    torch.save({"conv1.weight": torch.zeros(1).expand(10**6, 10**6)}, path)
    return path


def safetensors_that_claim_terabytes(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.safetensors"
    entry = {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
    header = json.dumps({"conv1.weight": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    return path


def safetensors_with_an_endless_header(directory: Path, step: int, canary: Path) -> Path:
    path = directory / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    return path
