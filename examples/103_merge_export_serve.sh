#!/bin/sh
# One adapter, four forms: merged, a LoRA for any server, GGUF for llama.cpp, and cut to a smaller rank.
#     sh examples/103_merge_export_serve.sh RUN       a run folder, such as own-run of example 102; about 3 minutes
set -eu
RUN=$1

pera merge "$RUN" --output merged                           # a plain model; its outputs are compared with the adapter's
pera export "$RUN" --to lora --output lora                  # a LoRA in PEFT's format, exact
pera export "$RUN" --to lora --max-rank 8 --output lora-8   # its best approximation of rank 8, with the loss of accuracy
pera export "$RUN" --for vllm --output for-vllm             # within the server's limits; prints the command that starts it
pera verify merged lora                                     # do two models answer alike?

# Plain PEFT loads the export. pera is not needed.
python - <<'PYTHON'
from peft import PeftConfig

config = PeftConfig.from_pretrained("lora")
print(f"{config.peft_type.value} of rank {config.r}")
PYTHON
