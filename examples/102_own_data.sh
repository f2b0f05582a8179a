#!/bin/sh
# Train on rows of your own, score held-out rows, and answer new ones.
#     sh examples/102_own_data.sh [MODEL]      about 2 minutes on two cores
set -eu
MODEL=${1:-smollm2-135m}
HERE=$(dirname "$0")

# 1. Rows: one JSON object per line, with the columns prompt and completion.
head -n 2 "$HERE/102_rows.jsonl"

# 2. A recipe: everything that it leaves out has a default.
cat > own.yaml <<RECIPE
model: {name: $MODEL}
method: {name: pera, r: 4, normalization: rms, target_modules: [q_proj, v_proj]}
task: {name: own, data: $HERE/102_rows.jsonl, test_size: 10}
training: {learning_rate: 3.0e-3, max_steps: 30, batch_size: 8, warmup_steps: 3}
evaluation: {max_new_tokens: 12}
RECIPE

# 3. Train and score. The run folder holds everything, the resolved recipe included.
pera train own.yaml --output own-run
pera evaluate own-run --base
pera evaluate own-run

# 4. Answer new rows.
echo '{"prompt": "Turn this into a polite request: Open the window."}' > new.jsonl
pera predict own-run --input new.jsonl --output answers.jsonl
cat answers.jsonl
