"""The probe in PyTorch: a byte-level LLaMA, with its weights by their Hugging Face names.

Weights are float32; products run in bfloat16 on a GPU, norms, rotations, the residual stream and the loss in float32.
A step works on a constant number of tokens, whatever the length of the sequences, so that what torch.compile makes of
the parts before and after attention serves every length and layer.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from .tasks import KINDS

HEAD_DIM = 64
ANSWER_WEIGHT = 4.0  # of a byte of an answer in the loss; a byte of text counts 1


@dataclass(frozen=True)
class Shape:
    """Sizes of the model. 6 layers of 384 hidden units are 5.6 M weights, 11.3 MB as bfloat16."""

    num_layers: int = 6
    hidden: int = 384
    num_heads_k: int = 2
    intermediate: int = 448
    vocab: int = 256
    max_tokens: int = 16384
    rope_theta: float = 1e6

    @property
    def num_heads(self):
        return self.hidden // HEAD_DIM


def new_weights(shape, device, seed):
    """{name: float32 parameter}."""
    generator = torch.Generator().manual_seed(seed)
    width_k = shape.num_heads_k * HEAD_DIM
    layer = {
        "self_attn.q_proj": (shape.hidden, shape.hidden),
        "self_attn.k_proj": (width_k, shape.hidden),
        "self_attn.v_proj": (width_k, shape.hidden),
        "self_attn.o_proj": (shape.hidden, shape.hidden),
        "mlp.gate_proj": (shape.intermediate, shape.hidden),
        "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
        "input_layernorm": (shape.hidden,),
        "post_attention_layernorm": (shape.hidden,),
    }
    sizes = {"model.embed_tokens": (shape.vocab, shape.hidden), "model.norm": (shape.hidden,)}
    sizes |= {f"model.layers.{i}.{name}": size for i in range(shape.num_layers) for name, size in layer.items()}
    sizes["lm_head"] = (shape.vocab, shape.hidden)
    weights = {}
    for name, size in sizes.items():
        if len(size) == 1:
            value = torch.ones(size)
        else:
            into_residual = name.endswith(("o_proj", "down_proj"))
            scale = 0.02 * ((2 * shape.num_layers) ** -0.5 if into_residual else 1)
            value = torch.randn(size, generator=generator) * scale
        weights[f"{name}.weight"] = value.to(device).requires_grad_()
    return weights


def rotations(shape, batch, length, device):
    """cos and sin, float32 [batch * length, 1, HEAD_DIM / 2]: the angle of each token and pair of dimensions."""
    frequency = shape.rope_theta ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return [wave(angle).float().repeat(batch, 1)[:, None].to(device) for wave in (torch.cos, torch.sin)]


def normed(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def rotated(x, cos, sin):
    """x [tokens, heads, HEAD_DIM], whose pairs are dimension i and i + HEAD_DIM / 2."""
    left, right = x.float().chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


def before_attention(x, norm, q_proj, k_proj, v_proj, cos, sin, dtype):
    """q [tokens, Hq, D], k and v [tokens, Hkv, D] of the residual stream x [tokens, hidden] float32."""
    x = normed(x, norm).to(dtype)
    q, k, v = ((x @ weight.to(dtype).T).unflatten(-1, (-1, HEAD_DIM)) for weight in (q_proj, k_proj, v_proj))
    return rotated(q, cos, sin), rotated(k, cos, sin), v


def after_attention(x, attended, o_proj, norm, gate_proj, up_proj, down_proj, dtype):
    """The residual stream after a layer; attended is [tokens, hidden]."""
    x = x + (attended @ o_proj.to(dtype).T).float()
    y = normed(x, norm).to(dtype)
    gated = F.silu(y @ gate_proj.to(dtype).T) * (y @ up_proj.to(dtype).T)
    return x + (gated @ down_proj.to(dtype).T).float()


def score(x, norm, lm_head, targets, kinds, dtype):
    """loss, and [kinds, 3] sums of losses, right guesses and bytes of each kind; also right [tokens] and losses."""
    logits = (normed(x, norm).to(dtype) @ lm_head.to(dtype).T).float()
    losses = F.cross_entropy(logits, targets, reduction="none")
    right = logits.argmax(-1) == targets
    is_kind = (kinds[:, None] == torch.arange(len(KINDS), device=kinds.device)).float()  # [tokens, kinds]
    sums = torch.stack([losses, right.float(), torch.ones_like(losses)]) @ is_kind
    weight = (kinds == 1).float() + ANSWER_WEIGHT * (kinds > 1).float()
    return (losses * weight).sum() / weight.sum().clamp(min=1), sums.T.detach(), right, losses.detach()


class Probe:
    """The model with its weights and, on a GPU, compiled parts."""

    def __init__(self, shape, device, seed=0, compiled=True):
        self.shape, self.device = shape, torch.device(device)
        self.on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        self.weights = new_weights(shape, self.device, seed)
        wrap = partial(torch.compile, dynamic=False) if compiled else lambda function: function
        self._before, self._after, self._score = wrap(before_attention), wrap(after_attention), wrap(score)
        self.backend = None
        self._rotations = {}

    def num_weights(self):
        return sum(weight.numel() for weight in self.weights.values())

    def attend(self, q, k, v, batch):
        """Causal attention of `batch` sequences in q [tokens, Hq, D]: [tokens, Hq * D]."""
        q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # [B, heads, L, D]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # not every kernel groups heads
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(-1, self.shape.hidden)

    def __call__(self, tokens, kinds):
        """What `score` returns, for tokens and kinds uint8 [B, L + 1]; byte i + 1 is the target at i."""
        batch, length = tokens.shape[0], tokens.shape[1] - 1
        if (batch, length) not in self._rotations:
            self._rotations = {(batch, length): rotations(self.shape, batch, length, self.device)}
        cos, sin = self._rotations[batch, length]
        w = self.weights
        x = F.embedding(tokens[:, :-1].reshape(-1).int(), w["model.embed_tokens.weight"])
        for i in range(self.shape.num_layers):
            of_layer = f"model.layers.{i}."
            before = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
            q, k, v = self._before(x, *(w[f"{of_layer}{name}.weight"] for name in before), cos, sin, self.dtype)
            after = ("self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
            attended = self.attend(q, k, v, batch)
            x = self._after(x, attended, *(w[f"{of_layer}{name}.weight"] for name in after), self.dtype)
        targets, kinds = tokens[:, 1:].reshape(-1).long(), kinds[:, 1:].reshape(-1)
        return self._score(x, w["model.norm.weight"], w["lm_head.weight"], targets, kinds, self.dtype)

    def choose_attention(self, batch, length):
        """Takes the fastest of the GPU's attention kernels at this size, forward and backward; returns {name: ms}."""
        if not self.on_gpu:
            return {}
        heads = (self.shape.num_heads, self.shape.num_heads_k, self.shape.num_heads_k)
        inputs = [
            torch.randn(batch * length, n, HEAD_DIM, device=self.device, dtype=self.dtype).requires_grad_()
            for n in heads
        ]
        times, first = {}, None
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            self.backend = backend
            try:
                for _ in range(3):
                    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    begin.record()
                    out = self.attend(*inputs, batch)
                    gradients = torch.autograd.grad(out.float().square().sum(), inputs)
                    end.record()
                end.synchronize()
            except RuntimeError as error:
                print(f"attention by {backend.name}: not here ({str(error).splitlines()[0]})")
                continue
            results = [x.detach().float() for x in (out, *gradients)]
            first = first or results
            apart = max(float((x - y).norm() / y.norm()) for x, y in zip(results, first))
            if not apart < 0.02:
                print(f"attention by {backend.name}: {apart:.3f} from the first one's results, so not used")
                continue
            times[backend] = begin.elapsed_time(end)
        if not times:
            raise SystemExit("no attention kernel of torch runs on this GPU")
        self.backend = min(times, key=times.get)
        return {backend.name: round(ms, 2) for backend, ms in times.items()}

    @torch.no_grad()
    def round_weights(self):
        """Rounds the weights to bfloat16, which is how they are exported; returns the weights as they were."""
        exact = {name: weight.clone() for name, weight in self.weights.items()}
        for weight in self.weights.values():
            weight.copy_(weight.bfloat16())
        return exact

    def export(self, folder):
        """A Hugging Face LLaMA directory, weights in bfloat16."""
        folder.mkdir(parents=True, exist_ok=True)
        rounded = {name: weight.detach().bfloat16().cpu().contiguous() for name, weight in self.weights.items()}
        save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.shape.vocab,
            "hidden_size": self.shape.hidden,
            "intermediate_size": self.shape.intermediate,
            "num_hidden_layers": self.shape.num_layers,
            "num_attention_heads": self.shape.num_heads,
            "num_key_value_heads": self.shape.num_heads_k,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": self.shape.rope_theta,
            "max_position_embeddings": self.shape.max_tokens,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 255,  # a byte that UTF-8 never holds; Paddle embeds the padding token as zeros
            "torch_dtype": "bfloat16",
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# Checkpoints: several files of at most 15 MB, since places that lend machines limit the size of a file.

_PART_BYTES = 15_500_000


def save_checkpoint(folder, probe, optimizer, state):
    """Weights in float32, the optimizer's moments in bfloat16, and `state` (what JSON holds)."""
    tensors = {f"weight.{name}": weight.detach().cpu() for name, weight in probe.weights.items()}
    for name, weight in probe.weights.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[weight][moment].bfloat16().cpu()
    parts, size = [{}], 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > _PART_BYTES and parts[-1]:
            parts.append({})
            size = 0
        parts[-1][name] = tensor.contiguous()
        size += tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(parts):
        save_file(part, folder / f"part-{i}.safetensors")
    (folder / "state.json").write_text(json.dumps({**state, "shape": asdict(probe.shape), "parts": len(parts)}))


@torch.no_grad()
def load_checkpoint(folder, probe, optimizer):
    """Puts a checkpoint's weights and moments in place; returns its state."""
    path = folder / "state.json"
    if not path.is_file():
        raise SystemExit(f"there is no checkpoint in {folder}: no state.json")
    state = json.loads(path.read_text())
    if state["shape"] != asdict(probe.shape):
        raise SystemExit(f"the checkpoint is of the shape {state['shape']}, but the model of {asdict(probe.shape)}")
    tensors = {}
    for i in range(state["parts"]):
        tensors |= load_file(folder / f"part-{i}.safetensors")
    for name, weight in probe.weights.items():
        weight.copy_(tensors[f"weight.{name}"])
        optimizer.state[weight] = {
            "step": torch.tensor(float(state["step"]), device=probe.device if probe.on_gpu else "cpu"),
            **{
                moment: tensors[f"{moment}.{name}"].to(probe.device, torch.float32)
                for moment in ("exp_avg", "exp_avg_sq")
            },
        }
    return state
