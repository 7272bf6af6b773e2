"""Optimisers, the learning-rate schedule, the moving average of the weights."""

import inspect
import math

import torch
from torch.optim.adamw import adamw


def lr_schedule(mode, lr, steps):
    """The learning rate as a function of the number of steps already taken, of `steps` in all.

    mode: a choice of train.py's --lr_schedule; a new one is a branch here, and a choice in arguments.py
    constant: lr. cosine: a straight line up over the first hundredth, then half a cosine down to 0
    (Loshchilov & Hutter 2017, eq. 5, without restarts).
    """
    if mode == "constant":
        return lambda step: lr
    if mode == "cosine":
        return lambda step: lr * min((step + 1) / max(1, steps // 100),
                                     (1 + math.cos(math.pi * step / steps)) / 2)
    raise ValueError(f"learning-rate schedule {mode!r}: constant or cosine")


@torch.no_grad()
def update_ema(ema, model, decay):
    """ema ← decay · ema + (1 - decay) · model, for all weights."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


class AdamW(torch.optim.AdamW):
    """torch's AdamW for one group of parameters, with the same steps to the last bit.

    torch's own class imports torch's compiler when it is constructed, and does work in each step for features
    that this project does not use. Measured on whole runs of the MLP (five epochs of MNIST, fp32, 2 cores, 7
    pairs): this one takes 0.965 of the time and 70 MB less memory; one epoch, 0.968.
    """
    add_param_group, state_dict, load_state_dict = map(inspect.unwrap, (
        torch.optim.AdamW.add_param_group, torch.optim.AdamW.state_dict, torch.optim.AdamW.load_state_dict))

    def moments(self, parameter):
        """The names of the tensors in a parameter's state that have its shape"""
        return "exp_avg", "exp_avg_sq"

    def set_lr(self, lr):
        """On a GPU the learning rate is a tensor, which a recorded step reads anew (execution.py)."""
        if isinstance(self.param_groups[0]["lr"], torch.Tensor):
            self.param_groups[0]["lr"].fill_(lr)
        else:
            self.param_groups[0]["lr"] = lr

    def zero_grad(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    @torch.no_grad()
    def step(self):
        options = self.param_groups[0]
        parameters = [parameter for parameter in options["params"] if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device if options["fused"] else "cpu"),
                    "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        states = [self.state[parameter] for parameter in parameters]
        moments = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        adamw(parameters, [parameter.grad for parameter in parameters], *moments, [],
              [state["step"] for state in states], fused=options["fused"], amsgrad=False, maximize=False,
              beta1=options["betas"][0], beta2=options["betas"][1], lr=options["lr"],
              weight_decay=options["weight_decay"], eps=options["eps"])


class Muon(AdamW):
    """Muon (Jordan et al. 2024) for matrices, AdamW for vectors. Embeddings are matrices, and so are
    convolutions, as [outputs, inputs · height · width].

    A matrix's step is its momentum, orthogonalised, and scaled to the length of an AdamW step, so that one
    learning rate and one weight decay fit both (Liu et al. 2025). torch.optim.Muon rejects convolutions and
    takes matrices one by one. Processes on different hardware round these products differently.
    """

    def __init__(self, parameters, **options):
        super().__init__(parameters, **options)
        self.by_shape = {}  # matrices of one shape are orthogonalised in one batch
        for parameter in self.param_groups[0]["params"]:
            if parameter.ndim > 1:
                self.by_shape.setdefault(parameter.shape, []).append(parameter)

    def moments(self, parameter):
        return ("exp_avg",) if parameter.ndim > 1 else super().moments(parameter)

    @torch.no_grad()
    def step(self):
        options = self.param_groups[0]
        for shape, matrices in self.by_shape.items():
            updates = []
            for matrix in matrices:
                state = self.state[matrix]
                if not state:  # load_state_dict of AdamW expects "step" in each
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(matrix)}
                momentum = state["exp_avg"].lerp_(matrix.grad, 0.05)
                updates.append(matrix.grad.lerp(momentum, 0.95).flatten(1))  # Nesterov's
                matrix.grad = None  # so that AdamW leaves the matrix alone
            updates = orthogonalize(torch.stack(updates))
            decay = 1 - options["lr"] * options["weight_decay"]
            length = -options["lr"] * (0.2 * math.sqrt(max(updates.shape[1:])))
            for matrix, update in zip(matrices, updates):
                matrix.mul_(decay)
                if isinstance(length, torch.Tensor):
                    matrix.addcmul_(update.view(shape), length)
                else:
                    matrix.add_(update.view(shape), alpha=length)
        super().step()


OPTIMIZERS = {"adamw": AdamW, "muon": Muon}  # a new one needs `moments`, by which checkpoints are verified


@torch.no_grad()
def orthogonalize(matrices):
    """Matrices U S Vᵀ [N, R, C] (their singular value decompositions) → about U Vᵀ: singular values between
    0.7 and 1.2, except those that were almost 0. By the Newton-Schulz iteration of Muon (Jordan et al. 2024).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x
