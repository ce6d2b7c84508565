"""Small parquet files, and large ones piece by piece, read and written by the calling thread alone.

Arrow's own threads may be cut off at the end of the interpreter, which then aborts, all work done (apache/arrow#34314).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO


def read_table(data: bytes) -> Any:
    """The pyarrow.Table in the bytes of a parquet file."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(io.BytesIO(data), pre_buffer=False).read(use_threads=False)


def write_table(table: Any) -> bytes:
    """A parquet file. The same table gives the same bytes."""
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, compression="zstd")
    return file.getvalue()


def parquet_batches(file: BinaryIO, rows: int, columns: Sequence[str]) -> Iterator[Any]:
    """Record batches of so many rows of a parquet file; of some columns, or all."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file, pre_buffer=False)
    yield from table.iter_batches(rows, columns=chosen(table.schema_arrow.names, columns), use_threads=False)


def arrow_batches(file: BinaryIO, rows: int, columns: Sequence[str]) -> Iterator[Any]:
    """The same of an Arrow stream, as the ``datasets`` library saves it."""
    import pyarrow

    for batch in pyarrow.ipc.open_stream(file, options=pyarrow.ipc.IpcReadOptions(use_threads=False)):
        batch = batch.select(chosen(batch.schema.names, columns))
        yield from (batch.slice(start, rows) for start in range(0, batch.num_rows, rows))


def chosen(names: Sequence[str], only: Sequence[str]) -> list[str]:
    return [name for name in names if not only or name in only]
