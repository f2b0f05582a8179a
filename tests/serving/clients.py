"""Runs the command that an export prints, and asks the server over its own interface."""

import json
import os
import shlex
import signal
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PORT = 8917
PATIENCE = 600
"""Seconds that a server may take to start or to answer."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}


class Request(NamedTuple):
    """What every server is asked."""

    start: str
    """The command that the export prints."""
    base: Path
    output: Path
    """The export."""
    bin: Path
    """The programs of the server's environment."""
    questions: list[str]
    """What a user says."""
    texts: list[str]
    """The questions in the chat template of the base."""
    prompts: list[list[int]]
    """The ids of the texts."""
    count: int
    """Number of tokens of each answer."""
    top: int
    """Number of log-probabilities at each token."""
    end: int
    """The token that ends an answer."""
    log: Path
    """File for the output of the server."""

    def environment(self):
        """Environment variables of the server: its own programs come first, and no package of this process is seen."""
        own = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return {**own, **OFFLINE, "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}"}


@contextmanager
def started(request, options):
    """Run the printed command with further options, until the block ends. Yields the address of the server."""
    address = f"http://127.0.0.1:{PORT}"
    with request.log.open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {request.start} {options}"],
            env=request.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        _wait(server, address, request)
        yield address
    finally:
        _end(server)


def _wait(server, address, request):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=10):
                return
        except OSError:  # also an answer such as 503, while it loads the model
            time.sleep(1)
    raise RuntimeError(f"the server did not start: {request.start}\n{request.log.read_text()[-4000:]}")


def _end(server):
    """End the server with all the processes that it started."""
    for number, seconds in ((signal.SIGINT, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(server.pid, number)
        except ProcessLookupError:
            return
        try:
            server.wait(seconds)
        except subprocess.TimeoutExpired:
            continue


def post(address, path, **body):
    """The JSON response to a request with this JSON body."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{path}: {error.read().decode()}") from error


def vllm(request):
    """Answers of the export and of the base model, from ``/v1/completions``."""
    with started(request, f"--host 127.0.0.1 --port {PORT}") as address:
        return [_vllm_answers(address, name, request) for name in (request.output.name, str(request.base))]


def _vllm_answers(address, model, request):
    body = {"prompt": request.prompts, "max_tokens": request.count, "temperature": 0, "logprobs": request.top}
    choices = post(address, "/v1/completions", model=model, return_tokens_as_token_ids=True, **body)["choices"]
    answers = []
    for choice in sorted(choices, key=lambda choice: choice["index"]):
        found = choice["logprobs"]
        tokens = [_number(token) for token in found["tokens"]]
        answers.append(
            [tokens, [[[_number(token), value] for token, value in row.items()] for row in found["top_logprobs"]]]
        )
    return answers


def _number(token):
    """The id in ``token_id:17``."""
    return int(token.rpartition(":")[2])


def mlx(request):
    """Answers of the export, from ``/v1/completions``."""
    with started(request, f"--host 127.0.0.1 --port {PORT}") as address:
        body = {"model": "default_model", "max_tokens": request.count, "temperature": 0, "top_logprobs": request.top}
        answers = []
        for text in request.texts:
            choice = post(address, "/v1/completions", prompt=text, logprobs=True, **body)["choices"][0]
            rows = [entry["top_logprobs"] for entry in choice["logprobs"]["content"]]
            answers.append(_most_probable([[[entry["id"], entry["logprob"]] for entry in row] for row in rows]))
        return [answers]


def llama_cpp(request):
    """Answers of the export and of the base model, from ``/completion``."""
    request = request._replace(start=request.start.replace("BASE.gguf", str(gguf_of(request.base))))
    with started(request, f"--host 127.0.0.1 --port {PORT}") as address:
        return [_llama_cpp_answers(address, scale, request) for scale in (1.0, 0.0)]


def gguf_of(base):
    """The GGUF file of a base model, next to its folder."""
    return base.with_name(base.name + ".gguf")


def _llama_cpp_answers(address, scale, request):
    body = {"n_predict": request.count, "n_probs": request.top, "temperature": 0, "lora": [{"id": 0, "scale": scale}]}
    answers = []
    for prompt in request.prompts:
        # It would continue from the prompt as computed with another scale: github.com/ggml-org/llama.cpp/issues/26207
        rows = post(address, "/completion", prompt=prompt, cache_prompt=False, **body)["completion_probabilities"]
        answers.append(_most_probable([[[e["id"], e["logprob"]] for e in row["top_logprobs"]] for row in rows]))
    return answers


def _most_probable(ranked):
    """An answer from its log-probabilities alone. Without sampling each token is the most probable one."""
    return [[max(row, key=lambda entry: entry[1])[0] for row in ranked], ranked]


def peft(request):
    """Answers of the model that the printed program loads."""
    return [_loaded(request, "import greedy; greedy.answer(model)", ("prompts", "count", "top", "end"))]


def mistralrs(request):
    """Answers of the export and of the base model, from the printed program."""
    then, asked = "import ask_mistralrs; ask_mistralrs.answer(runner)", ("questions", "count", "top")
    both = _loaded(request, then, asked, adapter=request.output.name)
    return [[_most_probable(ranked) for ranked in answers] for answers in both]


def _loaded(request, then, asked, **further):
    """The answers that a program adds to what the printed one loads, without waiting for a person after it."""
    _, *_, code = shlex.split(request.start, comments=True)
    return _run(request, ["-c", f"{code}\n{then}"], asked, **further)


def _run(request, arguments, asked, **further):
    """What Python in the server's environment writes into the file that the JSON on its standard input names."""
    file = request.log.with_suffix(".json")
    asked = {key: getattr(request, key) for key in asked}
    done = subprocess.run(
        [request.bin / "python", *arguments],
        env={**request.environment(), "PYTHONPATH": str(HERE)},
        input=json.dumps({**asked, **further, "file": str(file)}),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    request.log.write_text(done.stdout + done.stderr)
    if done.returncode:
        raise RuntimeError(f"the program failed: {request.start}\n{done.stderr[-4000:]}")
    return json.loads(file.read_text())


CLIENTS = {
    "vllm": vllm,
    "mlx": mlx,
    "mistralrs": mistralrs,
    "llama.cpp": llama_cpp,
    "peft": peft,
}
