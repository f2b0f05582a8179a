"""Asks the model that a program of mistral.rs loaded. It runs in the environment of mistral.rs."""

import json
import sys

from mistralrs import ChatCompletionRequest


def answer(runner):
    """Answer the request on the standard input, with the adapter and without, into the file that it names."""
    request = json.load(sys.stdin)
    with open(request["file"], "w") as stream:
        json.dump([_answers(runner, request, adapter) for adapter in (request["adapter"], None)], stream)


def _answers(runner, request, adapter):
    asked = {"model": "default", "max_tokens": request["count"], "temperature": 0.0, "adapter": adapter}
    answers = []
    for question in request["questions"]:  # only a chat returns log-probabilities
        messages = [{"role": "user", "content": question}]
        found = ChatCompletionRequest(messages=messages, logprobs=True, top_logprobs=request["top"], **asked)
        content = runner.send_chat_completion_request(found).choices[0].logprobs.content
        answers.append([[[entry.token, entry.logprob] for entry in row.top_logprobs] for row in content])
    return answers
