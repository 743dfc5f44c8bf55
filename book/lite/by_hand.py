# %% [markdown]
# # By hand, in the browser: chapters 0 to 4 with NumPy
#
# The small cells of the first chapters, without PyTorch and without anything to install.
# The figures are those of the chapters, in which everything is explained.

# %%
import numpy as np

# %% [markdown]
# ## Chapter 0: three steps add up
#
# One neuron, squared loss, momentum 0.5: (θ₀ − θ₃)/η is the weighted sum of three gradients.

# %%
x, y, rate = np.array([0.5, 0.25, 1.0]), 1.0, 0.1
start = w = np.array([1.0, -2.0, 0.5])
v, gradients = 0, []
for _ in range(3):
    gradients.append(2 * (w @ x - y) * x)
    v = 0.5 * v + gradients[-1]
    w = w - rate * v
total = sum(c * g for c, g in zip((1.75, 1.5, 1.0), gradients))
print("sent:", ((start - w) / rate).round(6), " weighted sum:", total.round(6))

# %% [markdown]
# ## Chapter 1: one neuron
#
# The weight gradient is k x, the bias gradient is k: divide.

# %%
bias = 0.25
k = 2 * (start @ x + bias - y)
print("sent for the weights:", (k * x).tolist())
print("sent for the bias:", float(k))
print("the ratio:", (k * x / k).tolist())

# %% [markdown]
# ## Chapter 2: no bias, and the softmax tells the length
#
# G = k xᵀ gives the direction v of x. With k = p − e_y, two rows other than the label's give s.

# %%
z = np.array([0.5, 2.0, -1.0, 0.0])
p = np.exp(z) / np.exp(z).sum()
k = p - np.eye(4)[2]
print("k:", [f"{entry:+.3f}" for entry in k])

# %%
W = np.random.default_rng(0).normal(size=(4, 3))
p = np.exp(W @ x) / np.exp(W @ x).sum()
G = np.outer(p - np.eye(4)[2], x)
v = np.linalg.svd(G)[2][0]
c = G @ v
c, v = (c, v) if (c > 0).sum() > 1 else (-c, -v)
label = int(c.argmin())
i, j = [row for row in range(4) if row != label][:2]
s = np.log(c[i] / c[j]) / ((W[i] - W[j]) @ v)
print("label:", label, " x:", (s * v).round(12).tolist())

# %% [markdown]
# ## Chapter 3: a kernel's gradient is a sum over positions

# %%
kernel, picture = np.array([[1.0, 2.0], [3.0, 4.0]]), np.arange(25.0).reshape(5, 5)
matrix = np.zeros((4, 4, 5, 5))
for a in range(4):
    for b in range(4):
        matrix[a, b, a : a + 2, b : b + 2] = kernel
matrix = matrix.reshape(16, 25)
print("matrix:", matrix.shape)
print("entries that are not zero:", int((matrix != 0).sum()))

# %%
k = np.cos(np.arange(16.0))
untied = np.outer(k, picture)  # a gradient for each entry of the matrix
tied = [untied[matrix == weight].sum() for weight in (1, 2, 3, 4)]
print("gradient of the kernel:", np.round(tied, 6).tolist())
print("divided by the bias gradient, a mixture:", np.round(tied / k.sum(), 3).tolist())

# %% [markdown]
# ## Chapter 4: a picture from its outputs, and a solver without a matrix


# %%
def convolved(x, w):  # 2 by 2, one row and column of padding on each side
    x, n = np.pad(x, 1), len(x) + 1
    parts = [w[a, b] * x[a : a + n, b : b + n] for a in (0, 1) for b in (0, 1)]
    return sum(parts)


def by_hand(z, w):
    n = len(z) - 1
    found = np.zeros((n + 1, n + 1))
    for i in range(n):
        for j in range(n):
            already = (w * found[i : i + 2, j : j + 2]).sum()
            found[i + 1, j + 1] = (z[i, j] - already) / w[1, 1]
    return found[1:, 1:]


x4 = np.array([[1, 5, 6, 2], [7, 0, 0, 8], [6, 0, 0, 7], [2, 8, 5, 1]])
w = np.array([[3, -2], [1, 2]])
z4 = convolved(x4, w)
print(z4)
print(by_hand(z4, w).astype(int))


# %%
def adjoint(r, w):  # every output sends its number back, by the weight that lay on the pixel
    return sum(w[a, b] * r[1 - a : len(r) - a, 1 - b : len(r) - b] for a in (0, 1) for b in (0, 1))


def cgls(h, w, rounds=100):
    r = h.astype(float)
    back = v = adjoint(r, w)
    x, first = 0 * v, (back**2).sum()
    for _ in range(rounds):
        seen = convolved(v, w)
        step = (back**2).sum() / (seen**2).sum()
        x, r, before = x + step * v, r - step * seen, (back**2).sum()
        back = adjoint(r, w)
        v = back + (back**2).sum() / before * v
        if (back**2).sum() < 1e-28 * first:
            break
    return x


print(cgls(z4, w).round(9).astype(int))
