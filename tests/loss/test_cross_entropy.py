"""The fused cross entropy against torch's own on the whole logits, in fp64 and within bounds."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kernels.loss import cross_entropy, head_cross_entropy, linear_cross_entropy

# Rows, width, vocabulary: one of each, primes, more rows than words, more words than a panel.
SHAPES = [(1, 1, 2), (1, 5, 7), (13, 7, 3), (37, 24, 301), (64, 33, 1000)]


def make(rows: int, width: int, vocab: int, dtype=torch.float64, ignored: int = 3, device="cpu"):
    hidden = torch.randn(rows, width, dtype=dtype, device=device)
    weight = torch.randn(vocab, width, dtype=dtype, device=device)
    bias = torch.randn(vocab, dtype=dtype, device=device)
    labels = torch.randint(vocab, (rows,), device=device)
    if rows > 1:
        labels[::ignored] = -100
    return hidden, weight, bias, labels


def plain(hidden, weight, labels, *, bias=None, softcap=None, logit_scale=1.0, **kwargs):
    """What every step of it means, from the whole logits."""
    z = logit_scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return F.cross_entropy(z, labels, **kwargs)


def value_and_grads(loss, tensors: dict[str, Tensor], **kwargs):
    """``loss(...)`` and its gradients in every tensor that is given, by name."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in tensors.items()}
    value = loss(**leaves, **kwargs)
    value.backward()
    return value.detach(), {k: v.grad for k, v in leaves.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("softcap, logit_scale", [(None, 1.0), (None, 0.3), (2.0, 1.0), (2.0, 0.3)])
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize(
    "trained", (("hidden",), ("hidden", "weight", "bias"), ("weight",)), ids=str
)
def test_equals_the_plain_loss(device, shape, softcap, logit_scale, with_bias, trained):
    hidden, weight, bias, labels = make(*shape, device=device)
    tensors = {"hidden": hidden, "weight": weight, **({"bias": bias} if with_bias else {})}
    free = {k: v for k, v in tensors.items() if k in trained}
    fixed = {k: v for k, v in tensors.items() if k not in trained}
    settings = dict(labels=labels, softcap=softcap, logit_scale=logit_scale, **fixed)
    expected, expected_grads = value_and_grads(plain, free, **settings)
    for chunks in ({}, {"chunk_tokens": 5, "chunk_vocab": 17}, {"chunk_vocab": 64}):
        value, grads = value_and_grads(linear_cross_entropy, free, **settings, **chunks)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
        for name in free:
            torch.testing.assert_close(grads[name], expected_grads[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", (None, 1.5))
@pytest.mark.parametrize("trained", (False, True))
def test_gradcheck(device, softcap, trained):
    hidden, weight, bias, labels = make(5, 4, 11, device=device)
    inputs = [hidden.requires_grad_(), weight.requires_grad_(trained), bias.requires_grad_(trained)]

    def loss(hidden, weight, bias):
        return linear_cross_entropy(
            hidden, weight, labels, bias=bias, softcap=softcap, logit_scale=0.7, chunk_vocab=4
        )

    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("softcap", (None, 2.0))
def test_each_row_takes_its_own_factor(device, softcap):
    hidden, weight, bias, labels = make(20, 6, 50, device=device)
    factors = torch.randn(20, dtype=torch.float64, device=device)

    def weighted(loss):
        def total(**tensors):
            settings = {"labels": labels, "bias": bias, "softcap": softcap, "reduction": "none"}
            return (loss(**tensors, **settings) * factors).sum()

        return total

    for free in ({"hidden": hidden}, {"hidden": hidden, "weight": weight}):
        fixed = {} if "weight" in free else {"weight": weight}
        expected, expected_grads = value_and_grads(weighted(plain), free, **fixed)
        value, grads = value_and_grads(weighted(linear_cross_entropy), free, **fixed)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(grads, expected_grads)


# --------------------------------------------------------------------------- bounds


def assert_within_bounds(dtype: torch.dtype, compute: torch.dtype, softcap: float | None):
    """Value and gradient against fp64, within what the operands' rounding can do.

    A sum of H products in precision u is off by at most g = H u sum |h_k W_k|, and by a rounding
    to the compute dtype. The loss is the difference of two such sums and a logarithm of the sum
    of exponentials, which passes the largest of these errors on. A probability is then off by the
    factor exp(2 d) for logits that are off by d, and so is each term of the gradient.
    """
    rows, width, vocab = 61, 96, 700
    hidden, weight, _, labels = make(rows, width, vocab, torch.float32)
    hidden, weight = (hidden / 4).to(dtype), (weight / 2).to(dtype)
    exact = {"hidden": hidden.double()}
    loss, grads = value_and_grads(
        plain, exact, weight=weight.double(), labels=labels, softcap=softcap, reduction="sum"
    )
    value, got = value_and_grads(
        linear_cross_entropy, {"hidden": hidden}, weight=weight, labels=labels,
        softcap=softcap, reduction="sum", chunk_vocab=128,
    )  # fmt: skip
    u, v = torch.finfo(torch.float32).eps / 2, torch.finfo(compute).eps / 2
    products = hidden.double().abs() @ weight.double().abs().t()
    z = hidden.double() @ weight.double().t()
    d = width * u * products.amax(1) + v * z.abs().amax(1)
    kept = labels != -100
    bound = ((2 * d + 20 * u * (1 + z.abs().amax(1)))[kept]).sum() + vocab * u
    assert (value.double() - loss).abs() <= bound
    weights = torch.softmax(z, 1) @ weight.double().abs() + weight.double().abs()[labels.clamp(0)]
    # Rounded once more: the probabilities, each panel's product, the gradient, and its factor.
    relative = torch.expm1(2 * d + 20 * u + 2 * v)[:, None] + (vocab + 20) * u
    relative = relative + 2 * v + torch.finfo(dtype).eps
    error = (got["hidden"].double() - grads["hidden"]).abs()
    assert (error <= relative * weights)[kept].all()
    assert (error[~kept] == 0).all()
    # The bound means something: it is a small part of the gradient.
    assert relative.max() < (0.2 if torch.finfo(compute).eps > 1e-4 else 2e-2)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("softcap", (None, 5.0))
def test_bounds_on_this_processor(dtype, softcap):
    compute = cross_entropy._compute_dtype(torch.empty(0, dtype=dtype), torch.empty(0, dtype=dtype))
    assert_within_bounds(dtype, compute, softcap)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_bounds_where_the_processor_multiplies_16_bits(dtype, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_cpu_multiplies", lambda dtype: True)
    assert_within_bounds(dtype, dtype, None)


def test_16_bits_are_widened_where_the_processor_lacks_them(monkeypatch):
    cross_entropy._cpu_multiplies.cache_clear()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    x = torch.empty(0, dtype=torch.bfloat16)
    if torch.cpu.get_capabilities()["architecture"] == "x86_64":
        assert cross_entropy._compute_dtype(x, x) == torch.float32
    cross_entropy._cpu_multiplies.cache_clear()


def test_mixed_dtypes_and_the_gradients_dtype(device):
    hidden, weight, _, labels = make(9, 8, 40, torch.float32, device=device)
    weight = weight.bfloat16()
    loss, grads = value_and_grads(
        linear_cross_entropy, {"hidden": hidden, "weight": weight}, labels=labels
    )
    expected, want = value_and_grads(
        plain, {"hidden": hidden, "weight": weight.float()}, labels=labels
    )
    assert loss.dtype == torch.float32 and grads["weight"].dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads["hidden"], want["hidden"])
    torch.testing.assert_close(grads["weight"].float(), want["weight"], rtol=1e-2, atol=1e-3)


# --------------------------------------------------------------------------- hard numbers


def test_maxima_that_rise_from_panel_to_panel(device):
    """Each panel's logits lie 100 above the last one's, then fall again."""
    steps = torch.tensor(
        [-300.0, -200, -100, 0, 250, 249, -500, 40], dtype=torch.float64, device=device
    )
    hidden = torch.randn(4, 3, dtype=torch.float64, device=device)
    weight = torch.randn(8 * 16, 3, dtype=torch.float64, device=device)
    bias = steps.repeat_interleave(16)
    labels = torch.tensor([0, 70, 127, 33], device=device)
    expected, want = value_and_grads(
        plain, {"hidden": hidden}, weight=weight, bias=bias, labels=labels
    )
    value, got = value_and_grads(
        linear_cross_entropy, {"hidden": hidden}, weight=weight, bias=bias, labels=labels,
        chunk_vocab=16,
    )  # fmt: skip
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    _, margin, entropy = cross_entropy._reduced(
        hidden, weight, labels, bias, chunk_vocab=16, want_entropy=True
    )
    z = F.linear(hidden, weight, bias)
    p = z.softmax(1)
    torch.testing.assert_close(entropy, -(p * z.log_softmax(1)).sum(1))
    torch.testing.assert_close(margin, z.gather(1, labels[:, None])[:, 0] - z.amax(1))


def test_words_that_a_bias_of_minus_infinity_forbids(device):
    hidden, weight, bias, _ = make(6, 4, 96, device=device)
    bias[:40] = -math.inf  # the whole first panel among them
    labels = torch.tensor([40, 95, 41, 60, 77, 50], device=device)
    tensors = {"hidden": hidden}
    expected, want = value_and_grads(plain, tensors, weight=weight, bias=bias, labels=labels)
    value, got = value_and_grads(
        linear_cross_entropy, tensors, weight=weight, bias=bias, labels=labels, chunk_vocab=32
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(got, want)
    entropy = cross_entropy._reduced(
        hidden, weight, labels, bias, chunk_vocab=32, want_entropy=True
    )[2]
    assert entropy.isfinite().all() and (entropy > 0).all()


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_what_is_not_a_number_is_not_hidden(device, value):
    hidden, weight, _, labels = make(6, 4, 96, device=device)
    hidden[1, 2] = value
    labels[1] = 5
    assert linear_cross_entropy(hidden, weight, labels, chunk_vocab=32).isnan()


# --------------------------------------------------------------------------- ignored rows


def test_ignored_rows_are_never_touched(device):
    hidden, weight, _, labels = make(30, 8, 90, device=device)
    ignored = labels == -100
    poisoned = hidden.clone()
    poisoned[ignored] = math.nan
    expected, want = value_and_grads(plain, {"hidden": hidden}, weight=weight, labels=labels)
    value, got = value_and_grads(
        linear_cross_entropy, {"hidden": poisoned}, weight=weight, labels=labels
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(got["hidden"], want["hidden"])


def test_another_ignore_index_and_leading_dimensions(device):
    hidden, weight, _, labels = make(24, 8, 90, device=device)
    labels = torch.where(labels == -100, 7, labels)
    expected = plain(hidden, weight, labels, ignore_index=7)
    shaped = linear_cross_entropy(
        hidden.view(2, 3, 4, 8), weight, labels.view(2, 3, 4), ignore_index=7
    )
    torch.testing.assert_close(shaped, expected)


@pytest.mark.parametrize("function", (linear_cross_entropy, head_cross_entropy))
def test_nothing_but_ignored_rows(device, function):
    hidden, weight, _, labels = make(6, 4, 30, device=device)
    labels.fill_(-100)
    head = weight if function is linear_cross_entropy else (lambda rows: rows @ weight.t())
    hidden.requires_grad_()
    assert function(hidden, head, labels).isnan()  # a mean of nothing, as in torch
    total = function(hidden, head, labels, num_items=5)
    total.backward()
    assert total == 0 and (hidden.grad == 0).all()


def test_accumulated_batches_equal_one_at_unequal_lengths(device):
    """Each micro-batch is divided by the labels of all of them, not by its own."""
    hidden, weight, _, labels = make(40, 8, 60, ignored=4, device=device)
    count = (labels != -100).sum()
    expected, want = value_and_grads(plain, {"hidden": hidden}, weight=weight, labels=labels)
    leaf = hidden.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start, end in itertools.pairwise((0, 3, 21, 22, 40)):
        loss = linear_cross_entropy(leaf[start:end], weight, labels[start:end], num_items=count)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(leaf.grad, want["hidden"])


# --------------------------------------------------------------------------- memory


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any result has."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_logits_are_never_held(dtype):
    rows, width, vocab = 300, 16, 20_000
    hidden, weight, _, labels = make(rows, width, vocab, dtype, ignored=50)
    body = cross_entropy._linear_cross_entropy._init_fn
    compute = cross_entropy._compute_dtype(hidden, weight)
    arguments = (hidden, weight, None, labels, -100, 0.0, 1.0, compute, 0, 0)
    with LargestTensor() as largest:
        body(*arguments, True, False, False, False, 0)
    step = cross_entropy._STEP_BYTES // 4
    assert largest.elements <= max(step, vocab * width)  # W itself is the largest thing in sight
    assert largest.elements < rows * vocab / 10
    with LargestTensor() as whole:  # the measure sees what it should
        plain(hidden.float(), weight.float(), labels)
    assert whole.elements >= rows * vocab


def test_a_trained_output_layer_holds_a_chunk_of_rows():
    hidden, weight, _, labels = make(600, 8, 40_000, torch.float32, ignored=1000)
    arguments = (hidden, weight, None, labels, -100, 0.0, 1.0, torch.float32, 0, 0)
    with LargestTensor() as largest:
        cross_entropy._linear_cross_entropy._init_fn(*arguments, True, True, False, False, 0)
    assert largest.elements <= cross_entropy._ROW_CHUNK_BYTES // 4 < 600 * 40_000


# --------------------------------------------------------------------------- torch's machinery


def test_no_grad_computes_no_gradient(device, monkeypatch):
    hidden, weight, _, labels = make(10, 8, 60, device=device)
    hidden.requires_grad_()
    added = []
    original = cross_entropy._Matmul.add
    monkeypatch.setattr(cross_entropy._Matmul, "add", lambda *a: (added.append(1), original(*a))[1])
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, labels)
    assert not loss.requires_grad and not added
    assert linear_cross_entropy(hidden, weight, labels).requires_grad and added


def test_under_checkpointing_and_twice_backward(device):
    from torch.utils.checkpoint import checkpoint

    hidden, weight, _, labels = make(10, 8, 60, device=device)
    _, want = value_and_grads(plain, {"hidden": hidden}, weight=weight, labels=labels)
    for reentrant in (False, True):
        leaf = hidden.clone().requires_grad_()
        checkpoint(linear_cross_entropy, leaf, weight, labels, use_reentrant=reentrant).backward()
        torch.testing.assert_close(leaf.grad, want["hidden"])
    leaf = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(leaf, weight, labels)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * want["hidden"])


def test_a_second_derivative_is_refused_and_not_wrong(device):
    hidden, weight, _, labels = make(4, 3, 20, device=device)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="no second ones"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("weight_dtype", (torch.float32, torch.bfloat16), ids=str)
def test_under_autocast(weight_dtype):
    hidden, weight, _, labels = make(30, 16, 200, torch.float32)
    hidden, weight = hidden / 4, weight.to(weight_dtype)
    expected, want = value_and_grads(
        plain, {"hidden": hidden}, weight=weight.float(), labels=labels
    )
    leaf = hidden.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(leaf, weight, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and leaf.grad.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(leaf.grad, want["hidden"], rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("wants", ((True, False, False), (True, True, True), (False,) * 3), ids=str)
def test_opcheck(device, wants):
    hidden, weight, bias, labels = make(6, 4, 30, torch.float32, device=device)
    hidden.requires_grad_(wants[0])
    weight.requires_grad_(wants[1])
    bias.requires_grad_(wants[2])
    torch.library.opcheck(
        torch.ops.qlora_kernels.linear_cross_entropy.default,
        (hidden, weight, bias, labels, -100, 2.0, 0.5, torch.float32, 0, 0, *wants, True, 0),
    )


@pytest.mark.parametrize("trained", (False, True))
def test_compiles_whole(device, trained):
    hidden, weight, _, labels = make(12, 8, 60, torch.float32, device=device)
    weight.requires_grad_(trained)
    _, want = value_and_grads(plain, {"hidden": hidden}, weight=weight.detach(), labels=labels)
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    leaf = hidden.clone().requires_grad_()
    compiled(leaf, weight, labels, softcap=None).backward()
    torch.testing.assert_close(leaf.grad, want["hidden"])
    assert (weight.grad is not None) == trained


def test_the_same_bits_again(device):
    hidden, weight, _, labels = make(300, 32, 3000, torch.float32, device=device)
    first = value_and_grads(linear_cross_entropy, {"hidden": hidden}, weight=weight, labels=labels)
    again = value_and_grads(linear_cross_entropy, {"hidden": hidden}, weight=weight, labels=labels)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1]["hidden"], again[1]["hidden"])


# --------------------------------------------------------------------------- any output layer


def test_head_cross_entropy_trains_what_the_head_trains(device):
    hidden, weight, bias, labels = make(50, 8, 40, device=device)
    low, high = (
        torch.randn(2, 8, dtype=torch.float64, device=device),
        torch.randn(40, 2, dtype=torch.float64, device=device),
    )

    def adapted(loss, chunked):
        def total(hidden, low, high):
            def head(rows):
                return F.linear(rows, weight, bias) + rows @ low.t() @ high.t()

            if chunked:
                return loss(hidden, head, labels, softcap=3.0, logit_scale=0.5, chunk_tokens=7)
            return F.cross_entropy(3.0 * torch.tanh(0.5 * head(hidden) / 3.0), labels)

        return total

    free = {"hidden": hidden, "low": low, "high": high}
    expected, want = value_and_grads(adapted(None, False), free)
    value, got = value_and_grads(adapted(head_cross_entropy, True), free)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(got, want)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "change, message",
    (
        ({"hidden": torch.zeros(4, 5)}, "last dimension of 3"),
        ({"hidden": torch.zeros(4, 3, dtype=torch.long)}, "hidden is torch.int64"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"expected integers \[4\]"),
        ({"labels": torch.zeros(4)}, "labels are torch.float32"),
        ({"weight": torch.zeros(7, 3, dtype=torch.uint8)}, "head_cross_entropy"),
        ({"weight": torch.zeros(3)}, r"\[vocabulary, width\]"),
        ({"bias": torch.zeros(6)}, r"bias is \[6\]; expected \[7\]"),
        ({"reduction": "median"}, "'mean', 'sum' or 'none'"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"logit_scale": math.inf}, "logit_scale is inf"),
    ),
)
def test_refused(change, message):
    settings = {
        "hidden": torch.zeros(4, 3),
        "weight": torch.zeros(7, 3),
        "labels": torch.zeros(4, dtype=torch.long),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**settings)


@pytest.mark.parametrize("label", (-1, 7, 10**6))
def test_a_label_outside_the_vocabulary(device, label):
    labels = torch.tensor([0, label, -100, 3], device=device)
    with pytest.raises(IndexError, match=f"label {label} is outside the vocabulary of 7"):
        linear_cross_entropy(
            torch.zeros(4, 3, device=device), torch.zeros(7, 3, device=device), labels
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_on_a_gpu(dtype):
    hidden, weight, _, labels = make(200, 64, 5000, torch.float32)
    hidden, weight = (hidden / 4).to(dtype), (weight / 4).to(dtype)
    expected, want = value_and_grads(
        plain, {"hidden": hidden.double()}, weight=weight.double(), labels=labels
    )
    value, got = value_and_grads(
        linear_cross_entropy, {"hidden": hidden.cuda()}, weight=weight.cuda(),
        labels=labels.cuda(), chunk_vocab=512,
    )  # fmt: skip
    torch.testing.assert_close(value.double().cpu(), expected, rtol=1e-3, atol=1e-3)
    scale = want["hidden"].abs().max()
    error = (got["hidden"].double().cpu() - want["hidden"]).abs().max()
    assert error <= scale * (1e-3 if dtype == torch.float32 else 2e-2)
