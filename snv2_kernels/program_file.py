"""The file of a program: sections, their checksums, and how it is written and read
(``docs/program.md``)."""

from __future__ import annotations

import os
import stat
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from snv2_kernels import _native
from snv2_kernels.packing.planes import ELEMENTS

__all__ = [
    "ABOUT", "CLASSES", "CPU_PLAN", "CPU_WEIGHTS", "GPU_PARAMETERS", "GPU_PLAN",
    "GPU_WEIGHTS", "INPUT", "NORMALIZATION", "Section", "read_program", "write_program",
]  # fmt: skip

_MAGIC = b"\x89SNV2\r\n\x1a"
_BYTE_ORDER, _FORMAT = 0x01020304, 1
_ALIGN = 64
# snv2::SectionKind
ABOUT, INPUT, NORMALIZATION, CLASSES = 1, 2, 3, 4
CPU_PLAN, CPU_WEIGHTS, GPU_PLAN, GPU_WEIGHTS, GPU_PARAMETERS = 16, 17, 32, 33, 34


@dataclass(frozen=True)
class Section:
    kind: int
    dtype: int
    data: bytes

    @staticmethod
    def of(kind: int, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Section:
        data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return Section(kind, ELEMENTS.index(dtype), data)


def _file(sections: list[Section], library: str) -> bytes:
    sections = sorted(sections, key=lambda section: (section.kind, section.dtype))
    offset = 64 + 32 * len(sections)
    table, body = b"", b""
    for section in sections:
        padding = -offset % _ALIGN
        offset += padding
        entry = section.kind, section.dtype, offset, len(section.data), zlib.crc32(section.data), 0
        table += struct.pack("<IIQQII", *entry)
        body += bytes(padding) + section.data
        offset += len(section.data)
    name = library.encode()[:31]

    def header(checksum: int) -> bytes:
        fields = _BYTE_ORDER, _FORMAT, offset, len(sections), checksum
        return _MAGIC + struct.pack("<IIQII32s", *fields, name)

    return header(zlib.crc32(header(0) + table)) + table + body


def write_program(path: Path, sections: list[Section], library: str) -> None:
    """Write a file as a whole or not at all; ``library`` is the version that writes it."""
    target = path.resolve()  # a link stays one
    if target.exists() and not target.is_file():
        raise ValueError(f"path: {path} is there, and no file")
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.write_bytes(_file(sections, library))
        read_program(part)
        if target.exists():
            part.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(part, target)
    except ValueError as error:
        # The reader's reason is about what was given.
        reason = str(error).removeprefix(f"path: {part}: program: ")
        raise ValueError(f"model: no program can hold it: {reason}") from None
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
    finally:
        part.unlink(missing_ok=True)


def read_program(path: str | os.PathLike[str]) -> _native.Program:
    """The checked program of a file."""
    with open(path, "rb"):  # errors of the system are Python's own
        pass
    try:
        return _native.Program(os.fspath(path))
    except RuntimeError as error:
        if "cannot allocate memory" in str(error):
            raise
        raise ValueError(f"path: {error}") from None
