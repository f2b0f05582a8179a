"""Models that FSDP, DeepSpeed ZeRO-3 or tensor parallelism divides over processes: the same as in one process."""

import importlib.util
import os
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import LlamaForCausalLM

import tiny
from pera import PeraConfig, UserError, to_lora
from pera.anchors import draw_anchors
from pera.polynomial import delta_weight, rms
from pera.tuner import hotswap_adapter
from processes import needs_processes, run_in_two_processes

pytestmark = [pytest.mark.slow, needs_processes]

OPTIONS = {"normalization": "rms", "anchors": 2, "task_type": "CAUSAL_LM"}
KINDS = ["embed_tokens", "q_proj", "v_proj", "o_proj", "down_proj", "lm_head"]


def llama(**options):
    """The tiny LLaMA in float64."""
    return tiny.llama(**{"tie_word_embeddings": False, **options}).double()


def adapted(base=None, targets=KINDS, **options):
    """A LLaMA with a random adapter, the same in every process."""
    base = llama() if base is None else base
    torch.manual_seed(1)
    return tiny.adapt(base, target_modules=targets, **{**OPTIONS, **options})


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


def train(model, samples=slice(None), steps=3):
    """Some steps of SGD. ``samples`` are the rows of this process, if processes average their gradients."""
    tokens = tiny.tokens()[samples]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model


def factors(state):
    return {key: weight for key, weight in state.items() if "pera_" in key}


def shard(model):
    """Shard with FSDP2: a unit for each block, and one for the rest."""
    from torch.distributed.fsdp import fully_shard

    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def check_sharded_factors(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    A, B, h = torch.randn(4, 10), torch.randn(6, 4), torch.randn(10)
    A[:2, 3] = 0  # zero in one shard
    A[:, 5] = 0
    sharded = [distribute_tensor(t, mesh, [Shard(0)]) for t in (A, B, h)]
    torch.testing.assert_close(rms(sharded[0]).full_tensor(), rms(A))
    for normalization in ("none", "rms", "centred"):
        found = delta_weight(*sharded, "all", normalization).full_tensor()
        torch.testing.assert_close(found, delta_weight(A, B, h, "all", normalization))
    anchors = draw_anchors(3, 0, "layer", 6, 10)
    h = torch.randn(13)
    found = delta_weight(*sharded[:2], distribute_tensor(h, mesh, [Shard(0)]), "all", "rms", anchors).full_tensor()
    torch.testing.assert_close(found, delta_weight(A, B, h, "all", "rms", anchors))


def check_fsdp2_merge(rank, folder):
    for safe_merge in (False, True):
        model = adapted()
        with_adapter = logits(model)
        shard(model)
        close(logits(model), with_adapter)  # the outermost unit now holds whole weights
        model.merge_adapter(safe_merge=safe_merge)
        close(logits(model), with_adapter)
        model.state_dict()  # sharded again
        close(logits(model), with_adapter)
        model.unmerge_adapter()
        model.state_dict()
        close(logits(model), with_adapter)
        with model.disable_adapter():
            close(logits(model), logits(llama()))


def check_fsdp2_updates(rank, folder):
    model, divided = adapted(), shard(adapted())
    for name, layer in tiny.layers(model).items():
        found = tiny.layers(divided)[name].get_delta_weight("default")
        close(found.full_tensor(), layer.get_delta_weight("default"))


def check_fsdp2_hotswap(rank, folder):
    other = adapted(init_weights=True)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    if rank == 0:
        other.save_pretrained(f"{folder}/other")
    distributed.barrier()
    model = shard(adapted())
    logits(model)
    hotswap_adapter(model, f"{folder}/other")
    close(logits(model), logits(other))


def check_fsdp2_mixed_batch(rank, folder):
    model = adapted()
    names = ["__base__", "default"]
    with torch.no_grad():
        expected = model(tiny.tokens(), adapter_names=names).logits
        close(shard(model)(tiny.tokens(), adapter_names=names).logits, expected)


def check_fsdp2_new_adapter(rank, folder):
    model = adapted()
    if rank == 0:
        model.save_pretrained(folder)
    distributed.barrier()
    shard(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.load_adapter(folder, "frozen")  # is not trained
    with pytest.warns(UserWarning, match="'new' is added to a model that FSDP divides already"):
        model.add_adapter("new", PeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def check_fsdp2_refusals(rank, folder):
    with pytest.raises(UserError, match="can be converted in one process only"):
        to_lora(shard(adapted()))
    shared = shard(adapted(llama(tie_word_embeddings=True), ["lm_head"]))
    logits(shared)
    with pytest.raises(UserError, match="'lm_head' cannot be merged under FSDP2, because it shares"):
        shared.merge_adapter()


def check_fsdp1(rank, folder, use_orig_params):
    from torch.distributed.fsdp import FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    for tied in (False, True):
        options = {"targets": ["embed_tokens", "q_proj", "down_proj"], "ensure_weight_tying": tied}
        model, expected = (adapted(llama(tie_word_embeddings=tied), **options) for _ in range(2))
        policy = fsdp_auto_wrap_policy(model)
        model = FSDP(model, auto_wrap_policy=policy, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        layer = next(m for m in model.modules() if hasattr(m, "get_delta_weight"))
        twin = tiny.layers(expected)["model.embed_tokens"]
        with pytest.raises(UserError, match="adapter 'default' is divided over processes"):
            layer.get_delta_weight("default")  # no forward pass yet
        with FSDP.summon_full_params(model, writeback=False):
            close(layer.get_delta_weight("default"), twin.get_delta_weight("default"))
        train(model, samples=slice(rank, rank + 1))
        train(expected)
        close(logits(model), logits(expected))
        close(layer.get_delta_weight("default"), twin.get_delta_weight("default"))
        everywhere = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT, everywhere):
            state = model.state_dict()
        close(factors(state), factors(expected.state_dict()))
        saved = get_peft_model_state_dict(model.module, state_dict=state, save_embedding_layers=False)
        assert saved.keys() == get_peft_model_state_dict(expected, save_embedding_layers=False).keys()
        with pytest.raises(UserError, match="cannot be merged or replaced while FSDP1"):
            model.module.merge_adapter()


def check_fsdp1_one_unit(rank, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model, expected = adapted(), adapted()
    whole = FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    train(whole, samples=slice(rank, rank + 1))
    layer, twin = (tiny.layers(m)["model.embed_tokens"] for m in (model, train(expected)))
    with pytest.raises(UserError, match=r"adapter 'default' is divided over processes.*summon_full_params"):
        layer.get_delta_weight("default")
    with FSDP.summon_full_params(whole, writeback=False):
        close(layer.get_delta_weight("default"), twin.get_delta_weight("default"))


def check_fsdp1_frozen(rank, folder):
    """With frozen factors, the policy leaves them in the unit of their block."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    model, expected = adapted().requires_grad_(False), adapted()
    policy = fsdp_auto_wrap_policy(model)
    whole = FSDP(model, auto_wrap_policy=policy, use_orig_params=False, device_id=torch.device("cpu"))
    close(logits(whole), logits(expected))
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
    with pytest.raises(UserError, match="adapter 'default' is divided over processes"):
        layer.get_delta_weight("default")


def tensor_parallel(folder, rank):
    """The tiny LLaMA, divided over both processes as transformers does."""
    path = f"{folder}/base"
    if rank == 0 and not os.path.exists(path):
        llama().save_pretrained(path)
    distributed.barrier()
    return LlamaForCausalLM.from_pretrained(path, tp_plan="auto", dtype=torch.float64)


def check_tensor_parallel(rank, folder):
    expected = adapted()
    if rank == 0:
        expected.save_pretrained(f"{folder}/start", save_embedding_layers=False)
    model = PeftModel.from_pretrained(tensor_parallel(folder, rank), f"{folder}/start", is_trainable=True)
    assert hasattr(tiny.layers(model)["model.layers.0.self_attn.q_proj"].base_layer.weight, "device_mesh")
    close(logits(model.eval()), logits(expected))
    with torch.no_grad():
        mixed = {"adapter_names": ["default", "__base__"]}
        close(model(tiny.tokens(), **mixed).logits, expected(tiny.tokens(), **mixed).logits)
    train(model.train())
    train(expected.train())
    close(factors(model.state_dict()), factors(expected.state_dict()))
    model.save_pretrained(f"{folder}/trained{rank}", save_embedding_layers=False)
    alone = PeftModel.from_pretrained(llama(), f"{folder}/trained{rank}").eval()
    close(logits(alone), logits(expected.eval()))
    with_adapter = logits(model.eval())
    model.merge_adapter()
    close(logits(model), with_adapter)
    model.unmerge_adapter()
    close(logits(model), with_adapter)


def check_tensor_parallel_new_adapter(rank, folder):
    torch.manual_seed(rank)
    model = get_peft_model(tensor_parallel(folder, rank), PeraConfig(r=3, target_modules=KINDS, **OPTIONS))
    for weight in factors(model.state_dict()).values():
        both = [torch.empty_like(weight) for _ in range(2)]
        distributed.all_gather(both, weight)
        assert torch.equal(*both)


def check_tensor_parallel_refusals(rank, folder):
    with pytest.raises(UserError, match=r"pera_dropout=0\.1 would drop other inputs in each process"):
        adapted(tensor_parallel(folder, rank), pera_dropout=0.1)
    with pytest.raises(UserError, match=r"'model\.layers\.0\.self_attn\.q_proj' has the tensor-parallel plan"):
        adapted(tensor_parallel(folder, rank), [], target_parameters=["0.self_attn.q_proj.weight"])
    base = tensor_parallel(folder, rank)
    base.tp_plan = {**base.tp_plan, "model.layers.*.self_attn.q_proj": "packed_colwise"}
    with pytest.raises(UserError, match=r"'model\.layers\.0\.self_attn\.q_proj' has the tensor-parallel plan 'pack"):
        adapted(base, ["q_proj"])


class Experts(nn.Module):
    """A module with every kind of layer whose shape DeepSpeed ZeRO-3 hides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.convolution = nn.Embedding(10, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(2, 6, 8))

    def forward(self, x):
        return torch.einsum("bsi,eoi->bso", self.convolution(self.embedding(x).mT).mT, self.weight)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()

    def forward(self, x):
        return self.experts(x)


class Model(nn.Module):
    _no_split_modules = ("Block",)

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(x).square().mean()


X = torch.arange(10).reshape(2, 5) * 3 % 10


def with_every_kind(base):
    """The model with adapters on its embedding, convolution and experts."""
    options = {"target_parameters": ["experts.weight"], "task_type": None}
    model = adapted(base, ["embedding", "convolution"], **options).train()
    with torch.no_grad():
        for parameter in factors(dict(model.named_parameters())).values():
            parameter.mul_(0.3)
    return model


def sgd(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def descend(model, x=X):
    """Return the losses of some steps of SGD."""
    optimizer, losses = sgd(model), []
    for _ in range(3):
        optimizer.zero_grad()
        model(x).backward()
        optimizer.step()
        losses.append(model(X).detach())
    return losses


def check_every_kind(rank, folder, engine):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model, expected = with_every_kind(Model().double()), with_every_kind(Model().double())
    if engine == "FSDP2":
        fully_shard(model.get_base_model().block)
        whole = fully_shard(model)
    else:
        options = {"auto_wrap_policy": fsdp_auto_wrap_policy(model), "use_orig_params": engine == "FSDP1"}
        whole = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)
    close(whole(X), expected(X))
    close(descend(whole, X[rank : rank + 1]), descend(expected))


def check_parameter_in_a_unit_of_its_own(rank, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    message = "target_parameters: the module of 'weight' is an FSDP unit"
    model = with_every_kind(Model())
    fully_shard(model.get_base_model().block.experts.base_layer)
    with pytest.raises(UserError, match=message):
        model(X)
    model = with_every_kind(Model())
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    wrapper = model.get_base_model().block.experts
    wrapper.base_layer = FullyShardedDataParallel(wrapper.base_layer, **options)
    whole = FullyShardedDataParallel(model, **options)
    with pytest.raises(UserError, match=message):
        whole(X)


def check_zero3(rank, folder):
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "gradient_clipping": 0.0}
    config = {**config, "zero_allow_untested_optimizer": True}
    expected = with_every_kind(Model())
    descend(expected)
    kept = HfDeepSpeedConfig(config)  # PEFT and transformers see it while it is alive
    with deepspeed.zero.Init(config_dict_or_path=config, remote_device="cpu"):
        base = Model()
    model = with_every_kind(base)
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    for _ in range(3):
        engine.backward(engine(X[rank : rank + 1]))
        engine.step()
    trained = {}
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            trained[name] = parameter.detach().clone()
    before = with_every_kind(Model()).state_dict()
    for name, weight in factors(expected.state_dict()).items():
        assert not torch.allclose(weight, before[name])
        torch.testing.assert_close(trained[name], weight, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="cannot be merged or replaced while FSDP1 or DeepSpeed ZeRO-3 divides"):
        model.merge_adapter()
    with pytest.raises(UserError, match="adapter 'default' is divided over processes"):
        tiny.layers(model)["block.experts"].get_delta_weight("default")
    del kept


CHECKS = [
    check_sharded_factors,
    check_fsdp2_merge,
    check_fsdp2_updates,
    check_fsdp2_hotswap,
    check_fsdp2_mixed_batch,
    check_fsdp2_new_adapter,
    check_fsdp2_refusals,
    check_fsdp1_one_unit,
    check_fsdp1_frozen,
    check_parameter_in_a_unit_of_its_own,
    check_tensor_parallel,
    check_tensor_parallel_new_adapter,
    check_tensor_parallel_refusals,
]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_agree_with_one(check, tmp_path):
    run_in_two_processes(check, tmp_path)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdp1_with_the_wrap_policy_of_peft(use_orig_params, tmp_path):
    run_in_two_processes(check_fsdp1, tmp_path, use_orig_params)


@pytest.mark.parametrize("engine", ["FSDP2", "FSDP1", "FSDP1, flat"])
def test_every_kind_of_layer(engine, tmp_path):
    run_in_two_processes(check_every_kind, tmp_path, engine)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_zero3(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("DS_BUILD_OPS", "0")
    run_in_two_processes(check_zero3, tmp_path)
