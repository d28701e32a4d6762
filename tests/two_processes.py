"""Runs `main(folder)` of each module named, one after the other in the same processes, until one fails.

Starting processes takes longer than most of what they do. `FOLDER/MODULE-RANK.txt` ends up empty, or holds the error.
"""

import importlib
import sys
import traceback
from pathlib import Path

import torch


def main(folder: Path, *modules: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    for module in modules:
        report = folder / f"{module}-{torch.distributed.get_rank()}.txt"
        try:
            torch.manual_seed(0)
            importlib.import_module(module).main(folder)
        except BaseException:
            report.write_text(traceback.format_exc())
            raise
        report.touch()
        torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
