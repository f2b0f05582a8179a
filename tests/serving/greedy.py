"""Greedy answers of a model in transformers. Old versions of transformers run it too, so it imports only torch."""

import json
import sys

import torch


@torch.no_grad()
def greedy(model, prompts, count, top, end):
    """Answer prompts of token ids without sampling.

    Args:
        model: the model.
        prompts: lists of token ids.
        count: number of tokens of an answer.
        top: number of log-probabilities to return at each token.
        end: id of the token that ends an answer. It is left out.

    Returns:
        For each prompt the ids of the answer, and for each of them the most probable tokens, ``[id, log-probability]``.
    """
    model.eval()
    answers = []
    for prompt in prompts:
        tokens, ranked, new, cache = [], [], prompt, None
        while len(tokens) < count:
            found = model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True)
            row, cache = found.logits[0, -1].float().log_softmax(-1), found.past_key_values
            values, ids = row.topk(top)
            if ids[0] == end:
                break
            new = [int(ids[0])]
            tokens += new
            ranked.append([list(pair) for pair in zip(ids.tolist(), values.tolist(), strict=True)])
        answers.append([tokens, ranked])
    return answers


def answer(model):
    """Answer the request on the standard input, and write the answers to the file that it names."""
    request = json.load(sys.stdin)
    file = request.pop("file")
    with open(file, "w") as stream:
        json.dump(greedy(model, **request), stream)
