"""Asks OpenVINO GenAI with an exported LoRA. It runs in the environment of OpenVINO GenAI."""

import json
import sys
from pathlib import Path

import openvino
import openvino_genai as genai
from optimum.exporters.openvino import main_export

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


def answers(pipeline, request, adapters):
    """Greedy answers, with the log-probability of each token."""
    found = []
    for i, prompt in enumerate(request["prompts"]):
        config = genai.GenerationConfig(max_new_tokens=request["count"], do_sample=False, logprobs=1)
        config.adapters, config.eos_token_id = adapters, request["end"]
        handle = pipeline.add_request(i, openvino.Tensor([prompt]), config)
        while pipeline.has_non_finished_requests():
            pipeline.step()
        (output,) = handle.read_all()
        pairs = zip(output.generated_ids, output.generated_log_probs, strict=True)
        found.append([list(output.generated_ids), [[[token, value]] for token, value in pairs]])
    return found


request = json.load(sys.stdin)
model = Path(request["base"] + ".openvino")
if not model.is_dir():
    main_export(request["base"], output=model, task="text-generation-with-past")
adapter = genai.Adapter(request["output"] + "/adapter_model.safetensors")
scheduler = genai.SchedulerConfig()
scheduler.cache_size = 1
pipeline = genai.ContinuousBatchingPipeline(
    model, scheduler, "CPU", {**EXACT, "adapters": genai.AdapterConfig(adapter)}
)
both = [answers(pipeline, request, chosen) for chosen in (genai.AdapterConfig(adapter), genai.AdapterConfig())]
Path(request["file"]).write_text(json.dumps(both))
