"""Teach a model facts and ask for them, with a LoRA and with anchors of the same rank.

    python examples/201_teach_facts.py [MODEL [FACTS [STEPS]]]

The model learns 50 invented phone numbers in one MLP. A number counts if the model gives it back whole. It takes
about 10 minutes on two cores.
"""

import sys

from pera_lab.evaluation import evaluate_run
from pera_lab.recipe import load_recipe
from pera_lab.runs import Run
from pera_lab.training import train

MODEL, FACTS, STEPS = (sys.argv[1:] + ["smollm2-135m", "50", "200"][len(sys.argv) - 1 :])[:3]

if __name__ == "__main__":
    for method in ("lora", "pera-anchors-16"):
        overrides = [f"model={MODEL}", f"method.name={method}", f"task.size={FACTS}", f"training.max_steps={STEPS}"]
        recipe = load_recipe("phonebook-smollm2", overrides)
        run = Run.create(recipe)
        train(recipe, run)
        score = evaluate_run(run)
        known, bits = f"{score.correct} of {score.n} numbers", f"{score.memory.bits:.0f} bits stored"
        print(f"{method}, r = {recipe.method['r']}: {known}, {bits}")
