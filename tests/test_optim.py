"""Tests of optim.py."""

import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import arguments
import data
import infer
import optim
import runs
import train
import training_state
from tests.conftest import double, fit, levels_like


def test_learning_rate_schedules():
    assert [optim.lr_schedule("constant", 0.5, 10)(step) for step in (0, 9)] == [0.5, 0.5]
    cosine = optim.lr_schedule("cosine", 0.5, 1000)
    assert [cosine(step) for step in (0, 4, 9)] == pytest.approx([0.05, 0.25, 0.5], rel=1e-3)
    assert [cosine(step) for step in (250, 500, 1000)] == pytest.approx([0.25 + 0.25 * 0.5 ** 0.5, 0.25, 0])
    assert optim.lr_schedule("cosine", 0.5, 3)(0) == 0.5
    with pytest.raises(ValueError, match="cosine"):
        optim.lr_schedule("linear", 1, 1)


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 50, 20), (1, 16, 16)])
def test_orthogonalize_keeps_the_singular_vectors(shape):
    matrices = double(*shape)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ optim.orthogonalize(matrices) @ vh.mT  # diagonal, where the singular vectors are the same
    values = inner.diagonal(dim1=1, dim2=2)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-9
    assert 0.6 < values.min() and values.max() < 1.3


def test_muon_is_that_of_torch_for_matrices_and_adamw_for_the_rest():
    torch.manual_seed(0)
    shapes = ((8, 12), (12, 8), (8, 12), (6, 2, 3, 3), (7,))
    ours = [torch.randn(shape) for shape in shapes]
    theirs = [torch.nn.Parameter(p.flatten(1).clone() if p.ndim > 1 else p.clone()) for p in ours]
    ours[3] = ours[3].to(memory_format=torch.channels_last)
    ours = [torch.nn.Parameter(p) for p in ours]
    options = {"lr": 0.05, "weight_decay": 0.1}
    muon = optim.Muon(ours, **options)
    others = (torch.optim.Muon(theirs[:4], adjust_lr_fn="match_rms_adamw", **options),
              torch.optim.AdamW(theirs[4:], **options))
    before = [p.detach().clone() for p in ours]
    for _ in range(5):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.reshape(b.shape).clone()
        for optimizer in (muon, *others):
            optimizer.step()
    for a, b, was in zip(ours, theirs, before):
        moved = (a - was).abs().mean()  # torch's computes in bf16
        assert moved > 0.02 and (a.flatten() - b.flatten()).abs().max() < 0.1 * moved


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_muon_multiplies_in_the_precision_of_training(folder, workplace, monkeypatch, precision, dtype):
    seen, orthogonalize = [], optim.orthogonalize

    def record(matrices):
        update = orthogonalize(matrices)
        assert 0.5 < update[0].float().norm() / min(update.shape[1:]) ** 0.5 < 1.3
        seen.append(update.dtype)
        return update
    monkeypatch.setattr(optim, "orthogonalize", record)
    fit(folder, "--optimizer=muon", f"--precision={precision}", epochs=1)
    assert set(seen) == {dtype}


@pytest.mark.parametrize("fused", [True, False])
def test_adamw_is_torchs(fused):
    ours, theirs = (torch.nn.Parameter(double(5, 3)) for _ in range(2))
    options = {"lr": 0.05, "weight_decay": 0.1, "fused": fused}
    optimizers = optim.AdamW([ours], **options), torch.optim.AdamW([theirs], **options)
    for step in range(5):
        for parameter, optimizer in zip((ours, theirs), optimizers):
            optimizer.zero_grad()
            (parameter * double(5, 3, seed=step)).sum().backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    assert str(optimizers[0].state_dict()["state"]) == str(optimizers[1].state_dict()["state"])
    assert torch.equal(ours, theirs) and not torch.equal(ours, double(5, 3))


def test_options_of_the_optimiser_reach_it(folder, workplace, monkeypatch):
    seen, adamw = [], optim.AdamW
    monkeypatch.setitem(optim.OPTIMIZERS, "adamw", lambda *args, **options: seen.append(options)
                        or adamw(*args, **options))
    fit(folder, "--lr=0.003", "--weight_decay=0.25", epochs=1)
    assert seen[0]["lr"] == 0.003 and seen[0]["weight_decay"] == 0.25
    args, _ = arguments.parse_args(["--optimizer=muon", "--lr=0.003", "--weight_decay=0.25"])
    muon = training_state.new_state(args, {"shape": (1, 8, 8), "levels": 256, "classes": []}).optimizer
    assert isinstance(muon, optim.Muon)
    assert muon.defaults["lr"] == 0.003 and muon.defaults["weight_decay"] == 0.25


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_learning_rate_in_a_tensor_is_that_number(name):
    nets = [torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Flatten(), torch.nn.Linear(3, 4))
            for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    both = [optim.OPTIMIZERS[name](net.parameters(), lr=lr, weight_decay=0.1, fused=True)
            for net, lr in zip(nets, (0.5, torch.tensor(0.5)))]
    for step in range(3):
        for net, optimizer in zip(nets, both):
            optimizer.set_lr(0.01 * (step + 1))
            optimizer.zero_grad()
            net(levels_like((2, 3, 3), 9, seed=step).float()).square().sum().backward()
            optimizer.step()
    assert both[1].param_groups[0]["lr"].item() == pytest.approx(0.03)
    for one, other in zip(*(net.parameters() for net in nets)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_schedule_reaches_the_optimiser_and_the_log(folder, workplace, monkeypatch):
    rates = []

    class Seen(optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()
    monkeypatch.setitem(optim.OPTIMIZERS, "adamw", Seen)
    rows, _ = fit(folder, "--lr_schedule=cosine", "--lr=0.01")
    expected = [0.005 * (1 + math.cos(math.pi * step / len(rates))) for step in range(len(rates))]
    assert len(rates) == 20 and rates == pytest.approx(expected)
    assert [float(row["lr"]) for row in rows] == [rates[9], rates[19]]


def test_the_moving_average_is_what_is_judged(folder, workplace, monkeypatch):
    seen, update_ema = [], train.update_ema
    monkeypatch.setattr(train, "update_ema", lambda ema, net, decay: seen.append(
        (decay, *[[p.detach().double().clone() for p in n.parameters()] for n in (ema, net)]))
        or update_ema(ema, net, decay))
    monkeypatch.setattr(train, "EMA_EVERY", 4)
    rows, test = fit(folder, "--ema=0.6", "--lr=0.01")
    # of ten steps an epoch it follows after the 4th, the 8th and the last
    assert [decay for decay, _, _ in seen] == pytest.approx(
        [min(0.6, step / (step + 9)) ** since for step, since in
         ((4, 4), (8, 4), (10, 2), (14, 4), (18, 4), (20, 2))])
    state = runs.load_checkpoint(Path("checkpoints/run/last.pt"))
    net, _ = infer.restore(Path("checkpoints/run/last.pt"), "cpu")
    for i, (name, parameter) in enumerate(net.named_parameters()):
        average = seen[0][1][i]
        for decay, _, weights in seen:
            average = decay * average + (1 - decay) * weights[i]
        torch.testing.assert_close(parameter.double(), average, rtol=1e-4, atol=1e-6)
        assert not torch.equal(parameter, state["model"][name])
    args, everything = Namespace(**state["args"]), data.load(str(folder), "data")
    judged = train.test_epoch(net, everything.val, args, "val", lambda: None)
    assert float(rows[-1]["val_rec"]) == pytest.approx(judged["rec"], rel=1e-6)
    infer.main(["--evaluate"])
    measured = json.loads(Path("results/run/evaluation.json").read_text())
    assert measured["rec"] == pytest.approx(test["test_rec"], rel=0.02) and measured["psnr"] > 5
    assert measured["ckpt"] == "checkpoints/run/best.pt"
