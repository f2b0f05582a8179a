#!/bin/sh
# PERA on one large GPU, in under ten minutes: is it right there, and what does it cost over LoRA?
#
#     sh benchmarks/gpu.sh --output gpu --model FOLDER    # FOLDER: SmolLM2-135M in Hugging Face's format, if at hand
#     sh benchmarks/gpu.sh --output gpu --size tiny       # the same on tiny shapes, for a CPU
#
# Needs torch, transformers and peft of the machine's python3. PERA runs from its sources.
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root/src:$root/benchmarks:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" "$root/benchmarks/gpu.py" "$@"
