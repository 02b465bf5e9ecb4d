"""log.csv: a row for each step, which a run that is killed and goes on has once, too.

    step,loss,lr,clips_per_second,seconds
    1,1.023,4e-05,11.2,0.71
"""

import csv
import os
from pathlib import Path

from .. import checkpoint


def begin_log(path: Path, columns: list[str], step: int) -> None:
    """An empty log; or at a step above 0 that of the run that goes on, without the rows that it wrote after its last save."""
    rows = []
    if step and path.exists():
        with checkpoint.blaming(path), open(path, newline='', encoding='utf-8') as file:
            table = csv.DictReader(file)
            if table.fieldnames != columns:
                raise ValueError(f'its columns are {", ".join(table.fieldnames or ["none"])}, and not {", ".join(columns)}: move '
                                 'it away, and a new one is begun')
            rows = [row for row in table if row['seconds'] and int(row['step']) <= step]
    temporary = path.with_suffix('.tmp')
    with open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def add_rows(path: Path, columns: list[str], rows: list[dict]) -> None:
    with open(path, 'a', newline='', encoding='utf-8') as file:
        csv.DictWriter(file, columns).writerows(rows)
