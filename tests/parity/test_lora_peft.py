"""LoRA on the fused linears against Hugging Face peft on the unfused model: same weights, same numbers.

A fused linear_qkv with one A and one B is three linears whose A are equal and whose B are the rows of the fused B; so
the gradient of the fused A is the sum of the three. An optimizer step would move the three copies of A apart, so the
step is compared on the linears that are not fused.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import save_hf

from steps.config.peft.lora import LoRA
from steps.config.training import Optimizer
from steps.engine.adapters import base
from steps.engine.checkpoint import hf, mapping
from steps.engine.model.decoder import Decoder, load_weights
from steps.engine.train.loss import cross_entropy_sum
from steps.engine.train.optim import AdamW, Gradients, clip
from steps.shapes.targets import linear_names, select

peft = pytest.importorskip("peft")

# In float64 only what transformers always does in float32 (norms, rotation, softmax, loss) makes a difference.
DTYPES = {torch.float64: 2e-6, torch.float32: 2e-4}
RANK, ALPHA = 4, 10
PARTS = {
    "linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "linear_proj": ("self_attn.o_proj",),
    "linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "linear_fc2": ("mlp.down_proj",),
}
FAMILIES = ("llama", "qwen2", "qwen3")


class Pair:
    """One random model twice: ours with adapters, transformers' under peft, all adapter tensors equal and not zero."""

    def __init__(self, directory, family: str, dtype: torch.dtype, targets: list[str]) -> None:
        save_hf(directory, family)
        source = hf.open_source(str(directory))
        self.config = replace(source.config, params_dtype=str(dtype).removeprefix("torch."))
        self.decoder = Decoder(self.config)
        load_weights(self.decoder, ((n, t.load()) for n, t in mapping.to_megatron(self.config, source.tensors).items()))
        section = LoRA(dim=RANK, alpha=ALPHA, target_modules=targets)
        names = select(targets, [], linear_names(self.config.num_layers))
        self.method = base.create(section, self.config)
        self.adapters = base.attach(self.decoder, self.method, names, 0)
        generator = torch.Generator().manual_seed(1)
        for module in self.adapters.modules.values():
            module.to(dtype)
            for value in module.parameters():
                value.data.copy_(0.1 * torch.randn(value.shape, generator=generator))

        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
        parts = [part.rpartition(".")[2] for target in targets for part in PARTS[target]]
        settings = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=parts, task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(model, settings).to(dtype)
        for name, module in self.adapters.modules.items():
            for (a, b), rows in zip(self.factors(name), self.split(name, module.linear_out.weight), strict=True):
                a.data.copy_(module.linear_in.weight.data)
                b.data.copy_(rows)

        self.ids = torch.randint(self.config.vocab_size, (2, 24), generator=generator)

    def split(self, name: str, rows: torch.Tensor) -> list[torch.Tensor]:
        """Rows of a fused linear as its parts; per group of linear_qkv: its queries, then its key, then its value."""
        rows = rows.detach()
        if name.endswith("linear_qkv"):
            c = self.config
            grouped = rows.view(c.num_query_groups, -1, c.kv_channels, rows.shape[-1])
            return [grouped[:, at].reshape(-1, rows.shape[-1]) for at in (slice(0, -2), slice(-2, -1), slice(-1, None))]
        return list(rows.chunk(2)) if name.endswith("linear_fc1") else [rows]

    def factors(self, name: str) -> list[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
        layer, linear = name.split(".")[2], name.rpartition(".")[2]
        found = []
        for part in PARTS[linear]:
            module = self.model.get_submodule(f"base_model.model.model.layers.{layer}.{part}")
            found.append((module.lora_A["default"].weight, module.lora_B["default"].weight))
        return found

    def losses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean next-token loss of both rows, ours over one packed row of two documents."""
        rows, length = self.ids.shape
        hidden = self.decoder.hidden_states(self.ids.flatten(), [0, length, 2 * length])
        trained = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
        targets = self.ids[:, 1:].flatten()
        mine = cross_entropy_sum(hidden[trained], self.decoder.output_weight, targets) / len(targets)
        return mine, self.model(self.ids, labels=self.ids).loss


@pytest.fixture(params=[(family, dtype) for family in FAMILIES for dtype in DTYPES], ids=lambda p: f"{p[0]}-{p[1]}")
def case(request):
    return request.param


def test_forward_gradients_and_merge(case, tmp_path):
    family, dtype = case
    tolerance = DTYPES[dtype]
    pair = Pair(tmp_path, family, dtype, list(PARTS))
    rows, length = pair.ids.shape
    logits = pair.decoder(pair.ids.flatten(), [0, length, 2 * length]).view(rows, length, -1)
    torch.testing.assert_close(logits, pair.model(pair.ids).logits, rtol=0, atol=tolerance)

    mine, theirs = pair.losses()
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    mine.backward()
    theirs.backward()
    for name, module in pair.adapters.modules.items():
        factors = pair.factors(name)
        _close(module.linear_in.weight.grad, sum(a.grad for a, _ in factors), tolerance)
        split = pair.split(name, module.linear_out.weight.grad)
        for part, (_, b) in zip(split, factors, strict=True):
            _close(part, b.grad, tolerance)

    merged = pair.model.merge_and_unload()
    for name, module in pair.adapters.modules.items():
        weight = pair.decoder.linears()[name].weight.float()
        tensors = {key: value.detach() for key, value in module.state_dict().items()}
        parts = pair.split(name, pair.method.merge(name, weight, tensors, {}))
        layer, linear = name.split(".")[2], name.rpartition(".")[2]
        for part, where in zip(parts, PARTS[linear], strict=True):
            theirs_merged = merged.get_submodule(f"model.layers.{layer}.{where}").weight
            torch.testing.assert_close(part, theirs_merged.float(), rtol=0, atol=1e-6)


def test_one_adamw_step(case, tmp_path):
    family, dtype = case
    pair = Pair(tmp_path, family, dtype, ["linear_proj", "linear_fc2"])
    settings = Optimizer(lr=0.01, weight_decay=0.1, clip_grad=0.05)
    gradients, optimizer = Gradients(pair.adapters.parameters()), AdamW(pair.adapters, settings)
    trained = [value for value in pair.model.parameters() if value.requires_grad]
    reference = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)

    mine, theirs = pair.losses()
    mine.backward()
    theirs.backward()
    norm = gradients.norm()
    # Adam's first step hardly depends on the gradients' scale, so the clipped gradients are compared by themselves.
    wanted = torch.nn.utils.clip_grad_norm_(trained, 0.05)
    assert norm == pytest.approx(wanted.item(), rel=1e-5)
    assert norm > 0.05
    clip(gradients, norm, 0.05)
    for name, module in pair.adapters.modules.items():
        ((a, b),) = pair.factors(name)
        _close(module.linear_in.weight.grad, a.grad, DTYPES[dtype])
        _close(module.linear_out.weight.grad, b.grad, DTYPES[dtype])
    before = [value.detach().clone() for value in pair.adapters.parameters().values()]
    optimizer.step(0.01)
    reference.step()
    after = list(pair.adapters.parameters().values())
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    for name, module in pair.adapters.modules.items():
        ((a, b),) = pair.factors(name)
        # Adam divides each gradient by its own size: where that is near zero, float32 noise is all there is.
        for value, expected in ((module.linear_in.weight, a), (module.linear_out.weight, b)):
            off = (value - expected).abs()
            assert off.mean().item() < (1e-7 if dtype == torch.float64 else 1e-5)
            assert off.max().item() < (2e-5 if dtype == torch.float64 else 2e-3)


def _close(mine: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Relative to the whole tensor's size."""
    assert ((mine - theirs).norm() / theirs.norm()).item() < tolerance
