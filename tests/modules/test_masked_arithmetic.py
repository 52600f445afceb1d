"""The two hand-written derivatives: applying a mask, and normalising over live positions, whole, in pieces and compiled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck

from hatify.modules import live_norms, live_pieces, masking
from hatify.modules.masking import apply_mask

LAYOUTS = {  # shape of the tensor, shape of the mask, reduced dimensions
    "over features": ((2, 3, 6), (1, 1, 6), [-1]),
    "over tokens and features": ((2, 4, 6), (1, 4, 6), [-2, -1]),
    "groups with space": ((2, 2, 3, 4), (1, 2, 3, 1), [2, 3]),
}


def composed(x: Tensor, live: Tensor, dims: list[int], eps: float, centred: bool) -> Tensor:
    """The definition, in torch's own operators."""
    repeats = 1
    for dim in dims:
        repeats *= x.shape[dim] // live.shape[dim]
    count = live.sum(dims, keepdim=True) * repeats
    if centred:
        x = x - live * x.sum(dims, keepdim=True) / count
    return x * torch.rsqrt(x.square().sum(dims, keepdim=True) / count + eps)


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "not centred"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "binary"])
def test_normalising_is_its_definition_with_its_gradients(layout: str, centred: bool, soft: bool) -> None:
    shape, mask_shape, dims = LAYOUTS[layout]
    torch.manual_seed(0)
    live = torch.rand(mask_shape, dtype=torch.float64) * 0.8 + 0.1
    live = torch.where(torch.rand(mask_shape) > 0.25, live, 0.0)
    live = live if soft else (live > 0).double()
    live.requires_grad_(soft)
    start = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    leaves = [start, live] if soft else [start]
    got = live_norms._normalised(start * (live.detach() > 0), live, dims, 1e-3, centred)
    expected = composed(start * (live.detach() > 0), live, dims, 1e-3, centred)
    torch.testing.assert_close(got, expected)
    along = torch.randn(shape, dtype=torch.float64) * (live > 0)  # what becomes of dead positions is not used
    for a, b in zip(torch.autograd.grad(got, leaves, along), torch.autograd.grad(expected, leaves, along)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalising_can_be_differentiated_twice(layout: str) -> None:
    shape, mask_shape, dims = LAYOUTS[layout]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    live = (torch.rand(mask_shape, dtype=torch.float64) + 0.2).requires_grad_()
    assert gradcheck(lambda x, live: live_norms._normalised(x, live, dims, 1e-2, True), (x, live))
    assert gradgradcheck(lambda x, live: live_norms._normalised(x, live, dims, 1e-2, True), (x, live))


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "rms"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalising_can_be_differentiated_forward(layout: str, centred: bool) -> None:
    shape, mask_shape, dims = LAYOUTS[layout]
    torch.manual_seed(0)
    x, live = torch.randn(shape, dtype=torch.float64), torch.rand(mask_shape, dtype=torch.float64) + 0.2
    weight, bias = torch.randn(2, *shape[dims[0] :], dtype=torch.float64).unbind()
    given = [t.requires_grad_() for t in (x, live, weight, bias)]
    assert gradcheck(lambda x, m, w, b: live_norms._normalised(x, m, dims, 1e-2, centred, w, b), given, check_forward_ad=True)
    assert gradcheck(lambda x: live_norms._normalised(x, live.detach(), dims, 1e-2, centred), given[:1], check_forward_ad=True)


NORMS = {  # shape of the value, dimension of its channels, whether the mask differs from token to token, the norm
    "layer": ((3, 5, 7, 12), -1, False, lambda x, w, b, live: live_norms.layer_norm(x, (12,), w, b, 1e-5, live)),
    "layer over tokens": ((9, 4, 12), -1, False, lambda x, w, b, live: live_norms.layer_norm(x, (4, 12), w, b, 1e-5, live)),
    "layer, masks by token": ((9, 4, 12), -1, True, lambda x, w, b, live: live_norms.layer_norm(x, (12,), w, b, 1e-5, live)),
    "layer of one line": ((4, 12), -1, True, lambda x, w, b, live: live_norms.layer_norm(x, (12,), w, b, 1e-5, live)),
    "layer without bias": ((15, 12), -1, False, lambda x, w, b, live: live_norms.layer_norm(x, (12,), w, None, 1e-5, live)),
    "root mean square": ((3, 5, 12), -1, False, lambda x, w, b, live: live_norms.rms_norm(x, (12,), w, None, live)),
    "group": ((7, 12, 3, 5), 1, False, lambda x, w, b, live: live_norms.group_norm(x, 3, w, b, 1e-5, live)),
    "group without weights": ((7, 12, 5), 1, False, lambda x, w, b, live: live_norms.group_norm(x, 4, None, None, 1e-5, live)),
}


def of_norm(name: str, soft: bool, dtype: torch.dtype, strided: bool = False) -> tuple[Tensor, ...]:
    """A norm's result and the gradients of all that has one, on values that do not change from call to call."""
    shape, channels, by_token, norm = NORMS[name]
    torch.manual_seed(0)
    sizes = [1] * len(shape)
    sizes[channels] = shape[channels]
    if by_token:
        sizes[-2] = shape[-2]
    mask = torch.rand(sizes, dtype=torch.float64).where(torch.rand(sizes) > 0.3, 0.0).to(dtype)
    wide = shape if name == "layer over tokens" else (1, shape[channels])
    weight, bias = (torch.randn(wide[-2:] if len(wide) == 3 else wide[-1:], dtype=torch.float64).to(dtype) for _ in "wb")
    x = torch.randn(shape, dtype=torch.float64).add(3).to(dtype) * (mask if soft else mask > 0)
    along = torch.randn(shape, dtype=torch.float64).to(dtype) * (mask > 0)  # what becomes of dead positions is not used
    x, along = ((t.mT.contiguous().mT if strided else t) for t in (x, along))
    leaves = [t.requires_grad_() for t in (x, weight, bias, *([mask] if soft else []))]
    out = norm(x, weight, bias, mask if soft else mask > 0)
    return out.detach(), *(g for g in torch.autograd.grad(out, leaves, along, allow_unused=True) if g is not None)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "binary"])
@pytest.mark.parametrize("name", NORMS)
def test_a_large_norm_in_pieces_is_the_same(name: str, soft: bool, strided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_pieces, "VAST", 0)
    whole, exact = of_norm(name, soft, torch.float32, strided), of_norm(name, soft, torch.float64, strided)
    cut = []
    for function in ("normalised", "gradients"):
        plain = getattr(live_pieces, function)
        monkeypatch.setattr(live_pieces, function, lambda *given, plain=plain: cut.append(1) or plain(*given))
    monkeypatch.setattr(live_pieces, "LARGE", 0)
    monkeypatch.setattr(live_pieces, "BLOCK", 48)
    by_threads = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        pieces = of_norm(name, soft, torch.float32, strided)
        assert len(cut) == (0 if strided and NORMS[name][1] == 1 else 2 * threads), "cut, or not, where it should be"
        if not (soft and name == "layer over tokens"):  # whose count is another sum
            assert torch.equal(pieces[0], whole[0]), "the cut shows in the result"
        for found, also, right in zip(pieces, whole, exact, strict=True):
            torch.testing.assert_close(found, also, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-4)
        by_threads.append(pieces)
    assert all(map(torch.equal, *by_threads)), "the number of threads shows in a gradient"


BY_KERNEL = ["layer", "layer over tokens", "layer without bias"]


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "binary"])
@pytest.mark.parametrize("name", NORMS)
def test_torchs_own_kernel_gives_the_same(name: str, soft: bool, strided: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    for function in ("by_kernel", "gradients_by_kernel"):
        plain = getattr(live_pieces, function)
        monkeypatch.setattr(live_pieces, function, lambda *given, plain=plain: used.append(1) or plain(*given))
    found, exact = of_norm(name, soft, torch.float32, strided), of_norm(name, soft, torch.float64, strided)
    assert len(used) == (4 if name in BY_KERNEL else 0)
    monkeypatch.setattr(live_pieces, "VAST", 0)
    for got, also, right in zip(found, of_norm(name, soft, torch.float32, strided), exact, strict=True):
        torch.testing.assert_close(got, also, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-4)
    assert len(used) == (4 if name in BY_KERNEL else 0)


@pytest.mark.parametrize("eps", [1e-5, 1.0], ids=str)
@pytest.mark.parametrize("repeated", [False, True], ids=["one by one", "repeated"])
def test_the_kernels_gradients_are_those_of_the_definition(eps: float, repeated: bool) -> None:
    """With an epsilon as large as the variance too, and a mask that stands for several positions each."""
    torch.manual_seed(0)
    live = torch.rand(4, 1 if repeated else 6, dtype=torch.float64).add(0.1).requires_grad_()
    x, along = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    weight, bias = torch.randn(2, 4, 6, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, bias)] + [live]
    with torch.no_grad():
        assert live_pieces.fits_kernel(x, live, weight, bias, 2, followed=False)
    found = torch.autograd.grad(live_norms.layer_norm(x, (4, 6), weight, bias, eps, live), leaves, along)
    expected = torch.autograd.grad(composed(x, live, [-2, -1], eps, True) * weight + bias, leaves, along)
    torch.testing.assert_close(found, expected)


def test_a_norm_of_nothing_live_is_its_bias() -> None:
    weight, bias = torch.randn(6), torch.randn(6)
    for live in (torch.zeros(1, 6, dtype=torch.bool), torch.zeros(1, 6)):
        out = live_norms.layer_norm(torch.zeros(4, 6), (6,), weight, bias, 1e-5, live)
        assert torch.equal(out, bias.expand(4, 6))


def test_dead_channels_are_not_seen_whatever_the_kernel_makes_of_them() -> None:
    """What a live channel gives is that of the live channels alone, normalised by torch itself."""
    torch.manual_seed(0)
    live = torch.rand(32) > 0.5
    x, weight, bias = torch.randn(64, 32) * live + 100 * live, torch.randn(32), torch.randn(32)
    out = live_norms.layer_norm(x, (32,), weight, bias, 1e-5, live.unsqueeze(0))
    alone = torch.layer_norm(x[:, live], (int(live.sum()),), weight[live], bias[live], 1e-5)
    torch.testing.assert_close(out[:, live], alone, rtol=1e-4, atol=1e-3)


def test_what_is_differentiated_again_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_pieces, "LARGE", 0)
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    live = (torch.rand(1, 6, dtype=torch.float64) + 0.2).requires_grad_()
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for function in ("gradients", "gradients_by_kernel"):
        monkeypatch.setattr(live_pieces, function, lambda *given: pytest.fail("cut"))
    assert gradgradcheck(lambda *given: live_norms.layer_norm(given[0], (6,), given[2], None, 1e-2, given[1]), (x, live, weight))
    out = live_norms.layer_norm(x, (6,), weight, None, 1e-2, live)
    torch.autograd.grad(out, x, torch.randn(3, 4, 6, dtype=torch.float64), is_grads_batched=True)


def test_dead_positions_have_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    for vast, large in ((live_pieces.VAST, 0), (0, 10**9), (0, 0)):  # by the kernel, whole, in pieces
        monkeypatch.setattr(live_pieces, "VAST", vast)
        monkeypatch.setattr(live_pieces, "LARGE", large)
        _, of_x, *_ = of_norm("layer", True, torch.float32)
        torch.manual_seed(0)
        torch.rand(1, 1, 1, 12, dtype=torch.float64)
        dead = torch.rand(1, 1, 1, 12).flatten() <= 0.3
        assert dead.any() and (of_x[..., dead] == 0).all() and (of_x[..., ~dead] != 0).all()


@pytest.mark.parametrize("shape", [(6,), (1, 1, 6), (5, 6), (1, 5, 1), (1, 1), (4, 1, 1), (4, 5, 1)], ids=str)
def test_a_large_gradient_in_pieces_is_the_same(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(shape, dtype=torch.float64).clamp(min=0).requires_grad_()
    along = torch.randn(4, 5, 6, dtype=torch.float64)
    along[0, 0] = torch.nan
    cut = []
    monkeypatch.setattr(masking, "_gradients", lambda *given, plain=masking._gradients: cut.append(1) or plain(*given))
    whole = torch.autograd.grad(apply_mask(x, mask, soft=True), (x, mask), along)
    assert not cut
    monkeypatch.setattr(masking, "PIECE", 12 // torch.get_num_threads())
    pieces = torch.autograd.grad(apply_mask(x, mask, soft=True), (x, mask), along)
    assert bool(cut) is (shape != (4, 5, 1))  # a mask that is another along the first dimension and a further one is applied whole
    assert torch.equal(pieces[0].nan_to_num(9.0), whole[0].nan_to_num(9.0))
    torch.testing.assert_close(pieces[1], whole[1], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dead_positions_are_zero_whatever_they_held(dtype: torch.dtype) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -2.0, 3.0], dtype=dtype)
    mask = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
    for soft in (True, False):
        out = apply_mask(x, mask, soft=soft)
        assert out.tolist() == [0.0, 0.0, 0.0, 0.0, 3.0] and not torch.signbit(out).any()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(apply_mask(x, mask, soft=False), x, torch.full_like(x, float("nan")))
    assert gradient[:4].tolist() == [0.0] * 4 and gradient[4].isnan(), "a dead position hands a NaN on"


def test_applying_a_mask_has_all_its_derivatives() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    soft = torch.tensor([0.1, 0.5, 1.0, 0.2], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, m: apply_mask(x, m, soft=True), (x, soft), check_forward_ad=True)
    assert gradgradcheck(lambda x, m: apply_mask(x, m, soft=True), (x, soft))
    hard = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    assert gradcheck(lambda x: apply_mask(x, hard, soft=False), (x,), check_forward_ad=True)


def composed_mask(x: Tensor, mask: Tensor, *, soft: bool) -> Tensor:
    """A soft mask in torch's own operators."""
    return torch.where(mask > 0, x, 0.0) * mask


@pytest.mark.parametrize(("apply", "more"), [(apply_mask, 0), (composed_mask, 1)], ids=["hatify's", "composed"])
def test_compiled_code_keeps_a_masked_value_only(apply: Callable, more: int) -> None:
    """Of ``f(m x)`` with a layer behind it, what the layer keeps anyway; composed of operators, the unmasked value too."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    x, first, second = torch.randn(16, 8), torch.randn(8, 32, requires_grad=True), torch.randn(32, 8, requires_grad=True)
    mask = torch.rand(32).index_fill(0, torch.tensor([3, 5]), 0.0).requires_grad_()
    kept: list[torch.Size] = []

    def keep(graph: fx.GraphModule, _: list) -> Callable:
        kept.extend(n.meta["val"].shape for n in graph.graph.output_node().args[0] if n is not None and n.op != "placeholder")
        return make_boxed_func(graph.forward)

    def run(x: Tensor) -> Tensor:
        return apply(x @ first, mask, soft=True) @ second

    backend = aot_autograd(
        fw_compiler=keep,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    out = torch.compile(run, backend=backend, fullgraph=True)(x)
    assert sum(shape.numel() == 16 * 32 for shape in kept) == 1 + more, kept
    along = torch.randn_like(out)
    given = torch.autograd.grad(out, (first, second, mask), along)
    torch.testing.assert_close(given, torch.autograd.grad(run(x), (first, second, mask), along))
    assert given[2][3] == 0 and not given[0][:, 3].any(), "a dead channel has no gradient"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_code_masks_small_types_too(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    x = torch.tensor([[1.0, float("nan"), -2.0]], dtype=dtype, requires_grad=True)
    mask = torch.tensor([2.0**-20, 0.0, 0.5], requires_grad=True)
    out = torch.compile(apply_mask, backend="aot_eager", fullgraph=True)(x, mask, soft=True)
    assert torch.equal(out, apply_mask(x, mask, soft=True)) and out[0, 1] == 0
    gradients = torch.autograd.grad(out.sum(), (x, mask))
    torch.testing.assert_close(gradients, torch.autograd.grad(apply_mask(x, mask, soft=True).sum(), (x, mask)))
    assert gradients[0][0, 1] == 0 and gradients[1][1] == 0
