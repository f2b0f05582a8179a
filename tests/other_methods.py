"""Tiny adapters of PEFT's other methods: those that are folded into LoRA, and those whose update has full rank."""

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, MontecloraConfig, get_peft_model
from peft.utils import PeftType

from tiny import llama

TARGETS = ["q_proj", "v_proj", "down_proj"]

FOLDABLE = {
    # method: configuration, rank of the LoRA
    "LORA": ({"r": 3, "lora_alpha": 5, "rank_pattern": {"v_proj": 2}, "use_rslora": True}, 3),
    "LORA, MiCA": ({"r": 3, "init_lora_weights": "mica"}, 3),
    "LORA, VeLoRA": ({"r": 3, "velora_config": {"num_groups": 4}}, 3),
    "LORA, MonteCLoRA": ({"r": 3, "monteclora_config": MontecloraConfig()}, 3),
    "ADALORA": ({"init_r": 3, "total_step": 10}, 3),
    "ADAMSS": ({"r": 4, "num_subspaces": 2, "subspace_rank": 2}, 4),
    "DEFT": ({"r": 3, "alpha": 5}, 3),
    "DEFT, removal only": ({"r": 3, "para": True, "decomposition_method": "relu"}, 3),
    "DELORA": ({"r": 3}, 3),
    "GRALORA": ({"r": 4, "gralora_k": 2, "hybrid_r": 1, "alpha": 6}, 9),
    "HRA": ({"r": 3}, 3),
    "HRA, orthogonal": ({"r": 3, "apply_GS": True}, 3),
    "LOHA": ({"r": 3, "alpha": 6}, 9),
    "LOKR": ({"r": 1, "alpha": 2, "decompose_factor": 4}, 4),
    "LOKR, both decomposed": ({"r": 1, "decompose_both": True, "decompose_factor": 8}, 1),
    "LOKR, whole": ({"r": 30, "decompose_factor": 4}, 32),
    "MISS": ({"r": 3}, 3),
    "MISS, mini": ({"r": 3, "mini_r": 4, "init_weights": "mini"}, 3),
    "PEANUT": ({"r": 3, "depth": 1}, 3),
    "PSOFT": ({"r": 3}, 3),
    "PVERA": ({"r": 5}, 5),
    "TINYLORA": ({"r": 2, "u": 3}, 2),
    "UNILORA": ({"r": 3, "theta_d_length": 40}, 3),
    "VBLORA": ({"r": 3, "num_vectors": 20, "vector_length": 8}, 3),
    "VERA": ({"r": 5}, 5),
}
OF_FULL_RANK = {
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "FOURIERFT": {"n_frequency": 200},
    "FROD": {},
    "GLORA": {"r": 4},
    "HIRA": {"r": 3},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "MISS, bat": {"r": 4, "init_weights": "bat"},
    "LORA, DoRA": {"r": 3, "use_dora": True},
    "OFT": {"oft_block_size": 4, "r": 0},
    "OSF": {},
    "RANDLORA": {"r": 3},
    "ROAD": {"group_size": 16},
    "SHIRA": {"r": 6},
    "SUPERTUNING": {"sparsity": 0.5},
    "WAVEFT": {"n_frequency": 200},
}


def adapter(name, base=None, **options):
    """A tiny LLaMA in float64 with a random adapter; ``name`` begins with PEFT's name of the method."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.partition(",")[0])](**{"target_modules": TARGETS, **options})
    model = get_peft_model(llama() if base is None else base, config).double().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(0.1 * drawn)
    return model
