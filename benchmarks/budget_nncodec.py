"""NNCodec (ISO/IEC 15938-17) as a rival of `benchmarks.budget`: run by a Python of its own, as it wants numpy < 2.

    PYTHON benchmarks/budget_nncodec.py STATE.safetensors OUT_FOLDER QP [QP ...]

Its package imports torchvision, OpenCV, torchmetrics and ptflops without using them here; empty modules stand in.
"""

import importlib
import json
import os
import sys
import time
from unittest.mock import MagicMock


class Absent(MagicMock):
    """A module that nothing is asked of."""

    __file__ = "absent"
    __path__ = ()
    __spec__ = None


for name in ("", ".models", ".transforms", ".datasets", ".transforms.functional"):
    sys.modules[f"torchvision{name}"] = Absent()
for name in ("cv2", "torchmetrics", "ptflops"):
    sys.modules[name] = Absent()

import numpy as np  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

nnc = importlib.import_module("nncodec.nnc")
state = load_file(sys.argv[1])
for qp in map(int, sys.argv[3:]):
    stream = os.path.join(sys.argv[2], f"{qp}.nnc")
    start = time.perf_counter()
    nnc.compress(state, bitstream_path=stream, qp=qp, use_dq=True)
    seconds = time.perf_counter() - start
    found = {name: np.ascontiguousarray(value) for name, value in nnc.decompress(stream).items()}
    save_file(found, os.path.join(sys.argv[2], f"{qp}.safetensors"))
    with open(os.path.join(sys.argv[2], f"{qp}.json"), "w", encoding="utf-8") as file:
        json.dump({"bytes": os.path.getsize(stream), "seconds": seconds}, file)
