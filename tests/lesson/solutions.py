"""The exercises' right answers, and what is written first: backward passes, nothing else."""

import torch


def saved(ctx):
    return ctx.saved_tensors


# 1: softmax


def softmax(ctx, v):
    (a,) = ctx.saved_tensors
    return a * (v - (a * v).sum(1, keepdim=True))


def softmax_with_J(ctx, v):
    (a,) = ctx.saved_tensors
    J = torch.diag_embed(a) - a[:, :, None] * a[:, None, :]
    return torch.einsum("nk,nks->ns", v, J)


def softmax_diagonal(ctx, v):
    (a,) = ctx.saved_tensors
    return v * a * (1 - a)


def softmax_over_rows(ctx, v):
    (a,) = ctx.saved_tensors
    return a * (v - (a * v).sum(0, keepdim=True))


def softmax_over_everything(ctx, v):
    (a,) = ctx.saved_tensors
    return a * (v - (a * v).sum())


def softmax_sign(ctx, v):
    return -softmax(ctx, v)


def softmax_upstream_forgotten(ctx, v):
    (a,) = ctx.saved_tensors
    J = torch.diag_embed(a) - a[:, :, None] * a[:, None, :]
    return J.sum(1)


# 2: log-softmax. ∂l_k/∂z_s = δ_ks − a_s


def log_softmax(ctx, v):
    (l,) = ctx.saved_tensors  # noqa: E741
    return v - l.exp() * v.sum(1, keepdim=True)


def log_softmax_transposed(ctx, v):
    (l,) = ctx.saved_tensors  # noqa: E741
    return v - (l.exp() * v).sum(1, keepdim=True)


def log_softmax_diagonal(ctx, v):
    (l,) = ctx.saved_tensors  # noqa: E741
    return v * (1 - l.exp())


def log_softmax_over_rows(ctx, v):
    (l,) = ctx.saved_tensors  # noqa: E741
    return v - l.exp() * v.sum(0, keepdim=True)


def log_softmax_upstream_taken_for_ones(ctx, v):
    (l,) = ctx.saved_tensors  # noqa: E741
    return 1 - l.exp() * l.shape[1]


# 3: cross-entropy, a cost for each row


def cross_entropy(ctx, g):
    Z, Y = ctx.saved_tensors
    return g[:, None] * (Y.sum(1, keepdim=True) * torch.softmax(Z, 1) - Y), None


def cross_entropy_upstream_taken_for_ones(ctx, g):
    Z, Y = ctx.saved_tensors
    return Y.sum(1, keepdim=True) * torch.softmax(Z, 1) - Y, None


def cross_entropy_upstream_summed(ctx, g):
    return cross_entropy_upstream_taken_for_ones(ctx, g)[0] * g.sum(), None


def cross_entropy_mass_forgotten(ctx, g):
    Z, Y = ctx.saved_tensors
    return g[:, None] * (torch.softmax(Z, 1) - Y), None


def cross_entropy_upstream_on_the_wrong_side(ctx, g):
    Z, Y = ctx.saved_tensors
    return g * (Y.sum(1, keepdim=True) * torch.softmax(Z, 1) - Y), None


# 4: the mean over the rows


def batch(ctx, g):
    Z, Y = ctx.saved_tensors
    return g * (torch.softmax(Z, 1) - Y) / len(Z), None


def batch_without_the_mean(ctx, g):
    Z, Y = ctx.saved_tensors
    return g * (torch.softmax(Z, 1) - Y), None


def batch_mean_twice(ctx, g):
    return batch(ctx, g)[0] / 3, None


def batch_mean_over_the_entries(ctx, g):
    Z, Y = ctx.saved_tensors
    return g * (torch.softmax(Z, 1) - Y) / Z.numel(), None


def batch_upstream_taken_for_one(ctx, g):
    Z, Y = ctx.saved_tensors
    return (torch.softmax(Z, 1) - Y) / len(Z), None


def batch_sign(ctx, g):
    return -batch(ctx, g)[0], None


# 5: the last layer


def dZ(ctx, g):
    X, W, b, Y = ctx.saved_tensors
    return g * (torch.softmax(X @ W.T + b, 1) - Y) / len(X)


def last_layer(ctx, g):
    X, W, _, _ = ctx.saved_tensors
    d = dZ(ctx, g)
    return d @ W, d.T @ X, d.sum(0), None


def last_layer_dW_transposed(ctx, g):
    X, W, _, _ = ctx.saved_tensors
    d = dZ(ctx, g)
    return d @ W, X.T @ d, d.sum(0), None


def last_layer_db_not_summed(ctx, g):
    X, W, _, _ = ctx.saved_tensors
    d = dZ(ctx, g)
    return d @ W, d.T @ X, d, None


def last_layer_db_of_one_row(ctx, g):
    X, W, _, _ = ctx.saved_tensors
    d = dZ(ctx, g)
    return d @ W, d.T @ X, d[0], None


def last_layer_mean_twice(ctx, g):
    X, W, _, _ = ctx.saved_tensors
    d = dZ(ctx, g)
    return d @ W, d.T @ X / len(X), d.sum(0), None


def last_layer_upstream_taken_for_one(ctx, g):
    dX, dW, db, _ = last_layer(ctx, torch.ones_like(g))
    return dX, dW, db, None


def last_layer_W_transposed(ctx, g):
    X, W, _, _ = ctx.saved_tensors
    d = dZ(ctx, g)
    return d @ W.T, d.T @ X, d.sum(0), None
