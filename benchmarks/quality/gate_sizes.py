"""Does the noise of a direction have a size of its own? Estimates of a gate's information against leaving its direction out.

    python -m benchmarks.quality.gate_sizes digits-all --seeds 300 301

A gate m_j multiplies rank activation j of a module, for each example. Its gradient d_ij of example i gives the Fisher
information F_j = E[d_ij^2], and alpha_j (1 + alpha_j) = beta / (N F_j) its openness 1 / (1 + alpha_j). A size for each
direction is worth having where openness from two halves of the examples agrees, and where it orders directions as the
rise of held-out loss does when each is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import contextmanager
from dataclasses import replace

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from . import methods
from .cell import WARMUP
from .measures import lora_factors
from .noise import TRIALS
from .tasks import TASKS

BETAS = tuple(10.0**power for power in range(0, -7, -1))
GROUPED = ("labels, batches, ema0.95", "labels, batches, ema0.99", "drawn, batches, ema0.99")
LEARNED_RATE = 0.05  # of the logits that are learned under the KL


class Gates:
    """m_ij of each module as leaves of the graph, so that backward gives each example's gradient of each gate.

    Args:
        alpha (`Tensor`): variance of m, (2, modules, r): for examples of the first and of the second half.
    """

    def __init__(self, model: nn.Module, alpha: Tensor):
        self.alpha, self.half = alpha, torch.zeros(0, dtype=torch.long)
        self.m: list[Tensor] = [torch.zeros(0)] * alpha.shape[1]
        modules = [m for name, m in model.named_modules() if name.endswith("lora_A.default")]
        for i, module in enumerate(modules):
            module.register_forward_hook(lambda module, _, output, i=i: self._multiply(i, module, output))

    def _multiply(self, i: int, module: nn.Module, output: Tensor) -> Tensor:
        if not module.training:
            return output
        scale = self.alpha[self.half, i].sqrt()
        m = (1 + scale * torch.randn_like(scale)).requires_grad_()
        self.m[i] = m
        return output * m.view(len(m), *[1] * (output.dim() - 2), -1)


def closed_form(information: Tensor, beta: float) -> Tensor:
    """alpha of alpha (1 + alpha) = beta / information."""
    return ((1 + 4 * beta / information.clamp_min(1e-30)).sqrt() - 1) / 2


def train(
    task_name: str, examples: int, lr: float, seed: int, passes: float, variance: float, learned: float | None
):
    """The trained model and, of every step, the gates' gradients.

    Returns:
        model, openness that was learned (2, modules, r), list of (half (b,), d (modules, b, r), the same at labels drawn from
        the model).
    """
    task = TASKS[task_name]
    task = replace(task, steps=round(passes * examples / task.batch))
    torch.manual_seed(seed)
    model, optimizer, _ = methods.find("lora").prepare(task, 8, lr, passes)
    training = task.training_examples(examples, seed)
    warmup = max(1, round(WARMUP * task.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (task.steps - step) / (task.steps - warmup))
    )
    shape = 2, len(lora_factors(model)), 8
    log_alpha = torch.full(shape, float(variance)).log()
    gates = Gates(model, log_alpha.exp())
    own = torch.optim.Adam([log_alpha], lr=LEARNED_RATE)
    steps = []
    model.train()
    for batch in task.batches(examples, seed):
        part = training[batch]
        gates.half = (batch >= examples // 2).long()
        out = model(**part.inputs, labels=part.labels)
        drawn = torch.multinomial(out.logits.detach().softmax(1), 1)[:, 0]
        at_drawn = torch.autograd.grad(cross_entropy(out.logits, drawn), gates.m, retain_graph=True)
        out.loss.backward()
        d = len(batch) * torch.stack([m.grad for m in gates.m])
        steps.append((gates.half, d, len(batch) * torch.stack(at_drawn)))
        if learned is not None:
            # Pathwise: m = 1 + sqrt(alpha) e, so dm / dlog(alpha) = (m - 1) / 2. KL: nats of all gates over N.
            log_alpha.grad = torch.zeros(shape)
            moved = d * (torch.stack(gates.m).detach() - 1) / 2
            for half in range(2):
                if (gates.half == half).any():
                    log_alpha.grad[half] = moved[:, gates.half == half].mean(1)
            log_alpha.grad -= (
                learned / examples / (2 * (1 + log_alpha.exp()))
            )  # d/dlog(alpha) of 1/2 log(1 + 1/alpha)
            own.step()
            log_alpha.data.clamp_(max=1.4)
            gates.alpha = log_alpha.exp()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), 1 / (1 + gates.alpha), steps


def estimates(steps: list) -> dict[str, Tensor]:
    """Of each way to estimate it, the Fisher information of each gate from both halves and from all: (3, modules, r)."""
    found = {}
    weights = {"ema0.95": 0.95, "ema0.99": 0.99, "mean": 1.0}
    for labels, at in (("labels", 1), ("drawn", 2)):
        for name, decay in weights.items():
            per_example, per_batch = [], []
            for half in (0, 1, None):
                total = torch.zeros(2)
                sums = [0.0, 0.0]
                for step in steps:
                    d = step[at] if half is None else step[at][:, step[0] == half]
                    if d.shape[1]:
                        sums[0] = decay * sums[0] + d.square().mean(1)
                        sums[1] = decay * sums[1] + d.mean(1).square() * d.shape[1]
                        total = decay * total + 1
                per_example.append(sums[0] / total[0])
                per_batch.append(sums[1] / total[1])
            found[f"{labels}, each example, {name}"] = torch.stack(per_example)
            found[f"{labels}, batches, {name}"] = torch.stack(per_batch)
    return found


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The blocks, in order."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len)


@contextmanager
def _from(layers: nn.ModuleList, first: int, hidden: list):
    """Blocks before `first` give what they gave before."""
    for i in range(first):
        layers[i].forward = lambda *args, i=i, **kwargs: hidden[i]
    yield
    for i in range(first):
        del layers[i].forward


@torch.inference_mode()
def leave_one_out(model: nn.Module, parts: list, chosen: Tensor) -> Tensor:
    """Rise of each held-out example's loss where direction j of module i is left out: (chosen, examples)."""
    layers = layers_of(model)
    factors = list(lora_factors(model).items())
    rises = torch.zeros(len(chosen), sum(len(part) for part in parts))
    start = 0
    for part in parts:
        hidden: list = []
        handles = [
            layer.register_forward_hook(lambda *given, kept=hidden: kept.append(given[2])) for layer in layers
        ]

        def losses(part=part) -> Tensor:
            return cross_entropy(model(**part.inputs).logits.float(), part.labels, reduction="none")

        whole = losses()
        for handle in handles:
            handle.remove()
        for k, (i, j) in enumerate(chosen.tolist()):
            name, (_, B) = factors[i]
            layer = next(int(piece) for piece in name.split(".") if piece.isdigit())
            column = B[:, j].clone()
            B[:, j] = 0
            with _from(layers, layer, hidden):
                rises[k, start : start + len(part)] = losses() - whole
            B[:, j] = column
        start += len(part)
    return rises


@torch.inference_mode()
def leave_groups_out(model: nn.Module, parts: list, value: Tensor, groups: int = 8) -> list[float]:
    """Rise of the held-out loss without each eighth of the directions, lowest `value` first."""
    Bs = [B for _, B in lora_factors(model).values()]
    kept = [B.clone() for B in Bs]
    count = sum(len(part) for part in parts)

    def loss() -> float:
        return (
            sum(
                cross_entropy(model(**p.inputs).logits.float(), p.labels, reduction="sum").item()
                for p in parts
            )
            / count
        )

    whole, rises = loss(), []
    place = value.flatten().argsort().argsort().view(value.shape) * groups // value.numel()
    for group in range(groups):
        for B, out in zip(Bs, place == group, strict=True):
            B[:, out] = 0
        rises.append(loss() - whole)
        for B, was in zip(Bs, kept, strict=True):
            B.copy_(was)
    return rises


def pearson(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()


def rank_correlation(x: Tensor, y: Tensor) -> float:
    return float(spearmanr(x.flatten().numpy(), y.flatten().numpy()).statistic)


def study(
    task_name: str,
    examples: int,
    lr: float,
    seed: int,
    passes: float,
    variance: float,
    learned: float | None,
    directions: int,
    held_out: int,
) -> dict:
    """One run: for each estimate, how its halves agree and how it orders directions."""
    started = time.perf_counter()
    model, open_, steps = train(task_name, examples, lr, seed, passes, variance, learned)
    parts = []
    for held in TASKS[task_name].load()[:0:-1]:  # test examples first
        at = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[
            : held_out - sum(map(len, parts))
        ]
        parts += [held[part] for part in at.split(100) if len(part)]
    shape = open_.shape[1:]
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(shape.numel(), generator=generator)[:directions]
    chosen = torch.stack([flat // shape[1], flat % shape[1]], 1)
    trained_at = time.perf_counter() - started
    rises = leave_one_out(model, parts, chosen)
    rise = rises.mean(1)
    order = torch.randperm(rises.shape[1], generator=generator)
    half = rises.shape[1] // 2
    sizes = torch.stack([A.norm(dim=1) * B.norm(dim=0) for A, B in lora_factors(model).values()]).detach()

    def against(value: Tensor, groups: bool = True) -> dict:
        without = leave_groups_out(model, parts, value) if groups else None
        value = value.flatten()[flat]
        return {
            "groups": without,
            "rise": rank_correlation(value, rise),
            "size_of_rise": rank_correlation(value, rise.abs()),
        }

    rows = {"|A||B|": against(sizes)}
    for name, F in estimates(steps).items():
        rows[name] = {
            "halves_rank": rank_correlation(F[0], F[1]),
            **{
                f"halves_beta_{beta:g}": pearson(
                    *(1 / (1 + closed_form(examples * F[h], beta)) for h in (0, 1))
                )
                for beta in BETAS
            },
            **{
                f"open_beta_{beta:g}": (1 / (1 + closed_form(examples * F[2], beta))).mean().item()
                for beta in BETAS
            },
            "median_nF": (examples * F[2]).median().item(),
            **against(F[2], name in GROUPED),
        }
    if learned is not None:
        rows["learned"] = {
            "halves_rank": rank_correlation(open_[0], open_[1]),
            "halves": pearson(open_[0], open_[1]),
            "open": open_.mean().item(),
            "open_std": open_.std().item(),
            **against(open_.mean(0)),
        }
    return {
        "task": task_name,
        "seed": seed,
        "passes": passes,
        "variance": variance,
        "learned": learned,
        "lr": lr,
        "rise_reliability": rank_correlation(rises[:, order[:half]].mean(1), rises[:, order[half:]].mean(1)),
        "rise_mean": rise.mean().item(),
        "rise_std": rise.std().item(),
        "positive": (rise > 0).float().mean().item(),
        "rows": rows,
        "seconds": [trained_at, time.perf_counter() - started],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--passes", type=float, default=50)
    parser.add_argument("--variance", type=float, default=1.0)
    parser.add_argument("--learned", type=float)
    parser.add_argument("--directions", type=int, default=200)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[300])
    o = parser.parse_args()
    for seed in o.seeds:
        line = study(
            o.task, o.examples, o.lr, seed, o.passes, o.variance, o.learned, o.directions, o.held_out
        )
        with open(TRIALS / "gate_sizes.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        print({k: v for k, v in line.items() if k != "rows"}, flush=True)
        for name, row in line["rows"].items():
            print(
                f"  {name:38s}",
                {
                    k: round(v, 3) if isinstance(v, float) else v and [round(x, 3) for x in v]
                    for k, v in row.items()
                    if not k.startswith("open_beta")
                },
                flush=True,
            )


if __name__ == "__main__":
    main()
