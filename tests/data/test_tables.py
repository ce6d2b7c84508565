"""Tables are read and written without threads of Arrow's own, which could abort a process at its end."""

import subprocess
import sys

PROGRAM = """
import io, os
import pyarrow
from hpc_mm.data.tables import arrow_batches, parquet_batches, read_table, write_table

table = pyarrow.table({"a": list(range(10_000)), "b": [str(number) for number in range(10_000)]})
before = len(os.listdir("/proc/self/task"))
data = write_table(table)
assert read_table(data) == table
pieces = list(parquet_batches(io.BytesIO(data), 3000, ["a"]))
assert [piece.num_rows for piece in pieces] == [3000, 3000, 3000, 1000] and pieces[0].schema.names == ["a"]
stream = io.BytesIO()
with pyarrow.ipc.new_stream(stream, table.schema) as writer:
    writer.write_table(table)
pieces = list(arrow_batches(io.BytesIO(stream.getvalue()), 3000, ()))
assert pyarrow.Table.from_batches(pieces) == table
print(before, len(os.listdir("/proc/self/task")))
"""


def test_no_thread_is_left() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    before, after = result.stdout.split()
    assert before == after
