"""A warm process that runs captures in children which may be killed: importing torch takes longer than a tiny capture.

Each line on stdin is a pickled CaptureRequest's path; it answers with the child's pid, and with its exit status when it ends.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

if __name__ == "__main__":
    import torch
    import transformers.models.auto.modeling_auto
    import transformers.models.llava.modeling_llava
    import transformers.models.qwen2.modeling_qwen2
    import transformers.models.siglip.modeling_siglip  # noqa: F401

    from pipelines.cache_teacher import capture

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                capture(pickle.loads(Path(line.strip()).read_bytes()))
            except BaseException as error:
                print(repr(error), file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
