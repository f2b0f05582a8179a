"""GraLoRA (arXiv 2505.20355) of PEFT, as a method that recipes and studies of pera can name."""

from peft import GraloraConfig

from pera_lab.methods import Method

METHODS = {
    "gralora": Method(
        GraloraConfig,
        aliases={"dropout": "gralora_dropout"},  # the common name of an option, and the class's own name
    ),
}
