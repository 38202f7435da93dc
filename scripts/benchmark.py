"""Compare with other libraries on the machine at hand; the options are those of `hf-vit benchmark`.

    python scripts/benchmark.py inference --models B/16 --output-dir model_cards/benchmarks
    python scripts/benchmark.py --quick                                    (one small case a suite)

Libraries that are not installed are left out: pip install timm vit-pytorch onnx onnxscript onnxruntime openvino
"""

import sys

from hf_vit.cli import app

if __name__ == "__main__":
    app(["benchmark", *sys.argv[1:]])
