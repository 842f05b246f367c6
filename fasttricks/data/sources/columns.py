"""Columns of numbers in an .npz, read as numpy.savez writes them and no other way: nothing is unpacked, and no code is run.

numpy.load would unpack a zip bomb, make an array of the size that a header claims, and parse that header as Python.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

_END = b"PK\5\6"  # a zip's end record; 12 bytes on stands the length of its list of members
_LONGEST_LIST = 1 << 12
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([^']{1,10})', 'fortran_order': False, 'shape': \((\d{1,18}),\), \} *\n",
    re.DOTALL,
)


def read_columns(content: bytes, kinds: Mapping[str, DTypeLike]) -> dict[str, NDArray[Any]]:
    """The one-dimensional arrays that `content`, an .npz, holds: those of `kinds`, each of its dtype, and no others.

    Raises ValueError with the fault, in words. Cost: a copy of `content` and a checksum.
    """
    try:
        end = content.rindex(_END)
        if struct.unpack_from("<I", content, end + 12)[0] > _LONGEST_LIST:
            raise ValueError("too many members")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            infos = archive.infolist()
            names = sorted(info.filename for info in infos)
            if names != sorted(f"{name}.npy" for name in kinds):
                raise ValueError(f"of {', '.join(names)[:200]}")
            if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in infos):
                raise ValueError("compressed")
            members = {name: archive.read(f"{name}.npy") for name in kinds}
    except Exception as error:  # foreign bytes fail in the zip reader in many ways
        raise ValueError(
            f"not the columns {', '.join(kinds)} as they are written: {error or type(error).__name__}"
        ) from error
    return {name: _column(name, members[name], np.dtype(kind)) for name, kind in kinds.items()}


def _column(name: str, member: bytes, dtype: np.dtype[Any]) -> NDArray[Any]:
    header = _HEADER.match(member[:1000])
    if header is None:
        raise ValueError(f"column {name}: must be a list of numbers as numpy.savez writes it")
    length, kind, count = int.from_bytes(header[1], "little"), header[2].decode("latin-1"), int(header[3])
    if kind != dtype.str or length + 10 != header.end():
        raise ValueError(f"column {name}: must be of {dtype.str}, not {kind!r}")
    if count * dtype.itemsize != len(member) - header.end():
        raise ValueError(
            f"column {name}: must have {count} numbers, but has {len(member) - header.end()} bytes of them"
        )
    return np.frombuffer(member, dtype, offset=header.end())
