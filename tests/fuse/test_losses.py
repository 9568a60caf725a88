"""The losses that people write, each beside the same lines with real logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import custom_ops
from training.measurement import peak_bytes

C = 23  # classes, as in conftest


def probabilities(labels: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*labels.shape, C, dtype=dtype, generator=generator).softmax(-1)


def weights() -> Tensor:
    return torch.linspace(0.1, 2, C, dtype=torch.float64)


def ignored(labels: Tensor) -> Tensor:
    return labels.masked_fill(labels % 3 == 0, -100)


def shifted(z: Tensor, y: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(
        z[..., :-1, :].contiguous().view(-1, C), y[..., 1:].contiguous().view(-1), **options
    )


def chunked(z: Tensor, y: Tensor) -> Tensor:
    parts = zip(z.chunk(2, dim=1), y.chunk(2, dim=1), strict=True)
    return sum(F.cross_entropy(a.flatten(0, 1), b.flatten(), reduction="sum") for a, b in parts)


def smoothed_as_in_transformers(z: Tensor, y: Tensor) -> Tensor:
    log_probs = -F.log_softmax(z[..., :-1, :].contiguous(), dim=-1)
    y = ignored(y)[..., 1:].contiguous().unsqueeze(-1)
    padding = y.eq(-100)
    nll = log_probs.gather(dim=-1, index=torch.clamp(y, min=0))
    smooth = log_probs.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(padding, 0.0)
    smooth.masked_fill_(padding, 0.0)
    count = padding.numel() - padding.long().sum()
    return 0.9 * nll.sum() / count + 0.1 * smooth.sum() / (count * log_probs.shape[-1])


def entropy(z: Tensor) -> Tensor:
    log_p = F.log_softmax(z, dim=-1)
    return -(torch.exp(log_p) * log_p).sum(-1)


def selected_as_in_trl(z: Tensor, y: Tensor) -> Tensor:
    picked = torch.gather(z, dim=-1, index=y.unsqueeze(-1)).squeeze(-1)
    lse = torch.stack([torch.logsumexp(row, dim=-1) for row in z])
    return -(picked - lse).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rows": lambda z, y: F.cross_entropy(z.view(-1, C), y.view(-1)),
    "rows by keyword": lambda z, y: F.cross_entropy(input=z.flatten(0, 1), target=y.flatten()),
    "ignored": lambda z, y: F.cross_entropy(z.view(-1, C), ignored(y).view(-1)),
    "another ignored": lambda z, y: F.cross_entropy(z.view(-1, C), y.view(-1), ignore_index=3),
    "all ignored": lambda z, y: F.cross_entropy(
        z.view(-1, C), torch.full_like(y, -100).view(-1), reduction="sum"
    ),
    "weighted": lambda z, y: F.cross_entropy(z.view(-1, C), y.view(-1), weights()),
    "smoothed": lambda z, y: F.cross_entropy(z.view(-1, C), y.view(-1), label_smoothing=0.1),
    "sum": lambda z, y: F.cross_entropy(z.view(-1, C), y.view(-1), reduction="sum") / 31,
    "none": lambda z, y: F.cross_entropy(z.view(-1, C), y.view(-1), reduction="none").square(),
    "legacy reductions": lambda z, y: F.cross_entropy(
        z.view(-1, C), y.view(-1), size_average=False, reduce=True
    ),
    "probabilities": lambda z, y: F.cross_entropy(z.view(-1, C), probabilities(y).view(-1, C)),
    "probabilities, weighted and smoothed": lambda z, y: F.cross_entropy(
        z.mT, probabilities(y).mT, weights(), label_smoothing=0.2
    ),
    "module": lambda z, y: nn.CrossEntropyLoss(ignore_index=2)(z.view(-1, C), y.view(-1)),
    "module of ours": lambda z, y: custom_ops.CrossEntropyLoss(z_loss=0.1)(z.mT, y),
    "ours": lambda z, y: custom_ops.cross_entropy(
        z.flatten(0, 1), y.flatten(), z_loss=0.1, softcap=2.0, logit_scale=3.0, normalizer=7
    ),
    "transposed": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "permuted": lambda z, y: F.cross_entropy(z.permute(0, 2, 1), y, reduction="none"),
    "moved": lambda z, y: F.cross_entropy(torch.movedim(z, -1, 1), y),
    "time first": lambda z, y: F.cross_entropy(z.transpose(0, 1).reshape(-1, C), y.t().flatten()),
    "unflattened": lambda z, y: F.cross_entropy(
        z.flatten(0, 1).unflatten(0, (5, 3)).permute(0, 2, 1), y.reshape(5, 3)
    ),
    "transposed and flattened": lambda z, y: F.cross_entropy(
        z.mT.unsqueeze(-1).flatten(2), y.squeeze()
    ),
    "shifted": shifted,
    "shifted and smoothed": lambda z, y: shifted(z, ignored(y), label_smoothing=0.1),
    "squeezed": lambda z, y: F.cross_entropy(z[:, -1:].squeeze(1), y[:, -1:].squeeze()),
    "one row": lambda z, y: F.cross_entropy(z[0, 1], y[0, 1]),
    "masked": lambda z, y: F.cross_entropy(z[y > 4], y[y > 4]),
    "masked by a column": lambda z, y: F.cross_entropy(
        z[torch.tensor([True, False, True])].flatten(0, 1), y[::2].flatten()
    ),
    "numbered": lambda z, y: F.cross_entropy(
        z[:, [0, 2, 2]].flatten(0, 1), y[:, [0, 2, 2]].flatten()
    ),
    "last tokens": lambda z, y: F.cross_entropy(
        z[torch.arange(3), torch.tensor([4, 1, 0])], y[:, 0]
    ),
    "selected": lambda z, y: F.cross_entropy(
        z.index_select(1, torch.tensor([3, 1])).flatten(0, 1), y[:, [3, 1]].flatten()
    ),
    "chunks": chunked,
    "split and joined": lambda z, y: F.cross_entropy(
        torch.cat(z.split([2, 3], dim=1), dim=1).flatten(0, 1), y.flatten()
    ),
    "unbound and stacked": lambda z, y: F.cross_entropy(torch.stack(list(z), dim=1).mT, y.t()),
    "scaled": lambda z, y: F.cross_entropy((z * 3 / 0.7).flatten(0, 1), y.flatten()),
    "scaled in place": lambda z, y: F.cross_entropy(z.mul_(0.3).flatten(0, 1), y.flatten()),
    "negated": lambda z, y: F.cross_entropy(-z.flatten(0, 1), y.flatten()),
    "scaled by a tensor": lambda z, y: F.cross_entropy(
        (z / torch.tensor(0.5, dtype=z.dtype)).flatten(0, 1), y.flatten()
    ),
    "capped": lambda z, y: F.cross_entropy(
        (30 * torch.tanh(z * 9 / 30)).flatten(0, 1), y.flatten()
    ),
    "capped, then cooled": lambda z, y: F.cross_entropy(
        (torch.tanh(z / 0.5) * 0.5 / 0.7).flatten(0, 1), y.flatten()
    ),
    "a bias of its own": lambda z, y: F.cross_entropy(
        (z * 2 + weights()).flatten(0, 1), y.flatten()
    ),
    "a bias as in BART": lambda z, y: F.cross_entropy(
        (z + weights()[None]).flatten(0, 1), y.flatten()
    ),
    "classes cut off": lambda z, y: F.cross_entropy(z[..., :20].flatten(0, 1), y.flatten() % 20),
    "negative log-likelihood": lambda z, y: F.nll_loss(
        F.log_softmax(z, dim=-1).flatten(0, 1), y.flatten(), weights(), ignore_index=5
    ),
    "its module": lambda z, y: nn.NLLLoss()(nn.LogSoftmax(dim=1)(z.mT), y),
    "gathered": lambda z, y: -F.log_softmax(z, -1).gather(2, y.unsqueeze(2)).squeeze(2).mean(),
    "gathered logits": lambda z, y: (
        torch.logsumexp(z, -1) - z.gather(-1, y[..., None]).squeeze(-1)
    ).mean(),
    "gathered capped logits": lambda z, y: (z / 3).tanh().gather(-1, y[..., None]).sum(),
    "picked by numbers": lambda z, y: (
        -z.flatten(0, 1).log_softmax(1)[torch.arange(15), y.flatten()].mean()
    ),
    "smoothed as in transformers": smoothed_as_in_transformers,
    "uniform": lambda z, y: -z.log_softmax(-1).mean(-1).sum(),
    "z-loss": lambda z, y: shifted(z, y) + 1e-2 * z.logsumexp(-1).square().mean(),
    "entropy": lambda z, y: shifted(z, y) - 0.1 * entropy(z).mean(),
    "entropy of softmax": lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "as in TRL": selected_as_in_trl,
    "a distribution": lambda z, y: -torch.distributions.Categorical(logits=z).log_prob(y).mean(),
    "two losses": lambda z, y: F.cross_entropy(z[:, :-1].mT, y[:, 1:]) + shifted(z.flip(1), y),
}
#: Of these an operation is not in the table.
NOT_IN_THE_TABLE = {"two losses", "a distribution"}


@pytest.mark.parametrize("name", LOSSES)
def test_it_is_what_the_real_logits_give(name: str, same: Any):
    lazily = name not in NOT_IN_THE_TABLE
    tolerance = {"rtol": 1e-6, "atol": 1e-7} if "transformers" in name else {}  # sums in float32
    same(lambda head, x, y: LOSSES[name](head(x), y), lazily=lazily, **tolerance)


@pytest.mark.parametrize("name", ["shifted", "gathered", "capped", "probabilities"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_to_its_rounding(name: str, dtype: torch.dtype, same: Any):
    def program(head: Any, x: Tensor, y: Tensor) -> Tensor:
        return (
            LOSSES[name](head(x).float(), y)
            if name != "probabilities"
            else F.cross_entropy(
                head(x).float().flatten(0, 1), probabilities(y, torch.float32).flatten(0, 1)
            )
        )

    tolerance = {"rtol": 3e-2, "atol": 3e-3} if dtype is torch.bfloat16 else {}
    same(program, dtype=dtype, **tolerance)


def test_accuracy_and_entropy_beside_the_loss_take_no_logits(same: Any):
    seen = []

    def program(head: Any, x: Tensor, y: Tensor) -> Tensor:
        z = head(x)
        with torch.no_grad():
            seen.append(
                ((z.argmax(-1) == y).double().mean(), entropy(z), z.argmax(-1, keepdim=True))
            )
        return shifted(z, y)

    same(program)
    torch.testing.assert_close(seen[0], seen[1])


def test_a_label_that_gather_refuses_is_refused():
    head = custom_ops.fuse(nn.Linear(4, C))
    z = head(torch.randn(2, 4)).log_softmax(-1)
    with pytest.raises(IndexError, match="-100"):
        z.gather(-1, torch.tensor([[1], [-100]]))


def test_a_sum_with_its_own_transpose(same: Any):
    def program(head: Any, x: Tensor, y: Tensor) -> Tensor:
        z = head(x)
        return F.cross_entropy(z + z.t(), y)

    same(program, rows=(C,), lazily=False)


def test_a_column_of_a_head_of_as_many_classes_as_features_and_rows(same: Any):
    same(
        lambda m, x, y: F.cross_entropy(m(x)[:, 5], y[0] % 8),
        nn.Linear(8, 8),
        rows=(8,),
        lazily=False,
    )


def test_einops_rearranges_them(same: Any):
    einops = pytest.importorskip("einops", reason="needs einops")
    same(
        lambda head, x, y: F.cross_entropy(
            einops.rearrange(head(x), "b t c -> (b t) c"), y.flatten()
        )
    )
    same(lambda head, x, y: F.cross_entropy(einops.rearrange(head(x), "b t c -> b c t"), y))


def test_no_memory_of_rows_times_classes():
    classes, rows = 5000, 16000
    head = custom_ops.fuse(nn.Linear(4, classes, bias=False))
    x, y = torch.randn(4, rows // 4, 4, requires_grad=True), torch.randint(classes, (4, rows // 4))

    def step() -> None:
        z = head(x).float()
        loss = F.cross_entropy(z[:, :-1].flatten(0, 1), y[:, 1:].flatten())
        loss = loss - z.log_softmax(-1).gather(-1, y[..., None]).mean() + z.logsumexp(-1).mean()
        loss = loss + entropy(z).mean()
        loss.backward()
        z.argmax(-1)

    peak = peak_bytes(step, torch.device("cpu"))
    assert 4 * 64 * classes < peak  # it did see the blocks
    assert peak < 4 * rows * classes / 3  # a block is 50 MiB
