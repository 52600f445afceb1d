"""Copies that share memory until written are copies in every respect; what cannot be one is cloned."""

import copy
import ctypes

import numpy as np
import pytest
import torch
from memory import SIDE, real, shared, weight
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hatify.modules.copies import can_share, copy_of


def optimizer(kind, **options):
    def write(p):
        p.grad = torch.ones_like(p)
        kind([p], lr=0.1, **options).step()

    return write


def through_dlpack(p):
    np.from_dlpack(p.detach())[0, 0] += 1


def through_address(p):
    ctypes.c_float.from_address(p.data_ptr()).value += 1


def through_storage(p):
    p.untyped_storage().fill_(0)


def through_shared_memory(p):
    p.detach().share_memory_().add_(1)


def through_view(p):
    p.detach().view(-1)[::2].add_(1)


def through_module(p, **options):
    layer = nn.Linear(SIDE, SIDE, bias=False)
    layer.weight = p
    layer.load_state_dict({"weight": torch.zeros(SIDE, SIDE)}, **options)
    with torch.no_grad():
        layer.weight.add_(1)


def through_forward(p):
    table = nn.Embedding(SIDE, SIDE, max_norm=0.1)
    table.weight = p
    table(torch.arange(SIDE))


WRITERS = {
    "add_": lambda p: p.detach().add_(1),
    "data": lambda p: p.data.mul_(2),
    "copy_": lambda p: p.detach().copy_(torch.zeros(SIDE, SIDE)),
    "index": lambda p: p.detach().__setitem__((0, 0), 7.0),
    "index_put_": lambda p: p.detach().index_put_((torch.tensor([0]),), torch.tensor(7.0)),
    "out": lambda p: torch.zeros(SIDE, SIDE, out=p.detach()),
    "matmul out": lambda p: torch.mm(torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE), out=p.detach()),
    "lerp_": lambda p: p.detach().lerp_(torch.zeros(SIDE, SIDE), 0.5),
    "foreach": lambda p: torch._foreach_add_([p.detach()], 1),
    "random": lambda p: nn.init.normal_(p),
    "numpy": lambda p: p.detach().numpy().__setitem__((0, 0), 7.0),
    "dlpack": through_dlpack,
    "address": through_address,
    "storage": through_storage,
    "share_memory_": through_shared_memory,
    "view": through_view,
    "transposed": lambda p: p.detach().t().add_(1),
    "load_state_dict": through_module,
    "forward": through_forward,
    "sgd": optimizer(torch.optim.SGD, foreach=False),
    "sgd foreach": optimizer(torch.optim.SGD, foreach=True, momentum=0.9),
    "sgd fused": optimizer(torch.optim.SGD, fused=True),
    "adam": optimizer(torch.optim.Adam, foreach=False),
    "adam foreach": optimizer(torch.optim.Adam, foreach=True),
    "adam fused": optimizer(torch.optim.Adam, fused=True),
    "adamw fused": optimizer(torch.optim.AdamW, fused=True),
    "rmsprop": optimizer(torch.optim.RMSprop),
    "lbfgs": lambda p: torch.optim.LBFGS([p]).step(lambda: _backward(p)),
}


def _backward(p):
    p.grad = None
    loss = (p**2).sum()
    loss.backward()
    return loss


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("side", ["original", "copy", "second copy"])
def test_a_write_to_one_side_never_shows_on_another(writer, side):
    """Whatever writes, with however many threads; and the control: the side that was written has changed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        original = weight()
        sides = {"original": original, "copy": nn.Parameter(copy_of(original)), "second copy": nn.Parameter(copy_of(original))}
        assert all(shared(t) for t in sides.values())
        before = real(original)
        WRITERS[writer](sides[side])
        assert not torch.equal(real(sides[side]), before)
        assert all(torch.equal(real(t), before) for name, t in sides.items() if name != side)
        for name, tensor in sides.items():  # and the others are no worse off for it
            if name != side:
                tensor.data.add_(1)
                assert torch.equal(real(tensor), before + 1)
    finally:
        torch.set_num_threads(threads)


def test_views_and_copies_of_copies_follow_their_own_side():
    original = weight()
    view = original.detach()[1:]
    copied = copy_of(original)
    again = copy_of(copied)
    before = real(original)
    original.data.zero_()
    assert not view.any() and torch.equal(copied, before)
    copied.fill_(1)
    assert torch.equal(again, before)
    deep = copy.deepcopy(nn.ParameterList([nn.Parameter(again)]))
    again.zero_()
    assert torch.equal(deep[0], before)


def test_a_copy_outlives_its_original():
    original = weight()
    before = real(original)
    copied = copy_of(original)
    del original
    [torch.full((SIDE, SIDE), 3.0) for _ in range(8)]  # would take freed memory
    assert torch.equal(copied, before)
    copied.add_(1)
    assert torch.equal(copied, before + 1)


def _numpy_taken(keep):
    t = weight()
    keep.append(t.detach().numpy())
    return t, lambda: keep[0].__setitem__((0, 0), 7.0)


def _numpy_dropped(keep):
    t = weight()
    view = memoryview(t.detach().numpy())
    keep.append(view)
    return t, lambda: np.asarray(view).__setitem__((0, 0), 7.0)


def _from_numpy(keep):
    array = np.ones((SIDE, SIDE), np.float32)
    return torch.from_numpy(array), lambda: array.__setitem__((0, 0), 7.0)


def _dlpack(keep):
    t = torch.randn(SIDE, SIDE)
    array = np.from_dlpack(t)
    return t, lambda: array.__setitem__((0, 0), 7.0)


def _dlpack_of_parameter(keep):
    t = weight()
    array = np.from_dlpack(t.detach())
    return t, lambda: array.__setitem__((0, 0), 7.0)


def _dlpack_in(keep):
    source = np.ones((SIDE, SIDE), np.float32)
    return torch.from_dlpack(source), lambda: source.__setitem__((0, 0), 7.0)


def _shared_memory(keep):
    t = torch.randn(SIDE, SIDE).share_memory_()
    return t, lambda: t.zero_()


def _file(keep, path="weights.bin"):
    t = torch.from_file(path, shared=True, size=SIDE * SIDE)
    return t, lambda: t.fill_(3)


def _safetensors(keep, path="weights.safetensors"):
    save_file({"w": torch.randn(SIDE, SIDE)}, path)
    t = load_file(path)["w"]
    return t, lambda: t.fill_(3)


def _partial(keep):
    base = torch.randn(SIDE, SIDE + 1)
    return base[:, :SIDE], lambda: base.zero_()


def _two_of_one_storage(keep):
    t = weight()
    keep.append(nn.Parameter(t.data))
    return t, lambda: keep[0].data.zero_()


def _expanded(keep):
    t = torch.randn(SIDE, 1).expand(SIDE, SIDE)
    return t, lambda: t[:, :1].zero_()


def _overlapping(keep):
    t = torch.randn(SIDE).as_strided((2, SIDE // 2), (1, 1))
    return t, lambda: t[0, :1].zero_()


def _conjugate(keep):
    t = torch.randn(SIDE, dtype=torch.complex64).conj()
    return t, lambda: t.zero_()


def _in_a_graph(keep):
    t = weight()
    keep.append((t**2).sum())
    return t, lambda: t.data.zero_()


UNFIT = [
    _numpy_taken, _numpy_dropped, _from_numpy, _dlpack, _dlpack_of_parameter, _dlpack_in, _shared_memory, _file, _safetensors,
    _partial, _two_of_one_storage, _expanded, _overlapping, _conjugate, _in_a_graph,
]  # fmt: skip


@pytest.mark.parametrize("make", UNFIT)
def test_memory_that_others_write_unseen_is_cloned(make, tmp_path, monkeypatch):
    """Each of these is written behind torch's back, or is no tensor with memory of its own: its copy is a clone, and keeps its values."""
    monkeypatch.chdir(tmp_path)
    tensor, write = make(keep := [])
    assert not can_share(tensor)
    before = real(tensor)
    copied = copy_of(tensor)
    assert not shared(copied) and not copied.requires_grad
    write()
    assert not torch.equal(real(tensor), before)
    assert torch.equal(copied, before)
    copied.add_(1)  # an expanded tensor could not be written
    assert keep is not None


def test_numpy_taken_before_would_write_through():
    """The control of the rule: without it, a copy of a tensor whose memory numpy holds changes with the array."""
    tensor = torch.zeros(SIDE, SIDE)
    array = tensor.numpy()
    naive = torch._lazy_clone(tensor)
    array[0, 0] = 7
    assert naive[0, 0] == 7


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_other_kinds_of_tensors_are_cloned():
    class Own(torch.Tensor):
        pass

    with FakeTensorMode():
        fake = torch.empty(SIDE, SIDE)
    odd = [
        torch.empty(SIDE, SIDE, device="meta"),
        fake,
        torch.eye(SIDE).to_sparse(),
        torch.randn(SIDE, SIDE).as_subclass(Own),
        torch.quantize_per_tensor(torch.randn(SIDE, SIDE), 0.1, 0, torch.qint8),
        weight() * 2,  # computed
        torch.randn(4),  # small
        torch.empty(0),
    ]
    for tensor in odd:
        assert not can_share(tensor)
        copied = copy_of(tensor)
        assert type(copied) is type(tensor.detach()) and copied.layout is tensor.layout and copied.device == tensor.device
        assert copied.shape == tensor.shape and copied.dtype == tensor.dtype
    assert can_share(weight()) and can_share(weight().detach().clone().t().contiguous())
